"""What the compilers made of the kernels; fastlm/bench/static_report.py says how.

python benchmarks/static_report.py            writes benchmarks/results/static/triton.csv and cuda.csv
python benchmarks/static_report.py --check    says what differs from those files, and exits with 1 if anything does
python benchmarks/static_report.py --only cuda
"""

from pathlib import Path

from fastlm.bench.results import exit_with
from fastlm.bench.static_report import main

if __name__ == "__main__":
    exit_with(main, Path(__file__).parent / "results" / "static")
