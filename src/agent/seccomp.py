"""The system calls of a sandbox: those of a program that computes, has threads, and reads and writes its files.

A list of what is allowed; everything else is denied (EPERM). An engine's own default allows more, and differs from
version to version: what it allows and this does not is above all io_uring, userfaultfd, ptrace and its kin, splice,
System V shared memory, message queues, xattrs, asynchronous I/O, and sockets of every family but three. Only the
machine's own architecture is allowed, so that no 32-bit call comes in by another number.
"""

from __future__ import annotations

from typing import Any

_FILES = """
    access faccessat faccessat2 chdir fchdir chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown close
    close_range copy_file_range creat dup dup2 dup3 fadvise64 fallocate fcntl fdatasync flock fsync fstat fstatfs
    ftruncate futimesat getcwd getdents getdents64 getxattr fgetxattr lgetxattr listxattr flistxattr llistxattr
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch ioctl link linkat lseek lstat mkdir mkdirat mknod
    mknodat newfstatat open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read
    readahead readlink readlinkat readv rename renameat renameat2 rmdir sendfile stat statfs statx symlink symlinkat
    sync_file_range truncate umask unlink unlinkat utime utimensat utimes write writev
"""
_MEMORY = """
    brk cachestat madvise map_shadow_stack membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect
    mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect
"""
_PROCESSES = """
    arch_prctl capget execve execveat exit exit_group fork vfork getcpu getegid geteuid getgid getgroups getpgid
    getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid
    get_robust_list get_thread_area ioprio_get landlock_add_rule landlock_create_ruleset landlock_restrict_self
    pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setpgid setpriority setrlimit setsid
    set_robust_list set_thread_area set_tid_address sysinfo times uname wait4 waitid waitpid
"""
_SIGNALS_AND_TIME = """
    alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday kill nanosleep pause rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    setitimer sigaltstack signalfd signalfd4 sigreturn tgkill time timer_create timer_delete timer_getoverrun
    timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime tkill
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 futex futex_requeue futex_wait futex_waitv futex_wake poll ppoll pselect6 select
"""
_SOCKETS = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto setsockopt shutdown socketpair
"""
_ALLOWED = tuple(" ".join((_FILES, _MEMORY, _PROCESSES, _SIGNALS_AND_TIME, _WAITING, _SOCKETS)).split())

# socket(2): its own processes may speak to each other; netlink, packet, vsock and the kernel's crypto are denied.
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
# clone(2): without any of the flags that make a namespace (CLONE_NEWNS, CLONE_NEWTIME, CLONE_NEWCGROUP to _NEWNET).
_NAMESPACES = 0x7E020080
# personality(2): the plain one, and to ask which it is.
_PERSONALITIES = (0, 0xFFFFFFFF)
_ENOSYS = 38
# perf_event_open(2): of oneself (pid 0), and no other flag than that the descriptor closes at exec, so of no control
# group. Arguments are C's int: what stands in the upper half of their registers means nothing.
_INT = 0xFFFFFFFF
_PERF_PID, _PERF_FLAGS = 1, 4
_NOT_CLOEXEC = 0xFFFFFFFFFFFFFFFF & ~8
# Engine's name of the machine's architecture, by that of uname.
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def profile(machine: str, *, counters: bool) -> dict[str, Any]:
    """Return the profile as the engine takes it.

    Args:
        machine: as `uname -m` names it.
        counters: allow a process to open performance counters of itself; the kernel's setting decides as well.
    """
    rules: list[dict[str, Any]] = [_rule(_ALLOWED)]
    rules += [_rule(("socket",), _argument(0, family)) for family in _FAMILIES]
    rules += [_rule(("personality",), _argument(0, value)) for value in _PERSONALITIES]
    rules.append(_rule(("clone",), _without(0, _NAMESPACES)))
    if counters:
        rules.append(_rule(("perf_event_open",), _without(_PERF_PID, _INT), _without(_PERF_FLAGS, _NOT_CLOEXEC)))
    # Its flags lie in memory, where no filter sees them. At "not implemented" the C library uses clone.
    rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": [_ARCHITECTURES[machine]],
        "syscalls": rules,
    }


def _rule(names: tuple[str, ...], *arguments: dict[str, Any]) -> dict[str, Any]:
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", "args": list(arguments)}


def _argument(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}


def _without(index: int, bits: int) -> dict[str, Any]:
    return {"index": index, "value": bits, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
