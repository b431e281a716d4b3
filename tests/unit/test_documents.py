"""What the documents name is there: tasks, files, chapters."""

import re
from pathlib import Path

import pytest
import tasks
from invoke import Collection

from live import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def chapters(document: Path) -> set[str]:
    """Return the names by which a document's chapters are linked to."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@by_name
def test_tasks_that_are_named_exist(document: Path) -> None:
    known = set(Collection.from_module(tasks).task_names)
    assert set(re.findall(r"\./invoke ([a-z][a-z-]*)", document.read_text())) <= known


@by_name
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        path, _, chapter = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not chapter or chapter in chapters(target), link
