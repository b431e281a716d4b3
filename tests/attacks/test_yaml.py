"""Attack 2: a description of delegates that carries Python or grows without end is refused at once."""

import pytest

from live import LiveCluster

LOAD = """
import resource, sys, time
from delegate_function import DelegateGenerator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
try:
    DelegateGenerator(yaml=sys.argv[1])
except Exception as error:
    print("refused:", type(error).__name__)
else:
    print("accepted")
print(int((time.monotonic() - start) * 1000), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""

# Small as text; what reads it grows it nine times with every line.
BOMB = "\n".join(
    ["version: 0.1", "sequence:", "  - type: TrivialDelegate", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7)]
)
CASES = {
    "command": "version: 0.1\nsequence:\n  - type: !!python/object/apply:os.system ['touch ~/owned']\n",
    "object": "version: 0.1\nsequence: !!python/object/new:os.system ['touch /tmp/owned']\n",
    "name": "version: 0.1\nsequence:\n  - !!python/name:os.system\n",
    "module": "version: 0.1\nsequence:\n  - type: os.system\n",
    "dunder": "version: 0.1\nsequence:\n  - type: __import__\n",
    "bomb": BOMB,
    "itself": "version: 0.1\nsequence: &a [*a]\n",
    "deep": "version: 0.1\nsequence: " + "[" * 20000,
    "huge": "version: 0.1\nsequence:\n" + "  - type: TrivialDelegate\n" * 4000,
    "version": "version: 99\nsequence:\n  - type: TrivialDelegate\n",
    "unknown": "version: 0.1\nsequence:\n  - type: TrivialDelegate\n    no_such_argument: 1\n",
}


@pytest.mark.parametrize("case", CASES)
def test_description_is_refused_at_once(cluster: LiveCluster, case: str) -> None:
    try:
        result = cluster.user(["python3", "-c", LOAD, CASES[case]], "test_user1", timeout_s=60)
        owned = cluster.user("ls -d ~/owned /tmp/owned", "test_user1").stdout
    finally:
        cluster.user("rm -f ~/owned /tmp/owned", "test_user1").ok()
    assert owned == ""
    verdict, numbers = result.ok().splitlines()
    milliseconds, megabytes = map(int, numbers.split())
    assert verdict.startswith("refused:"), verdict
    assert milliseconds < 2000
    assert megabytes < 64
