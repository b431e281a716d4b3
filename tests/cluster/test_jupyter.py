"""JupyterLab in a real browser: log in with the token, run the notebook to its end, see the plot."""

import json
import re
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

import browser
from cfiddle_cluster import userhost
from live import PATIENCE, ROOT, LiveCluster, wait_until

SCREENSHOT = ROOT / "test-output" / "jupyterlab.png"
NOTEBOOK_TIMEOUT_S = 180


@pytest.fixture
def folder(cluster: LiveCluster) -> Iterator[str]:
    """Give a directory of jovyan's with a fresh copy of the notebook."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.user(f"mkdir ~/{name} && cp /etc/skel/notebooks/first-experiment.ipynb ~/{name}/").ok()
    yield name
    for session in json.loads(_ask(cluster, "/api/sessions")):
        if session["path"].startswith(name):
            _ask(cluster, f"/api/sessions/{session['id']}", "DELETE")
    cluster.user(f"rm -rf ~/{name}").ok()


def _log_in(page: Page, cluster: LiveCluster) -> None:
    page.goto(f"{userhost.address(cluster.config)}/lab")
    page.get_by_label("Password or token:").fill(cluster.state.secret("jupyter-token"))
    page.get_by_role("button", name="Log in", exact=True).click()


def _ask(cluster: LiveCluster, path: str, method: str = "GET") -> bytes:
    address, token = userhost.address(cluster.config), cluster.state.secret("jupyter-token")
    request = urllib.request.Request(address + path, headers={"Authorization": f"token {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return bytes(answer.read())


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_first_experiment_runs_to_its_end_in_a_browser_and_shows_the_plot(cluster: LiveCluster, folder: str) -> None:
    with browser.page() as page:
        page.set_default_timeout(60_000 * PATIENCE)
        _log_in(page, cluster)
        page.goto(f"{userhost.address(cluster.config)}/lab/tree/{folder}/first-experiment.ipynb?reset")
        expect(page.locator(".jp-Notebook-cell").first).to_be_visible(timeout=60_000 * PATIENCE)
        # Without a kernel, Lab would ask which one to run it on.
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000 * PATIENCE)
        page.get_by_text("Run", exact=True).first.click()
        page.get_by_text("Run All Cells", exact=True).click()

        def has_run() -> Any:
            page.keyboard.press("Control+s")
            page.wait_for_timeout(1000)
            notebook = json.loads(_ask(cluster, f"/api/contents/{folder}/first-experiment.ipynb"))["content"]
            errors = [output for output in _outputs(notebook) if output["output_type"] == "error"]
            assert not errors, "\n".join(errors[0]["traceback"])
            code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]
            return notebook if all(cell["execution_count"] for cell in code) else None

        try:
            notebook = wait_until(has_run, timeout_s=NOTEBOOK_TIMEOUT_S, what="every cell of the notebook has run")
        finally:
            _keep(page, SCREENSHOT)
        assert any("image/png" in output.get("data", {}) for output in _outputs(notebook))

        plot = page.locator(".jp-OutputArea img").last
        for _ in range(20):
            if plot.count() and plot.is_visible():
                break
            page.locator(".jp-Notebook").first.hover()
            page.mouse.wheel(0, 500)
            page.wait_for_timeout(200)
        plot.scroll_into_view_if_needed()
        expect(plot).to_be_visible()
        assert plot.evaluate("image => image.naturalWidth") > 300
        page.wait_for_timeout(500)
        _keep(page, SCREENSHOT)


def _keep(page: Page, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    page.screenshot(path=path)


OTHER = "test_user2"
WAITING = """
import time
from delegate_function import SandboxDelegate, SlurmDelegate, progress

class Steps:
    def run(self):
        for step in range(50):
            progress(step, 50)
            time.sleep(0.1)
        print("the end")

SlurmDelegate(SandboxDelegate()).invoke(Steps(), "run")
"""


@pytest.fixture
def busy(cluster: LiveCluster) -> Iterator[None]:
    """Let another user's jobs have all workers."""
    for worker in cluster.workers:
        cluster.wait_until_runs(cluster.sbatch("sleep 300", OTHER, "-w", worker, "-t", "10"))
    yield
    cluster.user(f"scancel -u {OTHER}", OTHER)


