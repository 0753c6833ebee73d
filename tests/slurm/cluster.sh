#!/usr/bin/env bash
# A throw-away SLURM cluster of two pretended nodes on this machine, for tests:
#
#   cluster.sh up DIR          starts it; DIR is new, and keeps its configuration, state and logs
#   cluster.sh run DIR CMD...  runs a command inside, in this working folder
#   cluster.sh down DIR        ends it with everything that runs in it
#
# munge, slurmctld and two slurmd run in namespaces of their own (processes, mounts, host name, network): nothing
# listens on the machine's network, and killing their first process leaves nothing behind. Needs root, and Debian's or
# Ubuntu's packages slurmctld, slurmd, slurm-client, munge, iproute2.
# The nodes have 16 CPUs and 2 GPUs each, on paper. Time limits are kept to the second, and a requeued job may start
# after 5 s instead of SLURM's usual 2 minutes.
set -euo pipefail

NODES=2
PROGRAMS=(munged slurmctld slurmd sbatch unshare nsenter ip setsid)

fail() {
  echo "error: cluster.sh: $*" >&2
  exit 1
}

configure() {
  local node
  mkdir -p "$dir"/{dev,etc,log,run,state,spool}
  chmod 755 "$dir" "$dir"/*
  (umask 077 && head -c 128 /dev/urandom >"$dir/etc/munge.key")
  printf '127.0.0.1 localhost\n127.0.0.10 control\n' >"$dir/etc/hosts"
  for ((node = 1; node <= NODES; node++)); do
    echo "127.0.0.$((10 + node)) node$node" >>"$dir/etc/hosts"
  done
  {
    sed '/^hosts:/d' /etc/nsswitch.conf
    echo "hosts: files" # asks no name server
  } >"$dir/etc/nsswitch.conf"
  mknod "$dir/dev/gpu0" c 1 3 # devices of the kind of /dev/null: SLURM asks no more of a GPU
  mknod "$dir/dev/gpu1" c 1 3
  printf '%s\n' AutoDetect=off "NodeName=node[1-$NODES] Name=gpu File=$dir/dev/gpu[0-1]" >"$dir/etc/gres.conf"
  cat >"$dir/etc/slurm.conf" <<END
ClusterName=pretended
SlurmctldHost=control(127.0.0.10)
SlurmctldPort=17001
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
PropagateResourceLimits=NONE
JobRequeue=1
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
SlurmdParameters=config_overrides
GresTypes=gpu
$(for ((node = 1; node <= NODES; node++)); do
    echo "NodeName=node$node NodeHostname=node$node NodeAddr=127.0.0.$((10 + node)) Port=$((17100 + node)) CPUs=16 RealMemory=16000 Gres=gpu:2"
  done)
PartitionName=main Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-$NODES] MaxTime=INFINITE State=UP PriorityTier=9
END
}

# The first process of the namespaces: starts the daemons, then waits.
init() {
  local node
  mount --make-rprivate /
  mount --bind "$dir/etc/hosts" /etc/hosts
  mount --bind "$dir/etc/nsswitch.conf" /etc/nsswitch.conf
  mount -t tmpfs tmpfs /run # munge wants a socket that all may reach, and pytest's folders are private
  hostname control
  ip link set lo up
  ip addr add 10.0.0.1/32 dev lo # an address outside 127.0.0.0/8, without which glibc resolves no names for SLURM
  munged -S /run/munge.sock --key-file="$dir/etc/munge.key" --log-file="$dir/log/munged.log" \
    --pid-file="$dir/run/munged.pid" --seed-file="$dir/run/munged.seed"
  export SLURM_CONF="$dir/etc/slurm.conf"
  cd /
  slurmctld -c -f "$SLURM_CONF"
  # A node's service manager starts slurmd again when it dies: 22.05 does at times ("unaligned tcache chunk").
  for ((node = 1; node <= NODES; node++)); do
    unshare --uts bash -c "hostname node$node && until slurmd -D -f '$SLURM_CONF' -N node$node 2>/dev/null; do sleep 1; done" &
  done
  touch "$dir/run/started"
  while :; do
    sleep 3600 & # in the background, so that orphans are reaped meanwhile
    wait $! || true
  done
}

# is_up: whether the process that was noted is still the same one (its start time is noted, too).
is_up() {
  local pid started
  read -r pid started <"$dir/run/init" 2>/dev/null && [[ "$(cut -d ' ' -f 22 "/proc/$pid/stat" 2>/dev/null)" == "$started" ]]
}

up() {
  local program outer pid="" end=$((SECONDS + 30))
  [[ "$(id -u)" == 0 ]] || fail "needs root"
  for program in "${PROGRAMS[@]}"; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
  done
  [[ ! -e "$dir" ]] || fail "$dir is there already"
  configure
  setsid unshare --mount --uts --ipc --net --pid --fork --mount-proc --kill-child -- bash "$0" init "$dir" \
    </dev/null >"$dir/log/init.log" 2>&1 &
  outer=$!
  while [[ -z "$pid" ]]; do
    pid="$(pgrep -P "$outer" || true)"
    if ((SECONDS >= end)) || ! kill -0 "$outer" 2>/dev/null; then
      fail "no namespaces: $(cat "$dir/log/init.log")"
    fi
    sleep 0.05
  done
  echo "$pid $(cut -d ' ' -f 22 "/proc/$pid/stat")" >"$dir/run/init"
  until [[ -e "$dir/run/started" && "$(inside sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" == "$NODES" ]]; do
    if ! is_up || ((SECONDS >= end)); then
      tail -n 20 "$dir"/log/*.log >&2
      down
      fail "did not come up"
    fi
    sleep 0.1
  done
}

inside() {
  local pid started
  is_up || fail "is not up"
  read -r pid started <"$dir/run/init"
  SLURM_CONF="$dir/etc/slurm.conf" nsenter -t "$pid" --mount --uts --ipc --net --pid --wd="$PWD" -- "$@"
}

down() {
  local pid started
  while is_up; do
    read -r pid started <"$dir/run/init"
    kill -KILL "$pid" # the first process of the namespace: the kernel ends all others
    sleep 0.1
  done
}

(($# >= 2)) || fail "usage: cluster.sh up|run|down DIR [command]"
command="$1" dir="$(realpath -m "$2")"
shift 2
case "$command" in
  up | init | down) "$command" ;;
  run) inside "$@" ;;
  *) fail "$command: unknown" ;;
esac
