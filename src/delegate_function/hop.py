"""A hop's process: take a call's frames on standard input, hand them to the next hop, and bring back what comes.

It never opens the pickle. It starts the next hop (or, as the last, forks the process in which the call runs), passes
frames both ways, turns output into frames, and says where something went wrong. When the side it serves is silent for
too long or gone, it ends, and with it everything behind it.

Run as `python3 -I -m delegate_function.hop`, in a Slurm job as `slurm.srun_argv` says. Each call through Slurm waits
for such a process. Where the next hop is a sandbox it therefore loads nothing that it can do without (a test has
the list): of the standard library only what is written in C, as `posix` in the place of `os` and `_socket` in that of
`socket`. What other chains need is loaded where they need it.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import posix as os
import select
import sys
import time

from delegate_function import __version__, frames, launch
from delegate_function.errors import (
    AgentAway,
    CallCancelled,
    ConfigurationError,
    ConnectionLost,
    DelegateFunctionException,
    HopFailed,
    JobTimeout,
    LimitExceeded,
    RemoteError,
    VersionMismatch,
    to_wire,
)

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any

    from agent.call import Hold
    from delegate_function import steps

    Received = list[tuple[bytes, bytes]]

_SPEC_S = 10.0
_AGENT_S = 10.0
"""An agent that has died runs again after some seconds; without waiting, call after call would come to grief there."""
_DRAIN_S = 5.0
_FROM_THE_CALL = frozenset((frames.RESULT, frames.DATA, frames.CREDIT, frames.END, frames.PROGRESS))
_PROGRESS_S = 0.1


def describe(kind: Any, number: Any, of: Any, node: str = "") -> str:
    """Return the name of a hop for people: "hop 2 of 3 (sandbox on c1)"."""
    return f"hop {number} of {of} ({kind}{f' on {node}' if node else ''})"


class Relay:
    """One call on its way through this process."""

    def __init__(self, up: frames.Link, spec: dict[str, Any], where: str, lease: _Lease | None = None) -> None:
        self._up = up
        self._lease = lease
        self._poller = frames.Poller()
        self._credit = int(spec.get("credit", frames.WINDOW))
        self._written = 0
        self._over = False
        self._next_is_done = False
        self._end_held = False
        self._progress = b""
        self._progress_from = 0.0
        self._ending_since: float | None = None
        self._explanation: list[DelegateFunctionException] | None = None
        self.abandoned = False
        self.where = where
        self._number = int(spec["hop"])
        self._early: Received = []
        self._next = self._start(spec)
        self._call_is_next = not self._next.is_process
        for fd in self._next.outputs:
            os.set_blocking(fd, False)

    def _start(self, spec: dict[str, Any]) -> launch.Next:
        hops = list(spec["hops"])
        if _leads_to_sandbox(hops):
            # What lies where on this machine's disk is none of the sandbox's business.
            spec = {name: value for name, value in spec.items() if name not in ("directory", "path")}
            node = os.uname().nodename
        else:
            from delegate_function import remote, steps

            if not steps.leaves(hops):
                return self._fork(spec)
            node = remote.node(hops[0])
        kind = hops[0].get("type")
        self._number += 1
        self.where = describe(kind, self._number, spec["of"], node)
        process = self._start_next(hops[0])
        following = {**spec, "hops": hops[1:], "hop": self._number, "kind": kind}
        process.link.send(frames.encode_json(frames.SPEC, following))
        return process

    def _fork(self, spec: dict[str, Any]) -> launch.Next:
        from delegate_function import forked, steps

        if directories := steps.count(spec["hops"]):
            self._number += directories
            self.where = describe(steps.DIRECTORY, self._number, spec["of"], os.uname().nodename)
        return forked.Worker(spec, self.where)

    def _start_next(self, hop: dict[str, Any]) -> launch.Next:
        """Start the next hop; an agent that is just being replaced is waited for."""
        until = time.monotonic() + _AGENT_S
        while True:
            try:
                return launch.start(hop, self.where)
            except AgentAway:
                if time.monotonic() > until or self._up.closed or self._up.silent:
                    raise
            if self._up.read_fd in self._poller.wait([self._up.read_fd], [], [self._up]):
                self._early += self._up.receive()
            self._up.flush()
            self._up.beat()

    def run(self, waiting: list[tuple[bytes, bytes]]) -> None:
        """Pass frames, first those that wait already, until the call is over or nobody waits for it any more."""
        try:
            self._take(waiting + self._early)
            while not self._over:
                try:
                    self._step()
                except frames.ProtocolError as error:
                    self._fail(HopFailed(f"sent what does not belong there: {error}", where=self.where))
            finish_sending(self._up, self._poller)
            if self._next_is_done:
                self._next.close()
        finally:
            self._next.discard()

    def _step(self) -> None:
        up, down = self._up, self._next.link
        reads = [] if self._next.ended or self._explanation is not None else [self._next.wake_fd]
        if down.congested:
            up.watch()
        else:
            reads.append(up.read_fd)
        if up.congested:
            down.watch()
        else:
            reads += [] if down.closed else [down.read_fd]
            reads += self._next.outputs if self._credit > 0 else []
        ready = self._poller.wait(reads, [link.write_fd for link in (up, down) if link.pending], [up, down])
        for fd in [fd for fd in self._next.outputs if fd in ready]:
            self._pump(fd)
        if up.read_fd in ready:
            self._from_up()
        if down.read_fd in ready and not self._over:
            self._from_down()
        if self._next.wake_fd in ready and not self._next.ended:
            self._next.on_wake()
        self._tell_progress()
        for link in (up, down):
            link.flush()
            link.beat()
        if up.silent:
            self._over = self.abandoned = True
        elif self._lease and self._lease.is_up:
            self._fail(JobTimeout(f"killed, the lease's {self._lease.seconds:g} s are up", where=self.where))
        if self._over:
            return
        if self._call_is_next:
            self._check_call()
        else:
            self._check_process()

    def _from_up(self) -> None:
        self._take(self._up.receive())
        if self._up.closed:
            self._over = self.abandoned = True

    def _take(self, received: list[tuple[bytes, bytes]]) -> None:
        for kind, content in received:
            if kind == frames.CANCEL:
                self._fail(CallCancelled("the call was cancelled by its caller", where=self.where))
                return
            if kind == frames.CREDIT and self._call_is_next:
                stream, count = frames.decode_credit(content)
                if stream == frames.OUTPUT_STREAM:
                    self._credit += count
                    continue
            self._next.link.send(frames.encode(kind, content))

    def _from_down(self) -> None:
        for kind, content in self._next.link.receive():
            if self._call_is_next:
                # Where the call runs is not to be believed: it can send its result, and nothing else.
                if kind not in _FROM_THE_CALL or self._end_held:
                    raise frames.ProtocolError(f"frame {kind!r} from the call")
                if kind == frames.END:
                    self._end_held = True
                    continue
                if kind == frames.PROGRESS:
                    frames.decode_progress(content)
                    self._progress = content
                    continue
            elif kind == frames.HELLO:
                self._greet(frames.decode_json(content))
            self._up.send(frames.encode(kind, content))
            if kind in (frames.END, frames.ERROR):
                self._over = self._next_is_done = True
                return

    def _tell_progress(self) -> None:
        """Pass the latest progress on, now and then only: it is no stream with a window that would bound it."""
        now = time.monotonic()
        if self._progress and not self._over and now >= self._progress_from:
            self._up.send(frames.encode(frames.PROGRESS, self._progress))
            self._progress, self._progress_from = b"", now + _PROGRESS_S

    def _greet(self, greeting: dict[str, Any]) -> None:
        if greeting.get("hop") == self._number and self._next.is_process:
            self.where = str(greeting.get("where"))
            self._next.job_id = greeting.get("job")

    def _pump(self, fd: int) -> bool:
        """Pass on what was written to standard output or error; return whether there may be more at once."""
        if self._over or self._credit <= 0:
            return False
        try:
            data = os.read(fd, min(frames.CHUNK, self._credit))
        except BlockingIOError:
            return False
        if not data:
            del self._next.outputs[fd]
            os.close(fd)
            return False
        self._credit -= len(data)
        self._written += len(data)
        self._up.send(frames.encode(self._next.outputs[fd], data))
        limit = self._next.output_limit
        if limit is not None and self._written > limit:
            text = f"killed, output limit of {limit // 1024**2} MB"
            self._fail(LimitExceeded(text, where=self.where, limit="output"))
        return not self._over

    def _check_call(self) -> None:
        """End when the call's process has: first its output, then what is known of it, then the end."""
        if not (self._end_held or self._next.ended or self._next.link.closed):
            return
        if not self._next.ended:
            if self._ending_since is None:
                self._ending_since = time.monotonic()
            elif time.monotonic() - self._ending_since > _DRAIN_S:
                self._next.kill()
                self._next.ended = True
            return
        # What it left running may still hold its channel and its output: only what is there already counts.
        while not (self._end_held or self._next.link.closed) and _readable(self._next.link.read_fd):
            self._from_down()
        for fd in list(self._next.outputs):
            while self._pump(fd):
                pass
        if self._over or (self._next.outputs and self._credit <= 0):
            return
        if not self._end_held:
            self._fail(self._next.explain())
            return
        self._complete()
        self._over = True

    def _complete(self) -> None:
        known = {"hop": self._number, "where": self.where, **self._next.usage()}
        self._up.send(frames.encode_json(frames.INFO, known), frames.encode(frames.END))

    def _check_process(self) -> None:
        """Find out why the next hop's process ended or fell silent, without falling silent meanwhile."""
        if self._explanation:
            self._fail(self._explanation[0])
        elif self._explanation is None and (self._next.link.closed or self._next.link.silent):
            import threading

            self._explanation = []
            threading.Thread(target=self._explain, args=(self._explanation,), daemon=True).start()

    def _explain(self, found: list[DelegateFunctionException]) -> None:
        try:
            found.append(explain(self._next, self.where))
        except Exception as error:
            found.append(HopFailed(f"ended, and why cannot be found out: {error}", where=self.where))

    def _fail(self, error: DelegateFunctionException) -> None:
        self._up.send(frames.encode_json(frames.ERROR, to_wire(error)))
        self._over = True


