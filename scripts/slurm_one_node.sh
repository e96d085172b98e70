#!/usr/bin/env bash
# A SLURM of one node, this machine, for trying out and testing launcher=slurm: without systemd, cgroups or accounting.
#
#     scripts/slurm_one_node.sh install         # slurm and munge, with apt-get
#     scripts/slurm_one_node.sh start FOLDER    # configuration, state and logs go there; then:
#     export SLURM_CONF=FOLDER/slurm.conf
#     scripts/slurm_one_node.sh stop FOLDER
#
# Needs root. Do not run it on a machine that belongs to a cluster.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

start() {
    local folder=$1 host memory
    for command in munged slurmctld slurmd; do
        command -v "$command" >/dev/null || { echo "no $command here: run $0 install" >&2; exit 1; }
    done
    mkdir -p "$folder"/{state,spool,log} /run/munge
    host=$(hostname)
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.8) }' /proc/meminfo)
    [ -s /etc/munge/munge.key ] || (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chmod 0400 /etc/munge/munge.key
    chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one_node
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$folder/slurm.conf
    pgrep -x munged >/dev/null || { runuser -u munge -- munged --pid-file "/run/munge/munged.pid"; touch "$folder/munged"; }
    slurmctld
    slurmd
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && return
        sleep 0.5
    done
    echo "SLURM does not come up; see $folder/log" >&2
    exit 1
}

stop() {
    local folder=$1 pid
    export SLURM_CONF=$folder/slurm.conf
    scancel --user=root 2>/dev/null || true
    for _ in $(seq 40); do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
    for daemon in slurmd slurmctld; do
        pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        tail --pid="$pid" -f /dev/null
    done
    [ ! -e "$folder/munged" ] || kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
}

case ${1:-} in
    install) [ $# = 1 ] || usage; install ;;
    start | stop) [ $# = 2 ] || usage; "$1" "$(realpath -m "$2")" ;;
    *) usage ;;
esac
