"""Virtual machines: Debian as it comes, on a private switch; booted, cut off and cut down like machines of metal.

Each is one QEMU process. Its first interface leads outside, and has its SSH server's port on this machine's loopback;
its second is on a switch that nothing but these machines is on. By KVM where that works, otherwise emulated.
"""

import base64
import hashlib
import json
import os
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfiddle_cluster.package_access import write_build_secrets
from live import Result, run, wait_until

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "make-image"
RELEASE = "trixie"
NETWORK = "10.77.0"
FIRST_PORT = 2220
MEMORY_MB = 3072
NAMES = ("head", "c1", "c2")
"""The machines; their addresses follow from their places here."""

IMAGE_TIMEOUT_S = 300
BOOT_TIMEOUT_S = 60
"""How long a machine may take from power to SSH, before patience."""
KVM_PROBE_S = 5

_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_BARE = "-nodefaults -machine q35,sata=off,smbus=off -display none -vga none -monitor none".split()
_EMULATED = "-accel tcg,thread=multi,tb-size=512 -cpu max,la57=off,svm=off".split()
_BY_KVM = "-accel kvm -cpu host".split()


class Image:
    """The disk that all machines start from, made once for each recipe.

    Args:
        directory: where it is, or shall be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk, self.kernel, self.initrd = (directory / name for name in ("disk.raw", "vmlinuz", "initrd"))
        self.key = directory / "key"

    @classmethod
    def ensure(cls, cache: Path) -> "Image":
        """Return the image of this recipe, made if it is not there yet."""
        files = [RECIPE, *sorted(path for path in (HERE / "image").rglob("*") if path.is_file())]
        recipe = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]
        image = cls(cache / f"image-{recipe}")
        if not image.directory.exists():
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as unfinished:
                cls(Path(unfinished))._make()
                image.directory.mkdir(mode=0o700)
                for path in Path(unfinished).iterdir():
                    path.rename(image.directory / path.name)
        return image

    def _make(self) -> None:
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "virtual", "-f", self.key]).ok()
        with tempfile.TemporaryDirectory(prefix="access-") as access:
            write_build_secrets(Path(access), release=RELEASE, mounted_at=access)
            argv = [RECIPE, RELEASE, access, self.key.with_suffix(".pub"), self.directory]
            run(argv, timeout_s=IMAGE_TIMEOUT_S).ok()


def kvm_works(image: Image) -> bool:
    """Tell whether a kernel says something on its console: the device alone may be there, and be good for nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = ["-kernel", image.kernel, "-append", "console=ttyS0 panic=-1", "-no-reboot", "-serial", "stdio", "-m", "512"]
    argv = ["timeout", str(KVM_PROBE_S), "qemu-system-x86_64", *_BARE, *_BY_KVM, *boot]
    return "Linux version" in run(argv).stdout


