"""What writing a checkpoint costs a run; fastlm/bench/checkpoints.py says how.

python benchmarks/bench_checkpoint.py --set data.row_tokens=128 train.batch_tokens=128 train.micro_batch_tokens=0
"""

from fastlm.bench.checkpoints import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
