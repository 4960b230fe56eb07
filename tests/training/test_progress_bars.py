from typing import ClassVar

import pytest
import short_runs

from reft_lightning.training import progress


class Recorded(progress.Bar):
    """A bar that records what it is told to show."""

    every: ClassVar = []

    def __init__(self, what, total=None, begun=0.0):
        super().__init__(what, total, begun)
        self.steps, self.open = [], True
        self.every.append(self)

    def show(self, done, note=""):
        super().show(done, note)
        self.steps.append((done, note))

    def close(self):
        super().close()
        self.open = False


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    monkeypatch.setattr(progress, "Bar", Recorded)
    monkeypatch.setattr(Recorded, "every", [])


def test_a_run_shows_training_each_evaluation_and_whose_it_is(data, tmp_path, capsys):
    short_runs.run(data, tmp_path, "trainer.enable_progress_bar=true", "evaluate_base=true")
    bars = [(bar.what, bar.total, bar.done) for bar in Recorded.every]
    # 6 rows in batches of 4; 12 steps; the last validation is that of the selected checkpoint
    assert bars == [
        ("frozen base, test", 2, 2), ("training", 12, 12), ("validation", 2, 2), ("validation", 2, 2),
        ("validation", 2, 2), ("test", 2, 2),
    ]  # fmt: skip
    assert not any(bar.open for bar in Recorded.every)
    training = Recorded.every[1]
    assert "train/loss" in training.steps[0][1]
    assert "val/accuracy" in training.steps[-1][1]
    said = capsys.readouterr()
    assert not {"\r", "\x1b"} & set(said.out + said.err)
    assert "Epoch" not in said.out


def test_a_failure_removes_all_bars(data, tmp_path):
    short_runs.interrupt(data, tmp_path, 3, "trainer.enable_progress_bar=true")
    assert [bar.what for bar in Recorded.every] == ["training"]
    assert not Recorded.every[0].open
