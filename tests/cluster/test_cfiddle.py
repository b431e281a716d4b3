"""CFiddle on the cluster: what is built in a sandbox, what a measurement says of its node, and what it cannot say."""

import json
from typing import Any

from live import LiveCluster

PROLOGUE = """
import json, os, sys, tempfile, warnings
warnings.filterwarnings("ignore", module="cfiddle")
directory = tempfile.TemporaryDirectory(dir=os.path.expanduser("~"))
os.chdir(directory.name)
from cfiddle import *
from cfiddle.Builder import BuildFailure
from delegate_function import *
from delegate_function.cfiddle import build_method, execution_method

CODE = r'''
#include <cfiddle.hpp>
extern "C"
int sum_up(int n) {
    volatile int sum = 0;
    start_measurement();
    for (int i = 0; i < n; i++) sum += i;
    end_measurement();
    return sum;
}
'''

def chain(**sandbox):
    return SlurmDelegate(SandboxDelegate(**sandbox), partition="shared")
"""


def say(cluster: LiveCluster, program: str, *, timeout_s: float = 90) -> Any:
    """Run a program as jovyan and return what its last line says."""
    return json.loads(cluster.python(PROLOGUE + program, timeout_s=timeout_s).ok().splitlines()[-1])


def test_what_a_sandbox_built_is_looked_at_and_measured_like_what_was_built_here(cluster: LiveCluster) -> None:
    program = """
method = build_method()
with cfiddle_config(Builder_type=method, RunnerDelegate_type=execution_method(columns=["node", "cpu_model", "wall_s"])):
    executables = build(code(CODE), arg_map(OPTIMIZE=["-O0", "-O2"]))
    results = run(executables, "sum_up", arg_map(n=[10, 1000]))
built = method.delegate.last_call
[o0, o2] = [executable.asm("sum_up") for executable in executables]
print(json.dumps([built.where, built.node["image"], o0 != o2, executables[0].source("sum_up").strip(),
                  [result.return_value for result in results], results.as_dicts()[0]]))
"""
    where, image, differ, source, values, row = say(cluster, program)
    assert where.startswith("hop 2 of 2 (sandbox on ")
    assert image.startswith("sha256:")
    assert differ
    assert source.startswith("int sum_up(int n) {")
    assert values == [45, 499500] * 2
    assert row["node"] in cluster.workers
    assert isinstance(row["cpu_model"], str)
    assert 0 < row["wall_s"] < 60
    assert float(row["ET"]) > 0


def test_a_hostile_source_reaches_nothing_and_an_endless_one_is_ended(cluster: LiveCluster) -> None:
    program = """
with open("secret.h", "w") as file:
    file.write("int the_secret;")
said = []
for text, method in (
    ('#include "secret.h"', build_method()),
    ('#include "secret.h"', build_method(includes=False)),
    ('#include "%s/secret.h"' % directory.name, build_method()),
    ('#include "/dev/zero"', build_method(chain(profile="build", seconds=1))),
):
    with open("main.cpp", "w") as file:
        file.write(text + "\\n")
    try:
        with cfiddle_config(Builder_type=method):
            build("main.cpp")
        said.append(["built", ""])
    except CFiddleException as error:
        said.append([type(error).__name__, str(error)])
print(json.dumps(said))
"""
    own, *foreign, endless = say(cluster, program)
    assert own[0] == "built", "what the caller's own source names travels with it"
    for kind, text in foreign:
        assert kind == "BuildFailure"
        assert "secret.h: No such file or directory" in text
    assert endless[0] == "LimitExceeded", endless
    assert "(sandbox on " in endless[1]


def test_counters_are_had_or_their_reason_is(cluster: LiveCluster) -> None:
    program = """
with cfiddle_config(RunnerDelegate_type=execution_method(chain())):
    try:
        results = run(build(code(CODE)), "sum_up", arg_map(n=100000), perf_counters=["perf::INSTRUCTIONS"])
        print(json.dumps(["counted", int(results[0].get_results()[0]["perf::INSTRUCTIONS"])]))
    except CountersUnavailable as error:
        print(json.dumps([error.details["reason"], str(error)]))
"""
    reason, found = say(cluster, program)
    if reason == "counted":
        assert found > 100000
    else:
        assert reason.startswith(("policy: ", "kernel: ", "machine: "))
        assert "no counter perf::INSTRUCTIONS here, " + reason in found


def test_measurements_of_unlike_nodes_are_warned_of_once(cluster: LiveCluster) -> None:
    program = """
executable = build(code(CODE))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for profile in ("default", "default", "build", "default", "build"):
        with cfiddle_config(RunnerDelegate_type=execution_method(chain(profile=profile))):
            run(executable, "sum_up", arg_map(n=10))
print(json.dumps([str(one.message) for one in caught if one.category is UnlikeNodes]))
"""
    (text,) = say(cluster, program)
    assert "where this process measured before: image is sha256:" in text