class HookRelay(Relay):
    """A hook on its way, before the hop whose delegate has it: its output goes up, the call's frames wait."""

    def __init__(self, up: frames.Link, spec: dict[str, Any], where: str) -> None:
        super().__init__(up, spec, where)
        self._name = spec["hops"][0]["name"]
        self._raised: dict[str, Any] | None = None
        self.kept: Received = []
        self.completed = False

    @property
    def credit(self) -> int:
        """How much may be written to the output before the caller gives more credit."""
        return self._credit

    def _take(self, received: Received) -> None:
        for kind, content in received:
            if kind == frames.KEYS:
                super()._take([(kind, content)])
            elif kind == frames.CREDIT and frames.decode_credit(content)[0] == frames.OUTPUT_STREAM:
                self._credit += frames.decode_credit(content)[1]
            else:
                self.kept.append((kind, content))

    def _from_down(self) -> None:
        for kind, content in self._next.link.receive():
            if kind == frames.CREDIT:
                self._up.send(frames.encode(kind, content))
            elif kind == frames.RESULT:
                self._raised = frames.decode_json(content).get("error")
            elif kind == frames.END:
                self._end_held = True
            else:
                raise frames.ProtocolError(f"frame {kind!r} from a hook")

    def _complete(self) -> None:
        if self._raised:
            self._fail(RemoteError(str(self._raised.get("text")), where=self.where, type=self._raised.get("type")))
        else:
            self.completed = True


