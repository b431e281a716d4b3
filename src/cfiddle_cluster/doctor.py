"""Check what `up` needs and what users will meet, and say how to mend what is wrong.

It changes nothing, and works before the first `up`, after it, and with machines that do not answer.
"""

import hashlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from urllib.parse import quote

import docker.errors

from cfiddle_cluster import (
    engine,
    facts,
    firewall,
    homes,
    images,
    machines,
    packages,
    registry,
    services,
    simulated,
    slurm,
    swarm,
    tuning,
)
from cfiddle_cluster.config import LABEL, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.facts import KERNEL, Facts
from cfiddle_cluster.machines import Machine, Silent
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

OK, NOTE, MEND = "ok", "note", "mend"
WIDTH = 80

# What all images take, with two simulated workers that have copies; and what a cluster that runs needs to go on.
DISK_TO_BUILD_MB = 14000
DISK_TO_RUN_MB = 1000
MEMORY_TO_RUN_MB = 2500
"""What an idle cluster with two simulated workers takes, as benchmarks/ measures it."""
MEMORY_LEFT_MB = 256
# A credential of MUNGE holds for 300 s (munged(8), --max-ttl): clocks further apart than that let nobody in.
CLOCK_MEND_S = 60.0
CLOCK_NOTE_S = 2.0
STEAL_PER_MILLE = 10
MOST_NAMES = 5
STRAY_AFTER_S = 5.0
"""An agent removes the sandbox of a job that has ended within two seconds."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `ok`, `note` (good to know), or `mend` (something will not work until it is mended).
        machine: where; the head's name for what concerns all of the cluster.
        what: what is so.
        mend: what to do.
    """

    level: str
    machine: str
    what: str
    mend: str = ""


