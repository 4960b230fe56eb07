import logging
import os
import pty
import subprocess
import sys

import pytest

from reft_lightning.terminal import bars
from reft_lightning.terminal.bars import Bar
from reft_lightning.terminal.log_lines import LogHandler

WORK = """
import logging, sys, time
from reft_lightning.terminal import bars
from reft_lightning.terminal.log_lines import LogHandler
bars.DELAY = 0.0
handler = LogHandler()
logging.basicConfig(level=logging.INFO, handlers=[handler])
with bars.Bar("training", 4) as bar:
    for step in range(1, 5):
        with bars.Bar("validation", 2) as inner:
            inner.advance(); time.sleep(0.15)
        bar.show(step, "loss 0.5"); time.sleep(0.15)
    logging.info("a line on the way")
print("the end")
"""


def in_a_terminal(code, **environment):
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"} | environment,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the terminal is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return said.decode()


def test_a_terminal_shows_what_is_done_how_far_it_is_and_how_long_is_left():
    said = in_a_terminal(WORK)
    for expected in ("training", "2 of 4", "0:00:00 left", "loss 0.5", "validation", "a line on the way"):
        assert expected in said
    assert said.endswith("the end\r\n")


AT_ONCE = WORK.replace("0.15", "0")  # a terminal draws ten times a second


def test_a_pipe_gets_no_bar():
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("the end\n", "INFO:root:a line on the way\n")


def test_a_dumb_terminal_gets_no_bar():
    assert "\x1b" not in in_a_terminal(AT_ONCE, TERM="dumb")


def test_work_that_goes_on_does_not_count_what_was_done_before(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Bar("training", 1000, begun=900) as bar:
        now[0] = 40.0  # four steps of ten seconds
        bar.show(904)
    assert caplog.messages == ["training: 904 of 1000, about 0:16:00 left"]


@pytest.mark.parametrize(
    ("total", "done", "expected"),
    [(8, 2, "reading runs: 2 of 8, about 0:00:00 left"), (None, 3, "reading runs: 3, 0:00:00 so far"),
     (1.0, 0.25, "reading runs: 25 %, about 0:00:00 left")],
)  # fmt: skip
def test_without_a_terminal_a_line_says_where_the_work_is(monkeypatch, caplog, total, done, expected):
    monkeypatch.setattr(bars, "PERIOD", 0.0)
    with caplog.at_level(logging.INFO), Bar("reading runs", total) as bar:
        bar.show(done)
    assert caplog.messages == [expected]


def test_lines_are_rare(caplog):
    with caplog.at_level(logging.INFO), Bar("reading runs", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert caplog.messages == []


def test_other_ranks_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(bars, "PERIOD", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.INFO), Bar("reading runs", 2) as bar:
        bar.advance()
    assert caplog.messages == []


def test_log_lines_go_where_the_stream_is_now(capsys):
    handler = LogHandler("stdout")
    handler.emit(logging.makeLogRecord({"msg": "here"}))
    assert capsys.readouterr().out == "here\n"
