"""The GPUs of a machine, as NVIDIA's driver tells of them in its files; nothing needs to be installed for that."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.wire import Refused

DRIVER = Path("/proc/driver/nvidia/gpus")

_FIELD = re.compile(r"^([A-Za-z ]+):[ \t]+(.+?)[ \t]*$", re.MULTILINE)
_MAKERS = re.compile(r"^((nvidia|geforce|quadro|tesla)_)+")


class Gpu(NamedTuple):
    """A GPU: the number in its device's name, its model, its uuid, by which the engine knows it."""

    minor: int
    model: str
    uuid: str


def found(driver: Path = DRIVER) -> list[Gpu]:
    """Return the GPUs of this machine by number; none where there is no driver."""
    gpus = []
    for file in driver.glob("*/information"):
        told = dict(_FIELD.findall(file.read_text()))
        if told.get("GPU Excluded", "No") == "No":
            gpus.append(Gpu(int(told["Device Minor"]), told["Model"], told["GPU UUID"]))
    return sorted(gpus)


def kind(model: str) -> str:
    """Return what Slurm calls a model, whoever writes it: `TITAN Xp` and `NVIDIA TITAN Xp` are both `titan_xp`."""
    return _MAKERS.sub("", re.sub(r"[^a-z0-9]+", "_", model.lower()).strip("_"))


def chosen(kinds: Sequence[str], gpus: Sequence[Gpu], *, taken: Collection[str]) -> list[Gpu]:
    """Return a GPU of each of these kinds that nobody has; Refused if there are not so many.

    Args:
        kinds: what a job has, each as often as it has one of them.
        gpus: those of the machine.
        taken: uuids of those that containers have that run.
    """
    free = [gpu for gpu in gpus if gpu.uuid not in taken]
    given = []
    for wanted in kinds:
        match = next((gpu for gpu in free if kind(gpu.model) == wanted), None)
        if match is None:
            raise Refused("gpus", f"no GPU {wanted} is free on this machine")
        free.remove(match)
        given.append(match)
    return given


def gres(gpus: list[Gpu]) -> str:
    """Return the machine's GPUs as Slurm counts them, such as `gpu:titan_xp:2,gpu:h200:1`; "" for none."""
    kinds = [kind(gpu.model) for gpu in gpus]
    return ",".join(f"gpu:{name}:{kinds.count(name)}" for name in dict.fromkeys(kinds))


def main() -> None:
    """Print what slurmd tells of this machine's GPUs: as `--gres`, or `--kinds`, a line for each."""
    here = found()
    print(gres(here) if sys.argv[1] == "--gres" else "\n".join(kind(gpu.model) for gpu in here))


if __name__ == "__main__":
    main()