def _run_cell(page: Page, cluster: LiveCluster, folder: str, source: str) -> None:
    """Open a notebook of one cell in the browser and run it."""
    cell = {"cell_type": "code", "execution_count": None, "id": "one", "metadata": {}, "outputs": [], "source": source}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": [cell]}
    cluster.user(f"cat >~/{folder}/waiting.ipynb", input=json.dumps(notebook)).ok()
    page.set_default_timeout(60_000 * PATIENCE)
    _log_in(page, cluster)
    page.goto(f"{userhost.address(cluster.config)}/lab/tree/{folder}/waiting.ipynb?reset")
    expect(page.locator(".jp-Notebook-cell").first).to_be_visible(timeout=60_000 * PATIENCE)
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000 * PATIENCE)
    page.get_by_text("Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).click()


def _said(page: Page, cluster: LiveCluster, folder: str) -> list[Any]:
    """Save the notebook; return its outputs but those that hold nothing."""
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1000)
    outputs = _outputs(json.loads(_ask(cluster, f"/api/contents/{folder}/waiting.ipynb"))["content"])
    return [output for output in outputs if output.get("data") != {}]


def test_waiting_call_shows_its_place_then_its_progress_then_nothing(
    cluster: LiveCluster, folder: str, busy: None
) -> None:
    with browser.page() as page:
        _run_cell(page, cluster, folder, WAITING)
        output = page.locator(".jp-OutputArea")
        try:
            expect(output).to_contain_text(re.compile(r"job \d+ waits: 1st of 1"), timeout=40_000 * PATIENCE)
            _keep(page, SCREENSHOT.with_name("waiting.png"))
            cluster.user(f"scancel -u {OTHER}", OTHER).ok()
            expect(output).to_contain_text(
                re.compile(r"job \d+ runs on \w+ \(\d+ s\), \d+ of 50"), timeout=40_000 * PATIENCE
            )
            assert output.locator("progress").get_attribute("max") == "50"
            _keep(page, SCREENSHOT.with_name("running.png"))
            expect(output).to_have_text("the end", timeout=40_000 * PATIENCE)
        finally:
            _keep(page, SCREENSHOT.with_name("waited.png"))
        [said] = _said(page, cluster, folder)
        assert said["text"] in ("the end\n", ["the end\n"])


@pytest.mark.parametrize("runs", [False, True], ids=["waits", "runs"])
def test_interrupted_kernel_cancels_the_job(cluster: LiveCluster, folder: str, busy: None, runs: bool) -> None:
    if runs:
        cluster.user(f"scancel -u {OTHER}", OTHER).ok()
    with browser.page() as page:
        _run_cell(page, cluster, folder, WAITING.replace("range(50)", "range(5000)"))
        output = page.locator(".jp-OutputArea")
        shown = r"job \d+ runs" if runs else r"job \d+ waits"
        expect(output).to_contain_text(re.compile(shown), timeout=40_000 * PATIENCE)
        page.get_by_title("Interrupt the kernel").first.click()
        began = time.monotonic()
        wait_until(
            lambda: not cluster.slurm("squeue -h -u jovyan -t PENDING,RUNNING"), timeout_s=20, what="the job is gone"
        )
        assert time.monotonic() - began < 2 * PATIENCE
        expect(output).to_contain_text("KeyboardInterrupt", timeout=40_000 * PATIENCE)
        expect(output).not_to_contain_text(re.compile(shown))
        assert [said["output_type"] for said in _said(page, cluster, folder)] == ["error"]


def test_terminal_is_jovyan_s_and_has_slurm(cluster: LiveCluster, folder: str) -> None:
    with browser.page() as page:
        page.set_default_timeout(60_000 * PATIENCE)
        _log_in(page, cluster)
        page.goto(f"{userhost.address(cluster.config)}/lab?reset")
        page.locator('.jp-LauncherCard[title="Start a new terminal session"]').click()
        page.locator(".xterm-helper-textarea").wait_for(state="attached")
        page.locator(".jp-Terminal").click()
        page.keyboard.type(f"(id; umask; sinfo; echo end) >~/{folder}/said 2>&1; exit")
        page.keyboard.press("Enter")
        said = wait_until(
            lambda: (text := cluster.user(f"cat ~/{folder}/said").stdout) and text.endswith("end\n") and text,
            timeout_s=30,
            what="the terminal's commands to have run",
        )
    assert "uid=1000(jovyan) gid=100(users)" in said
    assert "0077" in said
    assert "normal*" in said


def test_login_page_refuses_a_wrong_token(cluster: LiveCluster) -> None:
    with browser.page() as page:
        page.goto(f"{userhost.address(cluster.config)}/lab")
        page.get_by_label("Password or token:").fill("0" * 64)
        page.get_by_role("button", name="Log in", exact=True).click()
        expect(page.get_by_text("Invalid credentials")).to_be_visible()
        page.goto(f"{userhost.address(cluster.config)}/lab")
        expect(page.get_by_label("Password or token:")).to_be_visible()
