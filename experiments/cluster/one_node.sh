#!/bin/bash
# A SLURM cluster of this one machine (Debian 12, root), for `pytest -m slow tests/runs/test_launchers.py`.
#   one_node.sh FOLDER start|stop          the commands of SLURM are then on the PATH of this shell only if they were before
set -euo pipefail
folder=$(realpath -m "$1")
if [ "$2" = stop ]; then
    kill "$(cat "$folder/ctl.pid")" "$(cat "$folder/d.pid")"
    exit
fi
apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
mkdir -p "$folder"/{ctl,d,log} /run/munge
chown munge /run/munge
node=$(hostname -s)
cat > /etc/slurm/slurm.conf <<EOF
ClusterName=one
SlurmctldHost=$node
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/ctl
SlurmdSpoolDir=$folder/d
SlurmctldPidFile=$folder/ctl.pid
SlurmdPidFile=$folder/d.pid
SlurmctldLogFile=$folder/log/ctl.log
SlurmdLogFile=$folder/log/d.log
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
NodeName=$node CPUs=$(nproc) Sockets=1 CoresPerSocket=$(nproc) ThreadsPerCore=1 RealMemory=$(($(free -m | awk '/Mem/ {print $2}') / 2))
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
EOF
runuser -u munge -- /usr/sbin/munged
slurmctld
slurmd
sleep 3
sinfo
