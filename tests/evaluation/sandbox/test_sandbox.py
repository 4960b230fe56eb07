"""The sandbox: which programs pass, what programs cannot do, and what is left behind."""

import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from reft_lightning.evaluation import Limits, Outcome, run_program, run_programs
from reft_lightning.evaluation.sandbox import confinement
from reft_lightning.evaluation.sandbox import run as execute

SHORT = Limits(seconds=1, wall_seconds=2)
CONFINEMENT = Path(execute.__file__).with_name("confinement.py")


def reason(source, limits=SHORT):
    outcome = run_program(source, limits)
    assert not outcome.passed
    return outcome.reason


def refused(*actions):
    """Every action of one program raises the sandbox's error, not one from a mistake in the test."""
    outcome = run_program(f"""
import os
for action in {actions!r}:
    try:
        exec(action, {{"os": os}})
    except (OSError, RuntimeError) as error:
        known = ("Operation not permitted", "Permission denied", "refuses", "can't start new thread")
        assert any(words in str(error) for words in known), (action, error)
    else:
        raise AssertionError(action)
""")
    assert outcome == Outcome(True, "passed")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path, monkeypatch):
    """No folder and no process survives a program, whatever it does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "programs"))
    (tmp_path / "programs").mkdir()
    yield
    assert list((tmp_path / "programs").iterdir()) == []
    if sys.platform == "linux":
        assert [p for p in processes() if str(tmp_path) in p] == []


def processes():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:  # it has ended
            continue
    return found


class TestVerdict:
    def test_a_program_that_reaches_its_end_passes(self):
        assert run_program("assert sum([1, 2]) == 3") == Outcome(True, "passed")

    def test_a_failed_assertion_fails_and_is_named(self):
        assert reason("assert 1 == 2, 'no'") == "AssertionError: no"

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("import sys; sys.exit(0)", "SystemExit: 0"),
            ("raise SystemExit", "SystemExit:"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt:"),
            ("import os; os._exit(0)", "exited with code 0 before its end"),
            ("quit()", "NameError: name 'quit' is not defined"),  # no site module
        ],
    )
    def test_leaving_before_the_end_fails(self, source, why):
        assert reason(source + "\nassert True") == why

    @pytest.mark.parametrize("stream", ["sys.stdout.buffer", "open(n, 'wb', closefd=False)"])
    def test_printing_that_it_passed_is_not_a_pass(self, stream):
        source = f"""
import os, sys
for n in range(1, 12):
    try:
        file = {stream}
        file.write(b'passed\\nready\\npassed 0123456789abcdef\\n')
        file.flush()
    except OSError:
        pass
os._exit(0)
"""
        assert not run_program(source, SHORT).passed

    def test_text_that_is_not_a_program_fails(self):
        assert reason("def f(:").startswith("SyntaxError")
        assert "null bytes" in reason("x = 'a\0b'")
        # an unpaired surrogate became "?"
        assert reason("x = '\ud800'\nassert x != '?'") == "AssertionError:"

    def test_an_exception_whose_text_fails_is_reported_by_its_name(self):
        source = "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd"
        assert reason(source) == "Odd"

    def test_reasons_are_one_short_line(self):
        assert reason("raise ValueError('a\\nb' * 1000)").startswith("ValueError: a ba b")
        assert len(reason("raise ValueError('a\\nb' * 1000)")) <= 200

    def test_the_main_block_is_not_run(self):
        assert run_program("if __name__ == '__main__':\n    raise ValueError").passed

    def test_dataclasses_and_pickle_find_their_module(self):
        source = """
