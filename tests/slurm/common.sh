# shellcheck shell=bash
# Shared by start.sh and stop.sh.
dir=${SPECCERT_SLURM_DIR:-${XDG_RUNTIME_DIR:-/tmp}/speccert-slurm-$(id -u)}
conf=$dir/slurm.conf
export SLURM_CONF=$conf

say() { echo "$@" >&2; }
fail() { say "$(basename "$0"): $*"; exit 1; }

# ours: the folder holds a cluster of start.sh, not somebody's Slurm
ours() { grep -qs '^ClusterName=speccert$' "$conf" && [ -e "$dir/munge.key" ]; }

# running PIDFILE: the process in the file lives and was started on this folder; a reused number does not count
running() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && grep -qsaF "$dir/" "/proc/$pid/cmdline"
}

# wait_for SECONDS COMMAND...
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}
