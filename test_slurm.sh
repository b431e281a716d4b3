#!/usr/bin/env bash
# Submit a spread of jobs as an ordinary user, show the queue while they run, and say which did what they should.
# Ends by itself; the exit status is 0 if all passed. A terminal sees the live queue, anything else plain lines.
set -Eeuo pipefail

readonly DEADLINE_S=600

declare -A ids=() expected=() # by the name of a test: the job, and how it must end
tests=()
directory=
failures=0

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

submit() { # usage: submit NAME EXPECTED-STATE:EXIT-CODE SBATCH-OPTION… -- COMMAND
    local name=$1 options=(--parsable --time=5 --output="$directory/%x.%a")
    expected[$name]=$2
    shift 2
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    ids[$name]=$(sbatch "${options[@]}" --job-name="test-$name" --wrap="$2")
    tests+=("$name")
}

all_ids() {
    local IFS=,
    echo "${ids[*]}"
}

queue() { squeue --noheader --array --jobs="$(all_ids)" --format="$1" 2>/dev/null || true; }

report() { # usage: report NAME STATUS [DETAIL]
    if (($2 == 0)); then
        printf 'passed  %s\n' "$1"
    else
        printf 'FAILED  %s: %s\n' "$1" "${3-}"
        failures=$((failures + 1))
    fi
}

# shellcheck disable=SC2016 # the job's shell expands what stands between single quotes
submit_all() {
    local nodes=$1
    submit one-job COMPLETED:0 -- 'hostname'
    submit array COMPLETED:0 --array=1-4 --partition=shared -- 'echo "member $SLURM_ARRAY_TASK_ID"'
    submit every-node COMPLETED:0 --nodes="$nodes" --ntasks-per-node=1 -- 'srun hostname'
    submit shared COMPLETED:0 --partition=shared --ntasks=1 -- 'sleep 2; echo "$SLURM_CPUS_ON_NODE"'
    submit fails-on-purpose FAILED:3 -- 'exit 3'
    submit killed-on-purpose FAILED:9 --partition=shared --ntasks=1 -- 'kill -9 $$'
    submit is-cancelled CANCELLED:0 --partition=shared --ntasks=1 -- 'sleep 600'
    submit after-one-job COMPLETED:0 --dependency="afterok:${ids["one-job"]}" -- 'echo after'
    submit never-starts CANCELLED:0 --dependency="afterok:${ids["fails-on-purpose"]}" --kill-on-invalid-dep=yes -- 'echo wrong'
}

watch_queue() {
    local line last='' drawn=0 rows
    while [[ -n $(queue %i) ]]; do
        ((SECONDS < DEADLINE_S)) || die "jobs are still in the queue after $DEADLINE_S seconds: $(queue '%i %T %r' | tr '\n' ';')"
        if [[ $(squeue --noheader --jobs="${ids["is-cancelled"]}" --format=%T 2>/dev/null) == RUNNING ]]; then scancel "${ids["is-cancelled"]}"; fi
        if [[ -t 1 ]]; then
            rows=$(squeue --array --jobs="$(all_ids)" 2>/dev/null || true)
            if ((drawn > 0)); then printf '\e[%dA\e[J' "$drawn"; fi
            printf '%s\n' "$rows"
            drawn=$(wc -l <<<"$rows")
        else
            line=$(queue %T | sort | uniq -c | awk '{ printf "%s%d %s", (NR > 1 ? ", " : ""), $1, tolower($2) }')
            if [[ $line != "$last" ]]; then printf '%3d s: %s\n' "$SECONDS" "${line:-all done}"; fi
            last=$line
        fi
        sleep 0.5
    done
}

ending() { # usage: ending JOB: STATE:CODE of the job and its array members, or nothing while the records are not there
    sacct --noheader --parsable2 --allocations --jobs="$1" --format=State,ExitCode | awk -F'[|:]' '
        { split($1, state, " "); ending = state[1] ":" (state[1] == "FAILED" && $3 > 0 ? $3 : $2) }
        state[1] ~ /PENDING|RUNNING|COMPLETING/ { unfinished = 1 }
        { seen[ending] }
        END { if (!unfinished) for (ending in seen) print ending }'
}

check_all() {
    local name actual deadline=$((SECONDS + 30)) nodes=$1
    for name in "${tests[@]}"; do
        actual=
        until [[ -n $actual ]] || ((SECONDS > deadline)); do
            actual=$(ending "${ids[$name]}")
            [[ -n $actual ]] || sleep 0.5
        done
        if [[ $actual == "${expected[$name]}" ]]; then
            report "$name (job ${ids[$name]})" 0
        else
            report "$name (job ${ids[$name]})" 1 "is ${actual:-not on record}, not ${expected[$name]}; $(cat "$directory/test-$name".* 2>/dev/null | tail -n 3)"
        fi
    done
    report "every member of the array wrote its output" "$(($(sort -u "$directory"/test-array.* | wc -l) != 4))" "see sacct"
    report "the job on every node ran on $nodes" "$(($(sort -u "$directory"/test-every-node.* | wc -l) != nodes))" \
        "it ran on $(sort -u "$directory"/test-every-node.* | tr '\n' ' ')"
}

main() {
    (($(id -u) != 0)) || die "root submits no jobs; run this as an ordinary user"
    local nodes
    nodes=$(sinfo --noheader --Node --partition=normal --responding --states=idle,mixed,allocated,completing --format=%N | sort -u | wc -l)
    ((nodes > 0)) || die "no node takes jobs: $(sinfo --noheader --format='%N %T %E' | tr '\n' ';')"
    directory=$(mktemp -d "$HOME/.test_slurm.XXXXXX")
    trap 'if ((${#ids[@]} > 0)); then scancel "${ids[@]}" 2>/dev/null || true; fi; rm -rf "$directory"' EXIT
    printf 'submitting jobs to %d nodes\n' "$nodes"
    report "srun runs as user $(id -un)" "$(($(srun --quiet --ntasks=1 --time=5 id -u) != $(id -u)))" "it runs as somebody else"
    submit_all "$nodes"
    watch_queue
    check_all "$nodes"
    ((failures == 0)) || die "$failures of $((${#tests[@]} + 3)) tests failed"
    printf 'all %d tests passed in %d s\n' "$((${#tests[@]} + 3))" "$SECONDS"
}

main "$@"
