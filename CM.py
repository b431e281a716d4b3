#!/usr/bin/env python3
"""Manage containers of your own: `python CM.py --help`. Outside a cluster they are on this machine's engine."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run `cm`, from a checkout with its sources and, where this Python lacks a package, with its environment."""
    # Before it hears Ctrl-C itself it has nothing to tidy up, and nothing to say.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    checkout = Path(__file__).resolve().parent
    if (checkout / "src").is_dir():
        environment = checkout / ".venv"
        python = environment / "bin" / "python"
        if not (find_spec("click") and find_spec("docker")):
            if python.exists() and Path(sys.prefix) != environment:
                os.execv(python, [python, *sys.argv])
            sys.exit(
                "error: click or docker is missing here\n→ ./invoke task-image   (or: pip install click docker rich)"
            )
        sys.path.insert(0, str(checkout / "src"))
    from container_manager import cm

    cm.main()


main()
