"""Fingerprints of nodes: what a measurement depends on, and whether two measurements may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The rest of a fingerprint says which node it was and what it can do, not how fast it is.
_MATTERS = ("cpu_model", "cores", "governor", "boost", "smt", "kernel", "image")


class UnlikeNodes(UserWarning):
    """Measurements of this process come from nodes that are not alike."""


class OversubscribedNode(UserWarning):
    """A node says to Slurm that it has more CPUs than it has: what is measured there is void."""


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return in what two fingerprints differ that a measurement depends on, with both values.

    What one of the nodes does not say is not compared.
    """
    return {
        name: (first[name], second[name])
        for name in _MATTERS
        if first.get(name) is not None and second.get(name) is not None and first[name] != second[name]
    }
