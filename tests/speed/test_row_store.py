"""Rows that are computed once."""

import torch

from reft_lightning.speed.row_store import RowStore


def test_each_row_is_computed_once_and_read_where_it_is_asked_for():
    store, computed = RowStore(), []

    def compute(rows):
        def run(places):
            computed.extend(rows[place] for place in places)
            return [torch.full((2, 3), float(rows[place])) for place in places]

        return run

    for rows in ([4, 1], [1, 7, 4], [7]):
        assert [int(tensor[0, 0]) for tensor in store.read(rows, compute(rows))] == rows
    assert computed == [4, 1, 7]
    assert len(store) == 3


def test_a_kept_row_does_not_change_with_the_batch_it_came_from():
    store, batch = RowStore(), torch.zeros(2, 3)
    store.read([0], lambda places: [batch[0]])
    batch += 1
    assert store.read([0], lambda places: [])[0].tolist() == [0, 0, 0]
