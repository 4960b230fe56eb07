"""The instruction family: its schemas, AlpacaEval's format, the real files."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data import FAMILIES
from reft_lightning.data.encoding import encode_all
from reft_lightning.data.example import placed
from reft_lightning.data.families.instruction import FAMILY, NO_ANSWER, TASKS, example_of
from reft_lightning.data.family import Family
from reft_lightning.data.files import read_json_file
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.pairs import rejected
from reft_lightning.data.prompts import apply_template
from reft_lightning.data.rows import DataSource, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "instruction"
NAMES = ("alpaca", "ultrafeedback", "ultrafeedback_binarized", "dolly", "self_instruct", "alpaca_eval")


def rows_of(task, split, folder=FIXTURES):
    return read_rows(TASKS[task], split, DataSource("local", str(folder)))


def examples(task, split, folder=FIXTURES):
    return [placed(TASKS[task].example, row, where) for row, where in rows_of(task, split, folder)[0]]


class TestFamily:
    def test_nothing_is_scored_and_prompts_are_alpacas(self):
        assert tuple(FAMILY.tasks) == NAMES
        assert (FAMILY.score, FAMILY.template) == (None, "alpaca")


class TestSchemas:
    def test_alpacas_input_is_the_context(self):
        found = examples("alpaca", "train")
        assert {bool(e.context) for e in found} == {True, False}
        assert found[0].target == found[0].answer

    def test_dollys_own_columns_read_like_the_renamed_ones(self):
        renamed = {"instruction": "Say it.", "input": "The note.", "output": "Note."}
        own = {"instruction": "Say it.", "context": "The note.", "response": "Note.", "category": "qa"}
        example = partial(example_of, "dolly")
        assert example(renamed) == example(own)

    def test_the_chosen_answer_is_learnt_as_text_or_as_messages(self):
        example = partial(example_of, "ultrafeedback_binarized")
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        row = {"prompt": "Hi", "rejected": "No."}
        assert example(row | {"chosen": "Hello"}) == example(row | {"chosen": messages})

    def test_a_preference_pair_has_its_answers_as_options(self):
        example = partial(example_of, "ultrafeedback_binarized")
        turns = [
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": x}] for x in ("Hello", "No.")
        ]
        found = example({"prompt": "Hi", "chosen": turns[0], "rejected": turns[1]})
        assert found.options == ("Hello", "No.")
        assert rejected(found).target == "No."
        assert example({"prompt": "Hi", "chosen": "Hello"}).options == ()
        with pytest.raises(ValueError, match=r"a conversation must be a list"):
            example({"prompt": "Hi", "chosen": "Hello", "rejected": 3})

    def test_earlier_messages_become_turns(self):
        said = ["system: Be brief.", "user: Hi", "assistant: Hello", "user: Bye", "assistant: See you"]
        messages = [dict(zip(("role", "content"), text.split(": "), strict=True)) for text in said]
        found = example_of("t", {"messages": messages})
        assert (found.prompt, found.target) == ("Bye", "See you")
        assert found.turns == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))

    def test_a_conversation_that_ends_with_the_user_is_refused(self):
        messages = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]
        with pytest.raises(ValueError, match=r"a conversation must end .* got assistant, user"):
            example_of("t", {"messages": messages})

    @pytest.mark.parametrize("content", [None, 3, {}])
    def test_a_message_without_text_names_its_row(self, content):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        for row in ({"messages": messages}, {"prompt": "Hi", "chosen": messages}):
            with pytest.raises(ValueError, match=r"content must be text; got"):
                example_of("t", row)

    @pytest.mark.parametrize("name", ["input", "context"])
    @pytest.mark.parametrize("value", [3, 0, float("nan"), ["a"]])
    def test_an_input_that_is_no_text_names_its_row(self, name, value):
        row = {"instruction": "Do.", name: value, "output": "Done."}
        with pytest.raises(ValueError, match=r"input or context must be text; got"):
            example_of("t", row)
        nested = {"instruction": "Do.", "instances": [{"input": value, "output": "Done."}]}
        with pytest.raises(ValueError, match=r"input or context must be text; got"):
            example_of("t", nested)

    @pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": " "}])
    def test_an_absent_input_is_no_context(self, absent):
        assert example_of("t", {"instruction": "Do.", **absent, "output": "Done."}).context == ""

    def test_self_instruct_takes_the_first_instance(self):
        first, second = {"input": "a", "output": "b"}, {"input": "c", "output": "d"}
        found = example_of("t", {"instruction": "Do.", "instances": [first, second]})
        assert (found.context, found.target) == ("a", "b")


class TestEmptyAnswers:
    """Stanford's alpaca_data.json has 28 rows with an empty output."""

    def module(self, folder, outputs, split="train"):
        rows = [{"instruction": f"Do {i}.", "input": "", "output": text} for i, text in enumerate(outputs)]
        task = "alpaca" if split == "train" else "self_instruct"
        name = (
            "alpaca/alpaca_data.json"
            if split == "train"
            else "self_instruct/user_oriented_instructions.jsonl"
        )
        path = folder / name
        path.parent.mkdir()
        lines = json.dumps(rows) if split == "train" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
        return GenerationData(
            FAMILY, byte_tokenizer(), DataSource("local", str(folder)), tasks=[task], batch_size=2,
            eval_batch_size=2, validation_size=1,
        )  # fmt: skip

    def test_they_are_left_out_of_training_counted_and_said(self, tmp_path, caplog):
        data = self.module(tmp_path, ["a", "", "b", " \n", "c"])
        with caplog.at_level(logging.WARNING):
            data.setup("fit")
        assert "skipped 2 of 5 alpaca train rows without an answer to learn" in caplog.text
        facts = data.data_versions["train"]["alpaca"]
        assert (facts["rows"], facts["left_out"]) == (5, 2)
        assert len(data.train_rows) + data.data_versions["split"]["validation_rows"] == 3

    def test_nothing_is_said_where_none_is_empty(self, tmp_path, caplog):
        data = self.module(tmp_path, ["a", "b"])
        data.setup("fit")
        assert data.data_versions["train"]["alpaca"]["left_out"] == 0
        assert "left out" not in caplog.text

    def test_a_test_row_without_an_answer_is_still_an_error(self, tmp_path):
        data = self.module(tmp_path, ["a", ""], split="test")
        with pytest.raises(
            ValueError, match=r"user_oriented_instructions\.jsonl, line 2: the target is empty"
        ):
            data.setup("test")

    def test_every_other_family_keeps_raising(self):
        others = [
            family for family in FAMILIES.values() if isinstance(family, Family) and family is not FAMILY
        ]
        assert others
        assert not any(family.skip_empty for family in others)


