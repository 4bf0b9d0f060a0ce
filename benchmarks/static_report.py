"""What the compilers made of the kernels; fastlm/bench/static_report.py says how.

python benchmarks/static_report.py            compares with benchmarks/results/static: triton.csv and cuda.csv. It says
                                              what differs, exits with 1 if anything does, and writes nothing
python benchmarks/static_report.py --out DIR  writes both files into another directory
python benchmarks/static_report.py --update   writes the committed files
python benchmarks/static_report.py --only cuda
"""

from pathlib import Path

from fastlm.bench.results import exit_with
from fastlm.bench.static_report import main

if __name__ == "__main__":
    exit_with(main, Path(__file__).parent / "results" / "static")
