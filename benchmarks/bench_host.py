"""What a call costs the host, without the kernel; fastlm/bench/host.py says how.

python benchmarks/bench_host.py --json host.json
"""

import sys

from fastlm.bench.host import main

if __name__ == "__main__":
    sys.exit(main())
