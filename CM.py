#!/usr/bin/env python3
"""Manage containers on this machine's engine: `python CM.py --help`. Where there is a cluster, its users have it as `cm`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from container_manager.cm import main

main()