import dataclasses, pickle
@dataclasses.dataclass
class Point:
    x: "int"
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
"""
        assert run_program(source) == Outcome(True, "passed")

    def test_futures_of_the_sandbox_do_not_leak_into_the_program(self):
        assert run_program("def f(x: int): ...\nassert f.__annotations__ == {'x': int}").passed

    def test_the_order_of_a_set_is_the_same_each_time(self):
        source = "assert list({'a', 'b', 'c', 'd', 'e'}) == %r"
        order = [reason("assert 0, list({'a', 'b', 'c', 'd', 'e'})") for _ in range(2)]
        assert order[0] == order[1]
        assert run_program(source % eval(order[0].partition(": ")[2])).passed


class TestLimits:
    def test_a_program_that_computes_for_ever_is_ended(self):
        endless = reason("while True: pass", Limits(seconds=1, wall_seconds=60))
        assert endless == "used more than 1 s of processor time"

    def test_a_program_that_catches_the_first_signal_is_ended_by_the_second(self):
        source = "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass"
        assert reason(source, Limits(seconds=1, wall_seconds=60)) == "killed by SIGKILL"

    def test_a_program_that_sleeps_is_ended(self):
        start = time.monotonic()
        assert reason("import time; time.sleep(100)", Limits(1, 0.3)) == "ran longer than 0.3 s"
        assert time.monotonic() - start < 30

    def test_a_program_that_waits_for_input_gets_none(self):
        assert reason("input()").startswith("EOFError")

    def test_memory_is_limited(self):
        assert reason("x = bytearray(2 << 30)").startswith("MemoryError")
        hoard = "x = []\nwhile True:\n    x.append(bytearray(1 << 20))"
        assert reason(hoard, Limits(memory_bytes=128 << 20)).startswith("MemoryError")

    def test_endless_recursion_fails(self):
        assert reason("def f(): f()\nf()").startswith("RecursionError")
        deep = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)"
        assert not run_program(deep, Limits(1, 5, memory_bytes=256 << 20)).passed

    def test_files_are_limited_in_size_and_number(self):
        assert "File too large" in reason("open('big', 'wb').write(bytes(10 << 20))")
        many = "for i in range(1000):\n    open(str(i), 'w').close()"
        assert reason(many).endswith("refuses more than 64 files")
        nested = "import os\nwhile True:\n    os.mkdir('a')\n    os.chdir('a')"
        assert reason(nested).endswith("refuses more than 64 files")

    def test_files_that_the_hook_does_not_see_are_counted(self):
        """SQLite creates the files of attached databases itself."""
        many = """
import sqlite3, time
connection = sqlite3.connect(":memory:", isolation_level=None)
for i in range(100):
    connection.execute(f"attach 'f{i}' as x")
    connection.execute("pragma x.synchronous=off")
    connection.execute("create table x.t (y)")
    connection.execute("detach x")
