"""What a call costs the host, without the kernel; fastlm/bench/host.py says how.

python benchmarks/bench_host.py --json host.json
"""

from fastlm.bench.host import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
