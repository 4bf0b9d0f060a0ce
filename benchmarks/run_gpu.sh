#!/usr/bin/env bash
# Builds, tests and measures fastlm on a CUDA machine, a part at a time, with the machine's torch and triton, offline:
#
#   benchmarks/run_gpu.sh                build, then tests ops train profile report; results in benchmarks/results/<gpu>/
#   benchmarks/run_gpu.sh tests ops      these parts alone, of: tests ops train profile report sanitizer
#   benchmarks/run_gpu.sh --dry-run      prints the plan and checks the imports; needs no GPU and writes nothing
#
# PYTHON          the interpreter that has torch (default python3)
# FASTLM_COMMIT   the commit to record, for a tree without git
# Each part writes <part>.log and its results as it goes. A part that fails or runs out of time does not stop the rest. The
# default parts take less than ten minutes together. A part named alone has ten minutes: `train` then also times GPT-2 and
# T5. `sanitizer` takes five minutes and runs only when named.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
PARTS=(tests ops train profile report)
EVERY=("${PARTS[@]}" sanitizer)
LIST_OPS="$PYTHON -c 'from fastlm.testing.cases import CASES; print(*CASES, sep=chr(10))'"
dry=0
chosen=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 ;;
    tests | ops | train | profile | report | sanitizer) chosen+=("$argument") ;;
    *) echo "run_gpu.sh: expected --dry-run or of: ${EVERY[*]}; got $argument" >&2 && exit 2 ;;
  esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${PARTS[@]}")

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-')
if [ -z "$gpu" ] && [ $dry -eq 0 ]; then
  echo "run_gpu.sh: nvidia-smi names no GPU; --dry-run needs none" >&2
  exit 1
fi
out=$PWD/benchmarks/results/${gpu:-gpu}

# The command of a part that may take so many seconds; and the seconds.
command_of() {
  case $1 in
    # From tests/, to test the installed fastlm and not the tree's. A process for each op, since compiling its Triton
    # kernels takes most of the time; the processes are short and share the device. The other tests run in any case,
    # without the files that fail to import (where transformers is missing, say).
    tests)
      echo "cd tests && failed=0 && { $LIST_OPS |" \
        "xargs -P 8 -I@ sh -c '$PYTHON -m pytest --device cuda -q test_ops.py -k \"[@\" >$out/tests-@.log 2>&1'" \
        "|| failed=1; $PYTHON -m pytest --device cuda -q --continue-on-collection-errors --ignore test_ops.py" \
        "|| failed=1; } && exit \$failed"
      ;;
    # Without torch's caching allocator, so that the tools see where a tensor ends and its first write. racecheck looks at
    # fastlm's kernels alone; initcheck needs all. A tool that runs out of time does not stop the rest.
    sanitizer)
      check="compute-sanitizer --target-processes all --error-exitcode 99"
      pytest="$PYTHON -m pytest --device cuda --backend cuda -q test_ops.py -k"
      echo "cd tests && export PYTORCH_NO_CUDA_MEMORY_CACHING=1 && failed=0" \
        "&& { timeout 90 $check --tool memcheck $pytest error_bound || failed=1" \
        "; timeout 90 $check --tool racecheck --kernel-name kns=fastlm $pytest 'error_bound and bfloat16' || failed=1" \
        "; timeout 90 $check --tool initcheck $pytest 'error_bound and bfloat16' || failed=1; } && exit \$failed"
      ;;
    # The first shapes of all ops come first; none begins in the last 40 seconds.
    ops)
      echo "$PYTHON benchmarks/bench_ops.py --op all --device cuda --rounds 5 --min-ms 10 --seconds $(($2 - 40))" \
        "--json $out/ops.json --plot $out/ops.png"
      ;;
    # BERT-base at 512 tokens, few steps of 32768 tokens each; then GPT-2 and T5, if two minutes are left for one.
    train)
      echo "$PYTHON benchmarks/bench_train.py --device cuda --recipe bert-base gpt2-124m-16x1024 t5-base-32x512" \
        "--rounds 5 --seconds 0.5 --stop-after $(($2 - 120))" \
        "--json $out/train.json --plot $out/train.png"
      ;;
    # torch's tables and trace; then nsys and ncu where they are installed, else their command lines. From benchmarks/,
    # to profile the installed fastlm.
    profile) echo "cd benchmarks && $PYTHON -m fastlm profile bert-base --device cuda --steps 2 --out $out/profile" ;;
    # The page, from the JSON of this run or an earlier one.
    report) echo "$PYTHON benchmarks/report.py" ;;
  esac
}
seconds_of() {
  [ "$1" = sanitizer ] && echo 280 && return
  [ ${#chosen[@]} -eq 1 ] && echo 580 && return
  case $1 in
    tests) echo 220 ;;
    ops) echo 130 ;;
    train) echo 150 ;;
    profile) echo 65 ;;
    report) echo 15 ;;
  esac
}

INSTALL="$PYTHON -m pip install --quiet --no-deps --no-build-isolation --force-reinstall ."
if [ $dry -eq 1 ]; then
  echo "plan, results in $out:"
  echo "  install: $INSTALL"
  total=0
  for part in "${chosen[@]}"; do
    echo "  $part, at most $(seconds_of "$part") s: $(command_of "$part" "$(seconds_of "$part")")"
    total=$((total + $(seconds_of "$part")))
  done
  echo "  together at most $total s"
  for tool in nsys ncu compute-sanitizer; do
    command -v $tool >/dev/null && echo "  $tool: installed" || echo "  $tool: not installed, and left out"
  done
  echo "imports, with $($PYTHON --version):"
  failed=0
  $PYTHON - <<'PY' || failed=1
import importlib, sys
failed = False
for module in ("torch", "triton", "setuptools", "pybind11", "pytest", "fastlm.ops", "fastlm.models", "fastlm.train",
               "fastlm.bench.ops", "fastlm.bench.training", "fastlm.bench.profile", "fastlm.bench.report"):
    try:
        importlib.import_module(module)
        print(f"  {module}: ok")
    except Exception as error:
        failed = True
        print(f"  {module}: {type(error).__name__}: {error}")
sys.exit(failed)
PY
  exit $failed
fi

mkdir -p "$out"
: >"$out/status.txt"
failed=0
run() { # name, seconds, command
  local start=$SECONDS code
  echo "== $1: $3"
  timeout --kill-after=10 "$2" bash -c "$3" 2>&1 | tee "$out/$1.log"
  code=${PIPESTATUS[0]}
  echo "$1: exit $code after $((SECONDS - start)) s" | tee -a "$out/status.txt"
  [ "$code" -eq 0 ] || failed=1
}

run install 300 "$INSTALL"
run info 60 "cd benchmarks && $PYTHON -c 'import fastlm.info; print(fastlm.info.report())'"
for part in "${chosen[@]}"; do
  if [ "$part" = sanitizer ] && ! command -v compute-sanitizer >/dev/null; then
    echo "sanitizer: compute-sanitizer is not installed" | tee -a "$out/status.txt"
    continue
  fi
  run "$part" "$(seconds_of "$part")" "$(command_of "$part" "$(seconds_of "$part")")"
done
exit $failed
