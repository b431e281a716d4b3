"""CFiddle in the users' image, with this package's ways to build and to run, through a process of its own.

The way through Slurm and sandboxes is tested on the cluster; what a compiler's sandbox has, in its image.
"""

import json
from typing import Any

import pytest

from containers import Container, Start

PROLOGUE = """
import json, os, tempfile, warnings
warnings.filterwarnings("ignore", module="cfiddle")
os.chdir(tempfile.mkdtemp())
from cfiddle import *
import cfiddle
from cfiddle.Builder import BuildFailure
from cfiddle.perfcount import UnknownPerformanceCounter
from delegate_function import *
from delegate_function.cfiddle import build_method, execution_method

here = SubprocessDelegate()
TEXT = r'''
#include <cfiddle.hpp>
extern "C"
int sum_up(int n) {
    volatile int sum = 0;
    start_measurement();
    for (int i = 0; i < n; i++) sum += i;
    int *pages = new int[1000 * 1024];
    for (int i = 0; i < 1000; i++) pages[i * 1024] = n;
    delete[] pages;
    end_measurement();
    return sum;
}
'''
"""


@pytest.fixture(scope="module")
def user(start_for_all: Start) -> Container:
    options = ["--entrypoint", "sleep", "--user", "1000:100", "--env", "HOME=/tmp", "--network", "none"]
    return start_for_all("user", "1d", options=options)


@pytest.fixture(scope="module")
def counting(start_for_all: Start) -> Container:
    """One that may ask for counters: of software's the kernel has all, of the CPU's perhaps none."""
    options = ["--entrypoint", "sleep", "--user", "1000:100", "--env", "HOME=/tmp", "--security-opt"]
    return start_for_all("user", "1d", options=[*options, "seccomp=unconfined"])


def say(container: Container, program: str) -> Any:
    """Run a program and return what its last line says."""
    output = container.run("python3", "-c", PROLOGUE + program, timeout_s=180)
    return json.loads(output.splitlines()[-1])


def test_builds_in_another_process_what_cfiddle_builds_here(user: Container) -> None:
    program = """
def look(executables):
    return [[e.asm("sum_up"), e.source("sum_up"), e.preprocessed("sum_up"), e.build_command,
             sorted(e.functions), e.get_build_parameters(), os.path.basename(e.lib)] for e in executables]

source, flags = code(TEXT), arg_map(OPTIMIZE=["-O0", "-O2"])
ours = build(source, flags, build_root="ours")
with cfiddle_config(Builder_type=build_method(here)):
    theirs = build(source, flags, build_root="theirs")
made = sorted({os.path.splitext(name)[1] for name in os.listdir(theirs[0].build_dir)})
same = json.dumps(look(ours)).replace("ours/", "theirs/") == json.dumps(look(theirs))
value = run(theirs, "sum_up", arg_map(n=10))[0].return_value
print(json.dumps([same, made, value, here.last_call.where, theirs[0].stack_frame("sum_up")]))
"""
    same, made, value, where, frame = say(user, program)
    assert same
    assert made == [".ii", ".s", ".so"], "no makefile that a compiler wrote"
    assert value == 45
    assert "n: (DW_OP_fbreg: " in frame
    assert where.startswith("hop 1 of 1 (subprocess on ")


def test_included_files_and_further_sources_travel(user: Container) -> None:
    program = """
os.makedirs("here/lib"), os.mkdir("beside"), os.chdir("here")
files = {"lib/a.h": '#include "../../beside/b.h"\\n', "../beside/b.h": "#define B 40\\n", "flags.txt": "-DF=2\\n",
         "lib/more.cpp": '#include "a.h"\\nextern "C" int more() { return B + F; }\\n',
         "lib/main.cpp": '#include <a.h>\\nextern "C" int more();\\n'
                         'extern "C" int main_one() {\\n return more();\\n}\\n'}
for name, text in files.items():
    open(name, "w").write(text)
with cfiddle_config(Builder_type=build_method(here, inputs=["flags.txt"])):
    built = build("lib/main.cpp", arg_map(MORE_SRC="lib/more.cpp", MORE_INCLUDES="-Ilib", MORE_CXXFLAGS="@flags.txt"))
    absolute = build(os.path.abspath("lib/main.cpp"), arg_map(MORE_SRC="lib/more.cpp", MORE_INCLUDES="-Ilib",
                     MORE_CXXFLAGS="@flags.txt"), build_root=os.path.abspath("elsewhere"))
print(json.dumps([run(e, "main_one")[0].return_value for e in (built, absolute)]))
"""
    assert say(user, program) == [42, 42]


def test_a_source_that_does_not_compile_is_cfiddles_own_failure_with_the_compilers_words(user: Container) -> None:
    program = """
with cfiddle_config(Builder_type=build_method(here)):
    try:
        build(code('#warning "\\x1b[31mred"\\nint wrong( {'))
    except BuildFailure as error:
        print(json.dumps(str(error)))
"""
    text = say(user, program)
    assert "make -R -f " in text
    assert "error: #warning" in text
    assert "\x1b" not in text


def test_a_rebuild_begins_anew_and_libraries_of_before_stay_otherwise(user: Container) -> None:
    program = """
names = []
with cfiddle_config(Builder_type=build_method(here)):
    for rebuild in (False, False, True):
        names.append(os.path.basename(build(code(TEXT), rebuild=rebuild)[0].lib).rpartition("_")[2])
print(json.dumps(names))
"""
    assert say(user, program) == ["0.so", "1.so", "2.so"]


