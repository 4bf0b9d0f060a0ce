"""Every op beside what a user would run instead; fastlm/bench/ops.py says how.

python benchmarks/bench_ops.py --op all --device cpu --json ops.json --plot ops.png
python benchmarks/bench_ops.py --op attention --device cuda --vs sdpa-flash,sdpa-cudnn,flash_attn
"""

from fastlm.bench.ops import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
