"""Any position specification is refused by name, or selects tokens of the text, each in one group."""

import torch
from any_input import examples, tried
from hypothesis import given
from hypothesis import strategies as st

from reft_lightning.adapters.reft.positions import parse_positions

TERMS = st.sampled_from(
    ["f", "l", "f0", "l1", "f7", "l7", "f99999999999999999999", "prompt", "all", "decode", "decode:2", "decode:-1", "+",
     "", " ", "F1", "f-1", "f1.5", "1f", "é", "f²", "l٣"]
)  # fmt: skip
SPECS = st.one_of(st.lists(TERMS, max_size=4).map("+".join), st.lists(TERMS, max_size=4).map("".join),
                  st.text(max_size=12), st.none(), st.integers(), st.lists(st.text(max_size=2), max_size=2),
                  st.binary(max_size=3))  # fmt: skip


@examples(300)
@given(
    spec=SPECS,
    cells=st.lists(st.lists(st.sampled_from("ptx"), min_size=6, max_size=6), min_size=1, max_size=3),
)
def test_any_spec_is_refused_or_selects_tokens_of_the_text(spec, cells):
    positions, said = tried(lambda: parse_positions(spec), ValueError)
    if said is not None:
        assert str(spec) in said or repr(spec) in said
        return
    rows = [sorted(row, key="xpt".index) for row in cells]  # padding, prompt, target
    prompt, target = (torch.tensor([[cell == kind for cell in row] for row in rows]) for kind in "pt")
    chosen = torch.stack(positions.select(prompt, target)) >= 0
    assert (chosen.sum(0) <= 1).all()
    assert not (chosen.any(0) & ~(prompt | target)).any()
    assert parse_positions(str(positions)) == positions
