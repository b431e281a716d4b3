#!/usr/bin/env python3
"""See that CFiddle measures on this cluster: here, in a Slurm job, and in a sandbox on a worker.

Run it on the userhost, as any user: `python3 test_cfiddle.py`. It builds a small function, measures it through three
chains, prints what passed and how long it took, and ends with status 0 if all did.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delegate_function import DelegateChain, SandboxDelegate, SlurmDelegate, TestClass, TrivialDelegate
from delegate_function.cfiddle import execution_method
from delegate_function.delegates import BaseDelegate

CHAINS: dict[str, Callable[[], BaseDelegate]] = {
    "Trivial": TrivialDelegate,
    "Slurm": SlurmDelegate,
    "Slurm, then Sandbox": DelegateChain(SlurmDelegate, SandboxDelegate),
}
SIZES = [10_000, 1_000_000]
CODE = """
#include <cfiddle.hpp>

extern "C"
int sum_up(int count) {
    volatile int sum = 0;
    start_measurement();
    for (int i = 0; i < count; i++) {
        sum += i & 3;
    }
    end_measurement();
    return sum;
}
"""


def expected(count: int) -> int:
    """Return what the function returns."""
    return sum(i & 3 for i in range(count))


def measure(chain: BaseDelegate, executables: Any) -> str:
    """Measure the function through a chain; return what was found, or raise AssertionError."""
    import cfiddle

    greeting = io.StringIO()
    with contextlib.redirect_stdout(greeting):
        process = chain.invoke(TestClass(), "hello")
    assert greeting.getvalue().startswith("hello from "), "its output did not come"
    assert (process == os.getpid()) == (not chain.compile()), f"it ran in process {process}, and this is {os.getpid()}"
    with cfiddle.cfiddle_config(RunnerDelegate_type=execution_method(chain)):
        results = cfiddle.run(executables, "sum_up", cfiddle.arg_map(count=SIZES))
    assert len(results) == len(executables) * len(SIZES), f"{len(results)} results"
    times = {}
    for result in results:
        count = result.invocation.arguments["count"]
        assert result.return_value == expected(count), f"sum_up({count}) returned {result.return_value}"
        times[count] = float(result.get_results()[0]["ET"])
    assert 0 < times[min(SIZES)] < times[max(SIZES)], f"the larger size took no longer: {times}"
    info = chain.last_call
    assert info is not None
    node = f" on {info.hops[-1]['node']}" if info.hops else ""
    where = f"{info.where}, job {info.job_id}{node}" if info.job_id else info.where
    return f"{max(SIZES)} steps in {times[max(SIZES)] * 1000:.2f} ms; ran in {where}"


def main() -> int:
    """Try all chains and return the exit status."""
    warnings.filterwarnings("ignore", module="cfiddle")  # 0.6.1 uses what pandas and setuptools are giving up
    failed = 0
    with tempfile.TemporaryDirectory(prefix="test_cfiddle-", dir=Path.home()) as directory:
        os.chdir(directory)
        started = time.monotonic()
        import cfiddle

        cfiddle.enable_debug()
        executables = cfiddle.build(cfiddle.code(CODE), cfiddle.arg_map(OPTIMIZE=["-O0", "-O2"]))
        print(f"built {len(executables)} executables in {time.monotonic() - started:.1f} s", flush=True)
        for name, chain in CHAINS.items():
            started = time.monotonic()
            try:
                found, verdict = measure(chain(), executables), "passed"
            except Exception as error:
                failed += 1
                found, verdict = f"{type(error).__name__}: {error}", "FAILED"
                if "--verbose" in sys.argv:
                    traceback.print_exc()
            print(f"{verdict}  {name:20} {time.monotonic() - started:6.2f} s  {found}", flush=True)
        os.chdir("/")
    print(f"{len(CHAINS) - failed} of {len(CHAINS)} chains passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