def main(config: Config, state: State, *, as_json: bool = False) -> int:
    """Print the findings; return 1 if something must be mended, else 0."""
    packages.ensure_root()
    findings = examine(config, state)
    faults = sum(finding.level == MEND for finding in findings)
    if as_json:
        print(json.dumps({"must_be_mended": faults, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(text(findings))
        print(f"\n{faults} to be mended" if faults else "\nnothing to mend")
    return 1 if faults else 0


def examine(config: Config, state: State) -> list[Finding]:
    """Look at every machine and at the cluster; return what is found, the head's first."""
    is_running = engine.is_running()
    workers, findings = _workers(config, state, is_running=is_running)
    head = machines.head(config)
    with ThreadPoolExecutor() as pool:
        # These wait for others more than they work; all at once.
        gathered = pool.submit(
            facts.gather,
            [head, *workers],
            home_root=config.home_root,
            ports=[
                *swarm.PORTS,
                *filter(None, [config.registry_port, config.user_registry_port, config.jupyter_port, config.ssh_port]),
            ],
            targets=_targets(config, is_running=is_running),
        )
        account = pool.submit(_registry, config, state, is_running=is_running)
        pythons = pool.submit(_pythons, config, state, is_running=is_running)
        walled = pool.submit(_firewall, config, state, [head, *(worker for worker in workers if not worker.simulated)])
        answers = gathered.result()
        known = [answer for answer in answers if isinstance(answer, Facts)]
        for silent in answers:
            if isinstance(silent, Silent):
                findings.append(_silent(silent))
        for fact in known:
            for check in _CHECKS:
                findings += check(config, fact)
        findings += _published(config, known)
        findings += _trust(config, state, known)
        findings += _names(known)
        findings += _clocks(known)
        findings += _load(config, known)
        findings += _strays(known)
        findings += account.result()
        findings += walled.result()
        findings += pythons.result()
    names = [head.name, *(fact.name for fact in known)]
    return sorted(findings, key=lambda found: names.index(found.machine) if found.machine in names else len(names))


def text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines, at most 80 columns wide; what is so on several machines is said once."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for found in findings:
        names = where.setdefault((found.level, found.what, found.mend), [])
        if found.machine not in names:
            names.append(found.machine)
    groups = {key: ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}" for key, names in where.items()}
    width = max((len(group) for group in groups.values()), default=0)
    lines = []
    for (level, what, mend), group in groups.items():
        start = f"{level:<4}  {group:<{width}}  "
        lines += textwrap.wrap(start + what, WIDTH, subsequent_indent=" " * len(start), break_on_hyphens=False)
        if mend:
            indent = " " * len(start)
            lines += textwrap.wrap(
                mend, WIDTH, initial_indent=f"{indent}→ ", subsequent_indent=f"{indent}  ", break_on_hyphens=False
            )
    return "\n".join(lines)


# --- whom to ask -----------------------------------------------------------------------------------------------------


def _workers(config: Config, state: State, *, is_running: bool) -> tuple[list[Machine], list[Finding]]:
    """Return the workers that can be asked, and what is to be said of the others."""
    head = machines.head(config).name
    if not config.simulated:
        # OpenSSH keeps its known hosts and its connections there.
        state.path("ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
        remote = [addr for addr in config.worker_addrs if addr != config.head_addr]
        return [machines.real_worker(config, state, addr) for addr in remote], []
    existing = simulated.workers(state) if is_running else []
    if not existing:
        return [], [Finding(OK, head, f"no simulated machines yet: ./invoke up makes {config.local_workers}")]
    return existing, []


def _targets(config: Config, *, is_running: bool) -> list[str]:
    """Return what every machine must reach, as HOST:PORT, as far as it is there by now."""
    targets = []
    if is_running and not config.dockerhub_username and _has_registry():
        targets.append(f"{config.head_addr}:{config.registry_port}")
    if homes.is_external(config) or (config.home_storage == "nfs" and homes.EXPORTS.exists()):
        targets.append(f"{config.home_server or config.head_addr}:{homes.NFS_PORT}")
    return targets


def _silent(silent: Silent) -> Finding:
    machine = silent.machine
    # What we say of it, and ssh's last line; those before it are a banner.
    lines = silent.error.message.strip().splitlines()
    said = " ".join(dict.fromkeys(line.strip() for line in (lines[0], lines[-1])))
    mend = " ".join(silent.error.remedy.split())
    if machine.simulated:
        mend = f"./invoke up starts it; docker logs cfiddle-machine-{machine.name} shows what it says"
    return Finding(MEND, machine.name, f"does not answer: {said}", mend)


# --- one machine -----------------------------------------------------------------------------------------------------


def _engine(_config: Config, fact: Facts) -> Iterator[Finding]:
    info = fact.engine
    if info is None:
        if "head" not in fact.machine.roles and fact.machine.simulated:
            yield Finding(MEND, fact.name, "its engine does not run", "./invoke up starts the machine's services")
        elif fact.is_engine_installed:
            yield Finding(NOTE, fact.name, "Docker Engine does not run yet", "./invoke up starts it")
        elif fact.is_yes("apt-get"):
            yield Finding(NOTE, fact.name, "no Docker Engine yet", "./invoke up installs it")
        else:
            yield Finding(MEND, fact.name, "no Docker Engine, no apt-get", "install Docker Engine by hand")
        return
    faults = swarm.engine_faults(info)
    client = info.get("ClientInfo") or {}
    # Since that version the client builds with a plugin only (docs.docker.com/engine/release-notes/23.0).
    version = re.match("[0-9]+", str(client.get("Version", "")))
    if "head" in fact.machine.roles and version and int(version[0]) >= 23:
        plugins = [plugin.get("Name") for plugin in client.get("Plugins") or []]
        if "buildx" not in plugins:
            faults.append(
                ("the docker client has no buildx, so no image can be built", "apt-get install docker-buildx")
            )
    for what, mend in faults:
        yield Finding(MEND, fact.name, what, mend)
    if not faults:
        yield Finding(OK, fact.name, f"Docker Engine {info['ServerVersion']}, storage {info['Driver']}")


def _commands(_config: Config, fact: Facts) -> Iterator[Finding]:
    if "head" not in fact.machine.roles:
        return
    missing = [package for command, package in packages.COMMANDS.items() if not shutil.which(command)]
    if missing and fact.is_yes("apt-get"):
        yield Finding(NOTE, fact.name, f"lacks {', '.join(missing)}", "./invoke up installs what is missing")
    elif missing:
        yield Finding(MEND, fact.name, f"lacks {', '.join(missing)}, and has no apt-get", "install them by hand")


def _kernel(_config: Config, fact: Facts) -> Iterator[Finding]:
    needs = {"namespaces": "namespaces", "overlay": "overlay file systems", "link-bridge": "bridges"}
    needs |= {"link-veth": "veth pairs", "link-vxlan": "VXLAN"}
    lacks = [meaning for name, meaning in needs.items() if fact.values.get(name) == "no"]
    untold = [meaning for name, meaning in needs.items() if fact.values.get(name, "unknown") == "unknown"]
    kernel = f"kernel {fact.values.get('kernel', '')}"
    if lacks:
        yield Finding(
            MEND,
            fact.name,
            f"{kernel} lacks {', '.join(lacks)}",
            "take a kernel, or rights, that have them: Docker Swarm needs them",
        )
    if untold:
        yield Finding(NOTE, fact.name, f"{kernel}: no telling yet whether it has {', '.join(untold)}")
    if not lacks and not untold:
        yield Finding(OK, fact.name, f"{kernel} has overlay, veth, vxlan, bridge, namespaces")


def _cgroups(_config: Config, fact: Facts) -> Iterator[Finding]:
    version, controllers = fact.values.get("cgroup", ""), fact.values.get("controllers", "").split()
    missing = [name for name in ("cpu", "cpuset", "memory", "pids") if name not in controllers]
    if missing:
        yield Finding(
            MEND,
            fact.name,
            f"cgroup v{version} without {', '.join(missing)}: sandboxes could not be limited",
            "boot with cgroup_enable=memory, or let the system delegate them",
        )
    else:
        yield Finding(OK, fact.name, f"cgroup v{version} with cpu, cpuset, memory, pids")


def _swarm_ports(_config: Config, fact: Facts) -> Iterator[Finding]:
    wanted = {port: kind for port, kind in swarm.PORTS.items() if port != swarm.PORT or "head" in fact.machine.roles}
    taken = False
    for (protocol, port), holder in sorted(fact.listeners.items(), key=lambda item: item[0][1]):
        if port in wanted and protocol in wanted[port] and holder not in ("dockerd", KERNEL):
            taken = True
            yield Finding(
                MEND,
                fact.name,
                f"port {port}/{protocol}, which Swarm needs, is held by {holder}",
                f"end {holder} there",
            )
    if not taken:
        yield Finding(OK, fact.name, f"ports {', '.join(map(str, wanted))} are free or Swarm's")


def _disk(_config: Config, fact: Facts) -> Iterator[Finding]:
    if fact.machine.simulated:
        return  # the head's
    needed = DISK_TO_RUN_MB if fact.engine and fact.engine.get("Images") else DISK_TO_BUILD_MB
    places = {"disk-docker": "images (/var/lib/docker)"}
    if "head" in fact.machine.roles:
        places |= {"disk-home": "homes", "disk-state": "the state (/var/lib/cfiddle-cluster)"}
    free = {meaning: fact.number(name) for name, meaning in places.items()}
    short = {meaning: size for meaning, size in free.items() if size is not None and size < needed}
    for meaning, size in short.items():
        mend = "docker system df shows what takes room" if "images" in meaning else "make room there"
        yield Finding(MEND, fact.name, f"{size} MB of disk left for {meaning}; {needed} MB are needed", mend)
    if not short:
        least = min((size for size in free.values() if size is not None), default=0)
        yield Finding(OK, fact.name, f"{least / 1000:.0f} GB of disk left")


def _memory(config: Config, fact: Facts) -> Iterator[Finding]:
    total, left = fact.number("MemTotal"), fact.number("MemAvailable")
    if fact.machine.simulated or total is None or left is None:
        return
    if left < MEMORY_LEFT_MB:
        yield Finding(
            MEND,
            fact.name,
            f"{left} MB of {total} MB of memory left",
            "end what takes it: ps aux --sort=-rss shows what does",
        )
    elif config.simulated and total < MEMORY_TO_RUN_MB:
        yield Finding(
            NOTE, fact.name, f"{total} MB of memory: little for simulated workers", "set LOCAL_WORKERS=1 in config.sh"
        )
    else:
        yield Finding(OK, fact.name, f"{total / 1000:.0f} GB of memory, {left / 1000:.0f} GB left")


def _nfs(config: Config, fact: Facts) -> Iterator[Finding]:
    if config.home_storage != "nfs":
        return
    serves = "head" in fact.machine.roles and not homes.is_external(config)
    if serves and not fact.is_yes("nfs-server"):
        yield Finding(
            MEND,
            fact.name,
            "its kernel cannot serve NFS (no nfsd), so workers would have no /home",
            "set HOME_SERVER in config.sh to a server that exports HOME_ROOT, or take another head",
        )
    if not fact.is_yes("nfs-client"):
        yield Finding(
            MEND, fact.name, "its kernel cannot mount NFS, so it would have no /home", "take a kernel that has NFS"
        )
    for target, is_reached in fact.reached.items():
        if target.endswith(f":{homes.NFS_PORT}") and not is_reached:
            yield Finding(
                MEND, fact.name, f"cannot reach the NFS server at {target}", "open that port, or start the server"
            )
    if fact.is_yes("nfs-client") and (not serves or fact.is_yes("nfs-server")):
        yield Finding(OK, fact.name, "NFS can be " + ("served and mounted" if serves else "mounted"))


def _counters(_config: Config, fact: Facts) -> Iterator[Finding]:
    if "worker" not in fact.machine.roles:
        return
    paranoid = fact.settings.get(tuning.PARANOID)
    if not fact.pmu:
        yield Finding(NOTE, fact.name, "no hardware counters: the CPU shows no PMU here. Times can be measured")
    elif paranoid is None:
        yield Finding(NOTE, fact.name, "no hardware counters: the kernel was built without perf events")
    elif closed := tuning.unwanted({tuning.PARANOID: paranoid}):
        mend = f"./invoke tune, or there: sysctl kernel.perf_event_paranoid={closed[0].wanted}"
        yield Finding(NOTE, fact.name, f"{closed[0].meaning}: kernel.perf_event_paranoid is {paranoid}", mend)
    else:
        yield Finding(OK, fact.name, f"hardware counters: {', '.join(fact.pmu)}")


def _is_measured_on(config: Config, fact: Facts) -> bool:
    """Return whether measurements run on this machine's own hardware; that of simulated workers is the head's."""
    return "head" in fact.machine.roles if config.simulated else "worker" in fact.machine.roles


def _settings(config: Config, fact: Facts) -> Iterator[Finding]:
    """Say which settings make measurements vary."""
    if not _is_measured_on(config, fact):
        return
    found = [change for change in tuning.unwanted(fact.settings) if change.kind != "counters"]
    if not found:
        yield Finding(OK, fact.name, "no governor, boost, SMT or swap is seen that measurements vary with")
        return
    used = f", {fact.number('swap-used')} MB of swap in use" if fact.number("swap-used") else ""
    varies = ", ".join(dict.fromkeys(change.meaning for change in found))
    may = {change.kind for change in found} & config.tune
    mend = "./invoke tune" if may else "let ./invoke tune set that: TUNE in config.sh"
    if config.simulated:
        mend = "measure on real workers, which ./invoke tune can set"
    yield Finding(NOTE, fact.name, f"measurements vary more with {varies}{used}", mend)


def _disturbances(config: Config, fact: Facts) -> Iterator[Finding]:
    """Say what else takes a machine's time."""
    if not _is_measured_on(config, fact):
        return
    disturbed = False
    if fact.foreign:
        disturbed = True
        names = ", ".join(fact.foreign[:MOST_NAMES]) + (" …" if len(fact.foreign) > MOST_NAMES else "")
        what = f"containers that are not the cluster's run beside measurements: {names}"
        yield Finding(NOTE, fact.name, what, "there: docker stop them, or run them elsewhere")
    steal = fact.number("steal") or 0
    if steal >= STEAL_PER_MILLE:
        disturbed = True
        what = f"{steal / 10:.1f} % of its CPU time went to other virtual machines (steal)"
        yield Finding(NOTE, fact.name, what, "take a machine of metal, or one whose CPUs are its own")
    throttled = fact.number("throttled") or 0
    if throttled:
        disturbed = True
        what = f"its CPU was slowed down {throttled} times for heat or power since it started"
        yield Finding(NOTE, fact.name, what, "see to its cooling; ./invoke calibrate compares it with its fellows")
    if not disturbed:
        yield Finding(OK, fact.name, "no foreign container, no CPU time stolen, no throttling")


_CHECKS: tuple[Callable[[Config, Facts], Iterable[Finding]], ...] = (
    _engine,
    _commands,
    _kernel,
    _cgroups,
    _swarm_ports,
    _disk,
    _memory,
    _nfs,
    _counters,
    _settings,
    _disturbances,
)

# --- the cluster -----------------------------------------------------------------------------------------------------


def _published(config: Config, known: Sequence[Facts]) -> Iterator[Finding]:
    """Tell whether the head's ports that people and machines connect to are free, or the cluster's own."""
    head = next((fact for fact in known if "head" in fact.machine.roles), None)
    if head is None:
        return
    ours = _ports_of_the_cluster()
    wanted = {config.jupyter_port: "JUPYTER_PORT", config.user_registry_port: "USER_REGISTRY_PORT"}
    if not config.dockerhub_username:
        wanted[config.registry_port] = "REGISTRY_PORT"
    if config.ssh_port:
        wanted[config.ssh_port] = "SSH_PORT"
    for port, knob in wanted.items():
        holder = head.listeners.get(("tcp", port))
        if holder and port not in ours:
            holder = "another container" if holder == "docker-proxy" else holder
            yield Finding(
                MEND,
                head.name,
                f"port {port} ({knob}) is held by {holder}",
                f"end that, or set another {knob} in config.sh",
            )
        else:
            yield Finding(OK, head.name, f"port {port} ({knob}) is " + ("the cluster's own" if holder else "free"))


def _ports_of_the_cluster() -> set[int]:
    with suppress(ClusterError, docker.errors.DockerException):
        ours = engine.client().api.containers(filters={"label": LABEL})
        return {port["PublicPort"] for container in ours for port in container["Ports"] if "PublicPort" in port}
    return set()


def _trust(config: Config, state: State, known: Sequence[Facts]) -> Iterator[Finding]:
    """Tell whether every engine reaches the cluster's registry and trusts it."""
    address = f"{config.head_addr}:{config.registry_port}"
    asked = [fact for fact in known if address in fact.reached]
    if not asked or not state.path("ca.crt").exists():
        return
    # The trailing newline is as it comes.
    authority = state.path("ca.crt").read_text().strip() + "\n"
    digest = hashlib.sha256(authority.encode()).hexdigest()
    for fact in asked:
        if not fact.reached[address]:
            yield Finding(
                MEND,
                fact.name,
                f"cannot reach the registry at {address}",
                "open that port on the head; ./invoke up starts it",
            )
        elif fact.trusted.get(address) != digest:
            yield Finding(MEND, fact.name, f"its engine does not trust the registry at {address}", "./invoke up")
        else:
            yield Finding(OK, fact.name, f"reaches the registry at {address} and trusts it")


def _registry(config: Config, state: State, *, is_running: bool) -> list[Finding]:
    """Tell whether the registry lets the cluster's account in."""
    head = machines.head(config).name
    account = config.dockerhub_username
    kept = state.path(f"secrets/{registry.TOKEN_SECRET}")
    if account and not os.environ.get(registry.TOKEN_VARIABLE) and not kept.exists():
        what = f"no password for {account}, who is DOCKERHUB_USERNAME in config.sh"
        return [Finding(MEND, head, what, f"set {registry.TOKEN_VARIABLE} in the environment for one ./invoke up")]
    if not state.exists or not is_running or not (account or _has_registry()):
        return [
            Finding(OK, head, f"no login as {account} yet" if account else "no registry yet: ./invoke up makes one")
        ]
    try:
        found = registry.of(config, state)
        found.ensure_login()
    except ClusterError as error:
        return [Finding(MEND, head, error.message, error.remedy or "./invoke up starts it; ./invoke logs registry")]
    return [Finding(OK, head, f"the registry at {found.address} lets {found.username} in")]


def _firewall(config: Config, state: State, walled: Sequence[Machine]) -> list[Finding]:
    """Tell whether strangers are kept from the cluster's ports, if the administrator wants that."""
    if not firewall.is_set(state):
        what = "whoever reaches these machines reaches the swarm's, the registries' and the homes' ports"
        mend = "./invoke firewall --set, where no firewall of your own keeps strangers out"
        return [] if config.simulated else [Finding(NOTE, walled[0].name, what, mend)]
    return [
        Finding(OK, wall.machine.name, "strangers are kept from the cluster's ports")
        if wall.state == "set"
        else Finding(MEND, wall.machine.name, "its firewall is not as it should be", "./invoke firewall --set")
        for wall in firewall.survey(config, state, walled)
        if isinstance(wall, firewall.Wall)
    ]


def _has_registry() -> bool:
    with suppress(ClusterError, docker.errors.DockerException):
        return services.is_manager() and bool(engine.client().services.list(filters={"name": registry.SERVICE}))
    return False


def _pythons(config: Config, state: State, *, is_running: bool) -> list[Finding]:
    """Tell whether all images that there are have the same Debian and the same Python."""
    head = machines.head(config).name
    if not is_running:
        return []
    try:
        found = images.releases(images.built(config), state)
    except ClusterError as error:
        return [Finding(MEND, head, error.message.splitlines()[0], error.remedy or "./invoke build")]
    if not found:
        return [Finding(OK, head, "no images yet: ./invoke up builds them")]
    kinds = sorted(set(found.values()), key=list(found.values()).count)
    if len(kinds) > 1:
        odd = ", ".join(f"cfiddle-{name} has {release}" for name, release in found.items() if release != kinds[-1])
        mend = "./invoke down --purge, then ./invoke up: all are built anew"
        return [Finding(MEND, head, f"the images differ: {odd}; the others have {kinds[-1]}", mend)]
    return [Finding(OK, head, f"{len(found)} images with {kinds[0]}")]


def _names(known: Sequence[Facts]) -> Iterator[Finding]:
    faults = swarm.name_faults([(fact.name, fact.machine.addr) for fact in known])
    for name, what, mend in faults:
        yield Finding(MEND, name, what, mend)
    if not faults and len(known) > 1:
        yield Finding(OK, known[0].name, f"{len(known)} machines, each with a name of its own")


def _clocks(known: Sequence[Facts]) -> Iterator[Finding]:
    remote = [fact for fact in known if not fact.machine.simulated]
    wrong = False
    for fact in remote:
        surely = abs(fact.offset_s) - fact.offset_error_s
        if surely > CLOCK_NOTE_S:
            wrong = True
            level = MEND if surely > CLOCK_MEND_S else NOTE
            way = "ahead" if fact.offset_s > 0 else "behind"
            what = f"its clock is {abs(fact.offset_s):.1f} s {way} of the head's"
            yield Finding(level, fact.name, what, "let it keep time there: apt-get install systemd-timesyncd")
    if not wrong and len(remote) > 1:
        most = max(abs(fact.offset_s) for fact in remote)
        yield Finding(OK, remote[0].name, f"clocks differ by {most:.2f} s at most")


def _load(config: Config, known: Sequence[Facts]) -> Iterator[Finding]:
    """Say who takes a machine's CPUs while no job runs there."""
    measured = [fact for fact in known if _is_measured_on(config, fact)]
    working = _working_nodes() if any(fact.busy for fact in measured) else set()
    for fact in measured:
        if fact.busy and not (working if config.simulated else working & {fact.name}):
            who = ", ".join(f"{name} {percent} %" for name, percent in fact.busy)
            what = f"busy while no job runs, in percent of one CPU: {who}"
            yield Finding(NOTE, fact.name, what, "end what need not run there")


def _working_nodes() -> set[str]:
    """Return the names of the nodes that run jobs; none if Slurm does not answer."""
    with suppress(ClusterError):
        return {name for name, node in slurm.nodes().items() if node.state in slurm.WORKING}
    return set()


def _strays(known: Sequence[Facts]) -> Iterator[Finding]:
    """Tell of sandboxes whose job is no more; those that are just being removed do not count."""
    workers = {fact.name: fact for fact in known if "worker" in fact.machine.roles and fact.engine is not None}
    if not workers:
        return
    jobs = _jobs() if any(fact.sandboxes for fact in workers.values()) else set()
    strays = {
        name: {container for container, job in fact.sandboxes.items() if job not in jobs}
        for name, fact in workers.items()
    }

    def are_gone() -> bool:
        for name, containers in strays.items():
            containers &= _sandboxes(workers[name].machine) if containers else set()
        return not any(strays.values())

    with suppress(ClusterError):
        wait_until(are_gone, timeout_s=STRAY_AFTER_S, interval_s=1, what="the agents to remove sandboxes")
    for name, containers in strays.items():
        if containers:
            short = " ".join(sorted(container[:12] for container in containers))
            what = f"{len(containers)} sandboxes are left of jobs that are no more"
            yield Finding(MEND, name, what, f"there: docker rm --force {short}")
    if not any(strays.values()):
        yield Finding(OK, known[0].name, "no sandbox is left of a job that is no more")


def _jobs() -> set[str]:
    """Return the numbers of the jobs in the queue, those of arrays one by one; none if Slurm does not answer."""
    with suppress(ClusterError):
        return set(slurm.slurm(["squeue", "--noheader", "--array", "--format=%A"]).split())
    return set()


def _sandboxes(machine: Machine) -> set[str]:
    filters = quote(json.dumps({"label": ["cfiddle.sandbox"]}))
    return {str(found["Id"]) for found in machine.engine_get(f"/containers/json?all=1&filters={filters}")}
