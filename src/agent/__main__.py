"""Run the agent on a worker: `python3 -m agent`; `--check` asks whether it answers."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from agent import wire

TYPE_CHECKING = False  # what only the agent itself needs is not loaded for a question to it
if TYPE_CHECKING:
    from agent.container_policy import ContainerPolicy
    from agent.containers import Containers
    from agent.engine import Engine
    from agent.grants import Grants
    from agent.quiet import Quiet

log = logging.getLogger("agent")


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="agent", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 0 if the agent answers")
    parser.add_argument("--list", action="store_true", help="print container, state, profile and job of each sandbox")
    parser.add_argument("--socket", type=Path, default=Path(wire.SOCKET), help="the agent's socket")
    parser.add_argument("--policy", type=Path, default=Path("/etc/cfiddle/policy.yaml"))
    parser.add_argument("--grants", type=Path, default=Path("/run/cfiddle-grants"))
    parser.add_argument("--sandboxes", type=Path, default=Path("/run/cfiddle-sandboxes"), help="for their sockets")
    parser.add_argument("--cgroups", type=Path, default=Path("/run/cgroup"), help="the machine's cgroup tree")
    parser.add_argument("--homes", type=Path, default=Path("/home"), help="the users' home directories")
    parser.add_argument("--engine", default="/var/run/docker.sock")
    options = parser.parse_args()
    if options.check:
        check(options.socket)
    elif options.list:
        show(options.socket)
    else:
        serve(options)


def check(path: Path) -> None:
    """Ask the agent for a sign of life."""
    [message] = ask(path, "ping", last="pong")
    if message.get("type") != "pong":
        sys.exit(f"the agent answers {message}")


def show(path: Path) -> None:
    """Print which sandboxes the agent has: container, state, profile and job (0 for none)."""
    *sandboxes, last = ask(path, "list", last="end")
    if last.get("type") != "end":
        sys.exit(f"the agent answers {last}")
    for found in sandboxes:
        print(found["container"], found["state"], found["profile"], (found["holder"] or {}).get("job", 0))


def ask(path: Path, kind: str, *, last: str) -> list[dict[str, Any]]:
    """Return the agent's answers to a plain question, up to the last one or a refusal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(os.fspath(path))
        wire.send(connection, {"v": wire.VERSION, "type": kind})
        answers = [wire.receive(connection)[0]]
        while answers[-1].get("type") not in (last, "refused"):
            answers.append(wire.receive(connection)[0])
        return answers


def serve(options: argparse.Namespace) -> NoReturn:
    """Sweep what an earlier agent left, then serve until a signal; leave no sandbox behind."""
    import resource

    from agent import duty
    from agent.engine import Engine, EngineError
    from agent.grants import Grants
    from agent.policy import PolicyError, load, own_images
    from agent.quiet import Quiet
    from agent.sandboxes import Sandboxes
    from agent.server import Server

    # Users' connections, and what comes with these, may be more than the thousand that an engine gives by itself.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(duty.FAILED, lambda *_: sys.exit(1))
    try:
        policy = load(options.policy, images=own_images(os.environ))
        engine, grants = Engine(options.engine), Grants(options.grants)
        quiet = Quiet(grants)
        options.sandboxes.mkdir(mode=0o700, parents=True, exist_ok=True)
        options.sandboxes.chmod(0o700)
        sandboxes = Sandboxes(engine, options.sandboxes, cgroups=options.cgroups)
        swept = sandboxes.sweep()
        for profile in policy.profiles.values():
            sandboxes.check_image(profile)
        containers = open_containers(engine, policy.containers, grants, quiet, options.homes)
        server = Server(
            options.socket, policy=policy, grants=grants, quiet=quiet, sandboxes=sandboxes, containers=containers
        )
    except (PolicyError, EngineError, OSError) as error:
        sys.exit(f"error: {error}")
    log.info("serving profiles %s; %d sandboxes of before removed", ", ".join(sorted(policy.profiles)), swept)
    status: object = 1
    try:
        server.run()
    except SystemExit as ending:
        status = ending.code
    except Exception:
        log.exception("the agent ends, for it can let nobody in")
    finally:
        server.close()
        logging.shutdown()
        os._exit(1 if status else 0)


def open_containers(
    engine: Engine, policy: ContainerPolicy | None, grants: Grants, quiet: Quiet, homes: Path
) -> Containers | None:
    """Keep users' containers and open the door to the network, if the policy has any."""
    from agent import own, user_images, user_network
    from agent.containers import Containers
    from agent.door import Door

    if policy is None:
        return None
    own_image = own.image(engine)
    containers = Containers(
        engine,
        policy,
        grants=grants,
        quiet=quiet,
        homes=homes,
        home_options=own.volumes_in(engine, homes),
        network=user_network.ensure(engine, image=own_image),
        own_image=own_image,
        registry=user_images.registry_of(os.environ),
    )
    Door(containers, quiet, address=own.address()).open()
    return containers


if __name__ == "__main__":
    main()
