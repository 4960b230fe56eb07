"""The families reading (RACE, QuAIL) and spans (SQuAD, XQuAD): prompts, readers, scorers, sources."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import encode
from reft_lightning.data.example import Example, placed
from reft_lightning.data.families import reading, spans
from reft_lightning.data.families.commonsense import TRIGGER
from reft_lightning.data.families.passages import carve_passages, passage_of, prompt_about
from reft_lightning.data.families.spans import extract, f1, score, words
from reft_lightning.data.rows import DataSource, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "reading"
FAMILY_OF = {name: family for family in (reading.FAMILY, spans.FAMILY) for name in family.tasks}
CHOICES, SPANS = ("race_middle", "race_high", "quail"), ("squad", "xquad_en")


def local(folder=FIXTURES):
    return DataSource("local", str(folder))


def examples(task, split, source=None):
    rows, _ = read_rows(FAMILY_OF[task].tasks[task], split, source or local())
    return [placed(FAMILY_OF[task].tasks[task].example, row, where) for row, where in rows]


def judge(text, *golds):
    return score([text], Example("squad", "p", TRIGGER + golds[0], json.dumps(golds)))


class TestTasks:
    @pytest.fixture(params=(*CHOICES, *SPANS))
    def task(self, request):
        return request.param

    @pytest.fixture
    def found(self, task):
        return examples(task, "test")

    def test_a_long_passage_loses_its_beginning_and_keeps_the_question(self, found):
        tokenizer = byte_tokenizer()
        for example in found:
            question = example.prompt.partition("\n\n")[2]
            tokens = tokenizer(question + example.target)["input_ids"]
            encoded = encode(tokenizer, example, len(tokens) + 20)
            kept = tokenizer.decode(encoded.prompt_ids, skip_special_tokens=True)
            assert encoded.cut_prompt > 0
            assert kept.endswith(question)
            assert tokenizer.decode(encoded.target_ids[:-1]) == example.target

    def test_every_task_says_where_its_rows_lie(self, task):
        splits = {"test"} if task == "xquad_en" else {"train", "test"}
        assert set(FAMILY_OF[task].tasks[task].hub) == set(FAMILY_OF[task].tasks[task].local) == splits


class TestChoices:
    def test_the_passage_stands_before_the_question_and_its_answers(self):
        row = {
            "article": "It rained. \nTom slept.\n",
            "question": "Who slept?",
            "options": ["Ann", "Tom", "Al", "nobody"],
            "answer": "B",
        }
        example = placed(reading.TASKS["race_high"].example, row, "here")
        assert example.prompt == (
            "Passage: It rained. \nTom slept.\n\nPlease choose the correct answer to the question: Who slept?\n\n"
            "Answer1: Ann Answer2: Tom Answer3: Al Answer4: nobody\n\n"
            "Answer format: answer1/answer2/answer3/answer4\n"
        )
        assert (example.target, example.answer, example.source) == (TRIGGER + "answer2", "answer2", "here")
        assert example.options == tuple(f"{TRIGGER}answer{i}" for i in range(1, 5))

    def test_a_wrong_or_missing_answer_scores_0(self):
        example = examples("quail", "test")[0]
        wrong = next(option for option in example.options if option != example.target)
        assert reading.FAMILY.score([wrong], example).scores == {"accuracy": 0.0}
        assert reading.FAMILY.score(["answer1"], example) == (None, {"accuracy": 0.0})

    def test_races_own_articles_give_a_row_a_question(self):
        found = examples("race_high", "test")
        assert len(found) == 4
        assert [e.source.rpartition(", ")[2] for e in found] == ["question 0", "question 1"] * 2
        again = [
            placed(reading.TASKS["race_high"].example, row, where)
            for row, where in as_hub_rows("race_high", "test")
        ]
        assert [(e.prompt, e.target) for e in again] == [(e.prompt, e.target) for e in found]

    @pytest.mark.parametrize("answer", ["E", "", "b", "AB"])
    def test_an_answer_that_is_no_letter_of_an_option_names_its_row(self, answer):
        row = {"article": "x", "question": "y", "options": ["1", "2", "3", "4"], "answer": answer}
        with pytest.raises(ValueError, match=r"row 3: the answer must be one of A, B, C, D; got"):
            placed(reading.TASKS["race_high"].example, row, "row 3")

    def test_quails_xml_and_rows_of_the_hub_are_the_same(self):
        row = {
            "context": "It rained.",
            "question": "What did it do?",
            "answers": ["rain", "shine", "snow", "not enough information"],
            "correct_answer_id": 0,
        }
        example = placed(reading.TASKS["quail"].example, row, "here")
        assert example.answer == "answer1"
        first = examples("quail", "test")[0]
        assert first.source == "quail/quail_1.3_dev_randomized.xml, text f0, question 0"
        assert "& kept it.\nNobody" in first.prompt
        assert "\n   " not in first.prompt

    def test_broken_xml_names_its_file(self, tmp_path):
        path = tmp_path / "quail.xml"
        path.write_text("<data><text>")
        with pytest.raises(ValueError, match=r"quail.xml: not XML \(no element found"):
            list(reading.read_quail(path))
        path.write_text(
            '<data><text id="f1"><text_body>x</text_body><q id="2">?<a correct="False">y</a></q></text></data>'
        )
        with pytest.raises(
            ValueError, match=r"text f1, question 2: exactly one answer must be marked correct; got 0"
        ):
            list(reading.read_quail(path))

    @pytest.mark.parametrize("number", ["A", None, "1.5"])
    def test_an_answer_that_is_no_number_names_its_row(self, number):
        row = {"context": "x", "question": "y", "answers": ["1", "2"], "correct_answer_id": number}
        with pytest.raises(
            ValueError, match=rf"row 3: correct_answer_id must be the number .*; got {number!r}"
        ):
            placed(reading.TASKS["quail"].example, row, "row 3")

    def test_an_empty_passage_or_a_missing_choice_is_refused(self):
        with pytest.raises(ValueError, match="the passage is empty"):
            reading.multiple_choice("quail", " ", "q", ["a", "b"], 0)
        with pytest.raises(ValueError, match=r"the answer must be one of the 2 choices; got number 3"):
            reading.multiple_choice("quail", "p", "q", ["a", "b"], 2)


def as_hub_rows(task, split):
    """Rows of RACE's articles in the hub's format."""
    for row, where in read_rows(reading.TASKS[task], split, local())[0]:
        yield {"example_id": "x", **row}, where


class TestSpans:
    def test_the_prompt_ends_in_the_question(self):
        row = {
            "context": "It rained.",
            "question": " What did it do? ",
            "answers": {"text": ["rained", "rained"]},
        }
        example = placed(spans.TASKS["squad"].example, row, "here")
        assert example.prompt == (
            "Passage: It rained.\n\nPlease answer the question with words of the passage: What did it do?\n"
        )
        assert (example.target, example.answer) == (TRIGGER + "rained", '["rained"]')

    def test_a_question_without_answer_is_refused(self):
        row = {"context": "x", "question": "y", "answers": {"text": []}}
        with pytest.raises(ValueError, match=r"row 3: the row has no answer; .*SQuAD 2.0"):
            placed(spans.TASKS["squad"].example, row, "row 3")

    def test_nested_json_without_a_key_names_the_place(self, tmp_path):
        path = tmp_path / "dev.json"
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "x", "qa": []}]}]}))
        with pytest.raises(ValueError, match=r"article 0, paragraph 0: no column 'qas'; did you mean 'qa'\?"):
            list(spans.read_squad(path))
        path.write_text("[]")
        with pytest.raises(ValueError, match=r"an object with a list 'data'; got list"):
            list(spans.read_squad(path))

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (TRIGGER + " the attic \n\nPassage: more", "the attic"),
            ("so " + TRIGGER + "a. " + TRIGGER + "b", "a. " + TRIGGER + "b"),
            (TRIGGER + "\nthe attic", "the attic"),
            ("the attic", None),
        ],
    )
    def test_the_answer_is_what_follows_the_phrase_on_its_line(self, text, answer):
        assert extract(text) == answer

    @pytest.mark.parametrize(
        ("text", "compared"),
        [
            ("The  Pro-Bowl,\ta game!", ["probowl", "game"]),
            ("an apple and another", ["apple", "and", "another"]),
            ("Theory of A. the", ["theory", "of"]),
            ("$5.20", ["520"]),
            ("Zoë’s", ["zoë’s"]),  # only ASCII punctuation is removed
            ("the", []),
        ],
    )
    def test_case_punctuation_articles_and_space_do_not_count(self, text, compared):
        assert words(text) == compared

    def test_f1_is_the_harmonic_mean_of_precision_and_recall(self):
        assert f1(words("the red kite"), words("a red kite of paper")) == pytest.approx(2 * 1 * 0.5 / 1.5)
        assert f1(["a", "a"], ["a"]) == pytest.approx(2 * 0.5 * 1 / 1.5)  # repeated words count
        assert f1(["x"], ["y"]) == 0.0
        assert (f1([], []), f1([], ["x"])) == (1.0, 0.0)

    def test_the_best_gold_answer_counts(self):
        assert judge(TRIGGER + "Broncos!", "Denver Broncos", "the Broncos").scores == {
            "exact_match": 1.0,
            "f1": 1.0,
        }
        assert judge(TRIGGER + "Denver", "Denver Broncos", "Broncos").scores == {
            "exact_match": 0.0,
            "f1": pytest.approx(2 / 3),
        }

    def test_an_answer_of_articles_alone_equals_itself(self):
        assert judge(TRIGGER + "The", "the").scores == {"exact_match": 1.0, "f1": 1.0}

    def test_a_text_without_the_phrase_scores_0_and_is_missing(self):
        assert judge("Broncos", "Broncos") == (None, {"exact_match": 0.0, "f1": 0.0})

    def test_several_texts_give_their_mean(self):
        example = Example("squad", "p", TRIGGER + "x", '["x y"]')
        found = score([TRIGGER + "x y", TRIGGER + "x", "nothing", TRIGGER + "z"], example)
        assert found == ("x y", {"exact_match": 0.25, "f1": pytest.approx((1 + 2 / 3) / 4)})


class TestFiles:
    """As in other formats, a byte order mark and capitals are allowed, and errors name broken files."""

    FILES = (
        (reading.read_quail, "quail/quail_1.3_dev_randomized.xml"),
        (spans.read_squad, "squad/train-v1.1.json"),
    )

    @pytest.mark.parametrize(("read", "name"), FILES)
    def test_a_byte_order_mark_and_gz_in_capitals_change_nothing(self, tmp_path, read, name):
        content = (FIXTURES / name).read_bytes()
        path = tmp_path / f"{Path(name).name}.GZ"
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
        assert [row for row, _ in read(path)] == [row for row, _ in read(FIXTURES / name)]

    @pytest.mark.parametrize(("read", "name"), FILES)
    def test_another_encoding_and_a_broken_gzip_file_are_named(self, tmp_path, read, name):
        path = tmp_path / Path(name).name
        path.write_bytes(b"\xff" + (FIXTURES / name).read_bytes())
        with pytest.raises(ValueError, match=rf"{path.name}, line 1: not UTF-8 text"):
            list(read(path))
        path = path.with_name(path.name + ".gz")
        path.write_bytes(b"plain text")
        with pytest.raises(ValueError, match=rf"{path.name}: not a complete gzip file"):
            list(read(path))


def about(*counts, task="t"):
    """Rows about passages with the given numbers of questions."""
    return [
        Example(task, prompt_about(f"{task} {i}", "say: ", f"{j}?"), "x", "x")
        for i, count in enumerate(counts)
        for j in range(count)
    ]


class TestValidationRows:
    @pytest.mark.parametrize("family", [reading.FAMILY, spans.FAMILY])
    @pytest.mark.parametrize("seed", range(5))
    def test_no_passage_is_trained_on_and_validated(self, family, seed):
        rows = [
            e for task in family.tasks.values() if "train" in task.local for e in examples(task.name, "train")
        ]
        train, validation = family.carve(rows, 4, seed, lambda e: e.task)
        assert 4 <= len(validation) < 4 + max(Counter(map(passage_of, rows)).values())
        assert not set(map(passage_of, train)) & set(map(passage_of, validation))
        assert sorted(train + validation, key=rows.index) == rows

    @pytest.mark.parametrize("size", [1, 5, 18, 19, 60])
    def test_the_size_is_reached_and_exceeded_by_less_than_a_passage(self, size):
        rows = about(*[18] * 3, task="long") + about(*[2] * 40, task="short")
        train, validation = carve_passages(rows, size, 0)
        assert size <= len(validation) < size + 18
        assert len(train) + len(validation) == len(rows)

    def test_passages_of_one_question_are_held_out_to_the_row(self):
        assert len(carve_passages(about(*[1] * 50), 17, 0)[1]) == 17

    def test_the_split_depends_on_its_seed_and_the_rows_alone(self):
        rows = about(*[3] * 20)
        assert carve_passages(rows, 9, 1) == carve_passages(rows, 9, 1)
        assert carve_passages(rows, 9, 1) != carve_passages(rows, 9, 2)

    def test_each_task_gives_its_share(self):
        rows = about(*[2] * 35, task="a") + about(*[2] * 10, task="b") + about(*[2] * 5, task="c")
        assert Counter(e.task for e in carve_passages(rows, 20, 0)[1]) == {"a": 14, "b": 4, "c": 2}

    def test_a_passage_of_two_tasks_is_held_out_of_both(self):
        rows = about(*[2] * 8)
        rows += [Example("u", e.prompt.replace("?", "!"), "x", "x") for e in rows]
        train, validation = carve_passages(rows, 5, 0)
        assert len(validation) == 8
        assert not set(map(passage_of, train)) & set(map(passage_of, validation))

    def test_a_repeated_row_is_validated_once_and_not_trained_on(self):
        rows = about(*[2] * 5) * 2
        train, validation = carve_passages(rows, 4, 0)
        assert (len(validation), len(train)) == (4, 12)
        assert validation == sorted(set(validation), key=rows.index)

    def test_no_validation_rows_are_possible(self):
        assert carve_passages(about(3), 0, 0) == (about(3), [])

    @pytest.mark.parametrize(
        ("size", "words"),
        [(-1, "must be at least 0; got -1"), (4, "=4 needs all 2 passages of the 6 distinct train")],
    )
    def test_an_impossible_size_is_refused(self, size, words):
        with pytest.raises(ValueError, match=f"validation_size.*{words}"):
            carve_passages(about(3, 3), size, 0)

    def test_a_passage_that_asks_please_itself_is_still_one(self):
        rows = [
            reading.multiple_choice("quail", "Hi.\n\nPlease come.\n\nPlease stay.", q, ["a", "b"], 0)
            for q in ("x", "y\n\nPlease z")
        ]
        assert len(set(map(passage_of, rows))) == 1
        assert passage_of(about(1)[0]) == "t 0"

    @pytest.mark.parametrize(
        ("passage", "words"), [(" ", "the passage is empty"), (3, "context must be text; got 3")]
    )
    def test_a_passage_that_is_not_text_names_its_row(self, passage, words):
        row = {"context": passage, "question": "y", "answers": {"text": ["x"]}}
        with pytest.raises(ValueError, match=f"row 3: {words}"):
            placed(spans.TASKS["squad"].example, row, "row 3")


# ------------------------------------------------------------------------------------- real rows


@pytest.fixture
def real(shared):
    return local(shared / "data" / "reading")


@pytest.mark.shared
@pytest.mark.parametrize(("task", "rows"), [("quail", 2164), ("xquad_en", 1190)])
def test_every_row_reads_and_gold_against_gold_scores_1(real, task, rows):
    found = examples(task, "test", real)
    family = FAMILY_OF[task]
    assert len(found) == rows
    perfect = dict.fromkeys(family.measures, 1.0)
    for example in found:
        answer, scores = family.score([example.target], example)
        assert (scores, answer is None) == (perfect, False), example.source


@pytest.mark.shared
def test_quails_rows_have_four_answers_and_every_position_is_right_sometimes(real):
    found = examples("quail", "test", real)
    assert {len(example.options) for example in found} == {4}
    counts = [sum(e.answer == f"answer{i}" for e in found) for i in range(1, 5)]
    assert min(counts) > 400


@pytest.mark.shared
def test_every_gold_answer_of_xquad_stands_in_its_passage(real):
    for example in examples("xquad_en", "test", real):
        passage = " ".join(example.prompt.split())
        assert all(gold in passage for gold in json.loads(example.answer)), example.source


@pytest.mark.shared
def test_fixture_rows_match_the_real_schema(real):
    for task in ("quail", "xquad_en"):
        mine, theirs = (read_rows(FAMILY_OF[task].tasks[task], "test", s)[0][0][0] for s in (local(), real))
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in theirs.items()}
