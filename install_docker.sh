#!/usr/bin/env bash
# Install Docker Engine if this machine has none, and start it. Safe to run again. Debian 12/13, Ubuntu 22.04 and later.
set -Eeuo pipefail

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

wait_for() { # usage: wait_for SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || die "timed out: $*"
        sleep 0.2
    done
}

answers() { /usr/bin/docker --host unix:///var/run/docker.sock version; }

install_engine() {
    if ! command -v apt-get >/dev/null; then
        die "no Docker Engine here, and no apt-get to install one with: install Docker Engine by hand"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # Newer releases have the client, and what it builds images with, in packages of their own.
    local packages=(ca-certificates docker.io iptables) package
    for package in docker-buildx docker-cli; do
        if apt-cache show "$package" >/dev/null 2>&1; then packages+=("$package"); fi
    done
    apt-get install -q -y --no-install-recommends "${packages[@]}"
}

main() {
    ((EUID == 0)) || die "run it as root, or with sudo"
    if [[ ! -x /usr/bin/dockerd && ! -x /usr/sbin/dockerd ]]; then install_engine; fi
    if answers >/dev/null 2>&1; then return; fi
    if [[ -d /run/systemd/system ]]; then
        systemctl enable --now docker
    else
        # Without an init system nobody else starts it. It outlives this script and its terminal.
        local log=${DOCKERD_LOG:-/var/log/dockerd.log}
        PATH=/usr/local/sbin:/usr/sbin:/sbin:$PATH setsid --fork dockerd >>"$log" 2>&1 </dev/null
    fi
    wait_for 60 answers
}

main "$@"