def test_measurements_that_come_as_data_are_the_same_with_columns_for_who_asks(user: Container) -> None:
    program = """
executables = build(code(TEXT), arg_map(OPTIMIZE=["-O0", "-O2"]))
method = execution_method(here, columns=["node", "seconds", "cpu_model"], results="data")
with cfiddle_config(RunnerDelegate_type=method):
    results = run(executables, "sum_up", arg_map(n=[10, 1000]))
plain = run(executables, "sum_up", arg_map(n=[10, 1000]))
rows = results.as_df().to_dict("records")
values = [[result.return_value for result in measured] for measured in (results, plain)]
print(json.dumps([type(results).__name__, type(results[0]).__name__, values[0] == values[1],
    list(results.as_df().columns), list(plain.as_df().columns), rows[0]["node"] == os.uname().nodename,
    0 < rows[0]["seconds"] == rows[3]["seconds"], results.as_dicts()[0]["cpu_model"], [row["ET"] > 0 for row in rows]]))
"""
    kind, one, same, columns, plain, node, seconds, model, times = say(user, program)
    assert (kind, one, same) == ("InvocationResultsList", "InvocationResult", True)
    assert columns == [*plain, "node", "seconds", "cpu_model"]
    assert (node, seconds, model) == (True, True, None)
    assert times == [True] * 4


def test_what_a_function_makes_of_its_results_is_never_opened_as_more_than_text(user: Container) -> None:
    program = """
class Forger:
    def __init__(self, *arguments):
        pass
    def run(self):
        from delegate_function.experiment import Measured
        return FORGED

said = []
executable = build(code(TEXT))
objects, right = [Forger(), {"invocation": 0}], [0, [{"ET": "1"}], 1]
wrong = [[0, [{"ET": 1}], 1], [9, [], 1], [0, [["ET"]], 1], [0, "rows", 1]]
for FORGED in (*objects, right, *wrong):
    with cfiddle_config(RunnerDelegate_type=execution_method(here, results="data"), Invoker_type=Forger):
        try:
            run(executable, "sum_up", arg_map(n=1))
            said.append("taken")
        except ResultNotReturned as error:
            said.append("refused")
print(json.dumps(said))
"""
    assert say(user, program) == ["refused", "refused", "taken", *["refused"] * 4]


def test_exceptions_of_cfiddles_come_as_they_are_also_as_data(user: Container) -> None:
    program = """
said = []
executable = build(code(TEXT))
with cfiddle_config(RunnerDelegate_type=execution_method(here, results="data")):
    for function, arguments in (("no_such", {}), ("sum_up", {}), ("sum_up", {"n": 1, "m": 2}), ("sum_up", {"n": "x"})):
        try:
            run(executable, function, [arguments])
        except CFiddleException as error:
            said.append([type(error).__name__, str(error)])
print(json.dumps(said))
"""
    (first, text), *rest = say(user, program)
    assert first == "RunnerException"
    assert "Couldn't find Prototype for 'no_such'" in text
    assert [name for name, _ in rest] == ["MissingArgument", "UnusedArgument", "IncorrectArgumentType"]


def test_measurements_of_a_node_that_says_it_has_more_cpus_than_it_has_are_void(user: Container) -> None:
    program = """
os.mkdir("bin")
with open("bin/srun", "w") as file:
    file.write('#!/bin/bash\\nwhile [[ $1 != -- ]]; do shift; done\\nshift\\n'
               'export SLURM_JOB_ID=17 SLURM_CPUS_ON_NODE=4096\\nexec "$@"\\n')
os.chmod("bin/srun", 0o755)
os.environ["PATH"] = os.path.abspath("bin") + ":" + os.environ["PATH"]
with warnings.catch_warnings(record=True) as caught, cfiddle_config(
    RunnerDelegate_type=execution_method(SlurmDelegate())
):
    results = run(build(code(TEXT)), "sum_up", arg_map(n=[10, 20]))
warned = [str(warning.message) for warning in caught if warning.category is OversubscribedNode]
print(json.dumps([warned, [row["void"] for row in results.as_dicts()]]))
"""
    (warning,), voids = say(user, program)
    assert " and says to Slurm that it has 4096: these measurements are void" in warning
    assert len(voids) == 2
    assert all("CPUs and says to Slurm that it has 4096" in void for void in voids)


COUNT = """
said = []
executable = build(code(TEXT))
for chain in (here, TrivialDelegate()):
    for names in (["perf::INSTRUCTIONS"], ["no such counter"], ["perf::PAGE-FAULTS"]):
        with cfiddle_config(RunnerDelegate_type=execution_method(chain)):
            try:
                row = run(executable, "sum_up", arg_map(n=100000), perf_counters=names)[0].get_results()[0]
                said.append([int(row[name]) for name in names])
            except CountersUnavailable as error:
                said.append([error.details["reason"], str(error), isinstance(error, CFiddleException)])
            except UnknownPerformanceCounter as error:
                said.append(str(error))
print(json.dumps(said))
"""


def test_counters_that_the_system_calls_do_not_allow_are_the_policy_s(user: Container) -> None:
    said = say(user, COUNT)
    for hardware, unknown, software in (said[:3], said[3:]):
        for reason, text, is_cfiddles in (hardware, software):
            assert reason.startswith("policy: ")
            assert reason in text
            assert is_cfiddles
        assert unknown == "Failed to add performance counter 'no such counter'."


def test_counters_count_where_there_are_any_and_a_cpu_without_is_the_machine_s(counting: Container) -> None:
    said = say(counting, COUNT)
    for hardware, unknown, software in (said[:3], said[3:]):
        # On a machine that has counters a loop of 100000 takes more instructions than that.
        assert hardware[0] > 100000 if len(hardware) == 1 else hardware[0].startswith("machine: ")
        assert unknown == "Failed to add performance counter 'no such counter'."
        assert software[0] >= 900, "of the 1000 pages that it writes to"
