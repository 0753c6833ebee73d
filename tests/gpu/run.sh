#!/usr/bin/env bash
# Checks and times the GPU path on one Hopper GPU: bash tests/gpu/run.sh [STAGE...]
#
# Stages, by default all, in this order (README.md beside this says what each tells):
#   report      what is installed, and what will be used
#   tests       tests/gpu in five processes side by side
#   plan        operations and memory of the benchmark's shapes, computed on the CPU where PLANS does not have them
#   benchmark   tools/benchmark.py at each of SHAPES, then again with rollouts and encoder in FP8 where there is FP8
# A stage that fails or runs out of time does not stop the next. The exit code is 1 where one did.
# OUT gets summary.txt (a line for each part), log.txt (everything that was printed) and the benchmarks' figures as JSON.
#
# Needs torch with CUDA. Where the Python at hand can import megatron.core, that is what runs (no network needed; put
# megatron-core, and Transformer Engine if it is to be used, on PYTHONPATH); else a virtual environment is made
# as tests/run.sh does, with Transformer Engine where EXTRAS has "te".
#   PYTHON  the interpreter (default: python3)
#   BOOT    a module whose boot() must run before Transformer Engine is imported (default: te_boot, where there is one)
#   SHAPES  of the benchmark (default: "8b-quarter 1b"; empty: none)
#   REPEATS of the benchmark (default: 3)
#   LIMIT   seconds that a test process or a benchmark may take (default: 480)
#   PLANS   folder of plans made ahead, SHAPE.json each (default: OUT)
#   OUT     folder of the results (default: gpu_results)
#   EXTRAS  of the virtual environment (default: dev)
#   DRY     1: on a machine without a GPU, with a tiny model: tries out every command
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../../tools/venv.sh"
python="${PYTHON:-python3}"
out="$(mkdir -p "${OUT:-gpu_results}" && cd "${OUT:-gpu_results}" && pwd)"
plans="${PLANS:-$out}"
limit="${LIMIT:-480}"
dry=()
if [[ "${DRY-}" == 1 ]]; then
  dry=(--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --vocab-size 128 --seq-length 64 --global-batch-size 2)
fi
export PYTHONPATH="$REPO:$REPO/tests:$REPO/tools${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$REPO" || exit
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

can_import() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

if ! can_import megatron.core; then
  venv="$(default_venv)" && ensure_venv "$venv" "${EXTRAS:-dev}" || exit 1
  python="$venv/bin/python"
fi
if [[ "${DRY-}" != 1 ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch finds no CUDA device (DRY=1 tries the commands without one)" >&2
  exit 1
fi
if [[ -z "${BOOT-}" ]] && can_import te_boot; then BOOT=te_boot; fi
export BOOT="${BOOT-}" # test_run.py starts processes of its own

# start MODULE ARGUMENTS...: python -m, after boot()
start() {
  timeout --kill-after=10 "$limit" "$python" -c 'import importlib, runpy, sys
boot, sys.argv = sys.argv[1], sys.argv[2:]
if boot:
    try:
        importlib.import_module(boot).boot()
    except Exception as error:
        print(f"{boot}.boot() failed: {error}", file=sys.stderr)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' "${BOOT-}" "$@"
}

# part NAME COMMAND...: runs it, its output into a log of its own; `finish` reports on it.
part() {
  local name="$1" begun=$SECONDS status
  shift
  "$@" >"$scratch/$name.log" 2>&1
  status=$?
  echo "$status $((SECONDS - begun))" >"$scratch/$name.status"
  return "$status"
}

# finish NAME: adds a part's output to log.txt and a line to summary.txt.
finish() {
  local name="$1" status=1 seconds=0 word=ok
  read -r status seconds <"$scratch/$name.status" || true
  { echo "=== $name"; cat "$scratch/$name.log"; } >>"$out/log.txt"
  if [[ "$status" == 124 || "$status" == 137 ]]; then word="TIMEOUT"; elif [[ "$status" != 0 ]]; then word="FAILED ($status)"; fi
  [[ "$status" == 0 ]] || failed=1
  printf '%-28s %-12s %4s s  %s\n' "$name" "$word" "$seconds" "$(tail -n 1 "$scratch/$name.log" | cut -c 1-110)" |
    tee -a "$out/summary.txt"
}

run_report() {
  part report start megatron_ebft.environment
  finish report
  cat "$scratch/report.log"
}

run_tests() {
  local name names=(attention fp8 training float32 bf16) quiet=(-q --durations=5 -o "faulthandler_timeout=$((limit - 20))")
  part test_attention start pytest "${quiet[@]}" tests/gpu/test_attention.py &
  part test_fp8 start pytest "${quiet[@]}" tests/gpu/test_fp8_kernels.py &
  part test_training start pytest "${quiet[@]}" -s tests/gpu/test_run.py &
  part test_float32 start pytest "${quiet[@]}" tests/gpu/test_step.py -k float32 &
  part test_bf16 start pytest "${quiet[@]}" tests/gpu/test_step.py -k "not float32" &
  wait
  for name in "${names[@]}"; do finish "test_$name"; done
}

run_plan() {
  local shape
  for shape in ${SHAPES-8b-quarter 1b}; do
    [[ -f "$plans/$shape.json" ]] && continue
    part "plan_$shape" start benchmark --shape "$shape" "${dry[@]}" --write-plan "$plans/$shape.json"
    finish "plan_$shape"
  done
}

# has_fp8: whether the recipe of the FP8 benchmark can run here.
has_fp8() {
  local said
  [[ "${DRY-}" == 1 ]] && return
  said="$(start megatron_ebft.environment 2>/dev/null)"
  [[ "$said" =~ FP8\ blockwise\ +yes ]]
}

run_benchmark() {
  local shape plan can_fp8=0 fp8=(--ebft-rollout-fp8 blockwise --ebft-encoder-fp8 blockwise)
  if [[ "${DRY-}" == 1 ]]; then fp8+=(--ebft-fp8-emulate); fi
  if has_fp8; then can_fp8=1; else echo "no blockwise FP8 here: not timed" | tee -a "$out/summary.txt"; fi
  for shape in ${SHAPES-8b-quarter 1b}; do
    plan=()
    if [[ -f "$plans/$shape.json" ]]; then plan=(--plan "$plans/$shape.json"); fi
    part "benchmark_$shape" start benchmark --shape "$shape" "${dry[@]}" "${plan[@]}" --repeats "${REPEATS:-3}" \
      --json "$out/benchmark_$shape.json"
    finish "benchmark_$shape"
    if [[ "$can_fp8" == 1 ]]; then
      part "benchmark_${shape}_fp8" start benchmark --shape "$shape" "${dry[@]}" "${plan[@]}" "${fp8[@]}" \
        --repeats "${REPEATS:-3}" --json "$out/benchmark_${shape}_fp8.json"
      finish "benchmark_${shape}_fp8"
    fi
  done
}

for stage in $([[ $# -gt 0 ]] && echo "$@" || echo report tests plan benchmark); do
  case "$stage" in
    report | tests | plan | benchmark) "run_$stage" ;;
    *) echo "error: no stage '$stage': report, tests, plan, benchmark" >&2; failed=1 ;;
  esac
done
exit "$failed"
