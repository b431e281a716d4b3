"""What a benchmark measures as a user, in one Python process on the users' node that takes orders on standard input.

Each line in is JSON, `[name, *arguments]` of a function below; each line out is JSON, what it returned.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time

from cfiddle import arg_map, build, cfiddle_config, code, run

from delegate_function import DelegateChain, Executor, SandboxDelegate, SlurmDelegate, lease
from delegate_function.cfiddle import execution_method

SOURCE = """
#include <cfiddle.hpp>
extern "C" int nothing(int n) {
    start_measurement();
    volatile int sum = 0;
    for (int i = 0; i < n; i++) sum += i;
    end_measurement();
    return sum;
}
"""
cluster = DelegateChain(SlurmDelegate, SandboxDelegate)()
held = lease(cluster, seconds=1200, idle_s=600)
built = {}


class Task:
    """What is called: nothing, something that comes back as it is, or when it ran."""

    def nothing(self):
        return None

    def echo(self, data):
        return data

    def kernel(self, program, *arguments):
        path = f"{os.getcwd()}/kernel"
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o755)) as file:
            file.write(program)
        return float(subprocess.check_output([path, *map(str, arguments)]))

    def when(self):
        return time.time()


def timed(function, *arguments):
    """Return how many seconds a call took."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def empty():
    """Return the seconds of an empty call through Slurm and a sandbox."""
    return timed(cluster.invoke, Task(), "nothing")


def without_sandbox():
    """Return the seconds of an empty call through Slurm alone."""
    return timed(SlurmDelegate().invoke, Task(), "nothing")


def srun(*command):
    """Return the seconds of a command under srun."""
    return timed(subprocess.check_call, ["srun", *command])


def in_lease():
    """Return the seconds of an empty call within a lease."""
    return timed(held.invoke, Task(), "nothing")


def end_lease():
    """Give the lease back."""
    held.close()


def local_run():
    """Return the seconds of a run of CFiddle's in a process here."""
    return _run()


def cluster_run():
    """Return the seconds of the same run on the cluster."""
    with cfiddle_config(RunnerDelegate_type=execution_method(cluster)):
        return _run()


def _run():
    if not built:
        built["it"] = build(code(SOURCE))
    return timed(lambda: run(built["it"], "nothing", arg_map(n=[1])))


def calls_through_executor(count):
    """Return how many seconds so many empty calls took, and how many failed."""
    start = time.perf_counter()
    with Executor() as executor:
        futures = [executor.submit(Task().nothing) for _ in range(count)]
        failed = sum(future.exception() is not None for future in futures)
    return time.perf_counter() - start, failed


def gap(node):
    """Return the seconds from the end of a call in one job to the beginning of one in the next, on the same node."""
    times = []
    chain = SlurmDelegate(SandboxDelegate(), nodelist=node)
    threads = [threading.Thread(target=lambda: times.append(chain.invoke(Task(), "when"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(times)
    return second - first


def bulk(size):
    """Return the seconds of a call with so many bytes in and out."""
    return timed(cluster.invoke, Task(), "echo", os.urandom(size))


def bulk_cat(size):
    """Return the seconds of `cat` under srun with so many bytes in and out."""
    data = os.urandom(size)
    return timed(lambda: subprocess.run(["srun", "cat"], input=data, stdout=subprocess.PIPE, check=True))


def hold_for_kernel(node, program):
    """Hold a node to run a program on it."""
    global held
    held = lease(SlurmDelegate(SandboxDelegate(), nodelist=node), seconds=1800, idle_s=600)
    built["kernel"] = base64.b64decode(program)


def kernel(*arguments):
    """Return the nanoseconds that the program measures in a sandbox."""
    return held.invoke(Task(), "kernel", built["kernel"], *arguments)


def main():
    """Obey."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
