"""MB/s a core of each stage of data preparation, on text that is made from a seed; fastlm/bench/data.py says how.

python benchmarks/bench_data.py --mb 20
"""

from fastlm.bench.data import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
