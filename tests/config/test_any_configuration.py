"""Any command line gives either one helpful message or a run that reaches its weights."""

import string
from dataclasses import is_dataclass

import pytest
import short_runs
from any_input import examples, tried
from hypothesis import given
from hypothesis import strategies as st

from reft_lightning.config import compose
from reft_lightning.config.schema import CHOICES, keys
from reft_lightning.runs import build, experiment


class WeightsReached(Exception):
    pass


# these keys name things that are read or created, or need another machine
NOT_DRAWN = {
    "resume",
    "data.path",
    "trainer.default_root_dir",
    "model.path",
    "data.validation_path",
    "data.test_path",
}
KEYS = sorted({key for key, hint in keys().items() if not is_dataclass(hint)} - NOT_DRAWN)
GROUPS = [
    "intervention",
    "data",
    "model",
    "optimizer",
    "scheduler",
    "decoding",
    "trainer",
    "logger",
    "experiment",
]
WORDS = [
    *sorted({value for values in CHOICES.values() for value in values}),
    "loreft", "all", "f7+l7", "position", "block_output", "ddp", "cpu", "gpu", "auto", "32-true", "val/loss",
    "torch.optim.SGD", "reft_lightning.training.schedules.linear", "os.system", "null", "true", "false", "???",
]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 9), st.sampled_from([10**18, -(10**18), 0.0, 1e-9, 0.5, 1.5, 1e30, -0.5]), st.floats()
).map(str)
TEXTS = st.text(string.printable + "äé中\u2028\x00", max_size=12)
PLAIN = st.one_of(NUMBERS, st.sampled_from(WORDS), TEXTS)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    st.dictionaries(st.sampled_from(["a", "0", "_target_", "layers"]), PLAIN, max_size=2).map(
        lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items.items()) + "}"
    ),
    TEXTS.map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", r"\'") + "'"),
)


@st.composite
def overrides(draw):
    key = draw(st.sampled_from(KEYS + GROUPS))
    if draw(st.integers(0, 9)) == 0:  # a typo, or an unknown key
        at = draw(st.integers(0, len(key) - 1))
        key = draw(st.sampled_from([key[:at] + key[at + 1 :], key + "s", draw(TEXTS), f"+{key}", f"~{key}"]))
    return f"{key}={draw(VALUES)}"


@pytest.fixture(scope="module")
def composing(data):
    with compose.composing() as one:
        yield lambda texts: one([*short_runs.arguments(data), *texts])


@examples(60)
@given(texts=st.lists(overrides(), min_size=1, max_size=2))
def test_any_override_is_refused_in_one_message_or_reaches_the_weights(
    composing, tmp_path, monkeypatch, texts
):
    def reached(**_):
        raise WeightsReached("weights")

    monkeypatch.setattr(build, "load_base_model", reached)
    refusals = (compose.CompositionError, experiment.SetupError)
    _, said = tried(lambda: experiment.run(composing(texts), tmp_path / "run"), *refusals, WeightsReached)
    assert said.strip()
    assert "Traceback" not in said
    assert len(said.splitlines()) < 25
    assert not (tmp_path / "run" / "results.json").exists()
