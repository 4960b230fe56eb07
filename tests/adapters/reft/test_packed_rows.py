"""Rows that hold several packed texts are refused, whichever argument of transformers says so."""

import functools

import pytest
import tiny
import torch

from reft_lightning import attach

AGAIN = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
ONES = torch.ones(1, 8, dtype=torch.long)
BOUNDS = torch.tensor([0, 4, 8], dtype=torch.int32)
OF_FLASH = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 4, "max_length_k": 4}
PAIRS = torch.block_diag(*[torch.ones(4, 4).bool().tril()] * 2)[None, None]
APART = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])


@functools.cache
def attached():
    return attach(tiny.model("llama"), "loreft", layers=[0], positions="f1+l1", rank=2).eval()


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": AGAIN},
        {"position_ids": AGAIN, "attention_mask": ONES},
        {"position_ids": AGAIN + 2, "attention_mask": ONES},
        {"position_ids": torch.tensor([[0, 1, 2, 9, 9, 0, 1, 2]]), "attention_mask": APART},
        {"position_ids": AGAIN, **OF_FLASH},
        OF_FLASH,
        {"seq_idx": (AGAIN.cumsum(-1) > 6).int()},
    ],
)
def test_packed_rows_are_refused(given):
    for call in (attached(), attached().generate):
        with pytest.raises(ValueError, match="several texts are packed into a row"):
            call(input_ids=torch.stack(tiny.rows(8)), **given)


@pytest.mark.parametrize("mask", [PAIRS, {"full_attention": PAIRS}])
def test_a_mask_of_pairs_of_tokens_is_refused(mask):
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        attached()(input_ids=torch.stack(tiny.rows(8)), attention_mask=mask)


def test_the_base_model_alone_reads_them():
    reft, ids = attached(), torch.stack(tiny.rows(8))
    for given in ({"position_ids": AGAIN}, {"attention_mask": PAIRS, "position_ids": AGAIN}):
        with torch.no_grad(), reft.disabled():
            assert torch.equal(reft(ids, **given).logits, reft.base_model(ids, **given).logits)


@pytest.mark.parametrize("real", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
@pytest.mark.parametrize("filled", [0, 1, 9])  # transformers' generate writes 1 where padding is
def test_one_text_with_padding_is_read_whatever_stands_where_it_is(real, filled):
    mask = torch.tensor([real])
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filled)
    reft, ids = attached(), torch.stack(tiny.rows(6))
    with torch.no_grad():
        found = reft(ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
        alone = reft(ids[mask.bool()][None]).logits[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)


def test_rows_of_one_text_may_have_bounds_and_numbers():
    reft, ids = attached(), torch.stack(tiny.rows(8))
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    with torch.no_grad():
        plain = reft(ids).logits
        told = reft(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=8, max_length_k=8,
                    seq_idx=torch.full((1, 8), 3, dtype=torch.int32)).logits  # fmt: skip
    assert torch.equal(plain, told)


def test_columns_after_a_cache_are_read():
    reft, ids = attached(), torch.stack(tiny.rows(8))
    prompt = torch.arange(8)[None] < 6
    with torch.no_grad():
        past = reft(ids[:, :5], prompt_mask=prompt[:, :5], use_cache=True).past_key_values
        more = {"attention_mask": ONES, "prompt_mask": prompt, "past_key_values": past}
        reft(ids[:, 5:], position_ids=torch.tensor([[5, 6, 7]]), **more)
