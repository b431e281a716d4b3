"""The `info.json` that another program for containers on several machines was set up by, as a part of policy.yaml."""

import json
from pathlib import Path
from typing import Any

import yaml

from agent import container_options, container_policy
from agent.checked import PolicyError
from cfiddle_cluster.errors import ClusterError

_KEYS = ("master", "workers", "type", "buffer", "start_port_num", "additional_options")
# What the rest of the section may be while these are checked.
_OTHERS = {"images": ["any"], "per_user": 1, "disk_mb": 1, "cpus": 1, "memory_mb": 16, "processes": 16}


def section(path: Path) -> str:
    """Return lines for the section `containers` of policy.yaml, and which machines to name in config.sh.

    Raises:
        ClusterError: it cannot be read, or not all of it can be taken: all that cannot is named.
    """
    try:
        info = json.loads(path.read_text())
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ClusterError(f"{path} is no JSON: {error}") from error
    if not isinstance(info, dict):
        raise ClusterError(f"{path} holds no JSON object")
    taken = {
        "types": info.get("type", {}),
        "buffer": info.get("buffer", {"cpu": 0, "mem": 0}),
        "start_port_num": info.get("start_port_num", 25000),
        "additional_options": info.get("additional_options", []),
    }
    if faults := [*_faults(info, taken)]:
        raise ClusterError("\n".join([f"not all of {path} can be taken:", *faults]))
    written = yaml.safe_dump(taken, sort_keys=False, default_flow_style=None, width=120)
    lines = "".join(f"  {line}\n" for line in written.splitlines())
    return f"# In policy.yaml, under `containers:`\n{lines}# In config.sh\n{_machines(info)}"


def _faults(info: dict[str, Any], taken: dict[str, Any]) -> list[str]:
    faults = [f"  {key}: nothing is known of it" for key in info if key not in _KEYS]
    options = taken["additional_options"]
    # Each on its own: all that is wrong is said at once.
    parts: list[dict[str, Any]] = [{name: value} for name, value in taken.items() if name != "additional_options"]
    for part in parts:
        try:
            container_policy.parse({**_OTHERS, **part}, {})
        except PolicyError as error:
            faults.append(f"  {str(error).removeprefix('containers.')}")
    for line in options if isinstance(options, list) else [options]:
        try:
            container_options.parse([line], "additional_options")
        except PolicyError as error:
            faults.append(f"  {error}")
    return faults


def _machines(info: dict[str, Any]) -> str:
    def host(entry: object) -> str:
        return str(entry.get("host", "")) if isinstance(entry, dict) else ""

    workers = info.get("workers", [])
    named = " ".join(filter(None, map(host, workers if isinstance(workers, list) else [])))
    return f'HEAD_ADDR="{host(info.get("master"))}"\nWORKER_ADDRS="{named}"\n'
