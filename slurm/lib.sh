# shellcheck shell=bash
# Shell functions shared by the job scripts of this folder, which source it inside a job, with REPO set.
#
# A training job makes checks (tools/preflight.py), starts the ranks, and goes by the training command's exit code:
#   0        finished: the job ends COMPLETED, also where a signal came meanwhile
#   75       stopped after saving, on request or before the time limit: the job requeues itself and goes on
#   64, 65   wrong flags or files; a number that is not finite: the job ends FAILED, trying again would not help
#   others   a crash: tried again, and FAILED after MAX_CRASHES in a row without a newer checkpoint between them
# A lost node ends the job script as well; SLURM then requeues the job by itself (#SBATCH --requeue).
#
# Settings of the cluster, the same for all scripts; change them here or in the environment of sbatch.

# The interpreter (tools/venv.sh makes this environment), or the container's.
: "${PYTHON:=${CONTAINER_IMAGE:+python}}"
: "${PYTHON:=$REPO/.venv/bin/python}"
# Names for `module load`, separated by spaces.
: "${MODULES:=}"
# For clusters with Pyxis and Enroot: an image, and what it shall see (the repository, data, checkpoints).
: "${CONTAINER_IMAGE:=}"
: "${CONTAINER_MOUNTS:=$REPO,$PWD}"
# Seconds before the time limit by which the run has saved and ended, counted from the start of the ranks: longer than
# they take to start. #SBATCH --signal asks first; this is for signals that get lost.
: "${END_MARGIN:=300}"
# Times in a row that a job requeues itself without a newer checkpoint, before giving up: --time is too short then.
: "${MAX_REQUEUES:=10}"
# Crashes in a row before giving up, and the seconds before the first retry; before the second it is five times as
# long, so that SLURM notices a dead node (after 300 s) and requeues the job.
: "${MAX_CRASHES:=3}"
: "${RETRY_PAUSE:=60}"
# Seconds the other ranks get once the first has ended; what hangs then is killed.
: "${END_WAIT:=300}"

# NCCL and torch. Errors with their cause; INFO also shows the network: look for NET/IB, as NET/Socket is slow.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Several networks in a node: the interface of the first contact (also GLOO_SOCKET_IFNAME), and the InfiniBand adapters
# that join the GPUs, without those for storage. Needed where ranks do not find each other, hang, or are slow.
#export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# One queue of kernels a GPU: tensor-parallel communication starts in the order it was issued, and overlaps.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Less fragmentation: rollouts and the training pass ask for blocks of different sizes.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

readonly FINISHED=0 WRONG=64 NOT_FINITE=65 STOPPED=75

# An array's tasks have a job number each, but that of one of them also names the whole array.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-${SLURM_JOB_ID:-}}"

say() { printf '%s %s\n' "$(date +%FT%T)" "$*"; }

# give_up CODE REASON...: ends the job as FAILED.
give_up() {
  local code="$1"
  shift
  say "FAILED: $*"
  exit "$code"
}

# last_value FLAG ARGUMENTS...: the value that FLAG has on a command line, where the last one wins.
last_value() {
  local flag="$1" value=""
  shift
  while (($#)); do
    case "$1" in
      "$flag") value="${2:-}" ;;
      "$flag="*) value="${1#*=}" ;;
    esac
    shift
  done
  echo "$value"
}

# in_environment: loads modules, and sets `launch`, the srun options that all steps share.
in_environment() {
  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    give_up "$WRONG" "this is a job script: submit it with sbatch"
  fi
  cd "$REPO" || exit
  if [[ -n "$MODULES" ]]; then
    set +u # modules' own scripts
    # shellcheck disable=SC2086
    module load $MODULES || give_up "$WRONG" "MODULES: module load $MODULES failed"
    set -u
  fi
  # srun does not take the number of CPUs from the job, and would bind every rank to a single one.
  launch=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  if [[ -n "$CONTAINER_IMAGE" ]]; then
    launch+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$REPO")
  elif [[ ! -x "$(command -v "$PYTHON")" ]]; then
    give_up "$WRONG" "PYTHON: $PYTHON does not run; make it (source tools/venv.sh; ensure_venv .venv hf), or set PYTHON"
  fi
}

