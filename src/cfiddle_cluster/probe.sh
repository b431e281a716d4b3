#!/usr/bin/env bash
# Print facts about this machine, one `name value` a line; changes nothing.
# Usage: probe.sh HOME_ROOT "PORTS" "HOST:PORT…" [ROOT]
# PORTS: those to tell the holder of. HOST:PORT: what must be reached from here. ROOT: where sys and proc are that tell of
# measuring, for tests. Called by facts.py, over SSH too.
set -u
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

home_root=$1 ports=$2 targets=$3 root=${4:-}

read_file() { [[ -r $2 ]] && printf '%s %s\n' "$1" "$(<"$2")"; } 2>/dev/null

# Each in namespaces of its own, which end with the command: nothing of it stays.
yields() { # usage: yields NAME COMMAND...
    if timeout 5 "${@:2}" >/dev/null 2>&1; then printf '%s yes\n' "$1"; else printf '%s no\n' "$1"; fi
}

has_module() { grep -qw "$1" /proc/filesystems || modprobe --dry-run --quiet "$1" 2>/dev/null; }

link() { # usage: link KIND OPTIONS...
    if command -v ip >/dev/null; then
        yields "link-$1" unshare --net ip link add cfiddle0 type "$@"
    elif [[ -d /sys/module/$1 ]] || modprobe --dry-run --quiet "$1" 2>/dev/null; then
        printf 'link-%s yes\n' "$1"
    else
        printf 'link-%s unknown\n' "$1"
    fi
}

overlay() {
    # shellcheck disable=SC2016  # the inner shell's
    yields overlay unshare --mount sh -c '
        mount -t tmpfs none /mnt && mkdir /mnt/lower /mnt/upper /mnt/work /mnt/all &&
            mount -t overlay none -o lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work /mnt/all'
}

cgroups() {
    if [[ $(stat -fc %T /sys/fs/cgroup 2>/dev/null) == cgroup2fs ]]; then
        printf 'cgroup 2\ncontrollers %s\n' "$(</sys/fs/cgroup/cgroup.controllers)"
    else
        printf 'cgroup 1\ncontrollers %s\n' "$(awk 'NR > 1 && $4 == 1 {print $1}' /proc/cgroups | xargs)"
    fi
}

