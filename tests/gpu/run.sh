#!/usr/bin/env bash
# Checks and times the GPU path on one Hopper GPU: bash tests/gpu/run.sh [pytest arguments]
#
# 1. python -m megatron_ebft.report, 2. tests/gpu, 3. tools/benchmark.py at the shapes in SHAPES. Stops at the first that
# fails. Logs and figures are left in OUT.
#
# Needs torch with CUDA. Where the Python at hand can import megatron.core, that is what runs (no network needed; put
# megatron-core, and Transformer Engine if it is to be used, on PYTHONPATH); else a virtual environment is made
# as tests/run.sh does, with Transformer Engine where EXTRAS has "te".
#   PYTHON  the interpreter (default: python3)
#   BOOT    a module whose boot() must run before Transformer Engine is imported (default: te_boot, where there is one)
#   SHAPES  of the benchmark (default: "1b 8b-quarter"; empty: none)
#   REPEATS of the benchmark (default: 5)
#   OUT     folder for logs and figures (default: gpu_results)
#   EXTRAS  of the virtual environment (default: dev)
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../../tools/venv.sh"
python="${PYTHON:-python3}"
out="${OUT:-gpu_results}"
export PYTHONPATH="$REPO:$REPO/tests:$REPO/tools${PYTHONPATH:+:$PYTHONPATH}"
cd "$REPO"
mkdir -p "$out"

can_import() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

if ! can_import megatron.core; then
  venv="$(default_venv)"
  ensure_venv "$venv" "${EXTRAS:-dev}"
  python="$venv/bin/python"
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch finds no CUDA device" >&2
  exit 1
fi
if [[ -z "${BOOT-}" ]] && can_import te_boot; then BOOT=te_boot; fi

# start MODULE ARGUMENTS...: python -m, after boot()
start() {
  "$python" -c 'import importlib, runpy, sys
boot, sys.argv = sys.argv[1], sys.argv[2:]
if boot:
    try:
        importlib.import_module(boot).boot()
    except Exception as error:
        print(f"{boot}.boot() failed: {error}", file=sys.stderr)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' "${BOOT-}" "$@"
}

start megatron_ebft.report | tee "$out/report.txt"
start pytest tests/gpu -q "$@" | tee "$out/tests.txt"
fp8=()
if grep -Eq '^ *FP8 blockwise +yes$' "$out/report.txt"; then
  fp8=(--ebft-rollout-fp8 blockwise --ebft-encoder-fp8 blockwise) # timed without as well, in the same run
fi
for shape in ${SHAPES-1b 8b-quarter}; do
  start benchmark --shape "$shape" "${fp8[@]}" --repeats "${REPEATS:-5}" --json "$out/benchmark_$shape.json" |
    tee "$out/benchmark_$shape.txt"
done
