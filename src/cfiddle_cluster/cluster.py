"""The whole cluster: what `up`, `down`, `scale` and their like do, as lists of steps.

Every step promises a state and can be run again at any time. What a step needs to know of the earlier ones stands in
the machines themselves, so nothing here has to be carried from one run to the next but the list of workers.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cfiddle_cluster import (
    backup,
    calibration,
    config,
    container_images,
    distribution,
    engine,
    firewall,
    homes,
    image_files,
    images,
    machines,
    packages,
    readiness,
    registry,
    services,
    simulated,
    slurm,
    stack,
    swarm,
    tuning,
    upgrade,
    user_containers,
    userhost,
    users,
)
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine, Silent
from cfiddle_cluster.report import Report
from cfiddle_cluster.state import State
from cfiddle_cluster.upgrade import Patience
from cfiddle_cluster.wait import wait_until

STOP_TIMEOUT_S = 60.0
BRING_IN = "all else is done; when that is mended, this brings in who was left out: ./invoke up"
WORKERS = "workers.json"
"""The file of the state that says what `scale`, `add-worker` and `remove-worker` made of the workers in config.sh."""


@dataclass(frozen=True)
class Cluster:
    """A cluster as its administrator drives it.

    Attributes:
        config: config.sh, with the workers that it has by now.
        configured: config.sh as it is.
        state: what is kept of the cluster on this machine.
    """

    config: Config
    configured: Config
    state: State

    @classmethod
    def of(cls, root: Path) -> "Cluster":
        """Return the cluster that a checkout's config.sh describes, on this machine's engine.

        Raises:
            ClusterError: config.sh is wrong.
        """
        # Every docker command means the head's engine, whatever context the administrator's own client has.
        os.environ.pop("DOCKER_CONTEXT", None)
        os.environ["DOCKER_HOST"] = f"unix://{engine.SOCKET}"
        configured = config.load(root)
        state = State(configured.state_dir)
        return cls(_with_workers(configured, state), configured, state)

    # --- up ----------------------------------------------------------------------------------------------------------

    def up(self, until: str = "") -> None:
        """Do every step, in order, or those up to a named one; each does only what is missing.

        Raises:
            ClusterError: a step fails, or another command is at work; or workers are left out, when all else is done.
        """
        packages.ensure_root()
        with self.state.lock("up"):
            silent = self._up(Report(again="./invoke up"), until)
        if not until:
            print(self._greeting())
        _refuse(silent, BRING_IN)

    def upgrade(self, *, drain_minutes: str, start_seconds: str) -> None:
        """Do what `up` does, but replace the services one by one and the workers' worker by worker, while jobs run.

        Args:
            drain_minutes: how long the jobs of a worker are waited for, as it was written.
            start_seconds: how long what was replaced may take to be healthy, as it was written.

        Raises:
            ClusterError: one of them is no number, or something did not come up, and all is as it was.
        """
        packages.ensure_root()
        drain_s = 60.0 * _whole_number("--drain-minutes", drain_minutes)
        patience = Patience(drain_s, _whole_number("--start-seconds", start_seconds))
        with self.state.lock("upgrade"):
            self._must_run()
            self._up(Report(again="./invoke upgrade"), patience=patience)

    def _up(self, report: Report, until: str = "", patience: Patience | None = None) -> list[Silent]:
        """Do the steps; return the workers that were left out, since they cannot be reached."""

        def engine_() -> None:
            packages.ensure_commands()
            swarm.refuse_other_address(self.config)
            self.state.ensure(self.config.head_addr)
            packages.ensure_engine(self.config, self.state)

        built: dict[str, str] = {}
        there: list[Machine] = []
        silent: list[Silent] = []
        references: dict[str, str] = {}
        identities: dict[str, calibration.Identity] = {}

        def images_() -> None:
            if images.needs_debian(self.config):
                packages.ensure_packages([images.BOOTSTRAP])
            built.update(images.build(self.config, report.note))
            images.ensure_one_python(built, self.state)

        def machines_() -> None:
            workers, others = self._ensure_machines(built, report)
            there.extend([self._head, *workers])
            silent.extend(others)
            # An upgrade could not keep Swarm from replacing the services of a worker that we alone do not reach.
            is_upgrade = bool(patience) or upgrade.is_under_way(self.state)
            if is_upgrade or not _that_run_jobs(there):
                _refuse(
                    silent, "mend that; who is gone for good: ./invoke remove-worker NAME, or WORKER_ADDRS in config.sh"
                )
            for found in silent:
                report.note(f"left out: {found.error.message.partition(chr(10))[0].rstrip(':')}")

        def registry_() -> None:
            registry.ensure_registry(self.config, self.state, there, built["registry"])

        def distribution_() -> None:
            running = services.references()
            references.update(distribution.distribute(self.config, self.state, there, built, report.note, running))

        def services_() -> None:
            if patience or upgrade.is_under_way(self.state):
                upgrade.roll_out(self.config, self.state, there, references, patience or Patience(), report.note)
            else:
                stack.deploy(self.config, self.state, references, report.note)

        def ready() -> None:
            identities.update(readiness.wait_until_ready(there))
            slurm.ensure_share()

        def calibration_() -> None:
            limit = self.config.calibration_limit
            for outcome in calibration.ensure_calibrated(self.state, _that_run_jobs(there), identities, limit):
                if outcome.difference and outcome.difference.is_off:
                    report.note(f"{outcome.name} {outcome.what}; when it is mended: ./invoke calibrate")

        steps: dict[str, tuple[str, Callable[[], object]]] = {
            "engine": ("packages, Docker Engine, secrets", engine_),
            "images": ("images", images_),
            "machines": ("machines", machines_),
            "swarm": ("swarm", lambda: self._ensure_swarm(there)),
            "labels": ("labels", lambda: swarm.ensure_labels(self._head, there)),
            "homes": ("home directories", lambda: homes.ensure_homes(self.config)),
            "registry": ("registry", registry_),
            "distribution": ("images to all machines", distribution_),
            "accounts": ("users: homes and accounts", lambda: users.ensure_accounts(self.config, self.state)),
            "stack": ("services", services_),
            "users": ("users: associations in Slurm", lambda: users.ensure_associations(self.state)),
            "ready": ("a job on each worker", ready),
            "calibration": ("speed of new workers", calibration_),
            "tidy": ("images of before", lambda: distribution.remove_outdated(there, built)),
        }
        for name, (title, step) in steps.items():
            with report.step(title):
                step()
            if name == until:
                break
        return silent

    def _greeting(self) -> str:
        lines = [
            "",
            f"JupyterLab: {userhost.url(self.config, self.state)}",
            "",
            "Try next:",
            "  ./invoke shell --command sinfo             the nodes",
            "  ./invoke shell --command ./test_slurm.sh   jobs of all kinds, as a user",
            "  ./invoke shell --command ./test_cfiddle.py a measurement in a sandbox",
        ]
        return "\n".join(lines)

    # --- the machines ------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> Machine:
        return machines.head(self.config)

    def _machines(self) -> list[Machine]:
        """Return the head and all workers; real ones are asked for their names."""
        return [self._head, *self._workers()]

    def _workers(self) -> list[Machine]:
        return machines.named(self._worker_list())

    def _slurm_workers(self) -> list[Machine]:
        """Return the machines that run jobs and answer, the head too if it is a worker; say which do not."""
        workers, silent = machines.reached(self._worker_list())
        for one in silent:
            print(f"warning: left out: {one.error.message}", file=sys.stderr)
        return _that_run_jobs([self._head, *workers])

    def _worker_list(self) -> list[Machine]:
        if self.config.simulated:
            return simulated.workers(self.state)
        remote = [addr for addr in self.config.worker_addrs if addr != self.config.head_addr]
        return [machines.real_worker(self.config, self.state, addr) for addr in remote]

    def _ensure_machines(self, built: Mapping[str, str], report: Report) -> tuple[list[Machine], list[Silent]]:
        """Make the simulated workers, or install Docker on the real ones; return those, and those beyond reach."""
        if self.config.simulated:
            names = _simulated_names(self.configured, self.state)
            homes.ensure_root(self.config)  # they have it mounted from their first moment
            simulated.ensure_machines(self.config, self.state, names, built["machine"], report.note)
            return self._workers(), []
        if left := simulated.existing():
            raise ClusterError(
                f"WORKER_ADDRS names real machines, and the simulated ones {', '.join(left)} are still there",
                "./invoke down takes them away; state and homes stay",
            )
        workers, silent = machines.reached(self._worker_list())
        script = (self.config.root / "install_docker.sh").read_text()
        machines.on_each(workers, lambda machine: machine.script(script, timeout_s=packages.INSTALL_TIMEOUT_S))
        return workers, silent

    def _ensure_swarm(self, there: list[Machine]) -> None:
        # A machine must be let in before it can join.
        walled = [machine for machine in there if not machine.simulated]
        if firewall.is_set(self.state) and (silent := firewall.ensure(self.config, self.state, walled)):
            raise silent[0].error
        swarm.ensure_swarm(self.config, self.state)
        swarm.ensure_joined(self.config, self.state, there)

    # --- more or fewer workers ---------------------------------------------------------------------------------------

    def scale(self, wanted: str) -> None:
        """Have so many simulated workers; those with the highest numbers go first, drained.

        Args:
            wanted: how many, as it was written.

        Raises:
            ClusterError: the number is none that can be, or the workers are real machines.
        """
        packages.ensure_root()
        if not self.config.simulated:
            raise ClusterError(
                "the workers are real machines, which cannot be made",
                "./invoke add-worker ADDRESS, ./invoke remove-worker NAME",
            )
        workers = int(wanted) if re.fullmatch("[0-9]{1,4}", wanted) else 0
        if not 1 <= workers <= config.MAX_LOCAL_WORKERS:
            raise ClusterError(
                f"there cannot be {wanted} workers", f"name a number from 1 to {config.MAX_LOCAL_WORKERS}"
            )
        with self.state.lock("scale"):
            self._must_run()
            names = _simulated_names(self.configured, self.state)
            spare = (name for name in map("c{}".format, range(1, config.MAX_LOCAL_WORKERS + 1)) if name not in names)
            added = [next(spare) for _ in range(workers - len(names))]
            left = sorted([*names[:workers], *added], key=simulated.number)
            report = Report(again=f"./invoke scale {workers}")
            for name in names[workers:]:
                self._remove_worker(report, name)
            _record(self.configured, self.state, left)
            self._up(report)

    def add_worker(self, addr: str) -> None:
        """Add a real machine by its address.

        Raises:
            ClusterError: it is one already, cannot be reached or has a name that another has.
        """
        packages.ensure_root()
        if self.config.simulated:
            raise ClusterError(
                "this cluster's workers are simulated",
                "./invoke scale N for more of them, or set WORKER_ADDRS in config.sh",
            )
        if addr in self.config.worker_addrs:
            raise ClusterError(
                f"{addr} is a worker already",
                "./invoke status shows it; to go on where it was interrupted: ./invoke up",
            )
        with self.state.lock("add-worker"):
            self._must_run()
            machines.named([machines.real_worker(self.config, self.state, addr)])
            _record(self.configured, self.state, [*self.config.worker_addrs, addr])
            larger, report = Cluster.of(self.config.root), Report(again="./invoke up")
            try:
                silent = larger._up(report, until="swarm")
                _refuse([found for found in silent if found.machine.addr == addr], "run this again when it answers")
            except BaseException:
                # It has not become a member, so nobody shall wait for it from now on, or let it in.
                _record(self.configured, self.state, self.config.worker_addrs)
                self._let_out(report, [machines.real_worker(self.config, self.state, addr)])
                raise
            silent = larger._up(report)
        _refuse(silent, BRING_IN)

    def remove_worker(self, name: str) -> None:
        """Drain a worker, wait until its jobs have ended, and take it out of the cluster, or go on with that.

        Raises:
            ClusterError: there is none of that name, it is the last one, or Swarm reaches it and we do not.
        """
        packages.ensure_root()
        with self.state.lock("remove-worker"):
            self._must_run()
            known = swarm.worker_names()
            if name not in known and not self._is_leaving(name):
                raise ClusterError(
                    f"there is no worker {name!r}; there are {', '.join(known)}", "./invoke status shows them"
                )
            if not set(known) - {name}:
                raise ClusterError(f"{name} is the last worker", "add another one first, or: ./invoke down")
            self._remove_worker(Report(again=f"./invoke remove-worker {name}"), name)

    def _remove_worker(self, report: Report, name: str) -> None:
        machine = self._reachable(name)
        addr = machine.addr if machine else swarm.address_of(name)
        is_head = machine is not None and "head" in machine.roles
        with report.step(f"drain {name}"):
            if machine is None:
                slurm.set_down([name], "cfiddle: its machine is gone")
            else:
                slurm.drain([name], "cfiddle: the worker is being removed")
                slurm.wait_until_empty([name], timeout_s=stack.DRAIN_TIMEOUT_S, say=report.note)
        with report.step(f"take {name} out of the cluster"):
            swarm.unlabel_worker(name)
            wait_until(
                lambda: not any(name in services.machines_of(service) for service in stack.WORKER_SERVICES),
                timeout_s=STOP_TIMEOUT_S,
                what=f"{' and '.join(stack.WORKER_SERVICES)} to end on {name}",
                remedy="./invoke logs slurmd or ./invoke logs agent shows why it does not",
            )
            slurm.delete_node(name)
            slurm.ensure_share()
            if machine and not machine.simulated:
                # Slurm must have forgotten it: with another number of CPUs the node would come anew, and take jobs.
                tuning.undo(self.config, self.state, [machine], report.note)
                user_containers.remove_all(machine)
            if not is_head:
                swarm.remove_node(self.state, name, machine)
            # What is recorded comes last, so that who was interrupted can go on.
            if self.config.simulated:
                simulated.remove_machine(name)
                left = [other for other in _simulated_names(self.configured, self.state) if other != name]
            else:
                gone = [machine] if machine and not is_head else []
                for former in gone:
                    self._clear(report, former)
                left = [other for other in self.config.worker_addrs if addr not in (other, machines.resolved(other))]
                smaller = replace(self, config=replace(self.config, worker_addrs=tuple(left)))
                homes.ensure_homes(smaller.config)
                smaller._let_out(report, gone)
            _record(self.configured, self.state, left)

    def _clear(self, report: Report, gone: Machine) -> None:
        """Remove what the cluster put on a machine that is no member: `down --purge` does not know it any longer."""
        try:
            registry.remove_trust(self.config, [gone])
            stack.remove_volumes(gone)
            images.remove_images(gone)
        except ClusterError as error:
            report.note(f"something of the cluster is left on {gone.name}: {error.message}")

    def _reachable(self, name: str) -> Machine | None:
        """Return the worker of that name, or None if it is lost: Swarm does not reach it either.

        Raises:
            ClusterError: Swarm does, so jobs may run there.
        """
        there, silent = machines.reached(self._worker_list())
        for machine in [self._head, *there]:
            if machine.name == name:
                return machine
        if swarm.is_ready(name):
            addr = swarm.address_of(name)
            for found in silent:
                if addr in (found.machine.addr, machines.resolved(found.machine.addr)):
                    raise found.error
            raise ClusterError(
                f"{name} is at {addr}, and no worker that answers has that name",
                "see that config.sh names its address in WORKER_ADDRS, and that ssh leads there",
            )
        return None

    def _is_leaving(self, name: str) -> bool:
        """Tell whether a machine is no worker any longer only because its removal was interrupted."""
        answering = _that_run_jobs([self._head, *machines.answering(self._worker_list())])
        return name in swarm.former_worker_names() or name in [machine.name for machine in answering]

    def _must_run(self) -> None:
        if not engine.is_running() or not services.container("slurmctld"):
            raise ClusterError("the cluster does not run", "./invoke up")

    def _must_have_engine(self) -> None:
        if not engine.is_running():
            raise ClusterError("Docker Engine does not run", "./install_docker.sh")

    # --- measurements ------------------------------------------------------------------------------------------------

    def calibrate(self, *, as_json: bool) -> int:
        """Measure how fast each worker is, drain those that are off; return 1 if there are any, else 0."""
        packages.ensure_root()
        with self.state.lock("calibrate"):
            self._must_run()
            outcomes = calibration.calibrate(self.state, self._slurm_workers(), self.config.calibration_limit)
        print(json.dumps(calibration.as_data(outcomes), indent=2) if as_json else calibration.table(outcomes))
        return int(any(outcome.difference and outcome.difference.is_off for outcome in outcomes))

    def tune(self, *, undo: bool) -> None:
        """Set what measurements on real workers vary with, or put back what was; then compare them anew."""
        packages.ensure_root()
        if self.config.simulated:
            print("nothing to set: simulated workers have this machine's CPUs, and are for trying")
            return
        with self.state.lock("tune"):
            workers = self._slurm_workers()
            act = tuning.undo if undo else tuning.tune
            changed = act(self.config, self.state, workers, print)
            if undo and not changed:
                print("nothing to put back")
            if changed and slurm.is_answering():
                print(calibration.table(calibration.calibrate(self.state, workers, self.config.calibration_limit)))

    # --- who may connect ---------------------------------------------------------------------------------------------

    def firewall(self, *, set_: bool, unset: bool) -> int:
        """Set the rules on all machines, or take them off, or neither; show what is there then.

        Returns:
            0, or 1 where a machine does not answer, or has not what the administrator wants.
        """
        packages.ensure_root()
        if set_ and unset:
            raise ClusterError("--set and --unset are opposites", "./invoke firewall shows what there is")
        with self.state.lock("firewall"):
            if not self.state.exists:
                raise ClusterError("there is no cluster on this machine", "./invoke up makes one")
            walled, failed = self._walled(), []
            if set_:
                failed = firewall.ensure(self.config, self.state, walled)
            elif unset:
                firewall.forget(self.state)
                failed = firewall.remove(walled)
            walls = firewall.survey(self.config, self.state, walled)
        print(firewall.text(self.config, self.state, walls))
        for silent in failed:
            print(f"{silent.machine.name}: {silent.error}", file=sys.stderr)
        return int(bool(failed) or not firewall.is_as_wanted(self.state, walls))

    def _walled(self) -> list[Machine]:
        """Return the machines that strangers could reach: simulated ones are behind the head."""
        return [self._head, *([] if self.config.simulated else self._worker_list())]

    def _let_out(self, report: Report, gone: Iterable[Machine]) -> None:
        """Take the rules off machines that are no members, and let the members know them no longer."""
        if firewall.is_set(self.state):
            for silent in [*firewall.remove(gone), *firewall.ensure(self.config, self.state, self._walled())]:
                report.note(f"{silent.machine.addr}: its firewall stays as it is, since it does not answer")

    # --- containers of users -----------------------------------------------------------------------------------------

    def set_up_containers(self) -> int:
        """Bring the images of users' containers to all machines, and have `ddocker setup` say what is amiss there.

        Returns:
            Its exit status.
        """
        packages.ensure_root()
        with self.state.lock("setup-containers"):
            self._must_run()
            answering = machines.answering(self._worker_list())
            container_images.share(self.config, self.state, [self._head, *answering])
            return userhost.ddocker(["setup"])

    def free_images(self) -> None:
        """Free the space of the users' images that were removed."""
        packages.ensure_root()
        with self.state.lock("free-images"):
            self._must_run()
            print(container_images.free_space())

    # --- users -------------------------------------------------------------------------------------------------------

    def add_user(self, name: str) -> None:
        """Add a user, known everywhere at once."""
        packages.ensure_root()
        with self.state.lock("add-user"):
            self._must_run()
            user = users.add(self.config, self.state, name)
        print(f"{user.name} (uid {user.uid}) can log in: ./invoke shell --user {user.name}")

    def remove_user(self, name: str, *, delete_home: bool) -> None:
        """Remove a user and end what they run."""
        packages.ensure_root()
        with self.state.lock("remove-user"):
            self._must_run()
            there, silent = machines.reached(_that_run_jobs([self._head, *self._worker_list()]))
            users.remove(self.config, self.state, name, delete_home=delete_home, machines=there)
            for found in silent:
                print(f"{found.machine.name} does not answer: containers of {name} may be left there")
        print(f"{name} is no user any longer" + ("" if delete_home else "; the home directory is still there"))

    def import_users(self, path: Path) -> None:
        """Add all users of a CSV file who are not there yet, or none."""
        packages.ensure_root()
        with self.state.lock("import-users"):
            self._must_run()
            added, there = users.import_users(self.config, self.state, path)
        names = f": {', '.join(user.name for user in added)}" if added else ""
        print(f"{len(added)} users added{names}" + (f"; {len(there)} were there" if there else ""))

    # --- backup, restore, down ---------------------------------------------------------------------------------------

    def save_images(self, path: Path) -> None:
        """Write the images into a file."""
        packages.ensure_root()
        with self.state.lock("save-images"):
            self._must_have_engine()
            image_files.save(self.config, path)
        print(f"{path}: {path.stat().st_size / 1e9:.1f} GB")

    def load_images(self, path: Path) -> None:
        """Have the images of a file on this machine."""
        packages.ensure_root()
        with self.state.lock("load-images"):
            self._must_have_engine()
            image_files.load(self.config, path)

    def backup(self, path: Path) -> None:
        """Write a backup."""
        packages.ensure_root()
        with self.state.lock("backup"):
            self._must_run()
            backup.create(self.config, self.state, path)
        print(f"{path} holds the cluster's secrets: keep it where only you can read it")

    def restore(self, path: Path) -> None:
        """Bring up the cluster of a backup on a machine that has none."""
        packages.ensure_root()
        archive = backup.examine(self.config, path)
        with self.state.lock("restore"):
            backup.refuse_if_state_exists(self.state, archive)
            report = Report(again=f"./invoke restore {path}")
            with report.step("secrets and users"):
                backup.restore_state(self.state, archive)
            self._up(report, until="stack")
            with report.step("accounting and Slurm's state"):
                backup.restore_services(self.state, archive)
            # What is restored is not restored again: from here on an `up` goes on.
            silent = self._up(Report(again="./invoke up"))
        print(self._greeting())
        _refuse(silent, BRING_IN)

    def down(self, *, purge: bool) -> None:
        """Take the cluster away from all machines; with `purge` also what it holds."""
        packages.ensure_root()
        with self.state.lock("down"):
            report = Report(again="./invoke down --purge" if purge else "./invoke down")
            if engine.is_running():
                self._take_down(report, purge=purge)
            elif purge and self.state.exists and Path("/var/lib/docker").exists():
                with report.step("Docker Engine, to remove what it holds"):
                    packages.ensure_engine(self.config, self.state)
                self._take_down(report, purge=True)
            if firewall.is_set(self.state):
                # That they shall be there is not forgotten, unless purged: the next `up` sets them again.
                with report.step("firewall"):
                    for silent in firewall.remove(self._walled()):
                        report.note(f"{silent.machine.addr} does not answer, and keeps its firewall")
            if purge:
                with report.step("home directories, state"):
                    if left := homes.purge(self.config, users.with_homes(self.state)):
                        report.note(f"{self.config.home_root} keeps what is no home of a user: {', '.join(left)}")
                    self.state.purge()

    def _take_down(self, report: Report, *, purge: bool) -> None:
        with report.step("services"):
            upgrade.forget(self.state)
            stack.remove()
            registry.remove_registry(purge=purge)
            user_containers.stop(self._head)
        if self.config.simulated or simulated.existing():
            with report.step("simulated machines"):
                simulated.remove_all(purge=purge)
        if not self.config.simulated and self.state.exists:
            if purge:
                with report.step("settings of real machines"):
                    workers = [self._head, *machines.answering(self._worker_list())]
                    tuning.undo(self.config, self.state, workers, report.note)
            with report.step("real machines"):
                self._release_workers(report, purge=purge)
        with report.step("swarm"):
            swarm.leave(self.state)
        if purge:
            with report.step("volumes and images"):
                registry.remove_trust(self.config, [self._head])
                user_containers.remove_all(self._head)
                stack.remove_volumes(self._head)
                images.remove_images(self._head)

    def _release_workers(self, report: Report, *, purge: bool) -> None:
        def release(machine: Machine) -> None:
            swarm.release(self.state, machine)
            registry.remove_trust(self.config, [machine])
            user_containers.stop(machine)
            if purge:
                user_containers.remove_all(machine)
                stack.remove_volumes(machine)
                images.remove_images(machine)

        listed = self._worker_list()
        answering = machines.answering(listed)
        for addr in [machine.addr for machine in listed if machine.addr not in {found.addr for found in answering}]:
            report.note(f"{addr} does not answer; should it come back, run there: docker swarm leave --force")
        machines.on_each(answering, release)


