"""Workers of one study as on several hosts that share its folder: with a journal in it, or a real PostgreSQL."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from pretended_runs import make_study, pretend, work

from reft_lightning.search.budget import counted
from reft_lightning.search.study import Study, run_again
from reft_lightning.search.summary import summarize

HOST = """
import sys, time
from pathlib import Path
import reft_lightning.search.study as study
study.HEARTBEAT = int(sys.argv[2])
from pretended_runs import pretend, work_with_others
here = study.Study(Path(sys.argv[1]))
def run(folder):
    print("begins", folder.name, flush=True)
    time.sleep(float(sys.argv[3]))
    return pretend(here, folder)
work_with_others(here, run)
"""


@contextlib.contextmanager
def host(folder, seconds, heartbeat=1):
    """A worker in its own process, whose runs take some seconds."""
    command = [sys.executable, "-c", HOST, str(folder), str(heartbeat), str(seconds)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def begin(folder, storage, trials):
    study = make_study(folder, storage, budget={"unit": "trials", "amount": trials})
    study.start()
    close(study)


def close(study):
    if hasattr(study.storage, "engine"):  # of a database
        study.storage.engine.dispose()


def check_that_nothing_was_done_twice(folder, trials, lost):
    study = Study(folder)
    summary = summarize(study)
    assert (summary["status"], summary["budget"]["verdict"]) == ("complete", "equal")
    found = [study.trials(method) for method in study.plan.methods]
    assert [len(counted(of_method)) for of_method in found] == [trials, trials]
    assert sum(map(len, found)) == 2 * trials + lost
    close(study)
    reads = [json.loads(line) for line in (folder / "test_reads.jsonl").read_text().splitlines()]
    assert sorted((r["method"], r["seed"]) for r in reads) == [
        (m, s) for m in ("direft", "loreft") for s in (1, 2)
    ]


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server: (URL, restart)."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="the driver: pip install 'reft_lightning[postgresql]'")
    place = Path(tempfile.mkdtemp(prefix="reft-pg-"))
    # the server refuses to be root
    who = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(place, who["user"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, control = place / "data", str(Path(initdb).with_name("pg_ctl"))
    options = f"-k {place} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off"

    def call(*arguments):
        subprocess.run(arguments, check=True, cwd=place, stdout=subprocess.DEVNULL, timeout=60, **who)

    def begin():
        call(control, "-w", "-D", str(data), "-o", options, "-l", str(place / "log"), "start")

    def end():
        call(control, "-w", "-D", str(data), "-m", "fast", "stop")

    def restart():
        end()
        begin()

    call(initdb, "-A", "trust", "-U", "reft", "-D", str(data))
    begin()
    yield f"postgresql+psycopg://reft@127.0.0.1:{port}/postgres", restart
    end()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=["journal", "postgresql"])
def storage(request):
    return None if request.param == "journal" else request.getfixturevalue("server")[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_is_gone_or_was_away_costs_one_attempt_and_no_trial(tmp_path, storage, ending):
    begin(tmp_path, storage, trials=4)
    with host(tmp_path, 1) as victim:
        victim.stdout.readline()  # in its trial
        victim.send_signal(ending)
        with host(tmp_path, 0.3) as other:
            if ending == signal.SIGSTOP:
                time.sleep(6)  # three heartbeats are missed
                victim.send_signal(signal.SIGCONT)
                assert victim.wait(120) == 0
            assert other.wait(120) == 0
    held = ending == signal.SIGSTOP and storage is None  # a stopped process still holds the lock of its trial
    check_that_nothing_was_done_twice(tmp_path, trials=4, lost=0 if held else 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_starts_again_within_a_trial_ends_no_worker(tmp_path, server):
    url, restart = server
    begin(tmp_path, url, trials=2)
    with host(tmp_path, 3, heartbeat=20) as worker:
        worker.stdout.readline()
        restart()
        assert worker.wait(120) == 0
    check_that_nothing_was_done_twice(tmp_path, trials=2, lost=0)


def test_a_worker_whose_trial_was_given_to_another_goes_on(tmp_path):
    study = make_study(tmp_path, f"sqlite:///{tmp_path}/trials.db", budget={"unit": "trials", "amount": 2})
    given = []

    def run(folder):
        other = Study(tmp_path)
        if not given:
            (trial,) = (t for t in other.trials("loreft") if t.state.name == "RUNNING")
            other.studies["loreft"].tell(trial.number, state=other.optuna.trial.TrialState.FAIL)
            run_again(other.studies["loreft"], trial)
            given.append(trial.params)
        return pretend(study, folder)

    work(study, run)
    check_that_nothing_was_done_twice(tmp_path, trials=2, lost=1)
    assert given[0] in [trial.params for trial in study.trials("loreft")[1:]]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret@127.0.0.1:1/studies", "cannot open storage|needs the database's driver"),
        ("nosuch://host/name", "cannot open storage"),
        ("a folder", "cannot open storage"),
    ],
)
def test_a_database_that_cannot_be_opened_is_said_in_one_line_without_its_password(tmp_path, url, said):
    from reft_lightning.search.study import open_storage

    with pytest.raises(ValueError, match=said) as raised:
        open_storage(tmp_path, url)
    assert "secret" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
