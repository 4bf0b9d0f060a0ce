"""Whether fastlm is as fast beside its peers as recorded; fastlm/bench/check.py says how.

python benchmarks/bench_check.py               against benchmarks/results/cpu
python benchmarks/bench_check.py --only ops    or train
"""

from pathlib import Path

from fastlm.bench.check import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main, Path(__file__).parent)