def _that_run_jobs(machines: Iterable[Machine]) -> list[Machine]:
    return [machine for machine in machines if "worker" in machine.roles]


def _refuse(silent: Collection[Silent], remedy: str) -> None:
    """Raise a ClusterError that says of each worker that cannot be reached why; nothing where there is none."""
    if silent:
        raise ClusterError("\n".join(str(found.error) for found in silent), remedy)


def _whole_number(option: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise ClusterError(f"{option} cannot be {text}", "name a whole number of at most six digits")
    return int(text)


def _with_workers(configured: Config, state: State) -> Config:
    """Return the configuration with the workers that `add-worker` and `remove-worker` made of those in config.sh."""
    recorded = _recorded(configured, state)
    if configured.simulated or recorded is None:
        return configured
    return replace(configured, worker_addrs=tuple(recorded))


def _simulated_names(configured: Config, state: State) -> list[str]:
    """Return the names of the simulated workers that there shall be: those asked for, and those that `scale` left."""
    asked = _recorded(configured, state) or [f"c{number}" for number in range(1, configured.local_workers + 1)]
    return sorted({*asked, *simulated.existing()}, key=simulated.number)


def _recorded(configured: Config, state: State) -> list[str] | None:
    """Return the recorded workers, unless config.sh has been changed since: then it has the last word."""
    try:
        recorded = state.read_json(WORKERS, None)
    except PermissionError:
        return None
    if recorded is None or recorded["configured"] != _configured_workers(configured):
        return None
    return list(recorded["workers"])


def _record(configured: Config, state: State, workers: Iterable[str]) -> None:
    state.write_json(WORKERS, {"configured": _configured_workers(configured), "workers": list(workers)})


def _configured_workers(configured: Config) -> list[str] | int:
    return configured.local_workers if configured.simulated else list(configured.worker_addrs)
