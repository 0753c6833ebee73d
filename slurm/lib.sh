# shellcheck shell=bash
# Shell functions shared by the job scripts of this folder. The scripts set REPO and source this file inside a job.
#
# A training job runs its checks (tools/preflight.py), starts the ranks and acts on the training command's exit code:
#   0        finished: the job ends COMPLETED, even if a signal came in the meantime
#   74       a filesystem did not answer: the job requeues itself; another node or hour may reach the files
#   75       stopped after a save, on request or before the time limit: the job requeues itself and continues
#   64       wrong flags or files: the job ends FAILED, because a retry would not help
#   65       a loss or gradient that is not finite: the job ends FAILED, for the same reason
#   others   a crash: the job retries; it ends FAILED after MAX_CRASHES in a row without a newer checkpoint
# A lost node also ends the job script. SLURM then requeues the job by itself (#SBATCH --requeue).
#
# Cluster settings, shared by all scripts. Change them here or set them in sbatch's environment.

# The Python interpreter. Default: the environment that tools/venv.sh makes, or the container's python.
: "${PYTHON:=${CONTAINER_IMAGE:+python}}"
: "${PYTHON:=$REPO/.venv/bin/python}"
# Modules to load with `module load`, separated by spaces.
: "${MODULES:=}"
# For clusters with Pyxis and Enroot: an image, and the folders it mounts (the repository, data, checkpoints).
: "${CONTAINER_IMAGE:=}"
: "${CONTAINER_MOUNTS:=$REPO,$PWD}"
# The run saves and ends this many seconds before the time limit; must be longer than the ranks take to start.
# #SBATCH --signal asks earlier: this margin is for signals that get lost.
: "${END_MARGIN:=300}"
# The job gives up after it requeued itself this many times without a newer checkpoint: --time is then too short.
: "${MAX_REQUEUES:=10}"
# The job gives up after this many crashes in a row. RETRY_PAUSE is the pause in seconds before the first retry. Later
# pauses are five times as long: SLURM then notices a dead node (after 300 s) and requeues the job.
: "${MAX_CRASHES:=3}"
: "${RETRY_PAUSE:=60}"
# Once one rank has ended, the others get this many seconds before srun kills them.
: "${END_WAIT:=300}"

# NCCL and torch. WARN prints errors with their cause. INFO also prints the network in use: NET/IB is what you want,
# NET/Socket is slow.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# For nodes with several networks: the interface for the first contact, and the InfiniBand adapters that connect the
# GPUs (leave out those for storage). Set these if ranks do not find each other, hang or are slow.
#export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# One queue of kernels per GPU: tensor-parallel communication then starts in the order it was issued and overlaps.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Less fragmentation: rollouts and the training pass allocate blocks of different sizes.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

readonly FINISHED=0 WRONG=64 NOT_FINITE=65 UNREACHABLE=74 STOPPED=75

# Each task of an array has its own job number, but the number of one task also names the whole array.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-${SLURM_JOB_ID:-}}"

say() { printf '%s %s\n' "$(date +%FT%T)" "$*"; }

# give_up CODE REASON...: end the job as FAILED.
give_up() {
  local code="$1"
  shift
  say "FAILED: $*"
  exit "$code"
}

# last_value FLAG ARGUMENTS...: print the value of FLAG on a command line, where the last one wins.
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

# in_environment: load modules and set `launch`, the srun options that all job steps share.
in_environment() {
  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    give_up "$WRONG" "this is a job script: submit it with sbatch"
  fi
  cd "$REPO" || exit
  if [[ -n "$MODULES" ]]; then
    set +u # the scripts of modules use unset variables
    # shellcheck disable=SC2086
    module load $MODULES || give_up "$WRONG" "MODULES: module load $MODULES failed"
    set -u
  fi
  # srun does not inherit the number of CPUs from the job: without this it binds every rank to a single CPU.
  launch=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
  if [[ -n "$CONTAINER_IMAGE" ]]; then
    launch+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$REPO")
  elif [[ ! -x "$(command -v "$PYTHON")" ]]; then
    give_up "$WRONG" "PYTHON: $PYTHON does not run; make it (source tools/venv.sh; ensure_venv .venv hf) or set PYTHON"
  fi
}

# ask_to_stop SIGNAL: the signal handler. The stop file reaches ranks that have no signal handler yet.
ask_to_stop() {
  is_stopping=1 was_interrupted=1
  say "got SIG$1: asking the ranks to save and stop"
  if [[ -n "${LOGS:-}" ]]; then
    touch "$LOGS/stop" || true
    scancel --signal=USR1 "$job" || true # signals the job steps, not this script
  fi
}

# in_step COMMAND...: run it in the background and return its exit code, whatever signals come in the meantime.
in_step() {
  local pid code
  "$@" &
  pid=$!
  while :; do # a signal interrupts `wait`; a second `wait` returns the code even if the command has ended
    was_interrupted="" code=0
    wait "$pid" || code=$?
    [[ -n "$was_interrupted" ]] || return "$code"
  done
}

# What each node and each rank runs; the variables expand there, not here. A signal would kill a Python process that
# has no handler yet, so it is ignored until then. Each rank writes its exit code to a file, because srun reports only
# the worst of all codes. Code 75 becomes 0, because srun kills the other ranks when one ends with anything else.
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