class Switch:
    """A network among the machines alone: a switch on a Unix socket.

    Args:
        directory: where its socket is; nothing of it leaves that.
    """

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "switch"
        self._process = subprocess.Popen(
            [*_DIE_WITH_US, "vde_switch", "-sock", self.socket], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        wait_until((self.socket / "ctl").exists, timeout_s=10, what="the switch is there")

    def remove(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class VirtualMachine:
    """A machine with a disk of its own, which stays while it is without power.

    Args:
        number: its place among the machines; its addresses follow from it.
        cpus: how many it has.
        stick: a disk that is put into it, to be mounted.
        engine: a disk for its engine, of which it has a copy; it is mounted when it boots.

    Attributes:
        name: its hostname.
        addr: its address among the machines.
    """

    def __init__(
        self,
        number: int,
        name: str,
        image: Image,
        switch: Switch,
        directory: Path,
        *,
        cpus: int = 1,
        stick: Path | None = None,
        engine: Path | None = None,
    ) -> None:
        self.name = name
        self.addr = f"{NETWORK}.{number}"
        self._number = number
        self._cpus = cpus
        self._stick = stick
        self._image = image
        self._originals = [image.disk, *([engine] if engine else [])]
        self._switch = switch
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._disks = [directory / f"{name}.{original.stem}.qcow2" for original in self._originals]
        self._control = directory / f"{name}.qmp"
        self._console = directory / f"{name}.console"
        self.renew()

    def renew(self) -> None:
        """Be another machine of that name: with disks on which nothing has been done yet."""
        for original, disk in zip(self._originals, self._disks, strict=True):
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", original, disk]).ok()

    # --- power and cables --------------------------------------------------------------------------------------------

    def start(self, *, kvm: bool) -> None:
        """Give it power; it boots by itself."""
        outside = f"user,id=outside,hostfwd=tcp:127.0.0.1:{FIRST_PORT + self._number}-:22"
        argv = [
            *_DIE_WITH_US,
            *("nice", "-n", "19", "qemu-system-x86_64", "-name", self.name),
            *_BARE,
            *(_BY_KVM if kvm else _EMULATED),
            *("-smp", str(self._cpus), "-m", str(MEMORY_MB)),
            *("-kernel", self._image.kernel, "-initrd", self._image.initrd, "-append", self._kernel_arguments()),
            *(word for disk in self._disks for word in ("-drive", f"file={disk},if=virtio,cache=unsafe,discard=unmap")),
            *(("-drive", f"file={self._stick},if=virtio,format=raw,readonly=on") if self._stick else ()),
            *("-device", "virtio-rng-pci"),
            *("-netdev", outside, "-device", "virtio-net-pci,netdev=outside,romfile="),
            *("-netdev", f"vde,id=inside,sock={self._switch.socket}"),
            *("-device", f"virtio-net-pci,netdev=inside,romfile=,mac=52:54:00:77:00:{self._number:02x}"),
            *("-qmp", f"unix:{self._control},server=on,wait=off", "-serial", f"file:{self._console}"),
        ]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def _kernel_arguments(self) -> str:
        """Return what differs between the machines, and reaches systemd through the kernel."""
        network = f"[Match]\nName=eth1\n[Network]\nAddress={self.addr}/24\n"
        return (
            "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 mitigations=off nokaslr systemd.ssh_auto=no "
            f"systemd.hostname={self.name} systemd.machine_id={hashlib.md5(self.name.encode()).hexdigest()} "
            f"systemd.set_credential_binary=network.network.60-inside:{base64.b64encode(network.encode()).decode()}"
        )

    def wait_until_up(self) -> None:
        """Wait until it answers by SSH."""

        def answers() -> bool:
            assert self._process
            assert self._process.poll() is None, f"{self.name} has ended with {self._process.returncode}"
            return self.run("true", timeout_s=10).exit_status == 0

        wait_until(answers, timeout_s=BOOT_TIMEOUT_S, interval_s=1, what=f"{self.name} is up; see {self._console}")

    def cut_power(self) -> None:
        """Take its power away; what was not on its disk is lost."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
        run(["ssh", *self._ssh(), "-O", "exit", "root@127.0.0.1"])

    def unplug(self) -> None:
        """Take the cable out that leads to the other machines."""
        self._tell("set_link", name="inside", up=False)

    def plug(self) -> None:
        """Put that cable back."""
        self._tell("set_link", name="inside", up=True)

    def _tell(self, command: str, **arguments: Any) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self._control))
            with connection.makefile("rw") as stream:
                stream.readline()  # a greeting
                for order in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    stream.write(json.dumps(order) + "\n")
                    stream.flush()
                    answer: dict[str, Any] = {"event": ""}
                    while "event" in answer:
                        answer = json.loads(stream.readline())
                    assert "return" in answer, f"{self.name}: {order} {answer}"

    # --- commands ----------------------------------------------------------------------------------------------------

    def run(self, command: str | Sequence[str], *, timeout_s: float = 60, input: str | None = None) -> Result:
        """Run a command there as root; a string is for a shell."""
        return run(self.argv(command), timeout_s=timeout_s, input=input)

    def argv(self, command: str | Sequence[str], *options: str) -> list[str]:
        """Return the command here that runs this one there."""
        words = command if isinstance(command, str) else shlex.join(command)
        return ["ssh", *self._ssh(), *options, "root@127.0.0.1", words]

    def write(self, path: str, text: str) -> None:
        """Have a file there with this text."""
        self.run(f"mkdir -p $(dirname {path}) && cat >{path}", input=text).ok()

    def _ssh(self) -> list[str]:
        settings = {
            "Port": FIRST_PORT + self._number,
            "IdentityFile": self._image.key,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": 10,
            "ServerAliveInterval": 15,
            "ControlMaster": "auto",
            "ControlPath": self._directory / f"{self.name}.ssh",
            "ControlPersist": 600,
        }
        return ["-F", "/dev/null", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]


@dataclass
class Lab:
    """All machines.

    Attributes:
        kvm: whether the processor runs them.
        engine: a disk for an engine; each machine that is made has a copy.
    """

    directory: Path
    image: Image
    switch: Switch
    kvm: bool
    engine: Path | None = None
    machines: dict[str, VirtualMachine] = field(default_factory=dict)

    def machine(self, name: str, **parts: Any) -> VirtualMachine:
        """Return a machine that has power; the first time it is made, with `cpus` and a `stick`."""
        if name not in self.machines:
            number = NAMES.index(name) + 1
            parts["engine"] = self.engine
            machine = VirtualMachine(number, name, self.image, self.switch, self.directory, **parts)
            machine.start(kvm=self.kvm)
            self.machines[name] = machine
        return self.machines[name]

    def restart(self, *names: str) -> None:
        """Give machines whose power was cut some again, in this order, and wait until they are up."""
        for name in names:
            self.machines[name].start(kvm=self.kvm)
        for name in names:
            self.machines[name].wait_until_up()


@contextmanager
def opened(cache: Path) -> Iterator[Lab]:
    """Have a place for machines; in the end none of them runs, and nothing but the image is left."""
    image = Image.ensure(cache)
    with tempfile.TemporaryDirectory(prefix="machines-", dir=cache) as directory:
        lab = Lab(Path(directory), image, Switch(Path(directory)), kvm_works(image))
        try:
            yield lab
        finally:
            for machine in lab.machines.values():
                machine.cut_power()
            lab.switch.remove()
