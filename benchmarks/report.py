"""Pages, pictures and the README's block from recorded results; fastlm/bench/report.py says how.

python benchmarks/report.py                    every directory of benchmarks/results/ that has results
python benchmarks/report.py --check            says whether the pages and README.md are what the results say
"""

import sys
from pathlib import Path

from fastlm.bench.report import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent.parent))
