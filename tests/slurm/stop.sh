#!/usr/bin/env bash
# Stop the cluster that start.sh started: only processes named in its folder's pid files. Logs stay in the folder.
set -euo pipefail
# shellcheck source=common.sh
source "$(cd "$(dirname "$0")" && pwd)/common.sh"

stop() { # stop PIDFILE
    running "$1" || return 0
    kill "$(cat "$1")"
    wait_for 15 stopped "$1" || fail "process $(cat "$1") of $1 does not end"
}
stopped() { ! running "$1"; }
no_jobs() { [ -z "$(squeue -h)" ]; }

ours || exit 0
if running "$dir/slurmctld.pid"; then
    # the processes of a job outlive slurmd: end the jobs first
    squeue -h -o %A | sort -u | xargs --no-run-if-empty scancel || say "the jobs could not be cancelled"
    wait_for 20 no_jobs || say "jobs are still running: $(squeue -h -o %A | tr '\n' ' ')"
fi
for node in $(sed -n 's/^NodeName=\(n[0-9]*\) .*/\1/p' "$conf"); do stop "$dir/slurmd.$node.pid"; done
stop "$dir/slurmctld.pid"
stop "$dir/munged.pid"
say "Slurm is stopped; its logs are in $dir/log"
