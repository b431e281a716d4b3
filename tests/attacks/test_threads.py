"""Attack 16, outside of sandboxes: a user who starts threads without end on the users' node and in a plain job."""

from live import LiveCluster

MOST = 4096

# Threads, for they are counted as processes are, and weigh little.
BOMB = f"""
import threading
threading.stack_size(1 << 16)
held = threading.Event()
started = 0
try:
    while started < {MOST + 500}:
        threading.Thread(target=held.wait, daemon=True).start()
        started += 1
except RuntimeError as error:
    print(error)
print("started", started, flush=True)
"""


def test_user_starts_so_many_threads_and_no_more(cluster: LiveCluster) -> None:
    places = {
        "the users' node": cluster.user(["python3", "-c", BOMB], "test_user1"),
        "a job": cluster.user(["srun", "python3", "-c", BOMB], "test_user1"),
    }
    for place, said in places.items():
        started = int(said.ok().split()[-1])
        assert started < MOST, f"{place}: {said.output}"
        assert started > MOST / 2, f"{place}: others' are not counted: {said.output}"