"""
        assert reason(many) == "created more than 64 files"
        assert reason(f"{many}time.sleep(60)", Limits(wall_seconds=30)) == "created more than 64 files"
        assert run_program(many, Limits(files=150)).passed

    def test_open_files_are_limited(self):
        assert "Too many open files" in reason("x = [open('program.py') for _ in range(1000)]")

    def test_a_flood_of_output_goes_nowhere(self):
        assert run_program(
            "import sys\nfor _ in range(100):\n    print('x' * 10**5)\nsys.stderr.write('x')"
        ).passed

    def test_limits_must_be_positive(self):
        with pytest.raises(ValueError, match=r"memory_bytes must be positive; got 0"):
            Limits(memory_bytes=0)


class TestHarm:
    def test_no_process_and_no_thread_is_started(self):
        refused(
            "for _ in range(3): os.fork()",
            "os.posix_spawn('/bin/sh', ['sh'], {})",
            "os.execv('/bin/true', ['true'])",
            "os.system('true')",
            "import subprocess; subprocess.run(['true'])",
            "import multiprocessing; multiprocessing.Process(target=print).start()",
            "import threading; threading.Thread(target=print).start()",
        )

    def test_there_is_no_network(self):
        refused(
            "import socket; socket.socket()",
            "import socket; socket.socketpair()",
            "import socket; socket.create_connection(('127.0.0.1', 9))",
            "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        )

    def test_nothing_is_written_outside_the_folder(self, tmp_path):
        path = str(tmp_path / "outside")
        refused(
            f"open({path!r}, 'w')",
            f"open({path!r}, 'a')",
            "open('../outside', 'w')",
            f"os.open({path!r}, os.O_RDWR | os.O_CREAT)",
            f"import pathlib; pathlib.Path({path!r}).write_text('x')",
            f"os.mkdir({path!r})",
            f"os.mkfifo({path!r})",
            "os.symlink('/', 'root')",
            f"os.rename('program.py', {path!r})",
            "os.chdir('/')",
            f"import shutil; shutil.copy('program.py', {path!r})",
            f"import sqlite3; sqlite3.connect({path!r})",
        )
        assert not list(tmp_path.rglob("outside"))

    def test_what_others_wrote_is_neither_changed_nor_removed(self, tmp_path):
        kept = tmp_path / "kept"
        kept.write_text("kept")
        mode = kept.stat().st_mode
        calls = ("remove(p)", "truncate(p, 0)", "chmod(p, 0)", "unlink(p)", "rename(p, 'mine')", "utime(p)")
        refused(
            *(f"p = {str(kept)!r}; os.{call}" for call in calls),
            f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        )
        assert (kept.read_text(), kept.stat().st_mode) == ("kept", mode)

    def test_nobody_is_killed(self):
        refused(f"os.kill({os.getpid()}, 9)", "os.killpg(os.getppid(), 9)")

    def test_doors_to_native_code_are_closed(self):
        refused("import ctypes", "import _ctypes", "import _posixsubprocess")
        assert reason("import ctypes").endswith("the sandbox refuses import of ctypes")

    def test_byte_code_cannot_be_forged(self):
        assert "refuses code.__new__" in reason("f = lambda: 0\nf.__code__.replace(co_code=b'')")

    def test_the_folder_is_free_to_use(self):
        source = """
import os, sqlite3, tempfile
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "a"), "w") as file:
        file.write("x")
    os.rename(os.path.join(folder, "a"), "b")
assert open("b").read() == "x" and not os.path.exists(folder)
sqlite3.connect(":memory:").execute("create table t (x)")
open(os.devnull, "w").write("x")
"""
        assert run_program(source) == Outcome(True, "passed")

    def test_a_folder_without_permissions_is_removed_all_the_same(self):
        source = (
            "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('a', 0)"
        )
        assert run_program(source).passed

    def test_the_environment_says_nothing(self, monkeypatch):
        monkeypatch.setenv("SECRET_TOKEN", "x")
        source = "import os\nassert set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', 'LANG', 'PYTHONHASHSEED', 'LC_CTYPE'}"
        assert run_program(source) == Outcome(True, "passed")

    def test_installed_packages_are_not_seen(self):
        assert reason("import torch") == "ModuleNotFoundError: No module named 'torch'"
        assert reason("import execute") == "ModuleNotFoundError: No module named 'execute'"


def guarded(body, guards="print(*confinement.kernel_guards(folder))"):
    """Run a script under the kernel's guards only, without the audit hook, or under other guards."""
    script = f"""
import os, sys
sys.path.insert(0, {str(CONFINEMENT.parent)!r})
import confinement
folder = os.path.realpath(os.getcwd())
{guards}
{body}
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-S", "-B", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60
        )
    return done.stdout.splitlines(), done.stderr


def each_raises_eperm(guards, *actions):
    if "seccomp" not in guards:
        pytest.skip("this kernel or machine has no seccomp filter")
    lines, error = guarded(f"""
import ctypes, errno, fcntl, resource, socket, time
kind, libc, file = resource.RLIMIT_CORE, ctypes.CDLL(None, use_errno=True), open("a", "w")
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
for action in {actions!r}:
    try:
        print(action, exec(action))
    except OSError as error:
        print(action, errno.errorcode[error.errno])
