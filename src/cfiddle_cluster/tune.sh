#!/usr/bin/env bash
# Set what measurements on this machine vary with. Usage: tune.sh ROOT {FILE VALUE}…
# A FILE is one of the kernel's, or swap:DEVICE, which is on or off. ROOT: where they are, for tests. Prints for each, when it is
# set, `set FILE`, and else `failed FILE WHY`. Called by tuning.py, over SSH too.
set -u
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

root=$1
shift

set_swap() { # usage: set_swap DEVICE on|off
    local used left
    if [[ $2 == on ]]; then
        swapon "$1"
        return
    fi
    used=$(awk -v device="$1" '$1 == device { print $4 }' "$root/proc/swaps")
    left=$(awk '$1 == "MemAvailable:" { print $2 }' "$root/proc/meminfo")
    if ((used * 2 > left)); then
        printf 'what is in it does not fit into memory\n' >&2
        return 1
    fi
    swapoff "$1"
}

main() {
    local why
    while (($# > 1)); do
        if why=$({ if [[ $1 == swap:* ]]; then set_swap "${1#swap:}" "$2"; else printf '%s\n' "$2" >"$root$1"; fi; } 2>&1); then
            printf 'set %s\n' "$1"
        else
            printf 'failed %s %s\n' "$1" "$(tail -n 1 <<<"$why" | sed 's/.*: //')"
        fi
        shift 2
    done
}

main "$@"
