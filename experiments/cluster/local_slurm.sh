#!/bin/bash
# A SLURM cluster on this one machine (Debian 12, root), for `pytest -m slow tests/runs/test_launchers.py`.
#   local_slurm.sh FOLDER start [NODES] | stop    each node has its slurmd and all cores; 1 node unless given
set -euo pipefail
folder=$(realpath -m "$1")
if [ "$2" = stop ]; then
    for file in "$folder"/*.pid; do
        kill "$(cat "$file")" || true
    done
    runuser -u munge -- /usr/sbin/munged --stop
    sed "/# local_slurm$/d" /etc/hosts > "$folder/hosts"
    cat "$folder/hosts" > /etc/hosts
    exit
fi
nodes=${3:-1}
command -v slurmctld slurmd srun munged > /dev/null ||
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
mkdir -p "$folder"/{ctl,d,log} /run/munge
chown munge /run/munge
host=$(hostname -s)
for ((i = 1; i <= nodes; i++)); do
    grep -q " node$i #" /etc/hosts || echo "127.0.0.1 node$i # local_slurm" >> /etc/hosts
done
cat > /etc/slurm/slurm.conf <<END
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/ctl
SlurmdSpoolDir=$folder/d/%n
SlurmctldPidFile=$folder/ctl.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/log/ctl.log
SlurmdLogFile=$folder/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=15
$(for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17000 + i)) Sockets=1 CoresPerSocket=$(nproc --all)" \
        "ThreadsPerCore=1 RealMemory=$(($(free -m | awk '/Mem/ {print $2}') / 2 / nodes))"
done)
PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP
END
runuser -u munge -- /usr/sbin/munged
slurmctld
for ((i = 1; i <= nodes; i++)); do
    slurmd -N "node$i"
done
sleep 3
sinfo -N
