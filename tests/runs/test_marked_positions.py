"""Positions that need marks are refused for rows without marks, before weights are loaded."""

import pytest
import short_runs

from reft_lightning.runs.build import outline


@pytest.mark.parametrize(
    "override", ["intervention.positions=given", "intervention.layers={0: {}, 1: {positions: 'given:0.5'}}"]
)
def test_positions_that_need_marks_are_refused_for_any_layer(tmp_path, override):
    with pytest.raises(ValueError, match="the positions `given` need marked words"):
        outline(short_runs.config(tmp_path, override))
