"""Run a method of an object somewhere else: in another process, in a Slurm job, in a sandbox on a worker.

    from delegate_function import DelegateChain, SandboxDelegate, SlurmDelegate

    delegate = DelegateChain(SlurmDelegate, SandboxDelegate)()
    value = delegate.invoke(experiment, "run", 1000)

Names are loaded when they are first used: a process on the way of a call needs few of them.
"""

from __future__ import annotations

__version__ = "1.0.0"

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any

    from delegate_function.batches import DetachedFuture as DetachedFuture
    from delegate_function.callinfo import CallInfo as CallInfo
    from delegate_function.delegates import BaseDelegate as BaseDelegate
    from delegate_function.delegates import DelegateChain as DelegateChain
    from delegate_function.delegates import DockerDelegate as DockerDelegate
    from delegate_function.delegates import SandboxDelegate as SandboxDelegate
    from delegate_function.delegates import SlurmDelegate as SlurmDelegate
    from delegate_function.delegates import SSHDelegate as SSHDelegate
    from delegate_function.delegates import SubprocessDelegate as SubprocessDelegate
    from delegate_function.delegates import SuDockerDelegate as SuDockerDelegate
    from delegate_function.delegates import SudoDelegate as SudoDelegate
    from delegate_function.delegates import TemporaryDirectoryDelegate as TemporaryDirectoryDelegate
    from delegate_function.delegates import TrivialDelegate as TrivialDelegate
    from delegate_function.delegates import shell_hook as shell_hook
    from delegate_function.errors import AgentAway as AgentAway
    from delegate_function.errors import CallCancelled as CallCancelled
    from delegate_function.errors import CallNotSent as CallNotSent
    from delegate_function.errors import ConfigurationError as ConfigurationError
    from delegate_function.errors import ConnectionLost as ConnectionLost
    from delegate_function.errors import CountersUnavailable as CountersUnavailable
    from delegate_function.errors import DelegateFunctionException as DelegateFunctionException
    from delegate_function.errors import HopFailed as HopFailed
    from delegate_function.errors import JobCancelled as JobCancelled
    from delegate_function.errors import JobError as JobError
    from delegate_function.errors import JobRejected as JobRejected
    from delegate_function.errors import JobTimeout as JobTimeout
    from delegate_function.errors import LeaseEnded as LeaseEnded
    from delegate_function.errors import LimitExceeded as LimitExceeded
    from delegate_function.errors import NodeFailed as NodeFailed
    from delegate_function.errors import NotOffered as NotOffered
    from delegate_function.errors import ProcessDied as ProcessDied
    from delegate_function.errors import RemoteError as RemoteError
    from delegate_function.errors import RemoteTraceback as RemoteTraceback
    from delegate_function.errors import ResultNotReturned as ResultNotReturned
    from delegate_function.errors import SandboxRefused as SandboxRefused
    from delegate_function.errors import VersionMismatch as VersionMismatch
    from delegate_function.executor import Executor as Executor
    from delegate_function.fingerprint import OversubscribedNode as OversubscribedNode
    from delegate_function.fingerprint import UnlikeNodes as UnlikeNodes
    from delegate_function.fingerprint import differences as differences
    from delegate_function.futures import Future as Future
    from delegate_function.generator import DelegateGenerator as DelegateGenerator
    from delegate_function.generator import LateBoundYAMLDelegate as LateBoundYAMLDelegate
    from delegate_function.generator import YAMLDelegate as YAMLDelegate
    from delegate_function.leases import Lease as Lease
    from delegate_function.leases import lease as lease
    from delegate_function.reporting import progress as progress
    from delegate_function.shelf import DetachedCall as DetachedCall
    from delegate_function.source import SourceCode as SourceCode
    from delegate_function.testing import PDBClass as PDBClass
    from delegate_function.testing import ShellCommandClass as ShellCommandClass
    from delegate_function.testing import TestClass as TestClass

_MODULES = {
    "batches": ["DetachedFuture"],
    "callinfo": ["CallInfo"],
    "delegates": [
        "BaseDelegate",
        "DelegateChain",
        "DockerDelegate",
        "SSHDelegate",
        "SandboxDelegate",
        "SlurmDelegate",
        "SuDockerDelegate",
        "SubprocessDelegate",
        "SudoDelegate",
        "TemporaryDirectoryDelegate",
        "TrivialDelegate",
        "shell_hook",
    ],
    "errors": [
        "AgentAway",
        "CallCancelled",
        "CallNotSent",
        "ConfigurationError",
        "ConnectionLost",
        "CountersUnavailable",
        "DelegateFunctionException",
        "HopFailed",
        "JobCancelled",
        "JobError",
        "JobRejected",
        "JobTimeout",
        "LeaseEnded",
        "LimitExceeded",
        "NodeFailed",
        "NotOffered",
        "ProcessDied",
        "RemoteError",
        "RemoteTraceback",
        "ResultNotReturned",
        "SandboxRefused",
        "VersionMismatch",
    ],
    "executor": ["Executor"],
    "futures": ["Future"],
    "fingerprint": ["OversubscribedNode", "UnlikeNodes", "differences"],
    "generator": ["DelegateGenerator", "LateBoundYAMLDelegate", "YAMLDelegate"],
    "leases": ["Lease", "lease"],
    "reporting": ["progress"],
    "shelf": ["DetachedCall"],
    "source": ["SourceCode"],
    "testing": ["PDBClass", "ShellCommandClass", "TestClass"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