def _take_steps(
    up: frames.Link, spec: dict[str, Any], waiting: Received, where: str, directories: steps.Directories
) -> tuple[dict[str, Any], Received] | HookRelay:
    """Take the steps before the next hop; return the call as it goes on, or the hook with which it ended."""
    from delegate_function import steps

    while True:
        hops = steps.bound(spec["hops"])
        spec = {**spec, "of": spec["of"] + steps.count(hops) - steps.count(spec["hops"]), "hops": hops}
        kind = hops[0]["type"] if steps.leaves(hops) else ""
        if kind == steps.DIRECTORY:
            number = spec["hop"] + 1
            place = describe(kind, number, spec["of"], os.uname().nodename)
            spec = {**spec, "hop": number, "directory": directories.make(place)}
        elif kind == steps.HOOK and (refusal := steps.hook_refused(hops[0]["name"])):
            said = f"{refusal}\n".encode()
            up.send(frames.encode(frames.ERR, said))
            spec = {**spec, "credit": spec.get("credit", frames.WINDOW) - len(said)}
        elif kind == steps.HOOK:
            relay = HookRelay(up, {**spec, "hops": hops[:1], "parts": [], "hook": True}, where)
            relay.run(waiting)
            if not relay.completed:
                return relay
            spec, waiting = {**spec, "credit": relay.credit}, relay.kept
        elif kind == steps.DATA and spec.get("results") != steps.DATA:
            raise ConfigurationError(
                "the description says results='data', and it was found too late: the caller must ask for that",
                where=where,
            )
        elif kind not in (steps.TERMINAL, steps.DATA):
            return spec, waiting
        spec = {**spec, "hops": hops[1:]}


