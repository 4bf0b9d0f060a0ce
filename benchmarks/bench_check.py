"""Whether fastlm is as fast beside its peers as recorded; fastlm/bench/check.py says how.

python benchmarks/bench_check.py               against benchmarks/results/cpu
python benchmarks/bench_check.py --only ops    or train
"""

import sys
from pathlib import Path

from fastlm.bench.check import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent))
