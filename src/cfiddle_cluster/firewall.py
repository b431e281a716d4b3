"""Who may connect to what machines have open because of the cluster: members alone, where the administrator wants so.

The rules are chains of their own in the kernel's table `mangle`, which firewall.sh puts there as a whole. That table
comes before an engine's redirection of published ports, so what is published is no exception; other people's rules are
elsewhere and stay. They are set by iptables, which engines bring along (nft they do not), in either of its two kinds.

What is not the cluster's is let alone, SSH above all: a rule names what is closed, never what stays open.
"""

import ipaddress
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from agent import user_network
from cfiddle_cluster import homes, swarm
from cfiddle_cluster.config import SIMULATED_NETWORK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import PARALLEL, Machine, Silent, resolved
from cfiddle_cluster.state import State

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("firewall.sh")
UNIT = Path(__file__).with_name("firewall.service")
RECORD = "firewall.json"
"""The file of the state that is there while the rules shall be; it has the addresses that each member is known by."""
TIMEOUT_S = 60.0
WIDTH = 80
SSH_PORT = 22

PORTS, FORWARD, MEMBERS = "CFIDDLE-FIREWALL", "CFIDDLE-FORWARD", "CFIDDLE-MEMBERS"

# What only passes through a machine is somebody else's. In iptables a broadcast is no LOCAL address; in ip6tables,
# UNICAST is what an address looks like, also where it is the machine's own.
_TO_THIS_MACHINE = {"iptables": "! --dst-type UNICAST", "ip6tables": "--dst-type LOCAL"}
_JUMPS = (f"-A PREROUTING -j {PORTS}", f"-A FORWARD -j {FORWARD}")


@dataclass(frozen=True)
class Wall:
    """What a machine's firewall is, and what it should be.

    Attributes:
        machine: whose it is, by its own name.
        closed: the ports that only members shall reach, by protocol.
        wanted: the rules that there should be, by the command that they are for.
        found: the rules that there are, likewise; a machine without IPv6 has none for that.
        kept: whether they come back when the machine starts: yes, no, or, without systemd, never.
    """

    machine: Machine
    closed: Mapping[str, Sequence[int]]
    wanted: Mapping[str, Sequence[str]]
    found: Mapping[str, Sequence[str]]
    kept: str

    @property
    def state(self) -> str:
        """`set`, `not set`, or `differs`."""
        if not any(self.found.values()):
            return "not set"
        return "differs" if self.differences else "set"

    @property
    def differences(self) -> list[str]:
        """What is not as it should be."""
        said = ["would lose its rules when it starts anew"] if self.kept == "no" else []
        for tables, found in self.found.items():
            wanted = self.wanted[tables]
            there, needed = list(map(_parts, found)), list(map(_parts, wanted))
            others = [f"lacks: {tables} {rule}" for rule in wanted if _parts(rule) not in there]
            others += [f"has: {tables} {rule}" for rule in found if _parts(rule) not in needed]
            if not others and sorted(there, key=itemgetter(0)) != sorted(needed, key=itemgetter(0)):
                others = [f"has its rules of {tables} in another order, or one twice"]
            said += others
        return said


def is_set(state: State) -> bool:
    """Return whether the administrator wants the rules."""
    return state.path(RECORD).exists()


def closed(config: Config, machine: Machine) -> dict[str, list[int]]:
    """Return the ports that a machine has open because of the cluster and that are members' business, by protocol.

    Slurm's and the agents' are none of them: those are in the services' network, into which no stranger is let.
    """
    ports = {protocol: {port for port, kind in swarm.PORTS.items() if protocol in kind} for protocol in ("tcp", "udp")}
    if "head" in machine.roles:
        ports["tcp"].add(config.user_registry_port)
        if not config.dockerhub_username:
            ports["tcp"].add(config.registry_port)
        if homes.are_exported(config):
            for found in ports.values():
                found.update(homes.SERVER_PORTS)
    return {
        protocol: sorted(found - {SSH_PORT, config.jupyter_port, config.ssh_port}) for protocol, found in ports.items()
    }


