"""Read and write a call's files beneath a directory, never following a link out of it.

Paths are walked by directory descriptors, one component at a time, so that nobody can exchange a directory for a link
between the check and the use.
"""

from __future__ import annotations

import contextlib
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class FileError(Exception):
    """A file that was named cannot be read or written, with the reason."""


def checked(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the paths in their normal form; raise FileError unless each is relative and stays beneath its start."""
    if isinstance(paths, str | bytes | os.PathLike):
        raise FileError(f"a list of paths is needed, not the single path {os.fsdecode(paths)!r}")
    found: dict[str, None] = {}
    for path in paths:
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise FileError(f"{text!r} is not a path")
        normal = os.path.normpath(text)
        if os.path.isabs(text) or ".." in text.split("/") or normal == ".":
            raise FileError(f"{text!r} leaves the working directory; name files relative to it, without '..'")
        found[normal] = None
    return list(found)


def _open_parent(root: int, path: str, *, create: bool) -> tuple[int, str]:
    *directories, name = path.split("/")
    current = os.dup(root)
    try:
        for directory in directories:
            try:
                following = os.open(directory, _DIRECTORY, dir_fd=current)
            except FileNotFoundError:
                if not create:
                    raise
                with contextlib.suppress(FileExistsError):  # another call makes it too
                    os.mkdir(directory, 0o777, dir_fd=current)
                following = os.open(directory, _DIRECTORY, dir_fd=current)
            os.close(current)
            current = following
    except OSError as error:
        os.close(current)
        if isinstance(error, NotADirectoryError):
            raise FileError(f"{path!r}: {directory!r} is a link or no directory") from error
        raise FileError(f"{path!r}: {error.strerror}") from error
    return current, name


def private_directory(path: str, *, root: int | None = None, create: bool = False) -> int:
    """Return the descriptor of a directory that is this user's alone; raise FileError for a link or any other."""
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=root)
    try:
        fd = os.open(path, _DIRECTORY, dir_fd=root)
    except OSError as error:
        reason = "it is a link or no directory" if isinstance(error, NotADirectoryError) else error.strerror
        raise FileError(f"{path!r} cannot be opened: {reason}") from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise FileError(f"{path!r} is not this user's alone (uid {status.st_uid}, mode {status.st_mode & 0o7777:04o})")
    return fd


def open_to_read(root: int, path: str) -> tuple[int, os.stat_result]:
    """Return descriptor and status of a regular file beneath `root`; raise FileError for anything else."""
    parent, name = _open_parent(root, path, create=False)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        reason = "is a link" if stat.S_ISLNK(_mode(name, parent)) else error.strerror
        raise FileError(f"{path!r}: {reason}") from error
    finally:
        os.close(parent)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FileError(f"{path!r} is not a regular file")
    return fd, status


def _mode(name: str, parent: int) -> int:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except OSError:
        return 0


class NewFile:
    """A file being written beside its name; it takes the name when it is complete."""

    def __init__(self, root: int, path: str, mode: int) -> None:
        self.path = path
        self._parent, self._name = _open_parent(root, path, create=True)
        self._temporary = f".{self._name[:200]}.{os.urandom(8).hex()}"
        try:
            self._fd = os.open(
                self._temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=self._parent,
            )
        except OSError as error:
            os.close(self._parent)
            raise FileError(f"{path!r}: {error.strerror}") from error
        self._mode = mode & 0o777 & ~_umask()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the bytes."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise FileError(f"{self.path!r}: {error.strerror}") from error

    def commit(self) -> None:
        """Give the file its name, in the place of what was there."""
        try:
            os.fchmod(self._fd, self._mode)
            os.rename(self._temporary, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            self.discard()
            raise FileError(f"{self.path!r}: {error.strerror}") from error
        os.close(self._fd)
        os.close(self._parent)

    def discard(self) -> None:
        """Take the unfinished file away."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary, dir_fd=self._parent)
        os.close(self._fd)
        os.close(self._parent)


def copy(source: str, target: str, paths: Iterable[str]) -> None:
    """Copy files from beneath one directory to beneath another, by the same names."""
    roots = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for directory in (source, target)]
    try:
        for path in paths:
            fd, status = open_to_read(roots[0], path)
            with open(fd, "rb", buffering=0) as file:
                new = NewFile(roots[1], path, status.st_mode)
                try:
                    while piece := file.read(1024 * 1024):
                        new.write(piece)
                except BaseException:
                    new.discard()
                    raise
                new.commit()
    finally:
        for root in roots:
            os.close(root)


def _umask() -> int:
    # Only the kernel's own account can be read without changing the mask for other threads meanwhile.
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o022
