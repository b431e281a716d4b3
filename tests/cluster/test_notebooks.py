"""The notebooks that each new home has, run top to bottom as a student would."""

import json
import re
import uuid
from collections.abc import Iterator

import pytest

from live import PATIENCE, ROOT, LiveCluster

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SHORT_S = 30
PICTURES = {"comparing-flags.ipynb": 2, "containers.ipynb": 2, "first-experiment.ipynb": 1, "many-experiments.ipynb": 1}
SAID = {
    "comparing-flags.ipynb": [r"150 measurements on c\d", r"-O0 .* against -O2: .* slower"],
    "containers.ipynb": [
        "task2.py",
        r"my_task_container_\d+ +running",
        r"epoch 1000, loss 0\.1",
        r"deleted all not running containers: \['my_task_container_",
    ],
    "first-experiment.ipynb": [r"\d+ invocations, on c\d"],
    "many-experiments.ipynb": ["15 of 15 are done", r"measured on c\d", "failed: division by zero", "was cancelled"],
    "marking-a-class.ipynb": [
        r"ada +6 +6",
        r"bob +4 +6",
        r"eve +0 +6",
        r"joe +0 +6",
        r"kim +0 +6",
        "ada +4 +4",
        "eve +0",
    ],
}
RUN = """
import json, sys, nbclient, nbformat

notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=120).execute()
print(json.dumps([cell.get("outputs", []) for cell in notebook.cells]))
"""


@pytest.fixture
def folder(cluster: LiveCluster) -> Iterator[str]:
    """Give a directory of jovyan's with a fresh copy of the notebooks."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.user(f"cp -r /etc/skel/notebooks ~/{name}").ok()
    yield name
    cluster.user(f"rm -rf ~/{name}").ok()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_to_its_end_soon_without_a_warning(cluster: LiveCluster, folder: str, name: str) -> None:
    result = cluster.user(
        ["sh", "-c", 'cd ~/"$1" && exec python3 -c "$2" "$3"', "sh", folder, RUN, name], timeout_s=180
    )
    assert result.exit_status == 0, re.sub(r"\x1b\[[0-9;]*m", "", result.output)[-3000:]
    outputs = [output for cell in json.loads(result.stdout.splitlines()[-1]) for output in cell]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES.get(name, 0)
    text = "\n".join(str(output.get("text") or output.get("data", {}).get("text/plain")) for output in outputs)
    for expected in SAID[name]:
        assert re.search(expected, text), f"{expected} is not in:\n{text}"
    assert result.seconds < SHORT_S * PATIENCE
