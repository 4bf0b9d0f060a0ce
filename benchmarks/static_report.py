"""What the compilers made of the kernels; fastlm/bench/static_report.py says how.

python benchmarks/static_report.py            compares triton.csv, cuda.csv and predicted.csv of results/static. It says
                                              what differs, and which kernels have serialised wgmma or an empty
                                              last wave, exits with 1 if there is anything, and writes nothing
python benchmarks/static_report.py --out DIR  writes the files into another directory
python benchmarks/static_report.py --update   writes the committed files
python benchmarks/static_report.py --only cuda

With Triton 3.6 installed, it reads and writes triton-3.6.csv in place of triton.csv, and no predicted.csv.
"""

from pathlib import Path

from fastlm.bench.results import exit_with
from fastlm.bench.static_report import main

if __name__ == "__main__":
    exit_with(main, Path(__file__).parent / "results" / "static")