sizes() {
    awk '/^(MemTotal|MemAvailable|SwapTotal):/ {print $1, int($2 / 1024)}' /proc/meminfo | tr -d :
    local name path
    for name in docker:/var/lib/docker home:"$home_root" state:/var/lib/cfiddle-cluster; do
        path=${name#*:}
        until [[ -e $path ]]; do path=$(dirname "$path"); done
        printf 'disk-%s %s\n' "${name%%:*}" "$(df --output=avail -BM "$path" | tail -n 1 | tr -dc 0-9)"
    done
}

# The sockets that listen on one of the ports, and who has them; `kernel` where it is nobody, as with Swarm's own VXLAN.
listeners() {
    local protocol port inode holder
    while read -r protocol port inode; do
        holder=$(find /proc/[0-9]*/fd -lname "socket:\[$inode\]" -print -quit 2>/dev/null)
        holder=${holder%/fd/*}
        [[ -n $holder ]] && holder=$(<"$holder/comm")
        printf 'listen %s %s %s\n' "$protocol" "$port" "${holder:-kernel}"
    done < <(
        for protocol in tcp tcp6 udp udp6; do
            [[ -r /proc/net/$protocol ]] || continue
            while read -r _ local _ state _ _ _ _ _ inode _; do
                [[ $state == 0A || ($protocol == udp* && $state == 07) ]] || continue
                port=$((16#${local##*:}))
                [[ " $ports " == *" $port "* ]] && printf '%s %s %s\n' "${protocol%6}" "$port" "$inode"
            done < <(tail -n +2 "/proc/net/$protocol")
        done | sort -u -k1,2
    )
}

reached() {
    local target
    for target in $targets; do
        # shellcheck disable=SC2016  # the inner shell's
        yields "reach-$target" timeout 2 bash -c '>"/dev/tcp/${0%:*}/${0##*:}"' "$target"
    done
}

authorities() {
    local file
    for file in /etc/docker/certs.d/*/ca.crt; do
        [[ -r $file ]] || continue
        printf 'trust %s %s\n' "$(basename "$(dirname "$file")")" "$(sha256sum <"$file" | cut -c 1-64)"
    done
}

# What spoils a measurement: settings (tuning.py says what each should be), heat, other virtual machines, swap.
measuring() {
    local file device
    for device in "$root"/sys/bus/event_source/devices/{cpu,cpu_core,armv8_*}; do
        [[ -e $device ]] && printf 'pmu %s\n' "$(basename "$device")"
    done
    for file in "$root"/sys/devices/system/cpu/{cpu[0-9]*/cpufreq/scaling_governor,cpufreq/boost,intel_pstate/no_turbo} \
        "$root"/sys/devices/system/cpu/smt/control "$root"/proc/sys/kernel/perf_event_paranoid; do
        read_file "setting ${file#"$root"}" "$file"
    done
    awk 'NR > 1 { print "setting swap:" $1 " on"; used += $4 } END { print "swap-used", int(used / 1024) }' "$root/proc/swaps"
    # Package and core count the same heat: the most that a CPU tells.
    sort -n "$root"/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count 2>/dev/null |
        awk 'END { if (NR) print "throttled", $1 }'
    # proc_stat(5): user nice system idle iowait irq softirq steal, in ticks since the machine started; in tenths of a percent.
    awk '$1 == "cpu" { busy = $2 + $3 + $4 + $7 + $8 + $9; if (busy) print "steal", int(1000 * $9 / busy) }' "$root/proc/stat"
}

processes() { # what each has used of the CPUs (proc_pid_stat(5)): process, ticks, name
    cat "$root"/proc/[0-9]*/stat 2>/dev/null |
        awk '{ name = $0; sub(/^[0-9]+ \(/, "", name); sub(/\) .*/, "", name); rest = $0; sub(/.*\) /, "", rest)
               split(rest, field, " "); print $1, field[12] + field[13], name }'
}

# Who takes a tenth of a CPU or more: percent and name, the busiest first.
busy() {
    local before
    before=$(processes)
    sleep 1
    {
        printf '%s\n\n' "$before"
        processes
    } | awk -v ticks="$(getconf CLK_TCK)" '
        !NF { later = 1 }
        NF && !later { used[$1] = $2 }
        NF && later && $1 in used { percent = 100 * ($2 - used[$1]) / ticks; sub(/^[0-9]+ [0-9]+ /, "")
                                    if (percent >= 10) print "busy", int(percent), $0 }' | sort -k2,2nr | head -n 5
}

docker_engine() {
    local docker=(timeout 10 docker --host unix:///var/run/docker.sock)
    if ! command -v dockerd >/dev/null && ! command -v docker >/dev/null; then
        printf 'engine absent\n'
    elif ! "${docker[@]}" info --format '{{json .}}' 2>/dev/null | grep '"ServerVersion":"[^"]' | sed 's/^/info /'; then
        printf 'engine stopped\n'
    else
        sandboxes
        "${docker[@]}" ps --format 'container {{.Names}} {{.Labels}}' 2>/dev/null | awk '!/[ ,]cfiddle\./ { print $1, $2 }'
    fi
}

# Sandboxes that serve or have served, with their job; one of which no agent knows has none. Those that wait are left out.
sandboxes() {
    local docker=(timeout 10 docker --host unix:///var/run/docker.sock) found agent known container state job
    found=$("${docker[@]}" ps --all --quiet --no-trunc --filter label=cfiddle.sandbox 2>/dev/null)
    [[ $found ]] || return 0
    agent=$("${docker[@]}" ps --quiet --filter label=com.docker.swarm.service.name=slurm-stack_agent 2>/dev/null)
    known=$("${docker[@]}" exec "${agent:-none}" python3 -m agent --list 2>/dev/null)
    for container in $found; do
        read -r _ state _ job <<<"$(grep "^$container " <<<"$known")"
        [[ $state == @(made|connected|ready) ]] || printf 'sandbox %s %s\n' "$container" "$job"
    done
}

main() {
    printf 'began %s\n' "$EPOCHREALTIME"
    printf 'name %s\n' "$(hostname -s 2>/dev/null || uname -n)"
    printf 'kernel %s\n' "$(uname -r)"
    cgroups
    sizes
    yields namespaces unshare --mount --uts --ipc --net --pid --fork true
    overlay
    link veth
    link vxlan id 1 dstport 0
    link bridge
    has_module nfsd && printf 'nfs-server yes\n'
    { has_module nfs4 || has_module nfs; } && printf 'nfs-client yes\n'
    command -v apt-get >/dev/null && printf 'apt-get yes\n'
    listeners
    reached
    authorities
    measuring
    busy
    docker_engine
    printf 'ended %s\n' "$EPOCHREALTIME"
}

main
