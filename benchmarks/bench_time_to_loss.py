"""Time until a small GPT-2 has learned tinyshakespeare: fastlm/bench/time_to_loss.py says how.

python benchmarks/bench_time_to_loss.py --text tinyshakespeare.txt --seeds 5 --json time_to_loss.json
"""

from fastlm.bench.results import exit_with
from fastlm.bench.time_to_loss import main

if __name__ == "__main__":
    exit_with(main)