def rules(ports: Mapping[str, Sequence[int]], members: Iterable[str], *, tables: str = "iptables") -> list[str]:
    """Return the rules of a machine, as `iptables -S` prints them.

    Args:
        ports: what is closed, by protocol.
        members: addresses or networks of those who may connect.
        tables: iptables, or ip6tables, by which nobody may: members know each other by IPv4.
    """
    here = f"-m addrtype {_TO_THIS_MACHINE[tables]}"
    networks = [ipaddress.ip_network(member) for member in members] if tables == "iptables" else []
    return [
        *_JUMPS,
        *(
            f"-A {PORTS} -p {protocol} {here} -m multiport --dports {','.join(map(str, numbers))} -j {MEMBERS}"
            for protocol, numbers in ports.items()
            if numbers
        ),
        # To the services' containers leads what they publish, and nothing else, also for a neighbour who takes this
        # machine for a way there.
        f"-A {FORWARD} -o {swarm.BRIDGE} -m conntrack ! --ctstate DNAT --ctdir ORIGINAL -j DROP",
        f"-A {FORWARD} -o {user_network.NAME} -j {MEMBERS}",
        f"-A {MEMBERS} -i lo -j RETURN",
        # Services on this machine, which other members know by this machine's address.
        f"-A {MEMBERS} -i {swarm.BRIDGE} -j RETURN",
        f"-A {MEMBERS} -m conntrack --ctdir REPLY -j RETURN",
        *(f"-A {MEMBERS} -s {network} -j RETURN" for network in networks),
        f"-A {MEMBERS} -j DROP",
    ]


def to_restore(wanted: Iterable[str]) -> str:
    """Return the rules as `iptables-restore --noflush` takes them: our chains anew, jumps to them before all else."""
    chains = [f":{chain} - [0:0]" for chain in (PORTS, FORWARD, MEMBERS)]
    return "\n".join([*chains, *(rule.replace("-A", "-I", 1) if rule in _JUMPS else rule for rule in wanted)])


def survey(config: Config, state: State, machines: Iterable[Machine]) -> list[Wall | Silent]:
    """Look at every machine at once; return what there is and what should be, in the machines' order."""
    return _survey(config, state, machines)[0]


def ensure(config: Config, state: State, machines: Iterable[Machine]) -> list[Silent]:
    """Set the rules on every machine that has others or none; return those on which that was not possible.

    From then on they shall be there: `up`, and whatever changes who is a member, sets them again.
    """
    walls, members = _survey(config, state, machines)
    state.write_json(RECORD, {"members": members})
    script, unit = SCRIPT.read_text(), UNIT.read_text()
    wrong = {wall.machine: wall for wall in walls if isinstance(wall, Wall) and wall.state != "set"}

    def set_(machine: Machine) -> None:
        texts = [to_restore(wrong[machine].wanted[tables]) for tables in _TO_THIS_MACHINE]
        machine.script(script, ["", "set", script, unit, *texts], timeout_s=TIMEOUT_S)

    return [outcome for outcome in (*walls, *_each(wrong, set_)) if isinstance(outcome, Silent)]


def remove(machines: Iterable[Machine]) -> list[Silent]:
    """Take the rules off every machine; return those on which that was not possible."""
    script = SCRIPT.read_text()
    outcomes = _each(machines, lambda machine: machine.script(script, ["", "unset"], timeout_s=TIMEOUT_S))
    return [outcome for outcome in outcomes if isinstance(outcome, Silent)]


def forget(state: State) -> None:
    """Want the rules no longer."""
    state.path(RECORD).unlink(missing_ok=True)


def is_as_wanted(state: State, walls: Iterable[Wall | Silent]) -> bool:
    """Return whether every machine answers and has the rules, or has none, as the administrator wants."""
    wanted = "set" if is_set(state) else "not set"
    return all(isinstance(wall, Wall) and wall.state == wanted for wall in walls)


