"""A step of AdamW, LAMB and Muon beside torch's and apex's; fastlm/bench/optimizers.py says how.

python benchmarks/bench_optimizer.py --model bert-small --json optimizers.json
"""

from fastlm.bench.optimizers import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