class TestAlpacaEval:
    def test_an_empty_reference_output_does_not_stop_the_run(self):
        found = examples("alpaca_eval", "test")
        assert [e.target for e in found].count(NO_ANSWER) == 1
        assert len(encode_all(byte_tokenizer(), found, 2048)) == 10

    def predictions(self):
        found = apply_template("alpaca", examples("alpaca_eval", "test"), byte_tokenizer())
        return [{"source": e.source, "generated": f" said {i}\n", **e.recorded} for i, e in enumerate(found)]

    def test_outputs_have_its_columns_in_the_order_of_the_instructions(self):
        rows, _ = rows_of("alpaca_eval", "test")
        found = FAMILY.export(reversed(self.predictions()), "mine-7b")
        assert [row["output"] for row in found] == [f"said {i}" for i in range(10)]
        for row, (given, _) in zip(found, rows, strict=True):
            assert row["instruction"] == given["instruction"]  # without a template
            assert (row["generator"], row["dataset"]) == ("mine-7b", given["dataset"])
            assert set(row) == {"instruction", "output", "generator", "dataset"}

    def test_row_ten_comes_after_row_nine(self):
        rows = [
            {"source": f"t.json, row {i}", "generated": "x", "instruction": str(i), "dataset": ""}
            for i in (10, 9)
        ]
        assert [row["instruction"] for row in FAMILY.export(rows, "m")] == ["9", "10"]

    def test_a_context_is_part_of_the_instruction_that_a_judge_reads(self):
        found = examples("self_instruct", "test")
        assert any(example.context for example in found)
        for example in found:
            assert example.recorded["instruction"].endswith(example.context)
            assert example.recorded["instruction"].startswith(example.prompt)
            assert example.recorded["dataset"] == "self_instruct"

    def test_several_samples_are_refused(self):
        rows = [{**row, "generated": ["x", "y"]} for row in self.predictions()]
        with pytest.raises(ValueError, match=r"got 2 samples: set decoding.samples=1"):
            FAMILY.export(rows, "m")


