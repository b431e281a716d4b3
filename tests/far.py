"""A far side for calls on this machine: a directory that every user may read, with all that a hop needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

import agent
import delegate_function

OTHER = "nobody"
"""A user whom every system has, and who may do nothing."""


def needed(command: str, package: str) -> str:
    """Return a command's path; fail, rather than skip, where its package is missing."""
    found = shutil.which(command, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if not found:
        pytest.fail(f"{command} is not installed: apt-get install {package} (./invoke test does)", pytrace=False)
    return found


class Far:
    """The directory and what is in it; `version` is what its package says of itself."""

    def __init__(self, directory: Path, *, version: str = delegate_function.__version__) -> None:
        directory.chmod(0o755)
        for package in (delegate_function, agent):
            source = Path(str(package.__file__)).parent
            shutil.copytree(source, directory / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        first = directory / "delegate_function/__init__.py"
        ours = f'__version__ = "{delegate_function.__version__}"'
        assert ours in first.read_text()
        first.write_text(first.read_text().replace(ours, f'__version__ = "{version}"'))
        shutil.copytree(Path(cloudpickle.__file__).parent, directory / "cloudpickle")
        self.hop = str(directory / "hop")
        Path(self.hop).write_text(
            f"#!{_python()} -I\nimport sys; sys.path.insert(0, {str(directory)!r}); sys.dont_write_bytecode = True\n"
            "from delegate_function.hop import main\nmain()\n"
        )
        Path(self.hop).chmod(0o755)


def _python() -> str:
    """Return a Python of the version that runs the tests, which others than its owner may run too."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (os.path.realpath(sys.executable), shutil.which(name, path="/usr/bin:/usr/local/bin")):
        if (
            python
            and subprocess.run(["setpriv", "--reuid", OTHER, "--clear-groups", "test", "-x", python]).returncode == 0
        ):
            return python
    pytest.fail(f"no {name} that {OTHER} can run: apt-get install {name}", pytrace=False)
