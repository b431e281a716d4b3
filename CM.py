#!/usr/bin/env python3
"""Manage containers of your own: `python CM.py --help`. Outside a cluster they are on this machine's engine."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

checkout = Path(__file__).resolve().parent
if (checkout / "src").is_dir():
    # A checkout: its commands have an environment with what this needs, too.
    environment = checkout / ".venv"
    if not (find_spec("click") and find_spec("docker")):
        if (environment / "bin/python").exists() and Path(sys.prefix) != environment:
            os.execv(environment / "bin/python", [environment / "bin/python", *sys.argv])
        sys.exit(
            "error: this Python has no click or no docker\n→ ./invoke task-image   (or: pip install click docker rich)"
        )
    sys.path.insert(0, str(checkout / "src"))

from container_manager.cm import main

main()