def _with_directory(spec: dict[str, Any], where: str, directories: steps.Directories) -> dict[str, Any]:
    """Make the directory of a call that runs here and needs one of its own: it may not live to remove it itself."""
    from os.path import isdir

    from delegate_function import steps

    if steps.leaves(spec["hops"]):
        return spec
    files = spec["outputs"] or len(spec["parts"]) > 1
    if not (files or steps.count(spec["hops"])) and isdir(spec.get("directory") or ""):
        return spec
    return {**spec, "temporary": directories.make(where)}


def _check_version(spec: dict[str, Any], where: str) -> None:
    theirs = (spec.get("version"), spec.get("v"))
    if theirs != (__version__, frames.VERSION):
        raise VersionMismatch(
            f"the caller has delegate_function {theirs[0]} (frames {theirs[1]}), here it is {__version__} (frames "
            f"{frames.VERSION})",
            where=where,
        )


def explain(process: launch.Next, where: str) -> DelegateFunctionException:
    """Return why a hop's process is of no more use: it ended, or it was silent."""
    if process.link.closed:
        return process.explain()
    known = ""
    if job_id := process.job_id:
        from delegate_function import slurm

        known = f"; {slurm.state(job_id)}"
    return ConnectionLost(f"was not heard of for {frames.SILENCE_S:g} s{known}", where=where, job_id=job_id)


def finish_sending(link: frames.Link, poller: frames.Poller) -> None:
    """Write what is pending, as long as the other side takes it."""
    deadline = time.monotonic() + _DRAIN_S
    while link.pending and not link.closed and time.monotonic() < deadline:
        poller.wait([], [link.write_fd], [])
        link.flush()


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _receive(up: frames.Link, poller: frames.Poller, kinds: tuple[bytes, ...]) -> Received:
    """Return what came if a frame of one of these kinds is in it, from that one on."""
    if up.read_fd not in poller.wait([up.read_fd], [], [up]):
        return []
    received = up.receive()
    found = next((number for number, (kind, _) in enumerate(received) if kind in kinds), len(received))
    return received[found:]


