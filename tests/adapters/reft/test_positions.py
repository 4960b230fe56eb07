import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_lightning import parse_positions
from reft_lightning.adapters.reft.positions import Positions

SPECS = ["f1", "l1", "f3", "l2", "f7+l7", "f1+l3", "prompt", "all", "decode", "decode:2", "f2+decode", "f1+l1+decode:1",
         "prompt+decode:2", "prompt:0.4", "prompt:0.5+decode:1"]  # fmt: skip
repeatable = settings(deadline=None, derandomize=True, database=None)


def masks(rows: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read rows such as ``..pppt``: p prompt, t target, a dot padding."""
    prompt = torch.tensor([[c == "p" for c in row] for row in rows])
    return prompt, torch.tensor([[c == "t" for c in row] for row in rows])


def chosen(spec, rows: list[str]) -> list[str]:
    """Mark the selected tokens of each row with x."""
    selected = torch.stack(parse_positions(spec).select(*masks(rows))).amax(0) >= 0
    return ["".join("x" if s else c for s, c in zip(line, row, strict=True))
            for line, row in zip(selected.tolist(), rows, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "row", "expected"),
    [
        ("f1", "pppptt", "xppptt"),
        ("f3", "pppptt", "xxxptt"),
        ("l1", "pppptt", "pppxtt"),
        ("l2", "pppptt", "ppxxtt"),
        ("f1+l2", "pppptt", "xpxxtt"),
        ("l2+f1", "pppptt", "xpxxtt"),
        (" f1 + l1 ", "pppptt", "xppxtt"),
        ("prompt", "pppptt", "xxxxtt"),
        ("decode", "pppptt", "ppppxx"),
        ("decode:1", "pppptt", "ppppxt"),
        ("decode:5", "pppptt", "ppppxx"),
        ("all", "pppptt", "xxxxxx"),
        ("prompt+decode:1", "pppptt", "xxxxxt"),
        ("f1+decode", "pppptt", "xpppxx"),
        ("f1+l1+decode:1", "pppptt", "xppxxt"),
        # a share, evenly spread, at least one token and the last one
        ("prompt:0.5", "pppptt", "pxpxtt"),
        ("prompt:0.25", "pppppppptt", "pppxpppxtt"),
        ("prompt:0.01", "pppptt", "pppxtt"),
        ("prompt:0.99", "pppptt", "pxxxtt"),
        ("prompt:0.3", "pppppppppptt", "pppxppxppxtt"),
        # padding, wherever it stands
        ("f1+l1", "..pppptt", "..xppxtt"),
        ("f1+l1", "pppptt..", "xppxtt.."),
        ("f1+l1", "..ppptt.", "..xpxtt."),
        ("all", "..pptt..", "..xxxx.."),
        ("decode:2", "ppp..ttt", "ppp..xxt"),
        ("f2+l1", "p.pp.tt", "x.xx.tt"),
        # short prompts
        ("f1", "pt", "xt"),
        ("l1", "pt", "xt"),
        ("f1+l1", "pt", "xt"),
        ("f1+l1", "ppt", "xxt"),
        ("f2", "ppt", "xxt"),
        ("f7+l7", "pppppt", "xxxxxt"),
        # the formula with p = 0 or s = 0; a prompt that is long enough stays whole, where pyreft halves it
        ("l7", "ppppp", "ppxxx"),
        ("f7", "ppppp", "xxppp"),
        ("l7", "ppppppp", "xxxxxxx"),
        ("f1", "....", "...."),
        ("l1", "tt", "tt"),
        ("all", "..", ".."),
    ],
)
def test_a_specification_selects(spec, row, expected):
    assert chosen(spec, [row]) == [expected]


def test_rows_of_a_batch_are_independent():
    rows = ["..pppptt", "pppppptt", "ppppt...", "p.......", "........"]
    for spec in SPECS:
        assert chosen(spec, rows) == [chosen(spec, [row])[0] for row in rows]


@pytest.mark.parametrize(("p", "s"), [(1, 1), (2, 2), (7, 7), (3, 1), (1, 3), (4, 4), (5, 2)])
def test_short_prompts_are_clipped_by_the_paper_s_formula(p, s):
    """Wu et al. 2024, sec. 4.1; where pyreft floors both sides, and edits one token fewer of odd prompts."""
    for n in range(1, 9):
        p_paper, s_paper = (min(p, n // 2), min(s, -(-n // 2))) if n < p + s else (p, s)
        prefix, suffix = parse_positions(f"f{p}+l{s}").select(*masks(["p" * n + "t"]))
        assert (prefix >= 0)[0, :n].nonzero().flatten().tolist() == list(range(p_paper))
        assert (suffix >= 0)[0, :n].nonzero().flatten().tolist() == list(range(n - s_paper, n))


def test_slots_count_from_each_side():
    (first, last, decode) = parse_positions("f2+l3+decode:2").select(*masks(["..ppppppttt"]))
    assert first.tolist() == [[-1, -1, 0, 1, -1, -1, -1, -1, -1, -1, -1]]
    assert last.tolist() == [[-1, -1, -1, -1, -1, 2, 1, 0, -1, -1, -1]]
    assert decode.tolist() == [[-1, -1, -1, -1, -1, -1, -1, -1, 0, 1, -1]]


def test_slots_and_groups_of_a_specification():
    positions = parse_positions("f2+l3+decode:2")
    assert positions.groups == 3
    assert positions.slots() == [2, 3, 2]
    for unbounded in ("prompt", "all", "decode", "f2+decode"):
        with pytest.raises(
            ValueError, match=rf"needs a fixed number of positions, but {re.escape(unbounded)}"
        ):
            parse_positions(unbounded).slots()


@st.composite
def batches(draw):
    """Prompts before targets, with padding anywhere: left, right and as gaps."""
    kind = draw(st.sampled_from(["left", "right", "gaps"]))
    rows = []
    width = 12
    for _ in range(draw(st.integers(1, 4))):
        n, m = draw(st.integers(0, 8)), draw(st.integers(0, 4))
        text = "p" * n + "t" * m
        if kind == "left":
            rows.append(text.rjust(width, "."))
        elif kind == "right":
            rows.append(text.ljust(width, "."))
        else:
            where = sorted(draw(st.permutations(range(width)))[: n + m])
            row = ["."] * width
            for column, c in zip(where, text, strict=True):
                row[column] = c
            rows.append("".join(row))
    return rows


@repeatable
@given(batches(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.sampled_from(SPECS))
def test_groups_never_overlap_and_never_leave_the_text(rows, p, s, k, extra):
    prompt, target = masks(rows)
    for spec in (f"f{p}+l{s}+decode:{k}", f"prompt+decode:{k}", extra):
        groups = [group >= 0 for group in parse_positions(spec).select(prompt, target)]
        assert torch.stack(groups).sum(0).max() <= 1
        assert not (torch.stack(groups).any(0) & ~(prompt | target)).any()
    # Each slot of a group is filled by one token a row at most, and slots are filled from 0 on.
    for group in parse_positions(f"f{p}+l{s}+decode:{k}").select(prompt, target):
        for row in group.tolist():
            filled = sorted(slot for slot in row if slot >= 0)
            assert filled == list(range(len(filled)))


@repeatable
@given(rows=batches(), spec=st.sampled_from(SPECS), left=st.integers(0, 3), right=st.integers(0, 3))
def test_more_padding_moves_the_selection_and_nothing_else(rows, spec, left, right):
    wide = ["." * left + row + "." * right for row in rows]
    assert chosen(spec, wide) == ["." * left + row + "." * right for row in chosen(spec, rows)]


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["", "7", "f", "l", "f0", "l0", "f-1", "f01", "f1+", "+f1", "f1 l1", "f1,l1", "m1", "f1+l1+m1", "F1", "f1.5",
          "decode:0", "decode:", "prompt:2", "all:1", "first", "prompt:0", "prompt:1", "prompt:1.5", "given:0.0",
          "all:0.5"], r"malformed positions .*allowed: fN, lN"),
        ([f"f{2**31}", f"l1+decode:{10**20}"], "counts more tokens than any text has"),
        (["f1+f2", "l1+l1", "decode+decode:2", "all+all", "prompt+prompt"], "twice"),
        (["all+f1", "l1+all", "prompt+f1", "prompt+l2", "all+prompt", "all+decode", "decode:2+all", "given+f1",
          "prompt+given", "all+given"], "overlap"),
        ([7, None, ["f1"], 1.0], "positions must be a string or a callable"),
    ],
)  # fmt: skip
def test_what_says_no_positions_is_refused(specs, said):
    for spec in specs:
        with pytest.raises(ValueError, match=said):
            parse_positions(spec)


def test_the_largest_count_selects_all_that_there_is():
    prompt = torch.ones(1, 3, dtype=torch.bool)
    assert (
        parse_positions(f"f{2**31 - 1}").select(prompt, ~prompt)[0] >= 0
    ).sum() == 1  # half of a short prompt


@pytest.mark.parametrize("spec", [*SPECS, "given:0.0000123", "prompt:0.123456789"])
def test_a_specification_prints_as_it_is_written(spec):
    parsed = parse_positions(spec)
    assert str(parsed) == spec
    assert parse_positions(str(parsed)) == parsed
    assert parse_positions(parsed) is parsed
    assert isinstance(parsed, Positions)


def test_only_some_specifications_reach_decoded_tokens():
    assert all(parse_positions(spec).reaches_decode for spec in ("decode", "f1+decode:2", "all"))
    assert not any(parse_positions(spec).reaches_decode for spec in ("f7+l7", "l1", "prompt"))


def every_second(prompt, target):
    return (prompt | target) & (torch.arange(prompt.shape[1]) % 2 == 0)


def test_a_callable_selects_and_padding_stays_out():
    assert chosen(every_second, ["ppppt"]) == ["xpxpx"]
    everything = parse_positions(lambda prompt, target: torch.ones_like(prompt))
    assert (everything.select(*masks([".ppt."]))[0] >= 0).tolist() == [[False, True, True, True, False]]
    assert parse_positions(every_second).groups == 1
    assert parse_positions(every_second).reaches_decode
    assert str(parse_positions(every_second)).endswith("test_positions.every_second>")
    with pytest.raises(ValueError, match="needs a fixed number"):
        parse_positions(every_second).slots()


@pytest.mark.parametrize("wrong", [lambda p, t: p.long(), lambda p, t: p[:, :1], lambda p, t: p[0]])
def test_a_callable_that_returns_no_mask_raises(wrong):
    with pytest.raises(ValueError, match="must return a bool mask of shape"):
        parse_positions(wrong).select(*masks(["ppt", "ppt"]))


def test_given_positions_are_those_of_the_prompt_that_the_caller_marks():
    prompt, target = masks(["ppppt", ".pppt"])
    marks = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]).bool()
    (slots,) = parse_positions("given").select(prompt, target, {"edit": marks})
    assert slots.tolist() == [[0, 0, -1, -1, -1], [-1, 0, 0, -1, -1]]
    (slots,) = parse_positions("given:0.5").select(prompt, target, {"edit": marks})
    assert slots.tolist() == [[-1, 0, -1, -1, -1], [-1, -1, 0, -1, -1]]
    with pytest.raises(ValueError, match="the positions given need edit_mask"):
        parse_positions("given").select(prompt, target)