# ask_to_stop SIGNAL: the handler. A file reaches ranks that cannot be signalled yet.
ask_to_stop() {
  is_stopping=1 was_interrupted=1
  say "got SIG$1: asking the ranks to save and to stop"
  if [[ -n "${LOGS:-}" ]]; then
    touch "$LOGS/stop" || true
    scancel --signal=USR1 "$job" || true # reaches the steps, and not this script
  fi
}

# in_step COMMAND...: runs it in the background and returns its exit code, whatever signals come meanwhile.
in_step() {
  local pid code
  "$@" &
  pid=$!
  while :; do # a signal interrupts `wait`; waiting again gives the code, even if the command ended meanwhile
    was_interrupted="" code=0
    wait "$pid" || code=$?
    [[ -n "$was_interrupted" ]] || return "$code"
  done
}

# What each node and each rank runs, where the variables are expanded. A signal would kill a python that has no handler
# yet, so it is ignored until then. What a rank ended with is kept: srun reports only the worst of all, and kills the
# other ranks where it is not 0.
# shellcheck disable=SC2016
readonly ON_NODE='trap "" USR1 TERM
((SLURM_PROCID == 0)) || set -- "$@" --node-only
exec "$@"'
# shellcheck disable=SC2016
readonly ON_RANK='trap "" USR1 TERM
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
((RANK == 0)) || exec >>"$LOGS/rank-$RANK.log" 2>&1
code=0
"$@" || code=$?
echo "$code" >"$LOGS/exit-$RANK"
((code != 75)) || exit 0
exit "$code"'

# minutes_left: until the run shall have ended, with two decimals; nothing where the job has no time limit.
minutes_left() {
  local end seconds
  end="$(SLURM_TIME_FORMAT=standard squeue -h -j "$job" -o %e 2>/dev/null || true)"
  if end="$(date -d "${end:-none}" +%s 2>/dev/null)"; then
    seconds=$((end - $(date +%s) - END_MARGIN))
    ((seconds > 0)) || seconds=0
    printf '%d.%02d\n' $((seconds / 60)) $((seconds % 60 * 100 / 60))
  fi
}

# newest_step: the step of the latest checkpoint.
newest_step() { cat "$save/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# outcome: what the ranks that ended by themselves say, the worst first; else 1, a crash.
outcome() {
  local codes code
  codes="$(cat "$LOGS"/exit-* 2>/dev/null | sort -u || true)"
  for code in "$NOT_FINITE" "$WRONG" "$FINISHED" "$STOPPED"; do
    if grep -qx "$code" <<<"$codes"; then
      echo "$code"
      return
    fi
  done
  echo 1
}

# first_ending: which rank ended first, and with what, for a crash.
first_ending() {
  local file first=""
  for file in "$LOGS"/exit-*; do
    if [[ -f "$file" && (-z "$first" || "$file" -ot "$first") ]]; then
      first="$file"
    fi
  done
  if [[ -n "$first" ]]; then
    echo "rank ${first##*-} ended first, with $(<"$first")"
  else
    echo "no rank ended by itself"
  fi
}

# in_a_row WHAT: how often WHAT has happened in this job since the newest checkpoint, this time included.
in_a_row() {
  local file="$save/logs/$job.$1" count=0 step=""
  if [[ -f "$file" ]]; then
    read -r count step <"$file"
  fi
  [[ "$step" == "$(newest_step)" ]] || count=0
  echo "$((count + 1)) $(newest_step)" >"$file"
  echo "$((count + 1))"
}

# requeue: SLURM starts the same job again. Not where it is being cancelled, or is requeued already.
requeue() {
  local pause state requeues
  trap '' USR1 TERM # being requeued ends this script
  requeues="$(in_a_row requeues)"
  if ((requeues > MAX_REQUEUES)); then
    give_up 1 "the job requeued itself $MAX_REQUEUES times without a newer checkpoint: --time must leave time for the" \
      "start, a step and a save before --signal comes"
  fi
  for pause in 5 10 20 40 60 60 60 60 60 60 60 0; do # as long as a restart of SLURM's controller may take
    state="$(scontrol show -o job "$job" 2>/dev/null | grep -o ' JobState=[A-Z_]*' | head -n 1 | cut -d = -f 2 || true)"
    case "$state" in
      CANCELLED* | COMPLETING | PENDING | PREEMPTED | REQUEUE*)
        say "the job is $state: not requeued"
        exit 0
        ;;
    esac
    if [[ -n "$state" ]] && scontrol requeue "$job"; then
      say "requeued; goes on from step $(newest_step)"
      exit 0
    fi
    sleep "$pause"
  done
  give_up "$STOPPED" "could not requeue the job (is it allowed here? scontrol show config | grep JobRequeue)." \
    "Nothing is lost: submit the same command again"
}