def _start_of(up: frames.Link) -> Received:
    """Return the first frame that comes, and those behind it; nothing if the caller is gone."""
    deadline = time.monotonic() + _SPEC_S
    poller = frames.Poller()
    while time.monotonic() < deadline and not up.closed:
        if received := _receive(up, poller, tuple(frames.TYPES)):
            if received[0][0] not in (frames.SPEC, frames.HOLD):
                raise frames.ProtocolError(f"frame {received[0][0]!r} at the start")
            return received
    return []


def _job_id() -> str | None:
    job_id = os.environ.get(b"SLURM_JOB_ID")
    return None if job_id is None else job_id.decode()


def _greet(up: frames.Link, spec: dict[str, Any]) -> str:
    """Say who this is; return where."""
    where = describe(spec.get("kind"), spec["hop"], spec["of"], os.uname().nodename)
    greeting = {
        "hop": spec["hop"],
        "kind": spec.get("kind"),
        "where": where,
        "node": os.uname().nodename,
        "pid": os.getpid(),
        "job": _job_id() if spec.get("kind") == "slurm" else None,
        "slurm_cpus": int(os.environ.get(b"SLURM_CPUS_ON_NODE", 0)) if spec.get("kind") == "slurm" else None,
        "cpus": len(os.sched_getaffinity(0)),
        "python": list(sys.version_info[:3]),
        "version": __version__,
        "lease": "idle_s" in spec,
    }
    up.send(frames.encode_json(frames.HELLO, greeting))
    return where


def _serve_call(
    up: frames.Link, spec: dict[str, Any], waiting: Received, where: str, lease: _Lease | None = None
) -> bool:
    """Serve one call; return whether anybody waited for it to the end."""
    try:
        _check_version(spec, where)
        if not _leads_to_sandbox(spec["hops"]):
            return _serve_other(up, spec, waiting, where, lease)
        relay = Relay(up, spec, where, lease)
    except DelegateFunctionException as error:
        _refuse(up, error)
        return True
    relay.run(waiting)
    return not relay.abandoned


def _leads_to_sandbox(hops: list[dict[str, Any]]) -> bool:
    return bool(hops) and hops[0].get("type") == "sandbox"


def _refuse(up: frames.Link, error: DelegateFunctionException) -> None:
    up.send(frames.encode_json(frames.ERROR, to_wire(error)))
    finish_sending(up, frames.Poller())


def _serve_other(up: frames.Link, spec: dict[str, Any], waiting: Received, where: str, lease: _Lease | None) -> bool:
    """Serve a call whose next hop is no sandbox, or that has steps to be taken before."""
    load_site()
    from delegate_function import steps

    with steps.Directories() as directories:
        going_on = _take_steps(up, spec, waiting, where, directories)
        if isinstance(going_on, HookRelay):
            return not going_on.abandoned
        relay = Relay(up, _with_directory(going_on[0], where, directories), where, lease)
        relay.run(going_on[1])
    return not relay.abandoned


def load_site() -> None:
    """Find the packages that are installed here, where Python was started without (-S)."""
    if sys.flags.no_site and "site" not in sys.modules:
        import site

        site.main()


