#!/usr/bin/env bash
# The rules that keep strangers from a machine of the cluster: chains named CFIDDLE-… in the kernel's table mangle.
# Usage: firewall.sh ROOT look ADDRESS… | set SCRIPT UNIT RULES RULES6 | load | unset
# look: print what is there, and from which address the machine reaches each ADDRESS. set: let RULES and RULES6 be the rules,
# and have SCRIPT, which is this one, set them by UNIT when the machine starts. load: what UNIT does. ROOT: where files are kept,
# for tests. Called by firewall.py, over SSH too.
set -Eeuo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

root=$1
shift
kept=$root/etc/cfiddle-firewall
unit=$root/etc/systemd/system/cfiddle-firewall.service

families() {
    printf 'iptables\n'
    if [[ -e /proc/net/if_inet6 ]]; then printf 'ip6tables\n'; fi
}

has_systemd() { [[ -d $root/run/systemd/system ]]; }

ours() { "$1" --wait -t mangle -S | sed -nE '/^-[AN] .*CFIDDLE-/p'; } # usage: ours iptables|ip6tables

without_jumps() { sed -nE 's/^-A (PREROUTING|FORWARD) /-D \1 /p'; }

# A change is refused as a whole when somebody else, an engine for instance, changes the tables at the same moment.
again() { # usage: again COMMAND…
    local tries=5
    until "$@"; do
        ((--tries)) || return 1
        sleep 0.2
    done
}

# All at once: there is no moment without rules, and none with half of them.
replace() { # usage: replace iptables|ip6tables RULES
    local jumps
    # Before the pipe: iptables-restore of the older tables holds their lock from its start.
    jumps=$(ours "$1" | without_jumps) &&
        printf '*mangle\n%s\n%s\nCOMMIT\n' "$jumps" "$2" | "$1-restore" --wait --noflush
}

take_away() { # usage: take_away iptables|ip6tables
    local found
    found=$(ours "$1") || return
    [[ $found ]] || return 0
    {
        printf '*mangle\n'
        without_jumps <<<"$found"
        sed -n 's/^-N /-F /p' <<<"$found"
        sed -n 's/^-N /-X /p' <<<"$found"
        printf 'COMMIT\n'
    } | "$1-restore" --wait --noflush
}

write() { # usage: write FILE TEXT
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "$2" >"$1.new"
    mv "$1.new" "$1"
}

look() {
    local address tables
    printf 'name %s\n' "$(hostname -s)"
    for address in "$@"; do
        if command -v ip >/dev/null; then
            { ip -o -4 route get "$address" 2>/dev/null || true; } | sed -nE 's/.* src ([0-9.]+).*/source \1/p'
        fi
    done
    for tables in $(families); do
        printf 'family %s\n' "$tables"
        ours "$tables" | sed "s/^/$tables /"
    done
    if ! has_systemd; then
        printf 'kept never\n'
    elif systemctl is-enabled --quiet cfiddle-firewall.service 2>/dev/null; then
        printf 'kept yes\n'
    else
        printf 'kept no\n'
    fi
}

set_rules() {
    local tables
    # The files first: what the machine will have when it starts is never older than what it has now.
    if has_systemd; then
        write "$kept/firewall.sh" "$1"
        write "$kept/iptables" "$3"
        write "$kept/ip6tables" "$4"
        write "$unit" "$2"
        systemctl daemon-reload
        systemctl enable --quiet cfiddle-firewall.service
    fi
    for tables in $(families); do
        if [[ $tables == iptables ]]; then again replace "$tables" "$3"; else again replace "$tables" "$4"; fi
    done
}

load() {
    local tables
    for tables in $(families); do again replace "$tables" "$(<"$kept/$tables")"; done
}

unset_rules() {
    local tables
    for tables in $(families); do again take_away "$tables"; done
    if [[ -e $unit ]]; then
        if has_systemd; then systemctl disable --quiet cfiddle-firewall.service; fi
        rm -f "$unit"
        if has_systemd; then systemctl daemon-reload; fi
    fi
    rm -rf "$kept"
}

main() {
    local what=$1
    shift
    case $what in
    look) look "$@" ;;
    set) set_rules "$@" ;;
    load) load ;;
    unset) unset_rules ;;
    esac
}

main "$@"