""")
    assert (lines[1:], error) == ([f"{action} EPERM" for action in actions], "")


@pytest.fixture(scope="module")
def guards():
    lines, _ = guarded("")
    return lines[0].split() if lines else []


class TestKernel:
    """The guards that hold when a program evades the audit hook."""

    def test_seccomp_refuses_processes_signals_and_sockets(self, guards):
        each_raises_eperm(
            guards,
            "os.fork()",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "os.execv('/bin/true', ['true'])",
            "socket.socket()",
            "os.kill(os.getppid(), 0)",
            "os.setsid()",
            "os.memfd_create('x')",
            "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
            "fcntl.fcntl(os.pipe()[0], 10, 9)",  # F_SETSIG, SIGKILL
        )

    def test_seccomp_refuses_changes_to_the_evaluator(self, guards):
        each_raises_eperm(
            guards,
            "os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid()))",
            "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(os.getppid()))",
            "os.sched_setscheduler(os.getppid(), os.SCHED_OTHER, os.sched_param(0))",
            "os.sched_setparam(os.getppid(), os.sched_param(0))",
            "resource.prlimit(os.getppid(), kind, resource.prlimit(0, kind))",
        )

    def test_a_process_may_limit_itself_and_set_up_its_own_files(self, guards):
        body = """
