"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from container_manager.errors import ContainerError


@contextmanager
def written(path: Path) -> Iterator[IO[str]]:
    """Give a text file to write to, which takes the place of `path` when the block is over; its directory is made.

    Raises:
        ContainerError: it cannot be written, for lack of rights or of room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file
                file.close()
                Path(file.name).chmod(0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ContainerError(f"{path} cannot be written: {error.strerror}") from error
