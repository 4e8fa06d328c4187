#!/usr/bin/env bash
# Stop what up.sh started, by recorded process ids, and remove its state and configuration.
set -uo pipefail
ROOT=${SLURM_TEST_ROOT:-/var/tmp/slurm-test}
source "$(dirname "$0")/alive.sh"

# stop NAME SECONDS: asked to end, and killed if it does not
stop() {
    local pid
    alive "$1" || return 0
    pid=$(cat "$ROOT/run/$1.pid")
    kill -TERM "$pid"
    for ((i = 0; i < $2 * 10; i++)); do
        alive "$1" || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

if scontrol ping 2>/dev/null | grep -q UP; then # steps outlive slurmd, so the jobs go first
    scancel --user root 2>/dev/null
    for ((i = 0; i < 150; i++)); do
        [ -z "$(squeue -h)" ] && break
        sleep 0.1
    done
fi
stop slurmd 10
stop slurmctld 20
stop slurmdbd 20
stop mariadbd 30
stop munged 10
for file in /etc/slurm/slurm.conf /etc/slurm/slurmdbd.conf; do
    grep -qs "written by tests/slurm/up.sh" "$file" && rm -f "$file"
done
rm -rf "$ROOT"
