"""Pages, pictures and the README's block from recorded results; fastlm/bench/report.py says how.

python benchmarks/report.py                    every directory of benchmarks/results/ that has results
python benchmarks/report.py --check            says whether the pages and README.md are what the results say
"""

from pathlib import Path

from fastlm.bench.report import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main, Path(__file__).parent.parent)
