"""Texts without prompts: every token is learnt once, for any length of pieces, and nothing is generated."""

import json
import logging
import math

import pytest
import short_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import Collator, encode_pieces
from reft_lightning.data.example import Example
from reft_lightning.data.families.custom import custom_family
from reft_lightning.data.files import read_file
from reft_lightning.data.rows import DataSource
from reft_lightning.data.text_data import TextData
from reft_lightning.reporting.build import build_report
from reft_lightning.runs.build import outline
from reft_lightning.runs.evaluate import evaluating_trainer
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.training.evaluation import evaluate

BOS, EOS = 1, 2
ALL = "intervention.positions=all"


def text(words, source="notes.txt, line 3"):
    return Example("custom", "", words, words, source=source)


def ids_of(words):
    return [byte + 3 for byte in words.encode()]


def write(folder, count=24, longest=40):
    rows = [{"text": f"entry {i} " + "abc " * (i % (longest // 4))} for i in range(count)]
    path = folder / "diary.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path, *overrides):
    no_prompt = [f"data.path={path}", "data=custom", "data.target=text", ALL, "data.validation_size=6"]
    arguments = [o for o in short_runs.arguments(path) if not o.startswith(("data=", "decoding"))]
    return short_runs.compose.compose([*arguments, *no_prompt, *overrides])


class TestPieces:
    @given(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=4),
        st.integers(2, 12),
        st.booleans(),
    )
    @settings(max_examples=200, deadline=None)
    def test_every_token_is_learnt_once_and_none_but_the_first_goes_without(self, texts, max_length, bos):
        rows = encode_pieces(byte_tokenizer(add_bos=bos), list(map(text, texts)), max_length)
        pieces = [rows[i] for i in range(len(rows))]
        assert max(map(len, pieces)) <= max_length
        assert all(len(piece.prompt_ids) == 1 and piece.target_ids for piece in pieces)
        for words in dict.fromkeys(texts):
            own = [piece for piece in pieces if piece.example.target == words]
            whole = [*ids_of(words), EOS] * texts.count(words)
            learnt = [token for piece in own for token in piece.target_ids]
            if bos:
                assert learnt == whole
                assert all(piece.prompt_ids == [BOS] for piece in own)
            elif texts.count(words) == 1:
                assert learnt == whole[1:]
                at = [0, *torch.tensor([len(p.target_ids) for p in own]).cumsum(0).tolist()]
                assert [p.prompt_ids for p in own] == [[whole[i]] for i in at[:-1]]

    def test_full_pieces_are_as_long_as_may_be_and_their_tokens_are_told(self, caplog):
        with caplog.at_level(logging.INFO):
            rows = encode_pieces(byte_tokenizer(), [text("x" * 20), text("yes")], 8, "train rows")
        assert rows.lengths == [8, 8, 8, 5]
        assert rows.targets == [7, 7, 7, 4]
        assert "2 train rows: 25 tokens to learn, in 4 pieces of at most 8" in caplog.text

    def test_what_a_text_spells_out_is_not_added_once_more(self):
        rows = encode_pieces(byte_tokenizer(), [text("<s>a</s>")], 8)
        assert (rows[0].prompt_ids, rows[0].target_ids) == ([BOS], [*ids_of("a"), EOS])

    def test_one_token_is_the_least_room(self):
        with pytest.raises(ValueError, match="max_length must be at least 2; got 1"):
            encode_pieces(byte_tokenizer(), [text("a")], 1)

    def test_the_loss_is_that_of_transformers_for_a_text_that_fits(self):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=16,
                                             num_hidden_layers=1, num_attention_heads=2)).eval()  # fmt: skip
        rows = encode_pieces(byte_tokenizer(), [text("a longer text"), text("short")], 32)
        batch = Collator(0)([rows[0], rows[1]])
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        whole = [torch.tensor([[BOS, *ids_of(e.target), EOS]]) for e in rows.examples]
        with torch.no_grad():
            alone = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in whole]
            found = model(**given).loss
        torch.testing.assert_close(found, sum(alone) / sum(ids.shape[1] - 1 for ids in whole))


