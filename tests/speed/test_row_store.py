"""The store of kept rows: places, limits, files that are found again, and damage that is noticed."""

import errno
import os

import pytest
import torch

from reft_lightning.speed import row_store
from reft_lightning.speed.row_store import KeptRows


def test_rows_beyond_the_limit_have_no_place():
    store = KeptRows([3, 2, 4], width=2, dtype=torch.float32, limit=5 * 2 * 4 + 7)
    assert len(store) == 2
    assert store.bytes == 40
    value = torch.arange(8.0).view(4, 2)
    store.write(2, value)
    assert not store.has(2)
    store.write(1, value[:2])
    assert store.has(1)
    assert not store.has(0)
    assert torch.equal(store.read(1), value[:2])


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 0 has 3 tokens of 2 numbers"):
        KeptRows([3], 2, torch.float32, 100).write(0, torch.zeros(2, 2))


def test_rows_on_disk_are_found_again_and_damaged_ones_are_not(tmp_path):
    first = KeptRows([3, 2], 2, torch.bfloat16, 1000, tmp_path)
    value = torch.randn(3, 2).bfloat16()
    first.write(0, value)
    first.write(1, value[:2])
    del first
    with (tmp_path / row_store.VALUES).open("r+b") as file:
        file.seek(13)  # within row 1
        byte = file.read(1)[0]
        file.seek(13)
        file.write(bytes([byte ^ 1]))
    again = KeptRows([3, 2], 2, torch.bfloat16, 1000, tmp_path)
    assert again.has(0)
    assert torch.equal(again.read(0), value)
    assert not again.has(1)
    again.write(1, value[:2])
    assert KeptRows([3, 2], 2, torch.bfloat16, 1000, tmp_path).has(1)


def test_a_larger_limit_keeps_what_a_smaller_one_kept(tmp_path):
    small = KeptRows([3, 2], 2, torch.float32, 24, tmp_path)
    small.write(0, torch.ones(3, 2))
    assert len(small) == 1
    large = KeptRows([3, 2], 2, torch.float32, 1000, tmp_path)
    assert len(large) == 2
    assert large.has(0)
    assert not large.has(1)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        KeptRows([3], 2, torch.float32, 1000, tmp_path)


def test_a_row_without_a_number_is_not_kept():
    store = KeptRows([3], 2, torch.float32, 1000)
    store.write(-1, torch.ones(3, 2))
    assert not store.has(-1)
    store.write(0, torch.ones(3, 2))
    assert not store.has(-1)
