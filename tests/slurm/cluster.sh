#!/usr/bin/env bash
# Runs a command beside a Slurm of two nodes, both on this host:
#   tests/slurm/cluster.sh COMMAND [ARGUMENT...]
# Missing packages are installed (Debian, as root). Settings, key, state and logs are in a folder that is removed at the
# end.
set -euo pipefail

# Ports are fixed, so a second run waits here for the first one to end.
exec 9<"$0"
flock 9

PATH=$PATH:/usr/sbin
if ! (type -P munged && type -P slurmctld && type -P slurmd) >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi

host=$(hostname -s)
user=$(id -un)
folder=$(mktemp --directory)
export SLURM_CONF=$folder/slurm.conf

wait_until() { # SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    until "${@:2}"; do
        if ((SECONDS >= deadline)); then
            echo "cluster.sh: not within $1 seconds: ${*:2}" >&2
            return 1
        fi
        sleep 0.2
    done
}
no_job_is_left() { [[ -z $(squeue --noheader) ]]; }
both_nodes_are_idle() { [[ $(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l) == 2 ]]; }

# Whatever fails on the way, the rest is still to be cleaned up.
stop() {
    local status=$?
    trap - EXIT
    set +e
    scancel --user="$user"
    wait_until 60 no_job_is_left
    # shellcheck disable=SC2046 # one word for each process
    kill $(jobs -p)
    wait
    if ((status != 0)); then
        tail --lines=20 "$folder"/*.log >&2
    fi
    rm -rf "$folder"
    exit "$status"
}
trap stop EXIT

# torchrun's ranks meet on the node of rank 0, by its name: so the names are addresses, which need no resolving. Nodes
# are as large as is said here, whatever the host has. A job that is queued again waits until its credential has
# expired, then until a node has been pinged (after a part of SlurmdTimeout) and a scheduler has looked at it: seconds.
cat >"$SLURM_CONF" <<CONF
ClusterName=two-nodes
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmdTimeout=30
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation=$folder
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=127.0.0.[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=8192
PartitionName=all Nodes=ALL Default=YES
CONF

chmod 755 "$folder"
mungekey --create --keyfile="$folder/munge.key"
munged --foreground --key-file="$folder/munge.key" --socket="$folder/munge.socket" --seed-file="$folder/munge.seed" \
    --pid-file="$folder/munge.pid" >"$folder/munged.log" 2>&1 &
wait_until 20 test -S "$folder/munge.socket"
slurmctld -D 2>/dev/null &
for node in 127.0.0.1 127.0.0.2; do
    slurmd -D -N "$node" 2>/dev/null &
done
wait_until 60 both_nodes_are_idle
# Both nodes share the cores of this host.
OMP_NUM_THREADS=1 "$@"
