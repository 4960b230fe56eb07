"""GLUE: rows in every layout become the same texts and labels, and the validation set is divided as in the paper."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import random_split

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.classification_data import ClassificationData, divide
from reft_lightning.data.example import placed
from reft_lightning.data.families.glue import FAMILY
from reft_lightning.data.labelled import ClassificationTask, LabelledText
from reft_lightning.data.rows import DataSource, read_rows
from reft_lightning.data.texts import EncodedTexts, TextCollator

FIXTURES = Path(__file__).parents[2] / "fixtures" / "glue"
SOURCE = DataSource("local", path=str(FIXTURES))
MAIN = {"cola": "matthews", "stsb": "pearson"}  # the authors' selection metrics; accuracy elsewhere
TWO = ("mrpc", "qqp", "stsb")  # tasks of two measures

# Rows as in nyu-mll/glue, with integer labels in the order of the names.
HUB_ROWS = {
    "cola": ({"sentence": "A zorb.", "label": 1, "idx": 0}, ("A zorb.",), "acceptable"),
    "sst2": ({"sentence": "fine ", "label": 0, "idx": 0}, ("fine ",), "negative"),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ("a", "b"), "equivalent"),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 2.4, "idx": 0}, ("a", "b"), "2.4"),
    "qqp": ({"question1": "a", "question2": "b", "label": 0, "idx": 0}, ("a", "b"), "not_duplicate"),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, ("a", "b"), "contradiction"),
    "qnli": ({"question": "a", "sentence": "b", "label": 0, "idx": 0}, ("a", "b"), "entailment"),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ("a", "b"), "not_entailment"),
    "wnli": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ("a", "b"), "entailment"),
}


def read(task, split="train", source=SOURCE):
    rows, facts = read_rows(FAMILY.task(task), split, source)
    return [placed(FAMILY.task(task).example, row, where) for row, where in rows], facts


def module(task="rte", source=SOURCE, **settings):
    settings = {"batch_size": 4, "eval_batch_size": 4, "group_by_length": False} | settings
    return ClassificationData(FAMILY, byte_tokenizer(), source, tasks=[task], **settings)


def texts(count):
    return [LabelledText("rte", (f"text {i}", "other"), i % 2, str(i % 2), f"row {i}") for i in range(count)]


class TestFamily:
    def test_the_tasks_are_the_nine(self):
        assert set(FAMILY.tasks) == set(HUB_ROWS)

    @pytest.mark.parametrize("name", HUB_ROWS)
    def test_a_row_of_the_hub_gives_its_texts_and_the_name_of_its_label(self, name):
        row, expected, answer = HUB_ROWS[name]
        example = placed(FAMILY.task(name).example, row, "hub, row 0")
        assert (example.texts, example.answer, example.label) == (expected, answer, row["label"])

    @pytest.mark.parametrize("name", HUB_ROWS)
    def test_the_main_measure_is_the_authors_and_two_are_reported_with_their_mean(self, name):
        measures = FAMILY.task(name).measures
        assert measures[0] == MAIN.get(name, "accuracy")
        assert measures[2:] == (("combined_score",) if name in TWO else ())

    def test_every_task_has_train_and_validation_rows_on_the_hub_and_in_a_folder(self):
        for task in FAMILY.tasks.values():
            splits = {"train", "validation", *task.further_tests}
            assert set(task.hub) == set(task.local) == splits
            assert {table.name for tables in task.hub.values() for table in tables} == {"nyu-mll/glue"}
        assert FAMILY.task("mnli").hub["validation"][0].split == "validation_matched"

    def test_a_task_of_three_texts_or_an_unknown_measure_is_refused(self):
        with pytest.raises(ValueError, match="one column or two"):
            ClassificationTask("x", ("a", "b", "c"))
        with pytest.raises(ValueError, match=r"measures must be some of accuracy.*got \('acuracy',\)"):
            ClassificationTask("x", ("a",), measures=("acuracy",))


class TestRows:
    @pytest.mark.parametrize("name", HUB_ROWS)
    def test_glues_own_files_are_read(self, name):
        for split, count in (("train", 16), ("validation", 12)):
            examples, facts = read(name, split)
            assert len(examples) == facts["rows"] == count
            labels = {example.label for example in examples}
            assert labels == set(range(FAMILY.task(name).num_labels)) or (name == "stsb" and len(labels) > 5)

    def test_words_and_numbers_name_the_same_class(self):
        rte = FAMILY.task("rte")
        row = {"sentence1": "a", "sentence2": "b"}
        by_word, by_number, by_text = (
            placed(rte.example, {**row, "label": label}, "x").label for label in ("not_entailment", 1, "1")
        )
        assert by_word == by_number == by_text == 1

    @pytest.mark.parametrize("absent", [None, float("nan")])
    def test_an_absent_text_is_empty_and_not_the_word_none(self, absent):
        qqp = FAMILY.task("qqp")
        row = {"question1": absent, "question2": "b", "label": 0}
        assert placed(qqp.example, row, "x").texts == ("", "b")
        with pytest.raises(ValueError, match="row 3: question1 and question2 is empty"):
            placed(qqp.example, {**row, "question2": absent}, "row 3")

    def test_quotation_marks_are_text(self, tmp_path):
        (tmp_path / "RTE").mkdir()
        lines = [
            "index\tsentence1\tsentence2\tlabel",
            '0\t"open\tb ""c""\tentailment',
            '1\t"d"\te\tnot_entailment',
        ]
        (tmp_path / "RTE" / "train.tsv").write_text("\n".join(lines) + "\n")
        examples, _ = read("rte", source=DataSource("local", path=str(tmp_path)))
        assert [example.texts for example in examples] == [('"open', 'b ""c""'), ('"d"', "e")]

    def test_cola_has_no_header_so_its_first_line_is_a_row(self):
        examples, _ = read("cola")
        assert examples[0].source == "CoLA/train.tsv, line 1"

    def test_the_trailing_space_of_sst2_stays_as_the_hub_has_it(self):
        assert read("sst2")[0][0].texts[0].endswith(". ")

    def test_lines_of_qqp_that_a_line_break_tore_are_left_out(self):
        lines = (FIXTURES / "QQP" / "train.tsv").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1 + 16 + 2
        examples, _ = read("qqp")
        assert len(examples) == 16
        assert not any("what is a zorb" in text for example in examples for text in example.texts)

    def test_a_broken_file_of_qqp_is_named_as_any_other(self, tmp_path):
        (tmp_path / "QQP").mkdir()
        source = DataSource("local", path=str(tmp_path))
        (tmp_path / "QQP" / "train.tsv").write_bytes("question1\tä\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"train\.tsv, line 1: not UTF-8 text"):
            read("qqp", source=source)
        (tmp_path / "QQP" / "train.tsv").unlink()
        (tmp_path / "QQP" / "train.tsv.gz").write_bytes(b"plain text")
        with pytest.raises(ValueError, match=r"train\.tsv\.gz: not a complete gzip file"):
            read("qqp", source=source)

    def test_a_torn_line_of_another_task_is_an_error(self, tmp_path):
        (tmp_path / "RTE").mkdir()
        (tmp_path / "RTE" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
        with pytest.raises(ValueError, match=r"train.tsv, line 2: 3 cells for the 4 columns"):
            read("rte", source=DataSource("local", path=str(tmp_path)))

    def test_the_subset_of_qnli_is_read_and_noted(self):
        examples, facts = read("qnli")
        assert len(examples) == 16
        assert "subset of 8,999 rows" in facts["note"]

    def test_the_fixtures_are_what_their_script_writes(self, tmp_path):
        made = tmp_path / "make_glue.py"
        shutil.copy(FIXTURES.parent / "make_glue.py", made)
        namespace = {"__file__": str(made), "__name__": "made"}
        exec(compile(made.read_text(), made, "exec"), namespace)
        namespace["main"]()
        written = {p.relative_to(tmp_path / "glue"): p.read_bytes() for p in (tmp_path / "glue").rglob("*.*")}
        assert written == {p.relative_to(FIXTURES): p.read_bytes() for p in FIXTURES.rglob("*.*")}


class TestBadRows:
    @pytest.mark.parametrize("label", ["", "-1", -1, None])
    def test_a_row_without_a_label_names_its_line(self, label):
        row = {"sentence1": "a", "sentence2": "b", "label": label}
        with pytest.raises(ValueError, match=r"RTE/test.tsv, line 7: the row has no label"):
            placed(FAMILY.task("rte").example, row, "RTE/test.tsv, line 7")

    def test_an_unknown_label_names_the_known_ones(self):
        row = {"sentence1": "a", "sentence2": "b", "label": "entailmant"}
        with pytest.raises(
            ValueError, match=r"0 entailment, 1 not_entailment; got 'entailmant'; did you mean 'entailment'"
        ):
            placed(FAMILY.task("rte").example, row, "x")
        with pytest.raises(ValueError, match=r"must be one of .* got '2'"):
            placed(FAMILY.task("rte").example, {**row, "label": 2}, "x")

    @pytest.mark.parametrize("score", ["5.5", "much", "nan"])
    def test_a_score_outside_its_range_is_an_error(self, score):
        with pytest.raises(ValueError, match=r"x: the score must be a number in 0..5"):
            placed(FAMILY.task("stsb").example, {"sentence1": "a", "sentence2": "b", "label": score}, "x")


class TestDivision:
    @pytest.mark.parametrize(
        ("rows", "selection"), [(277, 138), (1043, 521), (872, 436), (5000, 2500), (5001, 1000), (9815, 1000)]
    )
    def test_half_or_a_thousand_rows_are_for_selection(self, rows, selection):
        chosen, rest = divide(texts(rows), 42)
        assert (len(chosen), len(rest)) == (selection, rows - selection)
        assert {e.source for e in chosen}.isdisjoint(e.source for e in rest)

    @pytest.mark.parametrize("seed", [42, 43])
    def test_the_rows_are_those_of_the_authors_code(self, seed):
        rows = texts(30)
        torch.manual_seed(
            seed
        )  # the authors: set_seed, then random_split on the global generator, test first
        test, selection = random_split(rows, [15, 15])
        torch.rand(7)
        chosen, rest = divide(rows, seed)
        assert {e.source for e in chosen} == {e.source for e in selection}
        assert {e.source for e in rest} == {e.source for e in test}

    def test_dividing_draws_nothing_from_the_global_generator(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        divide(texts(10), 42)
        assert torch.equal(torch.rand(3), expected)

    def test_a_fixed_split_is_shared_by_all_seeds_and_an_open_one_by_none(self):
        def fingerprint(**settings):
            data = module(**settings)
            data.setup("fit")
            return data.data_versions["split"]["validation_fingerprint"]

        assert fingerprint(split_seed=42, seed=42) == fingerprint(split_seed=42, seed=43)
        assert fingerprint(split_seed=None, seed=42) != fingerprint(split_seed=None, seed=43)
        assert fingerprint(split_seed=None, seed=43) == fingerprint(split_seed=43, seed=1)


class TestBatches:
    def test_pairs_are_padded_on_the_right_with_masks_from_lengths(self):
        examples = [LabelledText("t", ("ab", "c"), 1, "1"), LabelledText("t", ("a", ""), 0, "0")]
        rows = EncodedTexts(byte_tokenizer(), examples, 16)
        batch = TextCollator(0, regression=False)([rows[0], rows[1]])
        assert batch["input_ids"].tolist() == [[1, 100, 101, 1, 102], [1, 100, 1, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
        assert batch["labels"].tolist() == [1, 0]
        assert (batch["rows"].tolist(), batch["rows"].dtype) == ([0, 1], torch.int64)
        assert batch["labels"].dtype == torch.int64
        assert "token_type_ids" not in batch

    def test_scores_are_float32(self):
        rows = EncodedTexts(byte_tokenizer(), [LabelledText("t", ("a", "b"), 2.4, "2.4")], 16)
        labels = TextCollator(0, regression=True)([rows[0]])["labels"]
        assert labels.dtype == torch.float32
        assert labels.item() == pytest.approx(2.4)

    def test_the_longer_text_is_truncated_first_and_the_rows_are_counted(self, caplog):
        examples = [LabelledText("t", ("a" * 20, "bb"), 0, "0"), LabelledText("t", ("a", "b"), 0, "0")]
        rows = EncodedTexts(byte_tokenizer(), examples, 10, "train rows")
        assert rows.lengths == [10, 4]
        assert rows[0]["input_ids"].tolist() == [1, *[100] * 6, 1, 101, 101]
        assert rows.truncated == 1
        assert "1 of 2 train rows: truncated to 10 tokens" in caplog.text

    def test_a_length_without_room_for_text_is_refused(self):
        with pytest.raises(ValueError, match="max_length must be at least 4"):
            EncodedTexts(byte_tokenizer(), texts(1), 3)


class TestModule:
    def test_the_stages_read_train_selection_and_test(self):
        data = module()
        data.setup("fit")
        data.setup("test")
        assert (len(data.train_rows), data.test_rows) == (16, {"rte": 6})
        (loader,) = data.val_dataloader()
        selected = {e.source for batch in loader for e in batch["examples"]}
        (loader,) = data.test_dataloader()
        tested = {e.source for batch in loader for e in batch["examples"]}
        assert len(selected) == len(tested) == 6
        assert selected.isdisjoint(tested)

    def test_the_mismatched_rows_of_mnli_are_a_further_test_set(self):
        data = module("mnli")
        data.setup("test")
        assert data.test_rows == {"mnli": 6, "mnli_mismatched": 7}
        assert data.val_tasks == ("mnli",)
        assert (data.task.num_labels, data.task.measures) == (3, ("accuracy",))

    def test_limits_leave_the_division_as_it_is(self):
        whole, few = module(), module(limit_train=5, limit_validation=3, limit_test=2)
        for data in (whole, few):
            data.setup("fit")
            data.setup("test")
        sources = [[{e.source for b in loaders for e in b["examples"]} for (loaders,) in
                    (data.val_dataloader(), data.test_dataloader())] for data in (few, whole)]  # fmt: skip
        assert all(part < all_ for part, all_ in zip(*sources, strict=True))
        assert [len(part) for part in sources[0]] == [3, 2]
        assert len(few.train_rows) == 5

    def test_a_sealed_module_builds_no_test_rows(self):
        data = module(sealed=True)
        data.setup("fit")
        with pytest.raises(PermissionError, match="sealed"):
            data.test_dataloader()

    def test_versions_say_what_was_read(self):
        data = module()
        data.setup("test")
        versions = json.loads(json.dumps(data.data_versions))
        assert (versions["family"], versions["version"], versions["split_seed"]) == (
            "glue",
            FAMILY.version,
            42,
        )
        assert versions["train"]["rte"]["from"] == ["RTE/train.tsv"]
        assert versions["validation"]["rte"]["rows"] == 12
        assert versions["split"]["validation_rows"] == versions["test"]["rte"]["test_rows"] == 6
        assert {len(versions[part]["rte"]["fingerprint"]) for part in ("train", "validation")} == {16}

    def test_test_rows_that_are_train_rows_are_counted_and_warned_of(self, tmp_path, caplog):
        shutil.copytree(FIXTURES / "RTE", tmp_path / "RTE")
        (tmp_path / "RTE" / "train.tsv").write_text(
            (tmp_path / "RTE" / "dev.tsv").read_text(encoding="utf-8")
        )
        data = module(source=DataSource("local", path=str(tmp_path)))
        data.setup("test")
        assert data.data_versions["test"]["rte"]["overlap"] == 6
        assert "6 of 6 rte test rows occur in the train rows" in caplog.text


# task: train rows, validation rows, as listed in the shared folder's README
REAL = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "stsb": (5749, 1500),
    "qnli": (8999, 5463),
    "rte": (2490, 277),
    "wnli": (635, 71),
}


@pytest.mark.shared
class TestRealRows:
    @pytest.mark.parametrize("name", REAL)
    def test_every_real_row_has_a_text_and_a_label(self, name, shared):
        source = DataSource("local", path=str(shared / "data" / "glue"))
        counts = []
        for split in ("train", "validation"):
            examples, _ = read(name, split, source)
            counts.append(len(examples))
            labels = {example.label for example in examples}
            assert labels == set(range(len(FAMILY.task(name).labels))) or name == "stsb"
        assert tuple(counts) == REAL[name]

    def test_the_division_has_the_sizes_of_the_paper(self, shared):
        source = DataSource("local", path=str(shared / "data" / "glue"))
        sizes = {name: tuple(map(len, divide(read(name, "validation", source)[0], 42))) for name in REAL}
        assert sizes == {
            "cola": (521, 522), "sst2": (436, 436), "stsb": (750, 750),
            "qnli": (1000, 4463), "rte": (138, 139), "wnli": (35, 36),
        }  # fmt: skip

    def test_quotation_marks_of_real_rows_are_kept(self, shared):
        source = DataSource("local", path=str(shared / "data" / "glue"))
        examples, _ = read("rte", "validation", source)
        assert '"Dr. Death,"' in examples[13].texts[0]
