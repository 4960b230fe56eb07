"""Custom rows: the mapping of columns, conversations, splits, and the errors for mistakes."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.config import compose
from reft_lightning.data.example import placed
from reft_lightning.data.families.custom import carve, custom_family
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.rows import DataSource, read_rows
from reft_lightning.runs import experiment

FIXTURES = Path(__file__).parents[2] / "fixtures" / "custom"
EMOJI = {"prompt": "question", "target": "reply"}


def examples(family, split="train"):
    task = family.task("custom")
    rows, _ = read_rows(task, split, DataSource("local", "."))
    return [placed(task.example, row, where) for row, where in rows]


def one(row, **settings):
    """The example of one row."""
    family = custom_family(path="rows.jsonl", source="hub", **settings)
    return placed(family.task("custom").example, row, "mine.csv, line 7")


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(*turns):
    return [{"role": role, "content": text} for role, text in turns]


class TestColumns:
    def test_the_columns_of_a_file_become_examples(self):
        settings = {**EMOJI, "context": "about {topic}"}
        found = examples(custom_family(path=str(FIXTURES / "rows.csv"), **settings))
        assert [(e.prompt, e.target, e.answer, e.context) for e in found[:2]] == [
            ("Which animal barks at the postman?", "🐶 🔊 📬", "🐶 🔊 📬", "about animals\n"),
            ("What is good on a hot day?", "🍦 🧊 😋", "🍦 🧊 😋", "about food\n"),
        ]
        assert len(found) == 10

    def test_a_text_with_braces_joins_columns(self):
        row = {"a": 2, "b": 3, "why": "two and three", "sum": 5}
        example = one(row, prompt="{a} + {b}?\\nThink.\n", target="{why}, {{so}} it is {sum}.", answer="sum")
        assert example.prompt == "2 + 3?\nThink.\n"
        assert (example.target, example.answer) == ("two and three, {so} it is 5.", "5")

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("two and three, so it is 5.", "5"),
            (" other words, so it is 5. ", "5"),
            ("so it is 4.", "4"),
            ("5", None),
            ("so it is .", None),
        ],
    )
    def test_the_answer_is_found_where_the_target_has_it(self, text, answer):
        settings = {"prompt": "q", "target": "{why}, so it is {sum}.", "answer": "sum"}
        family = custom_family(path="x", source="hub", **settings)
        example = placed(family.task("custom").example, {"q": "?", "why": "two and three", "sum": 5}, "row")
        text = text if ", " in text or answer is None else f"w, {text}"
        judged = family.score([text], example)
        assert judged.answer == answer
        assert judged.scores == {"accuracy": float(answer == "5")}

    def test_without_an_answer_column_the_whole_stripped_text_counts(self):
        family = custom_family(path="x", source="hub", prompt="q", target="t")
        example = placed(family.task("custom").example, {"q": "?", "t": " yes \n"}, "row")
        assert (example.target, example.answer) == ("yes", "yes")
        scores = [family.score([text], example).scores["accuracy"] for text in ("\nyes ", "yes.", "Yes", "")]
        assert scores == [1.0, 0.0, 0.0, 0.0]
        assert family.score([" \n"], example).answer is None

    def test_under_the_plain_template_alone_a_line_break_parts_prompt_and_target(self):
        row = {"q": "Where?", "t": "here"}
        assert one(row, prompt="q", target="t").prompt == "Where?\n"
        assert one(row, prompt="{q} ", target="t").prompt == "Where? "
        assert one(row, prompt="q", target="t", template="alpaca").prompt == "Where?"
        assert one(row, prompt="q", target="t", template="chat").prompt == "Where?"

    def test_lists_and_numbers_are_written_as_text(self):
        row = {"q": "pick", "choices": ["a", "b"], "n": 3, "none": None}
        assert one(row, prompt="{q}: {choices}; {n}{none}\n", target="n").prompt == "pick: a, b; 3\n"

    @pytest.mark.parametrize("options", [["true", "false"], "true, false", (True, False)])
    def test_options_take_the_answers_place_in_the_target(self, options):
        row = {"q": "?", "label": options[0] if isinstance(options, tuple) else "true", "all": options}
        example = one(row, prompt="q", target="It is {label}.", answer="label", options="all")
        assert example.options == tuple(
            f"It is {word}." for word in ("true", "false")
        ) or example.options == (
            "It is True.",
            "It is False.",
        )
        assert example.target in example.options

    def test_options_of_a_bare_target_are_targets(self):
        row = {"q": "?", "label": "b", "all": ["a", "b"]}
        assert one(row, prompt="q", target="label", options="all").options == ("a", "b")

    @pytest.mark.parametrize("cell", ['["red", "blue, dark"]', ' [ "red" ,"blue, dark" ] '])
    def test_options_may_stand_as_json_in_a_cell(self, cell):
        row = {"q": "?", "label": "1", "all": cell}
        example = one(row, prompt="q", target="label", options="all", answer_form="index")
        assert (example.target, example.options) == ("blue, dark", ("red", "blue, dark"))

    @pytest.mark.parametrize("cell", ["['red', 'blue']", '["red", "blue"', "[red, blue]"])
    def test_options_in_brackets_that_are_no_json_are_refused(self, cell):
        """The way pandas writes lists; split at commas, the second option would be "'blue']"."""
        row = {"q": "?", "label": "1", "all": cell}
        with pytest.raises(ValueError, match=r"line 7: column 'all' must be a list, a JSON list as text"):
            one(row, prompt="q", target="label", options="all", answer_form="index")

    def test_a_list_of_columns_holds_the_options(self):
        row = {"q": "?", "label": "b", "o1": "a", "o2": "b", "o3": None}
        example = one(row, prompt="q", target="It is {label}.", answer="label", options=["o1", "o2", "o3"])
        assert (example.target, example.answer) == ("It is b.", "b")
        assert example.options == ("It is a.", "It is b.")  # a row may have fewer

    @pytest.mark.parametrize(
        ("form", "cells"),
        [
            ("text", ["green", " green "]),
            ("letter", ["C", "c", "(C)", "C."]),
            ("index", [2, "2", 2.0, "2.0"]),
            ("number", [3, "3", 3.0]),
        ],
    )
    @pytest.mark.parametrize("columns", [True, False])
    def test_an_answer_may_be_the_letter_or_the_place_of_its_option(self, form, cells, columns):
        words = ["red", "blue", "green", "1"]
        names = ["opa", "opb", "opc", "opd"]  # as in MedMCQA
        row = {"q": "?", **dict(zip(names, words, strict=True)), "choices": words}
        options = names if columns else "choices"
        for cell in cells:
            settings = {"prompt": "{q}", "target": "cop", "options": options, "answer_form": form}
            example = one(row | {"cop": cell}, **settings)
            assert (example.target, example.answer) == ("green", "green")
            assert example.options == ("red", "blue", "green", "1")
            example = one(row | {"cop": cell}, **{**settings, "target": "It is {cop}.", "answer": "cop"})
            assert (example.target, example.answer) == ("It is green.", "green")

    @pytest.mark.parametrize(
        ("form", "cell"),
        [("text", "C"), ("text", 1), ("letter", "E"), ("letter", "green"), ("letter", 2), ("index", -1), ("index", 4),
         ("index", "C"), ("index", 1.5), ("number", 0), ("number", 5), ("index", "²"), ("letter", "D"), ("index", 3)],
    )  # fmt: skip
    def test_an_answer_that_names_no_option_is_refused(self, form, cell):
        row = {"q": "?", "a": "red", "b": "blue", "c": "green", "d": " ", "cop": cell}
        with pytest.raises(
            ValueError, match=r"line 7: the answer .* is not among the options red, blue, green.*can be"
        ):
            one(row, prompt="q", target="cop", options=["a", "b", "c", "d"], answer_form=form)

    def test_binary_cells_are_text_in_utf8(self, tmp_path):
        pq.write_table(pa.table({"q": [b"ist es gr\xc3\xbcn?"], "a": [b"ja"]}), tmp_path / "rows.parquet")
        (example,) = examples(custom_family(path=str(tmp_path / "rows.parquet"), prompt="q", target="a"))
        assert (example.prompt, example.target) == ("ist es grün?\n", "ja")
        with pytest.raises(ValueError, match="line 7: a holds bytes that are not UTF-8 text"):
            one({"q": "?", "a": b"\xff"}, prompt="q", target="a")


class TestConversations:
    @pytest.mark.parametrize(("name", "column"), [("chat", "messages"), ("sharegpt", "conversations")])
    def test_both_forms_give_the_same_examples(self, name, column):
        family = custom_family(path=str(FIXTURES / f"{name}.jsonl"), messages=column)
        first, *others = examples(family)
        assert (first.prompt, first.target) == ("Which animal barks at the postman?", "🐶 🔊 📬")
        assert first.turns == (
            ("system", "Answer in three emoji."),
            ("user", "Hello!"),
            ("assistant", "👋 😀 🌞"),
        )
        assert len(others) == 9
        assert all(example.turns == () for example in others)
        assert family.template == "chat"

    def test_messages_may_stand_as_json_in_a_cell(self):
        cell = json.dumps(talk(("user", "Hi"), ("assistant", "Hello")))
        assert one({"m": cell}, messages="m").target == "Hello"
        with pytest.raises(ValueError, match=r"line 7: messages given as text must be JSON"):
            one({"m": "Hi there"}, messages="m")

    def test_contents_may_be_openais_parts(self):
        parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[0]]}]
        example = one({"m": messages}, messages="m")
        assert (example.prompt, example.target) == ("Hi there", "Hi")

    @pytest.mark.parametrize(
        ("messages", "words"),
        [
            (
                [{"role": [], "content": "Hi"}],
                r"the role of a message must be one of system, user, .*got \[\]",
            ),
            (
                [{"role": None, "content": "Hi"}],
                "the role of a message must be one of system, user, .*got None",
            ),
            ([{"role": {}, "content": "Hi"}], r"got \{\}"),
            (
                [{"role": "user", "content": [{"type": "image_url"}]}],
                "must be text; got the part {'type': 'image_url'}",
            ),
            (
                [{"role": "user", "content": [{"type": "text", "text": None}]}],
                "text must be text; got None",
            ),
            ([{"role": "user", "content": ["Hi"]}], "must be an object with the column 'type'; got 'Hi'"),
            ('[{"role": "user", "role": "system"}]', "an object contains the key 'role' more than once"),
            ("[" * 10**5, "nested too deeply"),
            (talk(("user", "Hi")), "line 7: the row has no answer: .*got user$"),
            (talk(("assistant", "Hi")), "got assistant"),
            ([], "got nothing"),
            (talk(("user", "Hi"), ("assistant", " ")), "line 7: the assistant's last message is empty"),
            (talk(("user", ""), ("assistant", "x")), "line 7: the user's last message is empty"),
            (talk(("usr", "Hi")), "message must be one of system, user, .*got 'usr'; did you mean 'user'"),
            ([{"role": "user", "text": "Hi"}], "no column 'content'; the columns are role, text"),
            ([{"role": "user", "content": None}], "content must be text; got None"),
            (7, "must be a list of messages; got 7"),
        ],
    )
    def test_a_broken_conversation_names_its_line(self, messages, words):
        with pytest.raises(ValueError, match=words):
            one({"m": messages}, messages="m")


class TestMistakes:
    def test_a_wrong_column_lists_the_columns_there_are_before_anything_is_built(self):
        with pytest.raises(
            ValueError,
            match=r"custom/rows\.csv, line 2: no column 'qestion'; did you mean 'question'\?; the columns are "
            r"question, reply, topic, topics",
        ):
            custom_family(path=str(FIXTURES / "rows.csv"), prompt="{qestion}\n", target="reply")

    def test_a_wrong_column_of_the_validation_file_is_found_as_early(self, tmp_path):
        held = write(tmp_path, "held.jsonl", [{"question": "?", "answer": "x"}])
        with pytest.raises(ValueError, match=r"held\.jsonl, line 1: no column 'reply'; .*question, answer"):
            custom_family(path=str(FIXTURES / "rows.csv"), validation_path=str(held), **EMOJI)

    def test_forgotten_settings_list_the_columns_there_are(self):
        with pytest.raises(
            ValueError, match=r"needs data\.target, or data\.messages; the columns are question,"
        ):
            custom_family(path=str(FIXTURES / "rows.csv"), prompt="question")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("q,a\n1,2\n3,\n", r"rows\.csv, line 3: the row has no answer: column 'a' is empty"),
            ("q,a\n1,2\n ,4\n", r"rows\.csv, line 3: the row has no prompt: column 'q' is empty"),
        ],
    )
    def test_a_row_without_an_answer_or_a_prompt_names_its_line(self, tmp_path, text, words):
        path = tmp_path / "rows.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            examples(custom_family(path=str(path), prompt="q", target="a"))

    @pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
    def test_an_absent_value_is_no_answer(self, value):
        with pytest.raises(ValueError, match=r"line 7: the row has no answer: column 'a' is empty"):
            one({"q": "?", "a": value}, prompt="q", target="so {a}")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"path": None}, r"need data\.path"),
            ({"source": "wheel"}, "data.source must be local or hub for custom rows; got 'wheel'"),
            ({"messages": "m"}, r"data\.messages replaces data\.prompt, data\.target"),
            ({"answer": "topic"}, r"data\.answer='topic' is not in data\.target='reply'"),
            ({"target": "so {reply}", "options": "topics"}, r"data\.options needs data\.answer"),
            (
                {"options": ["topic", 3]},
                r"data\.options must be a column name or a list of column names; got \['topic', 3\]",
            ),
            (
                {"options": "topics", "answer_form": "leter"},
                "data.answer_form must be one of .*mean 'letter'",
            ),
            ({"answer_form": "letter"}, r"answer_form=letter refers to the options: set data\.options"),
            ({"delimiter": ";;"}, r"data\.delimiter must be one character, .*got ';;'"),
            ({"delimiter": '"'}, r"data\.delimiter must be one character"),
            ({"prompt": "{question"}, r"data\.prompt='\{question': .*write column names in braces"),
            ({"prompt": "{}"}, "must contain a column name"),
            ({"prompt": "{question:>3}"}, "must contain a column name and nothing else"),
            ({"prompt": "{{question}}"}, "names no column"),
        ],
    )
    def test_settings_that_do_not_fit_are_named(self, settings, words):
        with pytest.raises(ValueError, match=words):
            custom_family(**{"path": str(FIXTURES / "rows.csv"), **EMOJI, **settings})

    def test_an_answer_that_its_marks_do_not_single_out_is_refused(self):
        settings = {"prompt": "q", "target": "{why} so {a}", "answer": "a"}
        with pytest.raises(ValueError, match=r"line 7: the answer '5' cannot be separated from the rest"):
            one({"q": "?", "why": "so be it", "a": 5}, **settings)

    @pytest.mark.parametrize(
        ("cell", "words"),
        [
            ("a,b", "answer 'c', .* is not among the options a, b"),
            (3, "must be a list, .*or comma-separated text; got 3"),
        ],
    )
    def test_options_must_hold_the_answer(self, cell, words):
        with pytest.raises(ValueError, match=f"line 7: .*{words}"):
            one({"q": "?", "a": "c", "o": cell}, prompt="q", target="a", options="o")

    @pytest.mark.parametrize(
        ("cell", "words"), [({"x": 1}, "an object"), ([["a"], ["b"]], "a list of lists")]
    )
    def test_an_object_is_not_text(self, cell, words):
        with pytest.raises(ValueError, match=rf"line 7: column 'q' must be text; got {words}"):
            one({"q": cell, "a": "c"}, prompt="q", target="a")


class TestPlaces:
    def test_a_file_of_test_rows_may_stand_beside(self):
        family = custom_family(path=str(FIXTURES / "rows.csv"), test_path=str(FIXTURES / "rows.tsv"), **EMOJI)
        assert len(examples(family, "test")) == 10

    def test_a_folder_has_a_train_and_perhaps_a_test_file(self, tmp_path):
        write(tmp_path, "train.jsonl", [{"q": "a", "t": "b"}] * 3)
        assert set(custom_family(path=str(tmp_path), prompt="q", target="t").task("custom").local) == {
            "train"
        }
        (tmp_path / "test.csv").write_text("q,t\nc,d\n")
        family = custom_family(path=str(tmp_path), prompt="q", target="t")
        assert [len(examples(family, split)) for split in ("train", "test")] == [3, 1]

    @pytest.mark.parametrize("name", ["validation.csv", "valid.csv", "val.csv", "dev.csv.gz"])
    def test_a_folder_may_have_a_file_of_validation_rows(self, tmp_path, name):
        write(tmp_path, "train.jsonl", [{"q": "a", "t": "b"}] * 3)
        text = b"q,t\nc,d\n"
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        family = custom_family(path=str(tmp_path), prompt="q", target="t")
        assert [example.prompt for example in examples(family, "validation")] == ["c\n"]

    def test_a_named_file_of_validation_rows_replaces_the_folders(self, tmp_path):
        write(tmp_path, "train.jsonl", [{"q": "a", "t": "b"}])
        write(tmp_path, "validation.jsonl", [{"q": "c", "t": "d"}])
        other = write(tmp_path, "other.jsonl", [{"q": "e", "t": "f"}])
        family = custom_family(path=str(tmp_path), validation_path=str(other), prompt="q", target="t")
        assert [example.prompt for example in examples(family, "validation")] == ["e\n"]

    def test_the_delimiter_holds_for_every_file(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text("q|t\na|b\n")
        family = custom_family(path=str(tmp_path), prompt="q", target="t", delimiter="|")
        assert [examples(family, split)[0].target for split in ("train", "test")] == ["b", "b"]
        (tmp_path / "train.csv").write_text("q;r\tt\na;b\tc\n")
        family = custom_family(path=str(tmp_path / "train.csv"), prompt="q;r", target="t", delimiter="\\t")
        assert examples(family)[0].prompt == "a;b\n"

    @pytest.mark.parametrize("several", [True, False])
    def test_a_folder_of_save_to_disk_has_one_table_or_several(self, tmp_path, several):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list([{"q": "a", "t": "b"}] * 3)
        saved = datasets.DatasetDict({"train": table, "validation": table.select([1])}) if several else table
        saved.save_to_disk(str(tmp_path / "mine"))
        datasets.enable_progress_bars()
        family = custom_family(path=str(tmp_path / "mine"), prompt="q", target="t")
        assert len(examples(family)) == 3
        assert set(family.task("custom").local) == ({"train", "validation"} if several else {"train"})
        if several:
            assert [example.prompt for example in examples(family, "validation")] == ["a\n"]

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (
                ("train.jsonl", "train.json"),
                r"for train: train\.json, train\.jsonl; choose one with data\.path",
            ),
            (
                ("train.jsonl", "val.jsonl", "dev.jsonl"),
                r"for validation: val\.jsonl, dev\.jsonl; choose one with data\.validation_path",
            ),
        ],
    )
    def test_two_files_for_one_split_are_refused(self, tmp_path, names, words):
        for name in names:
            write(tmp_path, name, [{"q": "a"}])
        with pytest.raises(ValueError, match=f"several files {words}"):
            custom_family(path=str(tmp_path), **EMOJI)

    def test_a_folder_without_a_train_file_lists_what_it_holds(self, tmp_path):
        write(tmp_path, "data.jsonl", [{"q": "a"}])
        with pytest.raises(FileNotFoundError, match=r"must contain a file train\.\* .*it holds data\.jsonl"):
            custom_family(path=str(tmp_path), **EMOJI)

    @pytest.mark.parametrize("path", ["owner/name", "hf://datasets/owner/name", "misspelt"])
    def test_a_name_of_the_hub_wants_the_source_hub(self, path):
        with pytest.raises(FileNotFoundError, match=f"data.path={path} is not a file .* data.source=hub"):
            custom_family(path=path, **EMOJI)

    def test_a_missing_file_lists_its_neighbours(self, tmp_path):
        write(tmp_path, "data.jsonl", [{"q": "a"}])
        with pytest.raises(FileNotFoundError, match=r"dta\.jsonl does not exist; .* holds data\.jsonl"):
            custom_family(path=str(tmp_path / "dta.jsonl"), **EMOJI)

    def test_the_parts_of_a_hub_name(self):
        def tables(path, **others):
            hub = custom_family(path=path, source="hub", **others, **EMOJI).task("custom").hub
            return {split: str(table) for split, (table,) in hub.items()}

        assert tables("o/n") == {"train": "o/n:default:train@main"}
        assert tables("o/n:en:train[:90%]@abc", validation_path="dev", test_path="test") == {
            "train": "o/n:en:train[:90%]@abc",
            "validation": "o/n:en:dev@abc",
            "test": "o/n:en:test@abc",
        }
        assert tables("o/n:en", validation_path="o/other", test_path="p/q:de:dev@v2") == {
            "train": "o/n:en:train@main",
            "validation": "o/other:default:validation@main",
            "test": "p/q:de:dev@v2",
        }

    def test_a_file_is_not_looked_for_on_the_hub(self):
        with pytest.raises(ValueError, match=r"is on this machine: set data\.source=local"):
            custom_family(path=str(FIXTURES / "rows.csv"), source="hub", **EMOJI)


class TestDataModule:
    def make(self, family=None, **changes):
        family = family or custom_family(path=str(FIXTURES / "rows.csv"), **EMOJI)
        arguments = {"batch_size": 4, "eval_batch_size": 3, "validation_size": -1, **changes}
        source = DataSource("local", str(FIXTURES / "rows.csv"))
        return GenerationData(family, byte_tokenizer(), source, tasks=["custom"], **arguments)

    @pytest.mark.parametrize(("size", "rows"), [(-1, 1), (4, 4), (0.3, 3), (0.19, 1)])
    def test_a_tenth_a_number_or_a_part_of_the_rows_validates(self, size, rows):
        data = self.make(validation_size=size)
        data.setup("fit")
        assert (data.val_tasks, data.test_tasks) == (("custom",), ())
        split = data.data_versions["split"]
        assert (split["train_rows"], split["validation_rows"]) == (10 - rows, rows)
        assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 4

    @pytest.mark.parametrize("size", ["a", True, 1.0, 1.5, -0.5, 0.0, None, float("nan")])
    def test_a_validation_size_that_is_neither_a_number_nor_a_part_is_refused(self, size):
        with pytest.raises(ValueError, match=r"data\.validation_size must be a number of rows or a fraction"):
            self.make(validation_size=size)

    def test_a_part_that_is_less_than_a_row_is_refused(self):
        with pytest.raises(
            ValueError, match=r"data\.validation_size=0\.05 is less than one row of 10 distinct prompts"
        ):
            self.make(validation_size=0.05).setup("fit")

    def test_invalid_rows_are_counted_and_left_out_when_asked(self, tmp_path, caplog):
        rows = [{"q": f"q {i}", "a": "" if i in (3, 7) else "x"} for i in range(12)]
        rows[9]["q"] = "half \ud83d"
        test = write(tmp_path, "test.jsonl", rows[:5])
        train = write(tmp_path, "train.jsonl", rows)
        family = custom_family(path=str(train), test_path=str(test), prompt="q", target="a")
        with pytest.raises(
            ValueError,
            match=r"train\.jsonl, line 4: .*column 'a' is empty \(3 of 12 custom train rows are invalid; ",
        ):
            self.make(family).setup("fit")
        data = self.make(family, skip_invalid=True, validation_size=2)
        data.setup("fit")
        data.setup("test")
        assert data.data_versions["split"]["train_rows"] == 7
        assert data.data_versions["train"]["custom"]["left_out"] == 3
        assert (data.data_versions["test"]["custom"]["left_out"], data.test_rows) == (1, {"custom": 4})
        assert "skipped 3 of 12 custom train rows as invalid; the first: " in caplog.text

    def test_the_first_row_may_be_the_invalid_one(self, tmp_path):
        train = write(tmp_path, "train.jsonl", [{"q": "a"}, *({"q": f"{i}", "a": "b"} for i in range(3))])
        data = self.make(custom_family(path=str(train), prompt="q", target="a"), skip_invalid=True)
        data.setup("fit")
        assert data.data_versions["train"]["custom"]["left_out"] == 1

    def test_where_no_row_is_valid_the_first_error_is_raised(self, tmp_path):
        train = write(tmp_path, "train.jsonl", [{"q": "a", "a": ""}] * 3)
        family = custom_family(path=str(train), prompt="q", target="a")
        with pytest.raises(ValueError, match=r"line 1: the row has no answer: column 'a' is empty$"):
            self.make(family, skip_invalid=True).setup("fit")

    @pytest.mark.parametrize("place", ["q", "a", "o"])
    def test_half_a_character_names_its_row(self, tmp_path, place):
        row = {"q": "a", "a": "x", "o": ["x", "y"]}
        row[place] = ["x", "\ud83d"] if place == "o" else "\ud83d"
        if place == "a":
            row["o"][0] = "\ud83d"
        path = write(tmp_path, "train.jsonl", [row])
        family = custom_family(path=str(path), prompt="q", target="a", options="o")
        with pytest.raises(
            ValueError, match=r"train\.jsonl, line 1: the text contains half a character, '.ud83d'"
        ):
            self.make(family).setup("fit")

    @pytest.mark.parametrize(("size", "rows"), [(-1, 10), (300, 10), (4, 4), (0.5, 5)])
    def test_validation_rows_of_ones_own_are_used_and_all_train_rows_stay(self, tmp_path, caplog, size, rows):
        train = write(tmp_path, "train.jsonl", [{"question": f"q {i}", "reply": "a"} for i in range(30)])
        family = custom_family(path=str(train), validation_path=str(FIXTURES / "rows.csv"), **EMOJI)
        data = self.make(family, validation_size=size)
        data.setup("fit")
        split, facts = data.data_versions["split"], data.data_versions["validation"]["custom"]
        assert (split["train_rows"], split["validation_rows"]) == (30, rows)
        assert (facts["rows"], facts["from"], facts["overlap"]) == (10, ["rows.csv"], 0)
        known = {
            example.prompt for example in examples(custom_family(path=str(FIXTURES / "rows.csv"), **EMOJI))
        }
        assert {e.prompt for batch in data.val_dataloader()[0] for e in batch["examples"]} <= known
        assert "occur in the train rows" not in caplog.text

    @pytest.mark.parametrize("settings", [{"validation_size": 3}, {"limit_validation": 3}])
    def test_validation_rows_of_ones_own_may_repeat_a_question(self, tmp_path, settings):
        train = write(tmp_path, "train.jsonl", [{"q": f"q {i}", "a": "a"} for i in range(5)])
        write(tmp_path, "validation.jsonl", [{"q": "same", "a": "a"}] * 4 + [{"q": "other", "a": "a"}])
        data = self.make(custom_family(path=str(train.parent), prompt="q", target="a"), **settings)
        data.setup("fit")
        assert data.data_versions["split"]["validation_rows"] == 3

    def test_no_validation_is_possible_where_there_are_validation_rows(self):
        path = str(FIXTURES / "rows.csv")
        data = self.make(custom_family(path=path, validation_path=path, **EMOJI), validation_size=0)
        assert data.val_tasks == ()

    def test_validation_rows_among_the_train_rows_are_counted_and_warned_of(self, caplog):
        path = str(FIXTURES / "rows.csv")
        data = self.make(custom_family(path=path, validation_path=path, **EMOJI))
        data.setup("fit")
        assert data.data_versions["validation"]["custom"]["overlap"] == 10
        assert "10 of 10 custom validation rows occur in the train rows" in caplog.text

    def test_a_tenth_is_at_most_a_hundred_rows(self):
        from reft_lightning.data.example import Example

        def held_out(count):
            rows = [Example("custom", f"q {i}", "a", "a") for i in range(count)]
            return len(carve(rows, -1, 42)[1])

        assert [held_out(count) for count in (5, 10, 99, 1000, 5000)] == [0, 1, 9, 100, 100]

    def test_conversations_that_end_in_one_question_are_told_apart_by_what_precedes_it(self, tmp_path):
        def chat(i):
            return talk(
                ("user", f"tell me {i}"), ("assistant", "so"), ("user", "go on"), ("assistant", "then")
            )

        train = write(tmp_path, "train.jsonl", [{"m": chat(i)} for i in range(40)])
        test = write(tmp_path, "test.jsonl", [{"m": chat(i)} for i in range(38, 43)])
        family = custom_family(path=str(train), test_path=str(test), messages="m", template="chat")
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        data = GenerationData(
            family, tokenizer, DataSource("local", str(train)), tasks=["custom"], batch_size=4, eval_batch_size=4,
            validation_size=-1,
        )  # fmt: skip
        data.setup("fit")
        data.setup("test")
        assert data.data_versions["split"]["validation_rows"] == 4
        assert data.data_versions["split"]["train_rows"] == 36
        assert data.data_versions["test"]["custom"]["overlap"] == 2

    def test_a_conversation_is_read_whole_and_its_last_answer_learnt(self):
        family = custom_family(path=str(FIXTURES / "chat.jsonl"), messages="messages")
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        source = DataSource("local", str(FIXTURES / "chat.jsonl"))
        arguments = {"batch_size": 4, "eval_batch_size": 3, "validation_size": 0}
        data = GenerationData(family, tokenizer, source, tasks=["custom"], **arguments)
        data.setup("fit")
        first = data.train_rows[0]
        assert tokenizer.decode(first.prompt_ids, skip_special_tokens=True) == (
            "<system>Answer in three emoji.\n<user>Hello!\n<assistant>👋 😀 🌞\n"
            "<user>Which animal barks at the postman?\n<assistant>"
        )
        assert tokenizer.decode(first.target_ids, skip_special_tokens=True) == "🐶 🔊 📬"


def test_a_run_on_ten_rows_reports_what_it_held_out(tmp_path):
    settings = ["model=tiny_random", "data=custom", f"data.path='{FIXTURES / 'rows.csv'}'", "data.target=topic",
                'data.prompt="{question} Say:"', "data.options=topics", "intervention.positions=l1",
                "intervention.rank=2", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1",
                "trainer.enable_progress_bar=false", "decoding.max_new_tokens=3"]  # fmt: skip
    results = experiment.run(compose.compose(settings), tmp_path)
    assert results["status"] == "complete"
    assert results["data_versions"]["split"]["train_rows"] == 9
    assert results["counts"]["val/custom/accuracy"]["total"] == 1
    assert 0 <= results["metrics"]["val/custom/option_accuracy"] <= 1
    assert not any(name.startswith("test/") for name in results["metrics"])
    assert results["test_reads"] == []
