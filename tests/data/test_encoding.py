"""Tokens and the prompt | target layout. Defects are numbered as in test_defects_of_peers.py."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import Collator, EncodedRows, encode, encode_all, leading_ids, target_only
from reft_lightning.data.example import Example


def make(prompt="where?\n", target="here", task="t", source="t/train.json, row 5"):
    return Example(task, prompt, target, target, (), source)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def merging():
    """A tokenizer with a token, `ba`, that can span the boundary of prompt and target."""
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "ba": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
    )


class TestEncode:
    def test_prompt_and_target_are_the_text_and_one_eos(self, tokenizer):
        row = encode(tokenizer, make(), 64)
        assert tokenizer.decode(row.prompt_ids) == "<s>where?\n"
        assert tokenizer.decode(row.target_ids) == "here</s>"
        assert len(row) == 1 + 7 + 4 + 1

    def test_a_target_that_spells_eos_out_gets_no_second_one(self, tokenizer):
        assert encode(tokenizer, make(target="here</s>"), 64).target_ids.count(tokenizer.eos_token_id) == 1

    def test_a_prompt_that_spells_bos_out_gets_no_second_one_D22(self, tokenizer):
        row = encode(tokenizer, make(prompt="<s>where?\n"), 64)
        assert row.prompt_ids == encode(tokenizer, make(), 64).prompt_ids
        assert row.prompt_ids.count(tokenizer.bos_token_id) == 1

    def test_no_bos_is_invented_for_a_tokenizer_that_adds_none_D12(self):
        tokenizer = byte_tokenizer(add_bos=False)
        row = encode(tokenizer, make(), 64)
        assert leading_ids(tokenizer) == []
        assert tokenizer.decode(row.prompt_ids) == "where?\n"

    def test_no_dummy_token_stands_in_front_D23(self, tokenizer):
        assert encode(tokenizer, make(), 64).prompt_ids[:2] == [tokenizer.bos_token_id, ord("w") + 3]

    def test_a_token_over_the_boundary_is_tokenised_apart_and_counted(self, merging, caplog):
        example = make(prompt="aab", target="aa")
        assert merging("aabaa")["input_ids"] == [2, 2, 4, 2]
        row = encode(merging, example, 64)
        assert (row.prompt_ids, row.target_ids, row.joint) == ([2, 2, 3], [2, 2, 1], False)
        with caplog.at_level(logging.INFO):
            rows = encode_all(merging, [example, make(prompt="aa", target="ba")], 64, "train rows")
        assert [row.joint for row in rows].count(False) == 1
        assert "1 of 2 train rows: a token spans prompt and target" in caplog.text

    def test_a_long_prompt_loses_its_left_but_not_bos_D49(self, tokenizer, caplog):
        example = make(prompt="x" * 100 + "why?\n")
        with caplog.at_level(logging.WARNING):
            rows = encode_all(tokenizer, [example, make()], 16, "test rows")
        assert tokenizer.decode(rows[0].prompt_ids) == "<s>" + "x" * 5 + "why?\n"
        assert tokenizer.decode(rows[0].target_ids) == "here</s>"
        assert (len(rows[0]), rows[0].cut_prompt, rows[1].cut_prompt) == (16, 95, 0)
        assert "1 of 2 test rows: prompt truncated on the left to fit 16 tokens" in caplog.text

    def test_a_batch_of_long_prompts_has_a_finite_loss_D49(self, tokenizer):
        model = LlamaForCausalLM(tiny_config())
        rows = encode_all(tokenizer, [make(prompt="y" * 90), make(prompt="z" * 70)], 16)
        batch = Collator(0)([rows[0], rows[1]])
        assert (batch["labels"] != -100).any(dim=1).all()
        assert torch.isfinite(loss(model, batch))

    def test_a_long_target_keeps_half_the_room_and_loses_its_right(self, tokenizer):
        row = encode(tokenizer, make(prompt="p" * 30, target="t" * 40), 20)
        assert (len(row.prompt_ids), len(row.target_ids), row.cut_target) == (10, 10, 31)
        assert row.target_ids[-1] != tokenizer.eos_token_id
        row = encode(tokenizer, make(prompt="p", target="t" * 40), 20)
        assert (len(row.prompt_ids), len(row.target_ids)) == (2, 18)

    @pytest.mark.parametrize(
        ("part", "text"), [("prompt", ""), ("target", ""), ("target", " \n"), ("target", "\u200b\ufeff \x7f")]
    )
    def test_an_empty_part_names_its_row(self, tokenizer, part, text):
        with pytest.raises(ValueError, match=rf"t/train.json, row 5: the {part} is empty"):
            encode(tokenizer, make(**{part: text}), 64)

    @pytest.mark.parametrize("text", ["\U0001fae8", "\ue000", "\u0301", "\ud55c"])
    def test_characters_that_python_does_not_know_or_print_alone_are_text(self, tokenizer, text):
        assert tokenizer.decode(encode(tokenizer, make(target=text), 64).target_ids[:-1]) == text

    def test_a_target_that_the_tokenizer_leaves_out_is_counted(self, caplog):
        words = Tokenizer(models.WordLevel({"p": 0, "</s>": 1}, unk_token="p"))
        words.normalizer = normalizers.BertNormalizer()  # which removes U+FFFD
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        rows = encode_all(tokenizer, [make(prompt="p", target=text) for text in ("\ufffd", "p")], 16)
        assert [row.target_ids for row in (rows[0], rows[1])] == [[1], [0, 1]]
        assert "1 of 2 rows: the target has no tokens except eos" in caplog.text

    def test_a_tokenizer_without_eos_is_refused(self, tokenizer):
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="has no eos token"):
            encode(tokenizer, make(), 64)

    def test_a_max_length_without_room_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="max_length must be at least 5; got 4"):
            encode(tokenizer, make(), 4)

    def test_many_rows_are_encoded_as_each_alone(self, tokenizer):
        examples = [make(prompt=f"{'p' * i}é?\n", target=f"{i}") for i in range(1, 30)]
        rows = encode_all(tokenizer, examples, 24)
        assert isinstance(rows, EncodedRows)
        assert [rows[i] for i in range(len(rows))] == [encode(tokenizer, e, 24) for e in examples]
        assert rows.lengths == [len(encode(tokenizer, e, 24)) for e in examples]

    @pytest.mark.parametrize("most", [3, 2**31 - 1, 10**18])
    def test_of_each_target_so_many_tokens_are_left(self, tokenizer, most):
        examples = [make(target="t" * i) for i in (1, 2, 3, 9)]
        whole = encode_all(tokenizer, examples, 64)
        cut = encode_all(tokenizer, examples, 64, target_tokens=most)
        assert cut.targets == [min(count, most) for count in whole.targets]
        assert cut.lengths == [
            prompt + count for prompt, count in zip(whole.prompt_lengths, cut.targets, strict=True)
        ]


def tiny_config():
    return LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )


def loss(model, batch):
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    names = ("input_ids", "attention_mask", "labels", "logits_to_keep")
    with torch.no_grad():
        return model(position_ids=position_ids, **{n: batch[n] for n in names if n in batch}).loss


class TestLayout:
    @pytest.fixture
    def rows(self, tokenizer):
        pairs = (("a?\n", "yes"), ("longer?\n", "no"), ("b\n", "maybe so"))
        return [encode(tokenizer, make(prompt=p, target=t), 64) for p, t in pairs]

    def test_prompts_end_and_targets_begin_at_one_boundary(self, rows):
        batch = Collator(0)(rows)
        boundary = batch["boundary"]
        assert type(boundary) is int
        for ids, mask, prompt, labels, row in zip(
            batch["input_ids"],
            batch["attention_mask"],
            batch["prompt_mask"],
            batch["labels"],
            rows,
            strict=True,
        ):
            n, t = len(row.prompt_ids), len(row.target_ids)
            assert ids[boundary - n : boundary].tolist() == row.prompt_ids
            assert ids[boundary : boundary + t].tolist() == row.target_ids
            assert labels[boundary : boundary + t].tolist() == row.target_ids
            assert mask.nonzero().flatten().tolist() == list(range(boundary - n, boundary + t))
            assert prompt.nonzero().flatten().tolist() == list(range(boundary - n, boundary))
            assert (labels != -100).sum() == t

    def test_the_last_prompt_token_is_the_same_column_in_every_row_D7(self, rows):
        batch = Collator(0)(rows)
        assert (batch["input_ids"][:, batch["boundary"] - 1] == ord("\n") + 3).all()
        assert batch["prompt_mask"][:, batch["boundary"] - 1].all()
        assert not batch["prompt_mask"][:, batch["boundary"] :].any()

    def test_shapes_and_types_are_those_of_the_contract(self, rows):
        batch = Collator(0)(rows)
        assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_mask", "boundary", "rows"}
        shape = (3, batch["boundary"] + 9)
        for name in ("input_ids", "attention_mask", "labels"):
            assert (batch[name].shape, batch[name].dtype) == (shape, torch.int64)
        assert (batch["prompt_mask"].shape, batch["prompt_mask"].dtype) == (shape, torch.bool)

    def test_genuine_pad_tokens_in_the_text_stay_visible_D14(self, tokenizer):
        tokenizer.pad_token = tokenizer.eos_token
        row = encode(tokenizer, make(prompt="one</s>two\n"), 64)
        batch = Collator(tokenizer.pad_token_id)([row, encode(tokenizer, make(prompt="p" * 30), 64)])
        assert row.prompt_ids.count(tokenizer.pad_token_id) == 1
        assert batch["attention_mask"][0].sum() == len(row)
        assert batch["labels"][0][batch["labels"][0] != -100].tolist() == row.target_ids  # eos is learned

    def test_padding_changes_no_loss(self, rows):
        model = LlamaForCausalLM(tiny_config())
        together = Collator(0)(rows)
        weights = torch.tensor([len(row.target_ids) for row in rows], dtype=torch.float32)
        alone = torch.stack([loss(model, Collator(0)([row])) for row in rows])
        torch.testing.assert_close(loss(model, together), (alone * weights).sum() / weights.sum())

    def test_target_only_keeps_the_loss(self, rows):
        model = LlamaForCausalLM(tiny_config())
        batch = Collator(0)(rows)
        cut = target_only(batch)
        assert cut["logits_to_keep"] == batch["input_ids"].shape[1] - batch["boundary"] + 1
        assert cut["labels"].shape == (3, cut["logits_to_keep"])
        assert (cut["labels"][:, 0] == -100).all()
        torch.testing.assert_close(loss(model, cut), loss(model, batch))
        assert batch["labels"].shape == batch["input_ids"].shape  # the batch itself is unchanged

    def test_a_batch_names_its_rows(self, rows, tokenizer):
        kept = encode_all(tokenizer, [row.example for row in rows], 64)
        batch = Collator(0)([kept[2], kept[0]])
        assert (batch["rows"].tolist(), batch["rows"].dtype) == ([2, 0], torch.int64)
        assert Collator(0)(rows)["rows"].tolist() == [-1, -1, -1]  # of no split
        assert kept[2] == rows[2]  # the row index does not affect equality

    def test_a_missing_pad_token_is_refused(self):
        with pytest.raises(ValueError, match="no pad token"):
            Collator(None)
