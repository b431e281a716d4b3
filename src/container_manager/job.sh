#!/bin/bash
# The batch job of `cmrun`: Slurm runs it on the first of the job's nodes, in the job's working directory, and keeps what it
# says in cmlogs/JOB.log. usage: RETRIES MPI COMMAND…
set -Eeuo pipefail

say() { printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

main() {
    local tries=$(($1 + 1)) mpi=$2 try=$((${SLURM_RESTART_COUNT:-0} + 1)) status=0 options
    shift 2
    ((try == 1)) || say "its node died"
    if ((try > tries)); then
        say "not tried again: $tries of $tries tries are used up"
        exit 1
    fi
    say "try $try of $tries on $SLURM_JOB_NODELIST"
    # Slurm itself has no limit: it would try again for ever.
    ((try < tries)) || scontrol update "JobId=$SLURM_JOB_ID" Requeue=0 || say "the next try will end itself"
    options=("--mpi=$mpi" --open-mode=append "--output=cmlogs/%j.%t.out" "--error=cmlogs/%j.%t.err")
    [[ $mpi == none ]] || options+=(--kill-on-bad-exit=1)
    srun "${options[@]}" -- "$@" || status=$?
    say "ended with exit status $status"
    exit "$status"
}

main "$@"