@pytest.mark.shared
class TestRealRows:
    FILES = (  # (file, task, rows, rows with a context, rows with an empty answer)
        ("alpaca/alpaca_en_demo.json.gz", "alpaca", 999, 412, 0),
        ("alpaca/train_2k_subset.json.gz", "alpaca", 2000, 787, 0),
        ("dolly/train_2k_subset.json.gz", "dolly", 2000, 623, 0),
        ("self_instruct/seed_tasks.jsonl", "self_instruct", 175, None, 0),
        ("self_instruct/user_oriented_instructions.jsonl", "self_instruct", 252, None, 0),
        ("ultrafeedback/ultrafeedback_1k.jsonl.gz", "ultrafeedback", 1000, 0, 0),
        ("alpaca_eval/text_davinci_003.model_outputs.json.gz", "alpaca_eval", 805, 0, 2),
        ("alpaca_eval/gpt4_1106_preview.model_outputs.json.gz", "alpaca_eval", 805, 0, 0),
        ("alpaca_eval/alpaca-7b.model_outputs.json.gz", "alpaca_eval", 805, 0, 0),
    )

    @pytest.mark.parametrize(("name", "task", "count", "contexts", "empty"), FILES)
    def test_every_file_reads(self, shared, name, task, count, contexts, empty):
        rows = list(read_json_file(shared / "data/instruct" / name))
        found = [placed(TASKS[task].example, row, where) for row, where in rows]
        assert len(found) == count
        assert sum(not row.get("output", "-") for row, _ in rows) == empty
        assert contexts in (None, sum(bool(e.context) for e in found))
        for example in apply_template("alpaca", found, byte_tokenizer()):
            assert example.prompt.endswith("\n\n### Response:\n")
            assert example.target.strip()

    @pytest.mark.parametrize(
        ("task", "split", "count", "note"),
        [
            ("alpaca", "train", 2000, "2,000 of the 52,002 rows"),
            ("ultrafeedback", "train", 1000, "the paper's authors ship"),
            ("dolly", "train", 2000, "2,000 of the 15,011 rows"),
            ("self_instruct", "train", 175, ""),
            ("self_instruct", "test", 252, ""),
            ("alpaca_eval", "test", 805, ""),
        ],
    )
    def test_a_folder_of_them_is_read_by_its_layout(self, shared, task, split, count, note):
        rows, facts = rows_of(task, split, shared / "data/instruct")
        assert (len(rows), facts["rows"]) == (count, count)
        assert note in facts.get("note", "")

    def test_long_answers_are_cut_to_the_papers_length(self, shared):
        found = examples("ultrafeedback", "train", shared / "data/instruct")[:200]
        tokenizer = byte_tokenizer()
        rows = encode_all(tokenizer, apply_template("alpaca", found, tokenizer), 768)
        assert max(rows.lengths) <= 768
        assert any(row.cut_target for row in rows)
