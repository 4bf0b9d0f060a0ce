"""A whole training step beside the same step in Transformers; fastlm/bench/training.py says how.

python benchmarks/bench_train.py --recipe bert-mini gpt2-39m-4x256 --device cpu --json train.json --plot train.png
python benchmarks/bench_train.py --set model.hidden_dropout_prob=0.1 --curve 30 --curve-plot curve.png
python benchmarks/bench_train.py --threads 1 2 --contenders fastlm
"""

from fastlm.bench.results import exit_with
from fastlm.bench.training import main

if __name__ == "__main__":
    exit_with(main)
