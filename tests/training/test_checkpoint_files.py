"""Checkpoints are written atomically, and are read without running code."""

import os
import pickle
import tempfile

import pytest
import short_runs
import torch

from reft_lightning.training.checkpoint_files import WholeCheckpoints, read_checkpoint


class Unwritable:
    def __reduce__(self):
        raise OSError("No space left on device")


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(tmp_path):
    path, files = tmp_path / "checkpoints" / "last.ckpt", WholeCheckpoints()
    files.save_checkpoint({"step": 1, "weight": torch.ones(1000)}, path)
    with pytest.raises(OSError, match="No space left"):
        files.save_checkpoint({"weight": torch.zeros(1000), "step": Unwritable()}, path)
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_run_writes_its_checkpoints_next_to_their_place(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no_such_folder"))
    short_runs.run(data, tmp_path / "run")
    for name in ("best", "last"):
        assert short_runs.checkpoint(tmp_path / "run", name)["global_step"] > 0
    files = {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert files == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("cut", [0, 10, 700])
def test_a_damaged_checkpoint_is_named(tmp_path, cut):
    path = tmp_path / "last.ckpt"
    torch.save({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"last\.ckpt .*damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_checkpoint_with_code_is_refused_and_its_code_does_not_run(tmp_path, write):
    path = tmp_path / "last.ckpt"
    write({"weight": Touch(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"can run code when they are read.*trust_code=true"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_trusted_checkpoint_may_hold_anything(tmp_path):
    torch.save({"weight": Touch(tmp_path / "ran")}, tmp_path / "last.ckpt")
    read_checkpoint(tmp_path / "last.ckpt", trust_code=True)
    assert (tmp_path / "ran").is_dir()