class TestRows:
    def test_each_line_of_a_text_file_is_a_text(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_bytes(b'\xef\xbb\xbf one, "two"\r\n\r\n \t\nthree\\n  ')
        assert list(read_file(path)) == [
            ({"text": ' one, "two"'}, f"{tmp_path.name}/notes.txt, line 1"),
            ({"text": "three\\n  "}, f"{tmp_path.name}/notes.txt, line 4"),
        ]
        family = custom_family(path=str(path), target="text")
        assert family.task("custom").example({"text": " as it is\n"}).target == " as it is\n"

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("  ", "the row has no text: column 'text' is empty"),
            (None, "the row has no text"),
            ("\u200b", "the target is empty"),
        ],
    )
    def test_a_row_without_text_is_named(self, tmp_path, value, words):
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": value}))
        data = module(path)
        with pytest.raises(ValueError, match=rf"d\.jsonl, line 2: .*{words}"):
            data.setup("fit")

    def test_validation_texts_are_other_texts(self, tmp_path):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps({"text": f"text {i % 20}"}) + "\n" for i in range(40)))
        data = module(path, validation_size=5)
        data.setup("fit")
        held = {e.target for e in data._validation["custom"].examples}
        trained = {e.target for e in data.train_rows.examples}
        assert len(held) == 5
        assert held | trained == {f"text {i}" for i in range(20)}
        assert not held & trained

    def test_texts_that_are_tested_and_trained_on_are_counted(self, tmp_path):
        path = write(tmp_path)
        family = custom_family(path=str(path), target="text", test_path=str(path))
        data = TextData(family, byte_tokenizer(), DataSource("local", str(path)), tasks=["custom"],
                        batch_size=2, eval_batch_size=2, validation_size=0)  # fmt: skip
        data.setup("fit")
        data.setup("test")
        assert data.data_versions["test"]["custom"]["overlap"] == 24

    @pytest.mark.parametrize(
        ("rows", "named"),
        [
            ([{"question": "Who?", "text": "Ann", "topic": "names"}], "question, topic"),
            ([{"id": 3, "text": "Ann", "note": " ", "tags": ["a"]}], ""),
        ],
    )
    def test_a_forgotten_prompt_is_pointed_out_by_the_columns_that_nothing_reads(
        self, tmp_path, caplog, rows, named
    ):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with caplog.at_level(logging.WARNING):
            module(path).check_train()
        expected = [
            "data.prompt is not set, so the rows are texts without a prompt; columns of text that are not read: "
            "question, topic. If data.target answers one of them, set data.prompt to it"
        ]
        assert [record.message for record in caplog.records] == (expected if named else [])