import fcntl, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
fcntl.fcntl(os.pipe()[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
print("done")
"""
        lines, error = guarded(body)
        assert (lines[-1], error) == ("done", "")

    def test_seccomp_refuses_the_clock_the_names_and_owners_and_attributes_of_files(self, guards):
        each_raises_eperm(
            guards,
            "time.clock_settime(time.CLOCK_MONOTONIC, 0)",  # EINVAL without the filter
            "socket.sethostname(socket.gethostname())",
            "check(libc.setdomainname(b'x', -1))",  # EINVAL without the filter, or no privilege
            "os.chown('a', -1, -1)",
            "os.lchown('a', -1, -1)",
            "os.fchown(file.fileno(), -1, -1)",
            "os.chown('a', -1, -1, dir_fd=os.open('.', os.O_RDONLY))",
            "os.setxattr('a', 'user.x', b'')",
            "os.setxattr('a', 'user.x', b'', follow_symlinks=False)",
            "os.setxattr(file.fileno(), 'user.x', b'')",
            "os.removexattr('a', 'user.x')",
            "os.removexattr('a', 'user.x', follow_symlinks=False)",
            "os.removexattr(file.fileno(), 'user.x')",
            "check(libc.syscall(463, -100, b'a', 0, b'user.x', None, 0))",  # setxattrat: EINVAL without the filter
            "check(libc.syscall(466, -100, b'a', 0, b'user.x'))",  # removexattrat
        )

    def test_the_numbers_are_those_of_the_kernels_headers(self):
        headers = (
            Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
            Path("/usr/include/asm-generic/unistd.h"),  # what arm64 uses
        )
        if not all(header.is_file() for header in headers):
            pytest.skip("no kernel headers of x86_64")
        own = confinement.REFUSED_CALLS | {
            n: numbers for n, (numbers, *_) in confinement.DECIDED_CALLS.items()
        }
        newer = {"setxattrat", "removexattrat"}  # Linux 6.13
        for column, header in enumerate(headers):
            text = header.read_text()
            known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", text))
            for name, numbers in own.items():
                if name in known or name not in newer:
                    assert (name, str(numbers[column])) == (name, known.get(name, "None"))

    def test_landlock_refuses_writing_outside(self, guards, tmp_path):
        if "landlock" not in guards:
            pytest.skip("this kernel has no Landlock")
        kept, path = str(tmp_path / "kept"), str(tmp_path / "outside")
        Path(kept).write_text("kept")
        actions = (
            f"open({path!r}, 'w')",
            f"os.mkdir({path!r})",
            f"os.mkfifo({path!r})",
            "os.symlink('/', 'x')",
            f"os.remove({kept!r})",
            f"os.truncate({kept!r}, 0)",
            f"os.rename({kept!r}, 'x')",
        )
        lines, error = guarded(f"""
for action in {actions!r}:
    try:
        print(exec(action))
    except OSError as error:
        print(type(error).__name__ if isinstance(error, PermissionError) else error.strerror)
""")
        assert set(lines[1:]) <= {"PermissionError", "Invalid cross-device link"}
        assert (len(lines[1:]), error) == (len(actions), "")
        assert (Path(kept).read_text(), Path(path).exists()) == ("kept", False)

    def test_the_folder_stays_writable(self, guards):
        lines, error = guarded(
            "os.mkdir('a')\nopen('a/b', 'w').write('x')\nos.rename('a/b', 'c')\nprint('done')"
        )
        assert (lines[-1], error) == ("done", "")

    def test_a_system_without_guards_is_reported_once(self, caplog):
        execute._warn_of_missing.cache_clear()
        with caplog.at_level(logging.WARNING):
            execute._warn_of_missing(("landlock", "seccomp"))
            execute._warn_of_missing(("landlock", "seccomp"))
            execute._warn_of_missing(())
        assert [r.message.partition(",")[0] for r in caplog.records] == [
            "this system does not have landlock or seccomp"
        ]


class TestHook:
    """What remains on a system without Landlock and seccomp."""

    def test_it_refuses_alone(self, tmp_path):
        kept, path, parent = str(tmp_path / "kept"), str(tmp_path / "outside"), str(tmp_path)
        Path(kept).write_text("kept")
        actions = (
            "os.fork()",
            "os.posix_spawn('/bin/true', ['true'], os.environ)",
            "os.system('true')",
            "import subprocess",
            "import socket; socket.socket()",
            "os.kill(os.getppid(), 0)",
            "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
            f"open({path!r}, 'w')",
            f"os.open({path!r}, os.O_RDWR | os.O_CREAT)",
            f"os.mkdir({path!r})",
            f"os.remove({kept!r})",
            f"import shutil; shutil.rmtree({parent!r})",
            f"os.remove('kept', dir_fd=os.open({parent!r}, os.O_RDONLY))",
            "os.remove('kept', dir_fd=os.open('..', os.O_RDONLY, dir_fd=os.open('.', os.O_RDONLY)))",
        )
        body = f"""
for action in {actions!r}:
    try:
        print(exec(action))
    except PermissionError as error:
        print(str(error)[:30])
"""
        expected = ["[Errno 1] the sandbox refuses"] * len(actions)
        lines, error = guarded(body, "confinement.watch(folder, 64)")
        assert ([line.strip() for line in lines], error) == (expected, "")
        assert (Path(kept).read_text(), Path(path).exists()) == ("kept", False)

    def test_it_leaves_the_folder_free(self):
        body = """
import tempfile, pathlib
with tempfile.TemporaryDirectory(dir=".") as inner:
    pathlib.Path(inner, "a").mkdir()
    pathlib.Path(inner, "a", "b").write_text("x")
print(os.listdir("."))
"""
        assert guarded(body, "confinement.watch(folder, 64)") == (["[]"], "")


class TestRunner:
    def test_outcomes_come_in_order_and_equal_programs_run_once(self, monkeypatch):
        ran = []
        run = execute.run_program
        monkeypatch.setattr(execute, "run_program", lambda source: ran.append(source) or run(source))
        outcomes = run_programs(["x = 1", "assert 0", "x = 1"])
        assert [outcome.passed for outcome in outcomes] == [True, False, True]
        assert sorted(ran) == ["assert 0", "x = 1"]

    def test_a_sandbox_that_does_not_start_is_no_failed_program(self, monkeypatch, tmp_path):
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\nexit 3\n")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        with pytest.raises(RuntimeError, match=r"did not start: it exited with code 3"):
            run_program("x = 1")
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(FileNotFoundError):
            run_program("x = 1")

    def test_no_descriptor_stays_open(self):
        if not Path("/proc/self/fd").is_dir():
            pytest.skip("no /proc")
        run_program("x = 1")
        before = len(os.listdir("/proc/self/fd"))
        for source in ("x = 1", "assert 0", "import os; os._exit(1)"):
            run_program(source)
        assert len(os.listdir("/proc/self/fd")) == before