class _Lease:
    """One call after the other, until it is given back, idle for too long, over its time, or others wait."""

    def __init__(self, up: frames.Link, terms: dict[str, Any]) -> None:
        self.seconds = float(terms["seconds"])
        self._up = up
        self._poller = frames.Poller()
        self._idle_s = float(terms["idle_s"])
        self._ends = time.monotonic() + self.seconds
        self._others_wait = False
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # slurm.srun_argv has it wait until now
        self._in_sandboxes = bool(terms.get("sandbox"))
        self._hold: Hold | None = None
        if self._in_sandboxes:
            self._tell_agent()
        else:
            load_site()
            from delegate_function import inside  # noqa: F401  (what each call's process, forked from this one, needs)

    def _on_signal(self, number: int, frame: object) -> None:
        # Slurm sends it when the job's place is wanted (slurm.srun_argv asks for that); the call that runs may end.
        self._others_wait = True

    def _tell_agent(self) -> None:
        from delegate_function import sandboxed

        self._hold = sandboxed.tell_agent_of_lease()

    @property
    def is_up(self) -> bool:
        """Say whether its time is over."""
        return time.monotonic() >= self._ends

    def run(self, waiting: Received) -> bool:
        """Serve calls, the first of which may have come already; return whether the caller was there to the end."""
        while received := waiting or self._next():
            if received[0][0] == frames.OVER:
                return True
            spec = frames.decode_json(received[0][1])
            if not _serve_call(self._up, spec, received[1:], _greet(self._up, spec), self):
                return False
            waiting = []
        return not self._is_abandoned

    @property
    def _is_abandoned(self) -> bool:
        return self._up.closed or self._up.silent

    def _next(self) -> Received:
        """Wait for the next call or the end of the lease; return nothing where there is to be none."""
        if self._in_sandboxes and (self._hold is None or self._hold.lost):
            self._tell_agent()
        idle_until = time.monotonic() + self._idle_s
        while not self._is_abandoned:
            if reason := self._reason(idle_until):
                self._up.send(frames.encode_json(frames.OVER, reason))
                finish_sending(self._up, self._poller)
                break
            if received := _receive(self._up, self._poller, (frames.SPEC, frames.OVER)):
                return received
            self._up.flush()
            self._up.beat()
        return []

    def _reason(self, idle_until: float) -> dict[str, str] | None:
        if self._others_wait:
            return {"reason": "preempted", "text": "others wait for its node"}
        if self.is_up:
            return {"reason": "time", "text": f"its {self.seconds:g} s are up"}
        if time.monotonic() >= idle_until:
            return {"reason": "idle", "text": f"it was idle for {self._idle_s:g} s"}
        return None


def _serve_lease(up: frames.Link, terms: dict[str, Any], waiting: Received, where: str) -> bool:
    """Serve a lease's calls; return whether the caller was there to the end."""
    try:
        _check_version(terms, where)
    except DelegateFunctionException as error:
        _refuse(up, error)
        return True
    return _Lease(up, terms).run(waiting)


def _see_off(up: frames.Link) -> None:
    """Wait until the caller, who has been sent all, has nothing more to send, and throw away what comes until then.

    A slurmstepd whose task ends while the caller's bytes are on their way resets its connection to srun, and the end of
    the call, if it is not with srun by then, is lost.
    """
    poller = frames.Poller()
    deadline = time.monotonic() + _DRAIN_S
    while not (up.closed or up.silent) and time.monotonic() < deadline:
        if up.read_fd in poller.wait([up.read_fd], [], []):
            up.receive()


def serve(read_fd: int, write_fd: int) -> None:
    """Serve a call, or a lease's calls, whose frames come and go over the two descriptors."""
    up = frames.Link(read_fd, write_fd)
    received = _start_of(up)
    if not received:
        return
    kind, content = received[0]
    spec = frames.decode_json(content)
    serve_it = _serve_call if kind == frames.SPEC else _serve_lease
    if serve_it(up, spec, received[1:], _greet(up, spec)):
        _see_off(up)
    elif spec.get("kind") == "slurm":
        # Whoever started the job is gone, perhaps without a chance to take it away.
        from delegate_function import slurm

        slurm.cancel(os.environ[b"SLURM_JOB_ID"].decode())


def main() -> None:
    """Serve a call over standard input and output; what else writes to standard output goes to standard error."""
    read_fd, write_fd = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # Whoever ends this process ends what it started, and has its directories removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    try:
        serve(read_fd, write_fd)
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)  # the first process of a container does not die of it
    sys.stderr.flush()
    # A thread may still wait for an agent that does not answer.
    os._exit(0)


if __name__ == "__main__":
    main()