# pause SECONDS: or until the job shall stop.
pause() {
  sleep "$1" &
  wait $! || true
}

# train_until_done FLAGS...: the training command on all ranks, checked, stopped, continued; ends the script.
train_until_done() {
  local attempt=0 code crashes left hosts
  save="$(last_value --save "$@")" is_stopping=""
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  in_environment
  mkdir -p "$save/logs" || give_up "$WRONG" "--save $save: cannot be made"
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR="${hosts[0]}" MASTER_PORT LOGS

  while :; do
    # Each attempt has logs, a stop file and a port of its own: nothing of the one before can be taken for it.
    attempt=$((attempt + 1))
    LOGS="$(cd "$save/logs" && pwd -P)/$job.${SLURM_RESTART_COUNT:-0}.$attempt"
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0} * 7 + attempt) % 10000))
    rm -rf "$LOGS" && mkdir "$LOGS" || give_up 1 "$LOGS cannot be made: free space"
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), attempt $attempt: $SLURM_NTASKS ranks on" \
      "$SLURM_JOB_NODELIST, after step $(newest_step); logs in $LOGS"
    left="$(minutes_left)"
    if [[ "$left" == 0.00 ]]; then
      ((attempt > 1)) || give_up "$WRONG" "--time: must be above END_MARGIN, $END_MARGIN s, and the time to start"
      requeue
    fi
    code=0
    in_step srun "${launch[@]}" --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
      --kill-on-bad-exit=0 bash -c "$ON_NODE" preflight "$PYTHON" tools/preflight.py --world-size "$SLURM_NTASKS" \
      --ranks-per-node "$((SLURM_NTASKS / SLURM_NNODES))" --gpus-per-node "${SLURM_GPUS_ON_NODE:-0}" "$@" || code=$?
    if ((code == WRONG)); then
      give_up "$WRONG" "the problems above; nothing was started"
    fi
    [[ -z "$is_stopping" ]] || requeue
    left="$(minutes_left)" # the checks took their time
    [[ "$left" != 0.00 ]] || requeue
    if ((code == 0)); then
      say "starting the ranks${left:+; they end within $left minutes}"
      in_step srun "${launch[@]}" --kill-on-bad-exit=1 --wait="$END_WAIT" bash -c "$ON_RANK" rank \
        "$PYTHON" -m megatron_ebft.train "$@" --ebft-stop-file "$LOGS/stop" ${left:+--exit-duration-in-mins "$left"} ||
        code=$?
      say "the ranks ended (srun: $code)"
      code="$(outcome)"
    else
      say "the checks themselves failed ($code)"
    fi
    case "$code" in
      "$FINISHED")
        say "finished"
        exit 0
        ;;
      "$STOPPED") requeue ;;
      "$WRONG") give_up "$code" "wrong flags or files, see the error above (and $LOGS); mend it and submit again" ;;
      "$NOT_FINITE") give_up "$code" "a step failed by a number that is not finite, see the error above" ;;
    esac
    crashes="$(in_a_row crashes)"
    say "crash $crashes after the checkpoint of step $(newest_step); $(first_ending)"
    if ((crashes >= MAX_CRASHES)); then
      give_up 1 "$crashes crashes in a row without a newer checkpoint between them; see the errors above and $LOGS"
    fi
    [[ -z "$is_stopping" ]] || requeue
    pause $((crashes == 1 ? RETRY_PAUSE : 5 * RETRY_PAUSE))
    [[ -z "$is_stopping" ]] || requeue
  done
}
