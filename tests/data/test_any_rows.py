"""Whatever a file contains, there is one message that names it, or every row is trained on, validated on or counted."""

import csv
import io
import json

import pytest
from any_input import examples, tried
from hypothesis import given
from hypothesis import strategies as st

from reft_lightning.config import compose
from reft_lightning.runs import build, experiment

NAMES = st.sampled_from(["q", "a", "Q", "question", "é", ""])
TEXT = st.text(max_size=20)
CELL = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(TEXT, max_size=2),
                 st.dictionaries(TEXT, TEXT, max_size=2), st.just("x" * 100_000))  # fmt: skip
GOOD = st.fixed_dictionaries({"q": TEXT.filter(str.strip), "a": TEXT.filter(str.strip)})
ROWS = st.lists(st.one_of(GOOD, GOOD, GOOD, st.dictionaries(NAMES, CELL, max_size=3)), max_size=9)


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["q", "a"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_list(rows):
    return json.dumps(rows).encode()


@st.composite
def files(draw):
    """Draw (name, bytes, rows) of a valid or damaged file."""
    ending, write = draw(st.sampled_from([("csv", as_csv), ("jsonl", as_lines), ("json", as_list)]))
    rows = draw(ROWS)
    content = write(rows)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(
            st.sampled_from([b"", b"\xff", b"\x00", b"\n", b'"', b"{", b"\xef\xbb\xbf"])
        )
        rows = None
    return f"rows.{ending}", content, rows


class WeightsReached(Exception):
    pass


@pytest.fixture(scope="module")
def composing():
    with compose.composing() as one:
        yield lambda path: one(
            ["model=tiny_random", "data=custom", f"data.path={path}", "data.prompt=q", "data.target=a", "trainer=cpu",
             "data.validation_size=2", "data.max_length=64"]
        )  # fmt: skip


@examples(15)
@given(file=files())
def test_any_file_is_refused_by_name_or_read_to_its_last_row(composing, tmp_path, monkeypatch, file):
    name, content, rows = file
    path = tmp_path / name
    path.write_bytes(content)
    plans = []
    original = build.prepare
    monkeypatch.setattr(experiment, "prepare", lambda config: plans.append(original(config)) or plans[-1])

    def reached(**_):
        raise WeightsReached("weights")

    monkeypatch.setattr(build, "load_base_model", reached)
    _, said = tried(
        lambda: experiment.run(composing(path), tmp_path / "run"), experiment.SetupError, WeightsReached
    )
    if said != "weights":
        assert name in said or "rows" in said or "data." in said
        assert len(said.splitlines()) == 1
        assert len(said) < 1500
        return
    data = plans[-1].data
    train, validation = len(data.train_rows), sum(len(loader.dataset) for loader in data.val_dataloader())
    if rows is not None:
        left_out = len(rows) - train - validation
        assert (
            0 <= left_out <= len(rows) - len({repr(row["q"]) for row in rows})
        )  # rows that repeat a question
