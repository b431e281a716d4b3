#!/usr/bin/env bash
# Build the images and bring them to every machine of the cluster; only what is missing is built, and only missing layers travel.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

exec ./invoke distribute "$@"
