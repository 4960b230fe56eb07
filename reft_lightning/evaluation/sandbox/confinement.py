"""The inside of the sandbox: drop everything that a generated program does not need, then run it.

`run.py` starts this file as a script, in a fresh interpreter whose folder is empty except for `program.py`. It uses
only the standard library and nothing from the package. It removes, in this order:

1. writing outside the folder, with Landlock (Linux 5.13 and later; needs no privileges);
2. processes, signals, sockets, shared memory, namespaces, the clock, and changes to file owners and attributes, with a
   seccomp filter (Linux on x86_64 and arm64);
3. resources, with kernel limits: processor time, address space, file size, open files, core dumps;
4. writing, processes, signals and sockets once more, with a Python audit hook, which also names what it refused, and
   is the only guard if the kernel has neither Landlock nor seccomp.

It reports `ready` and the names of the kernel's guards, runs the program, and returns a token, which stays unread in a
pipe until the last line of the program has run.
"""

import errno
import math
import os
import resource
import struct
import sys

# Prefixes of audit events that no computation needs. Not every Python version reports new threads.
REFUSED_EVENTS = (
    "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.spawn", "subprocess.Popen",
    "_thread.start", "os.kill", "signal.pthread_kill", "resource.", "socket.", "syslog.", "os.link", "os.symlink",
    "ctypes.", "code.__new__", "sqlite3.enable_load_extension", "sqlite3.load",
    "fcntl.fcntl",  # an open file can be told to send signals to any process
)  # fmt: skip
# Modules that access the system without events of their own, or start interpreters without the hook.
REFUSED_MODULES = (
    "ctypes", "_ctypes", "_posixsubprocess", "_interpreters", "_xxsubinterpreters", "_testcapi",
)  # fmt: skip
# event -> number of leading arguments that are paths
PATH_EVENTS = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.truncate": 1, "os.chmod": 1, "os.chown": 1,
    "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "os.chflags": 1, "os.chdir": 1, "sqlite3.connect": 1,
}  # fmt: skip
MAKING_EVENTS = ("os.mkdir", "os.rename", "sqlite3.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# System calls that the filter refuses, with their numbers on x86_64 and arm64; None if the machine does not have it.
REFUSED_CALLS = {
    # processes and programs
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "execveat": (322, 281),
    # signals, and other processes; setsid would leave the session that is killed at the end
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "setsid": (112, 157),
    # these also affect the evaluator: priorities, processors, pages
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # sockets; io_uring could replace other calls
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    # objects that outlive their process, and other kinds of memory
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "keyctl": (250, 219), "memfd_create": (319, 279), "userfaultfd": (323, 282),
    # namespaces, file systems, devices, the kernel
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "mknod": (133, None), "mknodat": (259, 33), "bpf": (321, 280),
    "perf_event_open": (298, 241), "reboot": (169, 142),
    # the machine's clock and names
    "clock_settime": (227, 112), "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162),
    # owners and attributes of files anywhere, which Landlock does not cover
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
}  # fmt: skip
# Calls refused depending on one argument: numbers as above, the argument, its values, whether only these are allowed.
DECIDED_CALLS = {
    "prlimit64": ((302, 261), 0, (0,), True),  # process 0 is the caller itself, which sets its limits
    "fcntl": ((72, 25), 1, (8, 10, 15), False),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals from an open file
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's AUDIT_ARCH


def set_limits(seconds: float, memory_bytes: int, file_bytes: int) -> None:
    """Limit this process permanently, because hard limits cannot be raised again.

    `RLIMIT_NPROC` is 0, which allows no further process or thread. It does not apply to the superuser; the filter does.
    """

    def limit(kind: int, soft: int, beyond: int = 0) -> None:
        _, most = resource.getrlimit(kind)
        cap = math.inf if most == resource.RLIM_INFINITY else most
        resource.setrlimit(kind, (int(min(soft, cap)), int(min(soft + beyond, cap))))

    limit(resource.RLIMIT_CPU, math.ceil(seconds), beyond=1)  # SIGXCPU, which can be caught, then SIGKILL
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, file_bytes)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)


def kernel_guards(folder: str) -> list[str]:
    """Activate the guards that this kernel has, and return their names."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return []
    try:
        import ctypes
    except ImportError:  # in an interpreter built without ctypes, only the audit hook remains
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    # required by Landlock and seccomp, so that no set-uid program can lift them later
    pr_set_no_new_privs = 38
    if libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0):
        return []
    guards = {"landlock": landlock(ctypes, libc, folder), "seccomp": seccomp(ctypes, libc)}
    for name in [name for name in sys.modules if name.split(".")[0] in REFUSED_MODULES]:
        del sys.modules[name]
    return [name for name, raised in guards.items() if raised]


def landlock(ctypes, libc, folder: str) -> bool:
    """Confine writing, creating and removing files to `folder`, and forbid executing any; False if not supported.

    Source: https://docs.kernel.org/userspace-api/landlock.html. The three calls have the same numbers on all machines.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446

    def call(number: int, *arguments) -> int:
        return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))

    version = call(create_ruleset, None, 0, 1)
    if version < 1:
        return False
    write_file, remove, make_dir = 1 << 1, 3 << 4, 1 << 7
    make_file, refer, truncate = 1 << 8, 1 << 13, 1 << 14
    others = 1 << 0 | 1 << 6 | 15 << 9  # execute; devices, sockets, pipes, symbolic links
    newer = (refer if version >= 2 else 0) | (truncate if version >= 3 else 0)
    allowed = write_file | remove | make_dir | make_file | newer
    rules = call(create_ruleset, struct.pack("=Q", allowed | others), 8, 0)
    if rules < 0:
        return False
    try:
        for path, rights in ((folder, allowed), (os.devnull, write_file)):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if call(add_rule, rules, 1, struct.pack("=Qi", rights, place), 0):
                    return False
            finally:
                os.close(place)
        return call(restrict_self, rules, 0) == 0
    finally:
        os.close(rules)


