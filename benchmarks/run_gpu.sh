#!/usr/bin/env bash
# Builds, tests and measures fastlm on a CUDA machine without a network: benchmarks/run_gpu.py, which has the usage.
#
# PYTHON          the interpreter that has torch, and gets fastlm (default python3)
# FASTLM_COMMIT   the commit to record, for a tree without git
export PYTHON=${PYTHON:-python3}
exec "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/run_gpu.py" "$@"
