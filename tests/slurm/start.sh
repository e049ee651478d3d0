#!/usr/bin/env bash
# Start a Slurm cluster of virtual nodes on this machine, for tests, and print the path of its slurm.conf:
#
#     SLURM_CONF=$(tests/slurm/start.sh) && export SLURM_CONF
#     pytest
#     tests/slurm/stop.sh
#
# Everything it writes lies in one folder and it has ports and a munged of its own: an installed or running Slurm is
# left alone. A cluster that is already up is used as it is. Missing Debian packages (slurm-wlm, munge) are installed,
# which needs root; the rest does not.
#
#     SPECCERT_SLURM_DIR     the folder [/tmp/speccert-slurm-UID, or in $XDG_RUNTIME_DIR]
#     SPECCERT_SLURM_PORT    the first port; node k listens on the k-th after it [26800]
#     NODES, CPUS MEM GPUS   virtual nodes, and CPUs, MB and fake GPUs of each [2, 2 4000 2]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"
port=${SPECCERT_SLURM_PORT:-26800}
nodes=${NODES:-2} cpus=${CPUS:-2} mem=${MEM:-4000} gpus=${GPUS:-2}

install_packages() {
    local missing=() package
    for package in slurm-wlm munge; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" -eq 0 ] || fail "missing packages: ${missing[*]}; install them, or run this as root"
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >&2
}

write_config() {
    local lines="" k gres="" gpu
    [ "$gpus" -gt 0 ] && gres=" Gres=gpu:fake:$gpus"
    for k in $(seq "$nodes"); do
        lines+="NodeName=n$k NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + k)) CPUs=$cpus RealMemory=$mem$gres\\n"
        mkdir -p "$dir/spool/n$k"
    done
    sed -e "s#@DIR@#$dir#g; s#@PORT@#$port#; s#@USER@#$(id -un)#; s#@NODES@#$lines#" \
        "$here/slurm.conf.template" >"$conf"
    # Slurm counts only GPUs that name a device file, and numbers them for CUDA_VISIBLE_DEVICES in its order
    : >"$dir/gres.conf"
    for gpu in $(seq 0 $((gpus - 1))); do
        ln -s /dev/null "$dir/gpu$gpu"
        echo "Name=gpu Type=fake File=$dir/gpu$gpu" >>"$dir/gres.conf"
    done
}

start_munge() {
    mungekey --create --keyfile="$dir/munge.key"
    munged --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2
}

up() {
    local k
    for k in $(seq "$nodes"); do running "$dir/slurmd.n$k.pid" || return 1; done
    running "$dir/slurmctld.pid" && running "$dir/munged.pid" && ready
}

ready() { [ "$(sinfo -h -N -p main -o %T | grep -c -E '^(idle|mixed|allocated|completing)$')" -eq "$nodes" ]; }

PATH=$PATH:/usr/sbin
install_packages
if up; then
    say "Slurm is already up"
else
    [ ! -e "$dir" ] || ours || fail "$dir exists and is not a cluster of this script; set SPECCERT_SLURM_DIR"
    "$here/stop.sh" # what is left of an earlier one
    for k in $(seq 0 "$nodes"); do
        ! (: <"/dev/tcp/127.0.0.1/$((port + k))") 2>/dev/null || fail "port $((port + k)) is taken; set SPECCERT_SLURM_PORT"
    done
    rm -rf "$dir"
    mkdir -p "$dir/log" "$dir/state"
    write_config
    start_munge
    slurmctld -f "$conf"
    for k in $(seq "$nodes"); do slurmd -f "$conf" -N "n$k"; done
    wait_for 30 ready || { sinfo -N -l; tail "$dir"/log/*.log; fail "the nodes did not become ready"; } >&2
    say "Slurm is up: $nodes nodes, each with $cpus CPUs and $gpus fake GPUs; partitions main, low, high"
fi
say "use it with: export SLURM_CONF=$conf"
echo "$conf"
