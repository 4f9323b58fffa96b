"""The filter of system calls: a list of what an interpreter needs, everything else refused.

Namespaces and rlimits do not stop a fork bomb: the kernel does not enforce RLIMIT_NPROC for root,
and an unbounded bomb makes the runner's own fork fail. So no process is created at all; threads
are, and the runner counts them. What is not in the table answers ENOSYS, as an older kernel would,
which the C library has fallbacks for.
"""

from __future__ import annotations

import errno
import platform
import struct

# name, number on x86-64, number on aarch64 (asm/unistd_64.h and asm-generic/unistd.h of Linux 6.1)
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
pwritev 296 70, preadv2 327 286, pwritev2 328 287, open 2 -, openat 257 56, close 3 57,
close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291,
access 21 -, faccessat 269 48, faccessat2 439 439, lseek 8 62, getdents 78 -, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -, readlinkat 267 78, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53,
fchmodat2 452 452, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45,
ftruncate 77 46, fsync 74 82, fdatasync 75 83, flock 73 32, fcntl 72 25, dup 32 23, dup2 33 -,
dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
epoll_pwait2 441 441, eventfd2 290 19, sendto 44 206, recvfrom 45 207, shutdown 48 210,
getsockopt 55 209, setsockopt 54 208, getsockname 51 204, getpeername 52 205, sendfile 40 71,
copy_file_range 326 285, statfs 137 43, fstatfs 138 44, umask 95 166, getrlimit 97 163,
setrlimit 160 164, prlimit64 302 261, getrusage 98 165, times 100 153, sysinfo 99 179,
uname 63 160, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
nanosleep 35 101, gettimeofday 96 169, time 201 -, getitimer 36 102, setitimer 38 103,
alarm 37 -, timer_create 222 107, timer_settime 223 110, timer_gettime 224 108,
timer_getoverrun 225 109, timer_delete 226 111, brk 12 214, mmap 9 222, munmap 11 215,
mprotect 10 226, mremap 25 216, madvise 28 233, mincore 27 232, msync 26 227, membarrier 324 283,
futex 202 98, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293,
set_tid_address 218 96, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
getpriority 140 141, getcpu 309 168, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158,
getpgrp 111 -, getpgid 121 155, getsid 124 156, getresuid 118 148, getresgid 120 150,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigsuspend 130 133, rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128,
kill 62 129, tkill 200 130, tgkill 234 131, pause 34 -, wait4 61 260, waitid 247 95,
execve 59 221, arch_prctl 158 -, getrandom 318 278
"""
# These answer EPERM: a program that asks for them should read why it gets nothing.
_REFUSED = "fork 57 -, vfork 58 -, socket 41 198, connect 42 203, ptrace 101 117, unshare 272 97"
_CHECKED = (
    "clone 56 220, exit 60 93, exit_group 231 94, ioctl 16 29, prctl 157 167, socketpair 53 199"
)

_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# struct seccomp_data: the number, the architecture, the instruction pointer, six arguments
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, (16, 24)

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# PR_SET_NAME, PR_GET_NAME, PR_SET_VMA (malloc names its areas). Not PR_SET_PDEATHSIG: a program
# that cleared it would outlive its sandbox.
_PRCTLS = (15, 16, 0x53564D41)
_AF_UNIX = 1


def numbers(table: str, machine: str) -> dict[str, int]:
    """Name -> number of the calls of a table that this machine has."""
    column = _MACHINES[machine][1]
    rows = [row.split() for row in table.replace("\n", " ").split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def supported(machine: str) -> bool:
    """Whether the table has a column for this machine."""
    return machine in _MACHINES


def build(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter, native byte order.

    Args:
        machine: x86_64 or aarch64; None takes this one.

    Raises:
        KeyError: for another machine; ask `supported` first.
    """
    machine = machine or platform.machine()
    program: list[tuple[int, int, int, int]] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append((code, if_true, if_false, value))

    def refuse(number: int) -> None:
        add(_RETURN, _ERRNO | number)

    def one_of(values: tuple[int, ...], number: int) -> None:
        for left, value in zip(range(len(values), 0, -1), values, strict=True):
            add(_EQUAL, value, left, 0)
        refuse(number)
        add(_RETURN, _ALLOW)

    add(_LOAD, _ARCHITECTURE)
    add(_EQUAL, _MACHINES[machine][0], 1, 0)
    add(_RETURN, _KILL_PROCESS)
    add(_LOAD, _NUMBER)
    # the x32 calls of x86-64 have numbers of their own
    add(_ANY_BIT, 0x40000000, 0, 1)
    refuse(errno.EPERM)
    for number in numbers(_REFUSED, machine).values():
        add(_EQUAL, number, 0, 1)
        refuse(errno.EPERM)
    for name, number in numbers(_CHECKED, machine).items():
        start = len(program)
        add(_EQUAL, number)
        add(_LOAD, _ARGUMENT[name == "ioctl"])
        if name == "clone":
            add(_ANY_BIT, _CLONE_THREAD, 0, 2)
            add(_ANY_BIT, _CLONE_NEW, 1, 0)
            add(_RETURN, _ALLOW)
            refuse(errno.EPERM)
        elif name in ("exit", "exit_group"):
            # a status of 128 and more is left to real signals: with it a program could pass for one
            # that somebody outside has killed, and would be judged again instead of failing
            add(_ANY_BIT, 0x80, 1, 0)
            add(_RETURN, _ALLOW)
            refuse(errno.EPERM)
        else:
            allowed = {"ioctl": _IOCTLS, "prctl": _PRCTLS, "socketpair": (_AF_UNIX,)}[name]
            one_of(allowed, errno.ENOTTY if name == "ioctl" else errno.EPERM)
        program[start] = (_EQUAL, 0, len(program) - start - 1, number)
    one_of(tuple(numbers(_ALLOWED, machine).values()), errno.ENOSYS)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
