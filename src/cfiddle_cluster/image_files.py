"""Carry the cluster's images in a file, to a machine that cannot build them: without internet, or in less time."""

import os
from collections.abc import Callable
from pathlib import Path

from cfiddle_cluster import images
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError

_TIMEOUT_S = 1800


def save(config: Config, path: Path) -> None:
    """Write the images that this checkout stands for into a file.

    Raises:
        ClusterError: some are not built yet, or the file cannot be written.
    """
    references = images.built(config)
    missing = sorted(set(references.values()) - images.existing())
    if missing:
        raise ClusterError(f"not built yet: {', '.join(missing)}", "./invoke build")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        run([docker_cli(), "image", "save", "--output", unfinished, *references.values()], timeout_s=_TIMEOUT_S)
        unfinished.replace(path)
    except CommandError as error:
        raise ClusterError(
            f"the images cannot be written to {path}: {error.output.strip()}", "name another file"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def load(config: Config, path: Path, report: Callable[[str], None] = print) -> None:
    """Have the images that a file holds on this machine's engine.

    Args:
        report: is told which images of this checkout were not among them.

    Raises:
        ClusterError: it is no such file.
    """
    if not path.is_file():
        raise ClusterError(f"there is no file {path}", "./invoke save-images FILE makes one")
    try:
        run([docker_cli(), "image", "load", "--quiet", "--input", path], timeout_s=_TIMEOUT_S)
    except CommandError as error:
        raise ClusterError(
            f"{path} cannot be loaded: {error.output.strip()}", "./invoke save-images FILE makes one that can"
        ) from error
    references = images.built(config)
    for missing in sorted(set(references.values()) - images.existing()):
        report(f"{missing} was not in it: it is of another version, and will be built here")