def text(config: Config, state: State, walls: Sequence[Wall | Silent]) -> str:
    """Return a table of what there is, what differs, and what to do, at most 80 columns wide."""
    rows = [("machine", "firewall", "for members only")]
    for wall in walls:
        if isinstance(wall, Silent):
            rows.append((wall.machine.name, "no answer", ""))
        else:
            said = [f"{protocol} {' '.join(map(str, numbers))}" for protocol, numbers in wall.closed.items()]
            rows += [(wall.machine.name, wall.state, said[0]), *(("", "", more) for more in said[1:])]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = []
    for name, what, ports in rows:
        start = f"{name:<{widths[0]}}  {what:<{widths[1]}}  "
        lines += _wrapped(start + ports, indent=len(start))
    ssh = f", {config.ssh_port} (SSH to the users' node)" if config.ssh_port else ""
    lines += [
        "",
        *_wrapped(f"members: {' '.join(_addresses(config, _known(config, state)))}"),
        *_wrapped("for members only, too: users' containers; Slurm and the agents are in a network of their own"),
        *_wrapped(f"for everybody: SSH; on the head {config.jupyter_port} (JupyterLab){ssh}"),
    ]
    for wall in walls:
        if isinstance(wall, Silent):
            lines += _wrapped(f"{wall.machine.name}: {' '.join(wall.error.message.split())}")
        elif wall.state == "differs":
            lines += [line for said in wall.differences for line in _wrapped(f"{wall.machine.name} {said}")]
    fleeting = [wall.machine.name for wall in walls if isinstance(wall, Wall) and wall.kept == "never"]
    if is_set(state) and fleeting:
        lines += _wrapped(f"no systemd on {', '.join(fleeting)}: after a restart there, ./invoke up sets it again")
    return "\n".join([*lines, "", _verdict(state, walls)])


def _verdict(state: State, walls: Sequence[Wall | Silent]) -> str:
    if is_set(state):
        return "set" if is_as_wanted(state, walls) else "not as it should be: ./invoke firewall --set"
    if any(isinstance(wall, Wall) and wall.state != "not set" for wall in walls):
        return "not wanted, and there: ./invoke firewall --unset takes it away"
    return "not set, so these ports are for everybody: ./invoke firewall --set"


def _wrapped(line: str, *, indent: int = 2) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def _parts(rule: str) -> tuple[str, list[str]]:
    """Return a rule's chain and what it consists of, which releases of iptables print in different orders."""
    return rule.split()[1], sorted(rule.split())


@dataclass(frozen=True)
class _Answer:
    machine: Machine
    sources: Sequence[str]
    found: Mapping[str, Sequence[str]]
    kept: str


def _survey(
    config: Config, state: State, machines: Iterable[Machine]
) -> tuple[list[Wall | Silent], dict[str, Sequence[str]]]:
    """Return what is and should be on every machine, and by which addresses each member is known, silent ones too."""
    script, known = SCRIPT.read_text(), _known(config, state)
    targets = [] if config.simulated else _addresses(config, known)

    def ask(machine: Machine) -> _Answer:
        return _parse(machine, machine.script(script, ["", "look", *targets], timeout_s=TIMEOUT_S))

    def wall(answer: _Answer) -> Wall:
        ports = closed(config, answer.machine)
        wanted = {tables: rules(ports, members, tables=tables) for tables in _TO_THIS_MACHINE}
        return Wall(answer.machine, ports, wanted, answer.found, answer.kept)

    answers = _each(machines, ask)
    known |= {answer.machine.addr: answer.sources for answer in answers if isinstance(answer, _Answer)}
    members = _addresses(config, known)
    return [wall(answer) if isinstance(answer, _Answer) else answer for answer in answers], known


def _each(machines: Iterable[Machine], act: Callable[[Machine], T]) -> list[T | Silent]:
    """Do something on every machine at once; one that fails is silent, and the others go on."""

    def attempt(machine: Machine) -> T | Silent:
        try:
            return act(machine)
        except ClusterError as error:
            return Silent(machine, error)

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return list(pool.map(attempt, machines))


def _parse(machine: Machine, said: str) -> _Answer:
    """Read what firewall.sh prints when it looks."""
    values: dict[str, str] = {}
    sources: set[str] = set()
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        what, _, value = line.partition(" ")
        if what == "source":
            sources.add(value)
        elif what == "family":
            found[value] = []
        elif what not in found:
            values[what] = value
        elif value.startswith("-A "):
            found[what].append(value)
    return _Answer(replace(machine, name=values["name"]), sorted(sources), found, values["kept"])


def _known(config: Config, state: State) -> dict[str, Sequence[str]]:
    """Return for each member, by its address in config.sh, the addresses from which it was seen to reach others."""
    recorded = state.read_json(RECORD, {"members": {}})["members"]
    return {addr: recorded.get(addr, []) for addr in (config.head_addr, *config.worker_addrs)}


def _addresses(config: Config, known: Mapping[str, Iterable[str]]) -> list[str]:
    """Return all addresses of members: those they are reached at, and those from which they reach others."""
    if config.simulated:
        return [str(SIMULATED_NETWORK)]
    found = {address for addr, sources in known.items() for address in (resolved(addr), *sources)}
    return sorted(filter(_is_address, found), key=ipaddress.IPv4Address)


def _is_address(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