def module(path, **more):
    family = custom_family(path=str(path), target="text")
    arguments = {"tasks": ["custom"], "batch_size": 2, "eval_batch_size": 2, "validation_size": 0, **more}
    return TextData(family, byte_tokenizer(), DataSource("local", str(path)), **arguments)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["intervention.positions=f7+l7"], r"positions f7\+l7 need a prompt: write intervention.positions=all"),
        (["intervention.positions=prompt+decode"], "need a prompt"),
        (["intervention.positions=given"], "need marked words"),
        (["intervention.layers={0: {}, 1: {positions: l1}}"], "the positions l1 need a prompt"),
        (["intervention=cast", ALL], "cast needs prompts"),
        (["objective=dpo"], "DPO compares two answers to a prompt"),
        (["objective=reward"], "a reward model compares two answers to a prompt"),
        (["decoding.max_new_tokens=9"], "nothing is generated: leave out decoding.max_new_tokens"),
        (["data.template=chat"], "data.template=chat needs a prompt"),
        (["data.options=text"], r"needs data\.prompt, or data\.messages; the columns are text"),
        (["model.config={model_type: t5}"],
         "texts without a prompt need a decoder-only model"),
        (["model.config={model_type: bert}"], "is an encoder"),
    ],
)  # fmt: skip
def test_what_needs_a_prompt_is_refused_before_weights(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        outline(config(write(tmp_path), *overrides))


def test_what_needs_no_prompt_is_not(tmp_path):
    outline(config(write(tmp_path), "intervention.positions=decode"))
    rows = ["model=tiny_random", "data=custom", f"data.path={write(tmp_path)}", "data.target=text"]
    outline(short_runs.compose.compose([*rows, "intervention=peft/lora"]))


def test_no_column_at_all_names_both_ways(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs data\.prompt and data\.target, .*only data\.target for texts"
    ):
        custom_family(path=str(write(tmp_path)))


def test_a_run_generates_nothing_and_reports_loss_and_perplexity(tmp_path, monkeypatch, capsys):
    def generate(*args, **kwargs):
        raise AssertionError("a text was generated")

    monkeypatch.setattr("reft_lightning.training.generation.generate", generate)
    path = write(tmp_path)
    settings = config(path, f"data.test_path={path}", "data.max_length=16", "evaluate_base=true")
    results = short_runs.experiment.run(settings, tmp_path / "run")
    metrics = results["metrics"]
    for name in ("val", "test", "base/test"):
        assert math.isclose(metrics[f"{name}/perplexity"], math.exp(metrics[f"{name}/loss"]), rel_tol=1e-5)
    assert metrics["test/loss"] < metrics["base/test/loss"]
    assert results["monitor"] == "val/loss"
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "in %" not in printed  # a loss is not a percentage


def test_the_losses_of_pieces_give_a_report_the_interval_of_the_loss(tmp_path):
    path = write(tmp_path)
    for method in ("loreft", "direft"):
        settings = config(path, f"data.test_path={path}", "data.max_length=16", f"intervention={method}", ALL)
        results = short_runs.experiment.run(settings, tmp_path / "runs" / method)
        rows = short_runs.predictions(tmp_path / "runs" / method, "reft_test")
        assert len(rows) > 24 == len({row["source"] for row in rows})
        tokens = sum(row["target_tokens"] for row in rows)
        total = sum(row["target_tokens"] * row["scores"]["loss"] for row in rows)
        assert math.isclose(total / tokens, results["metrics"]["test/loss"], rel_tol=1e-5)
    (comparison,) = build_report([tmp_path / "runs"], resamples=200).comparisons
    for method in comparison.methods:
        score = method.scores["all", "loss"]
        assert score.rows == 24  # a text is drawn with all its pieces
        assert score.interval[0] < score.mean < score.interval[1]
    (pair,) = comparison.pairs
    assert pair.rows_test == "paired bootstrap"


def test_the_loss_is_a_mean_over_all_tokens_whatever_the_batches(tmp_path):
    run = config(write(tmp_path), "data.max_length=16", "data.eval_batch_size=2")
    objects = short_runs.experiment.build(run)
    rows, total = objects.data._validation["custom"] if objects.data.val_tasks else [], 0.0
    objects.module.eval()
    for i in range(len(rows)):
        ids = torch.tensor([[*rows[i].prompt_ids, *rows[i].target_ids]])
        with torch.no_grad():
            loss = objects.model(ids, labels=ids, prompt_mask=torch.arange(ids.shape[1])[None] < 1).loss
        total += float(loss) * (ids.shape[1] - 1)
    found = evaluate(evaluating_trainer(run, tmp_path, False), objects.module, objects.data, "validation")
    assert math.isclose(found.metrics["val/loss"], total / sum(rows.targets), rel_tol=1e-5)


def test_a_question_to_such_a_model_is_not_ended(tmp_path):
    path = write(tmp_path)
    assert not PromptFormat.of(config(path), "it").line_break
    assert PromptFormat.of(config(path, "data.prompt=text"), "it").line_break
