#!/usr/bin/env bash
# Deploy the stack: secrets, configuration and services. What is needed before it is made first; what is there stays.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

exec ./invoke deploy "$@"
