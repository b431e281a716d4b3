"""The GPUs of a machine, as NVIDIA's driver tells of them in its files; nothing needs to be installed for that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

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


def gres(gpus: list[Gpu]) -> str:
    """Return the machine's GPUs as Slurm counts them, such as `gpu:titan_xp:2,gpu:h200:1`; "" for none."""
    kinds = [kind(gpu.model) for gpu in gpus]
    return ",".join(f"gpu:{name}:{kinds.count(name)}" for name in dict.fromkeys(kinds))


if __name__ == "__main__":
    print(gres(found()))
