#!/usr/bin/env bash
# Install (Debian packages) and start a SLURM cluster of one node on this machine: root, no systemd, no cgroups needed.
# Safe to run again: what runs already is left alone, what died is started again. down.sh stops it.
#
#   SLURM_TEST_ROOT  state, logs and pid files (default /var/tmp/slurm-test)
#   SLURM_TEST_CPUS  cores that the node claims, more than it has if need be (default 8)
set -euo pipefail
ROOT=${SLURM_TEST_ROOT:-/var/tmp/slurm-test}
CPUS=${SLURM_TEST_CPUS:-8}
HOST=$(hostname -s)
SOCKET=$ROOT/mysql-run/mysqld.sock
MARK="# written by tests/slurm/up.sh"

die() { echo "up.sh: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "must be root"

source "$(dirname "$0")/alive.sh"

# wait_for SECONDS WHAT COMMAND...: by the clock, since a command that finds no daemon may itself take long
wait_for() {
    local seconds=$1 end=$((SECONDS + $1)) what=$2
    shift 2
    until timeout 10 "$@" >/dev/null 2>&1; do
        if ((SECONDS >= end)); then
            tail -n 5 "$ROOT"/log/* >&2 || true
            die "no $what after $seconds s; see $ROOT/log"
        fi
        sleep 0.1
    done
}

# started NAME COMMAND...: a daemon, which goes into the background by itself
started() {
    local name=$1
    shift
    "$@" </dev/null >"$ROOT/log/$name.out" 2>&1 || die "$name did not start: $(tail -n 3 "$ROOT/log/$name.out")"
}

mkdir -p "$ROOT"/{log,run,state,spool,mysql-run} /etc/slurm
missing=()
for package in munge slurm-client slurmctld slurmd slurmdbd mariadb-server; do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    } >"$ROOT/log/apt.log" 2>&1 || { tail -5 "$ROOT/log/apt.log" >&2; die "packages could not be installed"; }
fi
getent hosts "$HOST" >/dev/null || echo "127.0.0.1 $HOST" >>/etc/hosts

if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    [ -s /etc/munge/munge.key ] || mungekey --create
    chown munge:munge /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
    install -d -o munge -g munge -m 755 /run/munge
    install -d -o munge -g munge -m 700 /var/log/munge
    install -d -o munge -g munge -m 711 /var/lib/munge
    setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged </dev/null >"$ROOT/log/munged.out" 2>&1
    wait_for 10 munge bash -c 'munge -n | unmunge'
    cp /run/munge/munged.pid "$ROOT/run/munged.pid"
fi

# put FILE MODE: standard input becomes FILE, unless somebody else wrote it
put() {
    [ ! -e "$1" ] || grep -q "$MARK" "$1" || die "$1 is not of this script; a real cluster is left alone"
    cat >"$1"
    chmod "$2" "$1"
}
# cred_expire is also how long a requeued job waits before it starts again; below 10 s its old processes may still live
put /etc/slurm/slurm.conf 644 <<CONF
$MARK
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
CryptoType=crypto/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
EnforcePartLimits=ALL
KillWait=5
MaxArraySize=41
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=65536 State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE DefaultTime=5 DefMemPerCPU=256 State=UP
CONF
put /etc/slurm/slurmdbd.conf 600 <<CONF
$MARK
AuthType=auth/munge
DbdHost=$HOST
DbdAddr=127.0.0.1
SlurmUser=root
PidFile=$ROOT/run/slurmdbd.pid
LogFile=$ROOT/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
CONF

if ! alive mariadbd; then
    chown mysql:mysql "$ROOT/mysql-run"
    if [ ! -d "$ROOT/mysql/mysql" ]; then
        install -d -o mysql -g mysql -m 700 "$ROOT/mysql"
        mariadb-install-db --no-defaults --user=mysql --datadir="$ROOT/mysql" --skip-test-db \
            --auth-root-authentication-method=socket --auth-root-socket-user=root \
            --innodb-log-file-size=16M >"$ROOT/log/mariadb-install.log" 2>&1
    fi
    setsid /usr/sbin/mariadbd --no-defaults --user=mysql --datadir="$ROOT/mysql" --socket="$SOCKET" --skip-networking \
        --pid-file="$ROOT/mysql-run/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
        --innodb-lock-wait-timeout=900 --performance-schema=OFF </dev/null >"$ROOT/log/mariadbd.log" 2>&1 &
    echo $! >"$ROOT/run/mariadbd.pid"
    wait_for 30 database mariadb-admin --no-defaults --socket="$SOCKET" ping
fi
if ! alive slurmdbd; then
    started slurmdbd env MYSQL_UNIX_PORT="$SOCKET" /usr/sbin/slurmdbd
    wait_for 30 accounting sacctmgr -n show cluster
    sacctmgr -n show cluster format=cluster%20 | grep -qw test || sacctmgr -iQ add cluster test >/dev/null
fi
if ! alive slurmctld; then
    started slurmctld /usr/sbin/slurmctld
    wait_for 30 controller bash -c 'scontrol ping | grep -q UP'
fi
alive slurmd || started slurmd /usr/sbin/slurmd
wait_for 30 node bash -c "sinfo -hN -o %T | grep -qE '^(idle|mixed|allocated|completing)'"