def seccomp(ctypes, libc) -> bool:
    """Refuse `REFUSED_CALLS` and `DECIDED_CALLS` with EPERM from now on; False if not supported.

    Source: https://docs.kernel.org/userspace-api/seccomp_filter.html.
    """
    if os.uname().machine not in MACHINES:
        return False
    column, architecture = MACHINES[os.uname().machine]
    load, equal, at_least, give_back = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give_back, 0, 0, refuse), (load, 0, 0, 0)]
    if column == 0:
        steps += [(at_least, 0, 1, 0x40000000), (give_back, 0, 0, refuse)]  # calls of the x32 ABI
    for number in (numbers[column] for numbers in REFUSED_CALLS.values()):
        if number is not None:
            steps += [(equal, 0, 1, number), (give_back, 0, 0, refuse)]
    for numbers, argument, values, allowed in DECIDED_CALLS.values():
        then, otherwise = (allow, refuse) if allowed else (refuse, allow)
        inner = [(load, 0, 0, 16 + 8 * argument)]  # the lower half, because the kernel reads an int
        for value in values:
            inner += [(equal, 0, 1, value), (give_back, 0, 0, then)]
        inner.append((give_back, 0, 0, otherwise))
        steps += [(equal, 0, len(inner), numbers[column]), *inner]
    steps.append((give_back, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    pr_set_seccomp, filter_mode = 22, 2
    return libc.prctl(pr_set_seccomp, filter_mode, program, 0, 0) == 0


def watch(folder: str, files: int) -> None:
    """Install the audit hook, which raises PermissionError in the program for everything it refuses.

    Args:
        folder: the only folder that may be written to.
        files: how many times something may be created there, or opened for writing, as reported to the hook; `run.py`
            counts the actual files.
    """
    made = 0
    real, is_folder, decode = os.path.realpath, os.path.isdir, os.fsdecode
    devnull, within = os.devnull, folder + os.sep

    def refuse(what: str) -> None:
        raise PermissionError(errno.EPERM, f"the sandbox refuses {what}")

    def check(path, event: str) -> None:
        if isinstance(path, int):  # an open file was checked when it was opened
            return
        if event == "sqlite3.connect" and path == ":memory:":
            return
        where = real(decode(path))
        if where not in (folder, devnull) and not where.startswith(within):
            refuse(f"{event} outside its folder")

    def hook(event: str, arguments: tuple) -> None:
        nonlocal made
        if event == "open":
            path, mode, flags = arguments
            if path is None:
                return
            if not (flags & WRITING or (isinstance(mode, str) and set(mode) & set("wax+"))):
                # other calls can use an open folder (dir_fd), which the hook does not see
                if mode is None and not isinstance(path, int) and is_folder(path):
                    check(path, "opening a folder")
                return
        elif event == "import":
            if arguments[0].split(".")[0] in REFUSED_MODULES:
                refuse(f"import of {arguments[0]}")
            return
        elif event not in PATH_EVENTS:
            if event.startswith(REFUSED_EVENTS):
                refuse(event)
            return
        for path in arguments[: PATH_EVENTS.get(event, 1)]:
            check(path, event)
        if event == "open" or event in MAKING_EVENTS:
            made += 1
            if made > files:
                refuse(f"more than {files} files")

    sys.addaudithook(hook)


def describe(error: BaseException) -> str:
    """Return an exception as one short line; computing its text may run the program's code and fail."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return " ".join(text.split())[:200] or "an exception without a name"


def main() -> None:
    """Run `program.py` in the given folder, and report."""
    folder, report, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    seconds, (memory_bytes, file_bytes, files) = float(sys.argv[4]), map(int, sys.argv[5:8])
    write, read, leave, told = os.write, os.read, os._exit, describe  # the program may replace them in `os`

    def tell(text: str) -> None:
        write(report, text.encode("utf-8", "replace") + b"\n")

    try:
        with open(os.path.join(folder, "program.py"), encoding="utf-8") as file:
            source = file.read()
        guards = kernel_guards(folder)
        set_limits(seconds, memory_bytes, file_bytes)  # afterwards, because the guards need memory
        watch(folder, files)
        tell(" ".join(["ready", *guards]))
    except Exception as error:
        tell(f"broken {describe(error)}")
        leave(1)
    module = type(sys)("program")
    sys.modules["program"] = module  # where dataclasses and pickle look for the classes of a module
    sys.argv = ["program.py"]
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # including SystemExit and KeyboardInterrupt: the tests did not finish
        tell(f"failed {told(error)}")
        leave(1)
    write(report, b"passed " + read(token, 64) + b"\n")
    leave(0)


if __name__ == "__main__":
    main()
