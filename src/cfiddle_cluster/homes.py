"""Home directories: HOME_ROOT on the head, exported to real workers or bound into simulated ones; or another server."""

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cfiddle_cluster.commands import run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.packages import ensure_packages, is_installed

EXPORTS = Path("/etc/exports.d/cfiddle-cluster.exports")
SERVER = Path("/etc/nfs.conf.d/cfiddle-cluster.conf")
"""Where it is said what the NFS server does that was installed for the homes."""

NFS_PORT = 2049
STATD_PORT = 662
SERVER_PORTS = frozenset({111, STATD_PORT, NFS_PORT})
"""What an NFS server has open, over TCP and UDP: names of services (rpcbind), rpc.statd, and NFS itself."""

# Nobody mounts the homes by older versions, for which rpc.mountd and the lock manager listen on ports of their own
# choice. rpc.statd does so in any case, and takes a port that it is told. (nfs.conf(5))
_SERVER = f"[nfsd]\nvers2=n\nvers3=n\n[statd]\nport={STATD_PORT}\n"

# A client that waits for its server loses nothing; `soft` would turn a pause of the network into lost writes. (nfs(5))
_NFS_OPTIONS = "nfsvers=4.2,proto=tcp,hard,timeo=600,retrans=2,nosuid,nodev"


def is_external(config: Config) -> bool:
    """Whether homes are on a server that existed before the cluster and is not this machine."""
    return config.home_storage == "nfs" and config.home_server not in ("", config.head_addr)


def are_exported(config: Config) -> bool:
    """Whether this machine is the NFS server of the homes."""
    return config.home_storage == "nfs" and not is_external(config)


def volume_options(config: Config) -> dict[str, str]:
    """Return the local volume driver's options (type, o, device) for /home, the same on every machine."""
    if config.home_storage == "bind":
        return {"type": "none", "o": "bind", "device": str(config.home_root)}
    server = config.home_server or config.head_addr
    return {"type": "nfs", "o": f"addr={server},{_NFS_OPTIONS}", "device": f":{config.home_root}"}


def exports(config: Config) -> str:
    """Return the line of exports(5): HOME_ROOT for the machines of the cluster alone, whose root is nobody here."""
    options = "rw,sync,root_squash,no_subtree_check"
    clients = (f"{address}({options})" for address in dict.fromkeys([*config.worker_addrs, config.head_addr]))
    return f"{config.home_root} {' '.join(clients)}\n"


def ensure_homes(config: Config) -> None:
    """Make HOME_ROOT, and export it where workers mount it from here."""
    if is_external(config):
        return
    ensure_root(config)
    if are_exported(config):
        _ensure_export(config)


def ensure_root(config: Config) -> None:
    """Make HOME_ROOT, root's own: who could write there could put a link where a home is expected.

    Raises:
        ClusterError: it is something else.
    """
    root = config.home_root
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise ClusterError(
            f"HOME_ROOT {root} is not a directory that only root can write",
            f"run: chown root {root} && chmod 0755 {root}   or set another HOME_ROOT in config.sh",
        )
    if found.st_mode & 0o777 != 0o755:
        root.chmod(0o755)


def ensure_home(config: Config, name: str, *, uid: int, gid: int) -> None:
    """Make the user's home, empty, with mode 0700; on an external server its administrator does.

    Raises:
        ClusterError: something else has that name.
    """
    if is_external(config):
        return
    ensure_root(config)
    home = config.home_root / name
    if not os.path.lexists(home):
        os.mkdir(home, 0o700)
    found = os.lstat(home)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, uid):
        raise ClusterError(
            f"{home} exists and is not the home of uid {uid} (it belongs to uid {found.st_uid})",
            f"move it away, or if it shall be that home: chown -R {uid}:{gid} {home}",
        )
    if found.st_uid == 0:
        os.chown(home, uid, gid, follow_symlinks=False)
        os.chmod(home, 0o700)


def delete_home(config: Config, name: str) -> None:
    """Delete a home with all that is in it; links in it are removed, not followed.

    Raises:
        ClusterError: it is on an external server.
    """
    if is_external(config):
        raise ClusterError(
            f"the home of {name} is on {config.home_server}",
            f"delete {config.home_root}/{name} there, and run this without --delete-home",
        )
    home = config.home_root / name
    if os.path.lexists(home):
        shutil.rmtree(home)


def purge(config: Config, names: Iterable[str]) -> list[str]:
    """Withdraw the export and delete the homes; what is on an external server stays.

    Args:
        config: the administrator's settings.
        names: whose homes the cluster made.

    Returns:
        What is in HOME_ROOT besides them, and stays.
    """
    if EXPORTS.exists():
        EXPORTS.unlink()
        with suppress(OSError):  # holds somebody else's, too
            EXPORTS.parent.rmdir()
        run(["exportfs", "-ra"], timeout_s=30)
    SERVER.unlink(missing_ok=True)
    root = config.home_root
    if is_external(config) or not root.exists():
        return []
    for home in (root / name for name in names):
        if home.is_dir() and not home.is_symlink():
            shutil.rmtree(home)
    left = sorted(os.listdir(root))
    with suppress(OSError):  # holds something else, or a disk is mounted there
        root.rmdir()
        if root.parent.name == "cfiddle-cluster":
            root.parent.rmdir()
    return left


def kernel_has_nfs_server() -> bool:
    """Whether this machine's kernel can export a directory; loads the module where it is one."""
    if shutil.which("modprobe"):
        try:
            run(["modprobe", "nfsd"], timeout_s=30)
        except ClusterError:
            return False
    return any(line.split()[-1] == "nfsd" for line in Path("/proc/filesystems").read_text().splitlines())


def _ensure_export(config: Config) -> None:
    if not kernel_has_nfs_server():
        raise ClusterError(
            "this machine's kernel cannot serve NFS (no nfsd), so real workers would have no /home",
            "set HOME_SERVER in config.sh to a server that exports HOME_ROOT, or take a head whose kernel has nfsd",
        )
    if not is_installed("nfs-kernel-server"):
        # Before it starts; one that was there has its own administrator and other clients.
        SERVER.parent.mkdir(exist_ok=True)
        SERVER.write_text(_SERVER)
    ensure_packages(["nfs-kernel-server"])
    text = exports(config)
    if not EXPORTS.exists() or EXPORTS.read_text() != text:
        EXPORTS.parent.mkdir(parents=True, exist_ok=True)
        EXPORTS.write_text(text)
        EXPORTS.chmod(0o644)
    run(["exportfs", "-ra"], timeout_s=30)
