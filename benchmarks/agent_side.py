"""Make sandboxes and destroy them, as fast as this worker can: what the rate of calls is compared with.

Each is destroyed as soon as it could take a call (connected), or has imported what its profile says, too (ready).

Run in the agent's container, whose own code it uses. Prints how many seconds the given number took, in so many threads
as the worker has CPUs.
usage: python3 - COUNT connected|ready
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.engine import Engine
from agent.policy import load, own_images
from agent.sandboxes import Sandboxes, State


def main():
    """Do so."""
    profile = load(Path("/etc/cfiddle/policy.yaml"), images=own_images(os.environ)).profiles["default"]
    sandboxes = Sandboxes(Engine("/var/run/docker.sock"), Path("/run/cfiddle-sandboxes"), cgroups=Path("/run/cgroup"))
    never, wanted = os.eventfd(0), State(sys.argv[2])

    def make_and_destroy(_):
        sandbox = sandboxes.create(profile, profile.limits, cpus="")
        try:
            sandbox.start()
            if not sandbox.wait_until(wanted, timeout_s=60, wake=never):
                raise SystemExit(f"a sandbox is not {wanted.value} after 60 s")
        finally:
            sandboxes.destroy(sandbox)

    start = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(make_and_destroy, range(int(sys.argv[1]))))
    print(time.monotonic() - start)


if __name__ == "__main__":
    main()