# minutes_left: print the minutes until the run must have ended, with two decimals; nothing if the job has no limit.
minutes_left() {
  local end seconds
  end="$(SLURM_TIME_FORMAT=standard squeue -h -j "$job" -o %e 2>/dev/null || true)"
  if end="$(date -d "${end:-none}" +%s 2>/dev/null)"; then
    seconds=$((end - $(date +%s) - END_MARGIN))
    ((seconds > 0)) || seconds=0
    printf '%d.%02d\n' $((seconds / 60)) $((seconds % 60 * 100 / 60))
  fi
}

# newest_step: print the step of the latest checkpoint; 0 if there is none. Only digits are taken from a file: arithmetic
# would run whatever else it holds.
newest_step() {
  local file="$save/latest_checkpointed_iteration.txt" text=""
  [[ ! -f "$file" ]] || read -r text <"$file" || true # the file has no newline
  [[ "$text" =~ ^[0-9]{1,15}$ ]] || text=0
  echo "$((10#$text))"
}

# outcome: print the worst exit code among the ranks that ended by themselves, or 1 (a crash) if there is none.
outcome() {
  local codes code
  codes="$(cat "$LOGS"/exit-* 2>/dev/null | sort -u || true)"
  for code in "$NOT_FINITE" "$WRONG" "$UNREACHABLE" "$FINISHED" "$STOPPED"; do
    if grep -qx "$code" <<<"$codes"; then
      echo "$code"
      return
    fi
  done
  echo 1
}

# first_ending: say which rank ended first and with which code.
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

# in_a_row WHAT: count WHAT, and print how often it has happened in this job since the newest checkpoint.
in_a_row() {
  local file="$save/logs/$job.$1" count=0 step=""
  if [[ -f "$file" ]]; then
    read -r count step <"$file" || true
  fi
  [[ "$count" =~ ^[0-9]{1,9}$ && "$step" == "$(newest_step)" ]] || count=0
  count="$((10#$count + 1))"
  echo "$count $(newest_step)" >"$file"
  echo "$count"
}

# requeue: ask SLURM to start the same job again, unless it is being cancelled or is requeued already.
requeue() {
  local pause state requeues
  trap '' USR1 TERM # SLURM ends this script when it requeues the job
  requeues="$(in_a_row requeues)"
  if ((requeues > MAX_REQUEUES)); then
    give_up 1 "the job requeued itself $MAX_REQUEUES times without a newer checkpoint: raise --time, so that the" \
      "start, a step and a save fit before --signal comes; or see the errors above"
  fi
  for pause in 5 10 20 40 60 60 60 60 60 60 60 0; do # a restart of SLURM's controller may take this long
    state="$(scontrol show -o job "$job" 2>/dev/null | grep -o ' JobState=[A-Z_]*' | head -n 1 | cut -d = -f 2 || true)"
    case "$state" in
      CANCELLED* | COMPLETING | PENDING | PREEMPTED | REQUEUE*)
        say "the job is $state: not requeued"
        exit 0
        ;;
    esac
    if [[ -n "$state" ]] && scontrol requeue "$job"; then
      say "requeued; continues from step $(newest_step)"
      exit 0
    fi
    sleep "$pause"
  done
  give_up "$STOPPED" "could not requeue the job; does this cluster allow it (scontrol show config | grep JobRequeue)?" \
    "Nothing is lost: submit the same command again"
}

# pause SECONDS: wait, or return early when a signal comes.
pause() {
  sleep "$1" &
  wait $! || true
}

# train_until_done FLAGS...: check, start, stop and continue the training command on all ranks; ends the script.
train_until_done() {
  local attempt=0 code crashes left hosts
  save="$(last_value --save "$@")" is_stopping=""
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  in_environment
  mkdir -p "$save/logs" || give_up "$WRONG" "--save $save: cannot create this folder"
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR="${hosts[0]}" MASTER_PORT LOGS

  while :; do
    # Each attempt has its own logs, stop file and port, so that nothing of an earlier attempt is mistaken for it.
    attempt=$((attempt + 1))
    LOGS="$(cd "$save/logs" && pwd -P)/$job.${SLURM_RESTART_COUNT:-0}.$attempt"
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0} * 7 + attempt) % 10000))
    { rm -rf "$LOGS" && mkdir "$LOGS"; } || give_up 1 "cannot create $LOGS: free some disk space"
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), attempt $attempt: $SLURM_NTASKS ranks on" \
      "$SLURM_JOB_NODELIST, after step $(newest_step); logs in $LOGS"
    left="$(minutes_left)"
    if [[ "$left" == 0.00 ]]; then
      ((attempt > 1)) || give_up "$WRONG" "--time: must be longer than END_MARGIN, $END_MARGIN s, plus the start"
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
    left="$(minutes_left)" # the checks took a while
    [[ "$left" != 0.00 ]] || requeue
    if ((code == 0)); then
      say "starting the ranks${left:+; they will end within $left minutes}"
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
      "$UNREACHABLE")
        say "a filesystem did not answer: see the error above"
        requeue
        ;;
      "$WRONG") give_up "$code" "wrong flags or files: see the error above and $LOGS, fix it and submit again" ;;
      "$NOT_FINITE") give_up "$code" "a loss or gradient is not finite: see the error above" ;;
    esac
    crashes="$(in_a_row crashes)"
    say "crash $crashes after the checkpoint of step $(newest_step); $(first_ending)"
    if ((crashes >= MAX_CRASHES)); then
      give_up 1 "$crashes crashes in a row without a newer checkpoint: see the errors above and $LOGS"
    fi
    [[ -z "$is_stopping" ]] || requeue
    pause $((crashes == 1 ? RETRY_PAUSE : 5 * RETRY_PAUSE))
    [[ -z "$is_stopping" ]] || requeue
  done
}
