"""The arithmetic family and GSM8K on its own: laws of every family, pitfalls of extraction, sources, overlap."""

import logging
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.config.compose import compose, config_dir
from reft_lightning.data.example import Example, normalized, placed
from reft_lightning.data.families import arithmetic, gsm8k
from reft_lightning.data.families.arithmetic import says, score
from reft_lightning.data.families.extraction import (
    equals,
    first_letter,
    is_number,
    last_number,
    stated_letter,
)
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.prompts import alpaca
from reft_lightning.data.rows import DataSource, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "arithmetic"
TASKS = arithmetic.TASKS
NAMES = ("AQuA", "gsm8k", "mawps", "SVAMP", "AddSub", "MultiArith", "SingleEq")
BOTH = {"accuracy": 1.0, "strict_accuracy": 1.0}
FAMILIES = {"arithmetic": arithmetic.FAMILY, "gsm8k": gsm8k.FAMILY}


def local(layout):
    return DataSource("local", str(FIXTURES / layout))


def examples(task, split, source, family=arithmetic.FAMILY):
    rows, _ = read_rows(family.tasks[task], split, source)
    return [placed(family.tasks[task].example, row, where) for row, where in rows]


def gold(answer):
    return Example("task", "question", says(answer), answer)


def judge(text, answer):
    return score([text], gold(answer)).scores


class TestFamily:
    def test_every_task_has_test_rows_in_the_layout_of_llm_adapters(self):
        assert tuple(TASKS) == NAMES
        assert all(task.local["test"][0].files == (f"{name}/test.json",) for name, task in TASKS.items())


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("4 and then 7 birds", "7"),
            ("That makes 1,234,567 in all.", "1234567"),
            ("it falls to -3", "-3"),
            ("She pays $5.", "5"),
            ("$1,080.50", "1080.50"),
            ("a share of 12.5%", "12.5"),
            ("the answer is 0.6666666666666666", "0.6666666666666666"),
            ("2 1/2", "2"),
            ("12 ²", "12"),
        ],
    )
    def test_the_last_number_is_read_without_commas_signs_and_full_stop(self, text, number):
        assert last_number(text) == number

    @pytest.mark.parametrize(("text", "number"), [("1e5", "5"), ("8-3", "-3"), ("1, 2,3", "23"), (".5", "5")])
    def test_the_published_rule_reads_these_wrong_and_so_do_we(self, text, number):
        assert last_number(text) == number

    @pytest.mark.parametrize("text", ["", "no idea", "twelve", "-", ". , %"])
    def test_without_a_digit_there_is_no_number_and_nothing_is_right(self, text):
        assert last_number(text) is None
        judged = score([text], gold("0"))
        assert judged.answer is None
        assert judged.scores == {"accuracy": 0.0, "strict_accuracy": 0.0}

    @pytest.mark.parametrize(
        ("text", "answer", "right"),
        [
            ("5", "5.0", True),
            ("5.0009", "5", True),
            ("5.0011", "5", False),
            ("1.833", "1.8333333333333335", True),
            ("1.83", "1.8333333333333335", False),
            ("100000", "1e5", True),
            ("-15", "-15.0", True),
            ("15", "-15.0", False),
            ("50%", "0.5", False),
            ("1" * 400, "1", False),
        ],
    )
    def test_a_number_is_right_within_a_thousandth(self, text, answer, right):
        assert judge(text, answer) == {"accuracy": float(right), "strict_accuracy": float(right)}

    def test_nan_and_infinity_are_no_gold_numbers(self):
        assert [is_number(text) for text in ("nan", "inf", "-inf", "B", "", "1e5", "-0.5")] == [False] * 5 + [
            True
        ] * 2
        assert judge("nan", "nan") == {"accuracy": 0.0, "strict_accuracy": 0.0}
        assert not equals("3", "nan")
        for value in ("nan", "inf", float("nan"), "B", ""):
            with pytest.raises(ValueError, match=r"row 3: the answer must be a finite number"):
                placed(
                    TASKS["AddSub"].example,
                    {"instruction": "How many?", "output": "", "answer": value},
                    "row 3",
                )


class TestLetters:
    @pytest.mark.parametrize(
        ("text", "first", "stated"),
        [
            ("The answer is (B).", "B", "B"),
            ("Rationale: the cost is 4. The answer is (C).", "C", "C"),
            ("A train takes 2 h. The answer is (D).", "A", "D"),  # a letter that is a word
            ("Every part counts, so the answer is D.", "E", "D"),  # a letter inside a word
            ("Add both.\nAnswer: E", "A", "E"),
            ("ANSWER:B", "A", "B"),
            ("correct option is D", "D", "D"),
            ("Let us see: the answer is option C, 45 km", "C", "C"),
            ("Hence B) 69", "B", None),
            ("the answer is A train", "A", None),
            ("the answer is Dora", "D", None),
            ("Answer Choices: (A) 1 (B) 2", "A", None),  # repeats the question
            ("first the answer is A. No: the answer is E.", "A", "E"),  # the last statement counts
            ("it must be the third, (C)", "C", "C"),
            (" D. ", "D", "D"),
            ("the answer is b", None, None),
            ("42", None, None),
            ("", None, None),
        ],
    )
    def test_the_published_rule_takes_the_first_capital_and_the_strict_one_what_is_stated(
        self, text, first, stated
    ):
        assert (first_letter(text), stated_letter(text)) == (first, stated)

    def test_the_two_measures_can_disagree(self):
        assert judge("A train. The answer is (D).", "D") == {"accuracy": 0.0, "strict_accuracy": 1.0}
        assert judge("Dora says so.", "D") == {"accuracy": 1.0, "strict_accuracy": 0.0}

    def test_a_text_without_any_capital_is_counted_as_missing(self):
        assert score(["none"], gold("A")).answer is None

    @pytest.mark.parametrize("value", ["F", "a", "", None, "AB", "4"])
    def test_a_gold_letter_outside_a_to_e_is_refused(self, value):
        with pytest.raises(ValueError, match=r"row 9: the answer must be one of A, B, C, D, E"):
            placed(TASKS["AQuA"].example, {"instruction": "Which?", "answer": value}, "row 9")


class TestSamples:
    def test_several_samples_of_a_row_score_their_share(self):
        judged = score(["4", "The answer is 5.", "none", "5.0"], gold("5"))
        assert judged.answer == "4"
        assert judged.scores == {"accuracy": 0.5, "strict_accuracy": 0.5}
        found = score(["A train. The answer is (B).", "The answer is (B)."], gold("B"))
        assert found.scores == {"accuracy": 0.5, "strict_accuracy": 1.0}
        assert gsm8k.FAMILY.score(["7", "8"], gold("8")).scores == {"accuracy": 0.5}


class TestRows:
    def test_a_prompt_is_the_instruction_as_it_stands_under_alpacas_header(self):
        found = examples("MultiArith", "test", local("rendered"))[0]
        assert found.prompt.startswith(" ")  # MultiArith's own blank, which the authors keep
        read = alpaca(found).prompt
        assert read.endswith(f"\n\n### Instruction:\n{found.prompt}\n\n### Response:\n")
        assert read.startswith("Below is an instruction that describes a task. Write a response")

    def test_test_targets_are_bare_sentences_not_the_outputs_of_a_model(self):
        found = examples("AddSub", "test", local("rendered"))
        assert all(e.target == says(e.answer) for e in found)
        assert (says("6.0"), says("0.25"), says("B")) == (
            "The answer is 6.",
            "The answer is 0.25.",
            "The answer is (B).",
        )

    def test_gsm8k_rationales_lose_their_calculator_annotations(self):
        found = examples("gsm8k", "train", local("original"))
        assert found[1].answer == "83300"  # "83,300" in the file
        assert found[1].target == (
            "Count both: 83000+300 = 83300.\nThat is 83300 in all.\nThe answer is 83300."
        )
        assert not any("<<" in e.target for e in found)

    def test_aqua_rationales_hold_no_capital_that_the_published_rule_could_take(self):
        found = examples("AQuA", "train", local("original"))
        assert all(re.findall("[A-E]", e.target) == [e.answer] for e in found)
        assert found[0].target == (
            "both heaps together: a + b = 57. cost plays no part, dora says\nThe answer is (A)."
        )

    def test_original_aqua_and_svamp_rows_read_as_in_llm_adapters(self):
        for task in ("AQuA", "SVAMP", "gsm8k"):
            mine, theirs = (examples(task, "test", local(x)) for x in ("original", "rendered"))
            assert [e.prompt for e in mine] == [e.prompt for e in theirs]
            if task == "AQuA":
                assert [e.answer for e in mine] == [e.answer for e in theirs]
            else:
                assert all(equals(a.answer, b.answer) for a, b in zip(mine, theirs, strict=True))

    def test_an_option_without_its_letter_is_taken_whole(self):
        row = {"question": "Q", "options": ["A)1", "2", "C) 3", "A", "E)"], "rationale": "r", "correct": "A"}
        example = placed(TASKS["AQuA"].example, row, "here")
        assert example.prompt == "Q Answer Choices: (A) 1 (B) 2 (C)  3 (D) A (E) "

    def test_a_mixture_row_is_learnt_as_it_stands(self):
        row = {
            "instruction": "How many?",
            "input": "",
            "output": "\nA: Some. The answer is 5.",
            "answer": "6.0",
        }
        example = placed(arithmetic.FAMILY.mixture_example, row, "math_10k.json, row 1")
        assert (example.prompt, example.target, example.answer) == ("How many?", row["output"], "6.0")
        with pytest.raises(ValueError, match="row 2: the output is empty, so there is nothing to learn"):
            placed(arithmetic.FAMILY.mixture_example, row | {"output": " "}, "row 2")
        with pytest.raises(ValueError, match="row 3: the template has no place for input 'more'"):
            placed(arithmetic.FAMILY.mixture_example, row | {"input": "more"}, "row 3")

    def test_broken_rows_name_their_row(self):
        with pytest.raises(ValueError, match=r"row 4: the answer has no '####' before its number: '5'"):
            placed(TASKS["gsm8k"].example, {"question": "How many?", "answer": "5"}, "row 4")
        with pytest.raises(ValueError, match=r"row 5: no column 'correct'.*question, options, rationale"):
            placed(TASKS["AQuA"].example, {"question": "Q", "options": ["A)1"], "rationale": "r"}, "row 5")
        row = {"question": "Q", "options": ["A)1", "C)2"], "rationale": "r", "correct": "A"}
        with pytest.raises(ValueError, match=r"row 6: option B must begin with 'B\)'; got 'C\)2'"):
            placed(TASKS["AQuA"].example, row, "row 6")

    def test_what_the_hub_lacks_is_said(self):
        for task in ("mawps", "AddSub", "SingleEq"):
            with pytest.raises(
                ValueError, match=rf"{task} has no test split in source hub; available: local"
            ):
                read_rows(TASKS[task], "test", DataSource("hub"))
            assert "dataset/ of the LLM-Adapters repository" in TASKS[task].notes["hub"]


class TestGsm8k:
    def test_prompt_and_target_are_loftqs(self):
        example = examples("gsm8k", "train", local("original"), gsm8k.FAMILY)[1]
        question, request, rest = example.prompt.split("\n")
        assert question.endswith("How many mivles does Dora have now?")
        assert (
            request == "Answer the above question. First think step by step and then answer the final number."
        )
        assert rest == ""
        assert "<<83000+300=83300>>83300" in example.target
        assert example.target.endswith(
            "\nThe final answer is:  83,300"
        )  # two blanks, as in the authors' code
        assert example.answer == "83300"

    def test_the_last_rows_validate(self):
        rows = [Example("gsm8k", f"question {i}", "", "") for i in range(10)]
        train, validation = gsm8k.carve_last(rows, 3, seed=7)
        assert (train, validation) == (rows[:7], rows[7:])
        assert gsm8k.carve_last(rows, 0) == (rows, [])

    def test_a_train_row_that_repeats_a_validation_question_is_left_out(self):
        rows = [Example("gsm8k", f"question {i % 4}", "", str(i)) for i in range(6)]
        train, validation = gsm8k.carve_last(rows, 2)
        assert [e.answer for e in train] == ["2", "3"]
        assert [e.answer for e in validation] == ["4", "5"]

    @pytest.mark.parametrize("size", [-1, 10, 11])
    def test_a_validation_that_leaves_no_train_row_is_refused(self, size):
        rows = [Example("gsm8k", f"question {i}", "", "") for i in range(10)]
        with pytest.raises(
            ValueError, match=rf"validation_size must be in 0..9 with 10 train rows; got {size}"
        ):
            gsm8k.carve_last(rows, size)


def make(family, layout, **arguments):
    source = arguments.pop("source", None) or local(layout)
    settings = {"batch_size": 2, "eval_batch_size": 4, "max_length": 4096, "validation_size": 2}
    return GenerationData(FAMILIES[family], byte_tokenizer(), source, **settings | arguments)


class TestOverlap:
    @pytest.mark.parametrize(
        ("one", "other"),
        [("What is 2 - 3?", "What is 2 + 3?"), ("x < y", "x > y"), ("🙂", "🙁"), ("5%", "$5"), ("...", "?!")],
    )
    def test_questions_that_differ_in_a_symbol_are_not_the_same(self, one, other):
        assert normalized(one) != normalized(other)
        assert "" not in (normalized(one), normalized(other))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("What is 2+3 ?", "what  is\n(2 + 3)"),
            ("“Tom’s” cat.", '"Tom\'s" cat'),
            ("One, two; three!", "one two three"),
        ],
    )
    def test_case_space_and_the_punctuation_of_sentences_do_not_count(self, one, other):
        assert normalized(one) == normalized(other)

    def test_a_mixture_file_is_measured_too(self, caplog):
        source = DataSource(
            "local", str(FIXTURES / "rendered"), mixture=str(FIXTURES / "rendered/AddSub/test.json")
        )
        data = make("arithmetic", "", source=source, tasks=["AddSub", "SingleEq"])
        with caplog.at_level(logging.WARNING):
            data.setup("fit")
            data.setup("test")
        assert data.data_versions["test"]["AddSub"]["overlap"] == 6
        assert data.data_versions["test"]["SingleEq"]["overlap"] == 0


PAPER = sorted(
    path.stem
    for path in (config_dir() / "experiment" / "paper").glob("*.yaml")
    if path.stem.startswith(("arithmetic_", "ablation_"))
)


class TestConfigs:
    @pytest.mark.parametrize("name", [name for name in PAPER if "13b" in name])
    def test_the_larger_model_has_the_settings_of_the_smaller_one(self, name):
        larger, smaller = (
            OmegaConf.load(config_dir() / "experiment" / "paper" / f"{own}.yaml")
            for own in (name, name.replace("13b", "7b"))
        )
        assert OmegaConf.to_yaml(larger).replace("13b", "7b") == OmegaConf.to_yaml(smaller)

    @pytest.mark.parametrize("name", [name for name in PAPER if "7b" in name])
    def test_they_have_the_papers_settings(self, name):
        config = compose([f"experiment=paper/{name}", "data.path=folder", "data.mixture=math_10k.json"])
        method = config.intervention.method
        direft = method == "direft"
        assert f"_{method}" in name
        assert (config.intervention.rank, config.intervention.positions, config.intervention.tied) == (
            8,
            "f7+l7",
            "all",
        )
        three = name.endswith("3_epochs")
        assert config.trainer.max_epochs == (3 if three else 12)
        assert config.data.batch_size * config.trainer.accumulate_grad_batches == (16 if three else 32)
        assert config.optimizer.lr == 9e-4
        assert (
            config.scheduler.warmup_ratio,
            config.optimizer.weight_decay,
            config.intervention.dropout,
        ) == ((0.0, 0.06, 0.05) if direft else (0.1, 0.0, 0.0))
        assert config.data.tasks == ["AQuA", "gsm8k", "mawps", "SVAMP"]
        assert (config.data.train_tasks, config.data.validation_size) == (None, 0)
        decoding = config.decoding
        assert (decoding.do_sample, decoding.temperature, decoding.top_p, decoding.top_k) == (
            True,
            0.3,
            0.75,
            40,
        )
        assert (decoding.num_beams, decoding.max_new_tokens) == (4, 512)

    def test_greedy_decoding_can_be_chosen_instead(self):
        config = compose(
            ["experiment=paper/arithmetic_llama_7b_loreft", "data.path=folder", "decoding=greedy"]
        )
        assert (config.decoding.do_sample, config.decoding.num_beams, config.decoding.max_new_tokens) == (
            False,
            1,
            None,
        )
        assert arithmetic.FAMILY.max_new_tokens == 512

    def test_the_tuning_command_reads_no_test_row_and_validates_on_300(self):
        config = compose(["experiment=paper/gsm8k_direft_tuning"])
        assert (config.test, config.data.validation_size, config.data.family) == (False, 300, "gsm8k")
        assert (config.intervention.rank, config.intervention.tied, config.intervention.method) == (
            4,
            "group",
            "direft",
        )
        assert config.data.batch_size * config.trainer.accumulate_grad_batches == 32
        assert not config.decoding.do_sample


# ------------------------------------------------------------------------------------- real rows

COUNTS = {
    ("AQuA", "train"): 254,  # dev
    ("AQuA", "test"): 254,
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("mawps", "train"): 1898,
    ("mawps", "test"): 238,
    ("AddSub", "test"): 395,
    ("MultiArith", "test"): 600,
    ("SingleEq", "test"): 508,
}


@pytest.fixture(scope="module")
def real(shared):
    source = DataSource("local", str(shared / "data" / "arithmetic"))
    return {key: examples(*key, source) for key in COUNTS}


def questions(found):
    return [normalized(e.prompt) for e in found]


@pytest.mark.shared
def test_every_real_file_has_its_rows_and_scores_1_against_itself(real):
    for key, found in real.items():
        assert len(found) == COUNTS[key]
        assert all(score([e.target], e).scores == BOTH for e in found), key


@pytest.mark.shared
def test_gsm8k_alone_reads_the_real_rows(shared):
    source = DataSource("local", str(shared / "data" / "arithmetic"))
    found = examples("gsm8k", "train", source, gsm8k.FAMILY)
    assert all(gsm8k.FAMILY.score([e.target], e).scores == {"accuracy": 1.0} for e in found)
    train, validation = gsm8k.carve_last(found, 300)
    assert (len(train), len(validation)) == (7173, 300)  # no question occurs twice
    assert len(examples("gsm8k", "test", source, gsm8k.FAMILY)) == 1319


@pytest.mark.shared
def test_the_rendered_and_the_original_gsm8k_test_are_the_same_questions(shared, real):
    from reft_lightning.data.rows import LocalRows, local_rows

    rows, _ = local_rows(shared / "data" / "arithmetic", (LocalRows(("gsm8k/test.jsonl",)),))
    original = {
        e.prompt: e.answer for e in (placed(TASKS["gsm8k"].example, row, where) for row, where in rows)
    }
    theirs = {e.prompt: e.answer for e in real["gsm8k", "test"]}
    assert set(original) == set(theirs)
    assert all(equals(original[question], theirs[question]) for question in theirs)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "rows", "distinct", "seen", "distinct_seen"),
    [("AddSub", 395, 395, 327, 327), ("MultiArith", 600, 580, 452, 432), ("SingleEq", 508, 507, 416, 415)],
)
def test_mawps_train_holds_most_of_the_questions_of_three_test_sets(
    real, task, rows, distinct, seen, distinct_seen
):
    train, test = set(questions(real["mawps", "train"])), questions(real[task, "test"])
    assert (len(test), len(set(test))) == (rows, distinct)
    assert sum(question in train for question in test) == seen
    assert len(set(test) & train) == distinct_seen


@pytest.mark.shared
def test_gsm8k_train_and_aqua_dev_hold_no_question_of_any_test_set(real):
    train = {*questions(real["gsm8k", "train"]), *questions(real["AQuA", "train"])}
    for (task, split), found in real.items():
        if split == "test":
            assert not train & set(questions(found)), task


@pytest.mark.shared
def test_the_published_letter_rule_reads_a_third_of_the_gold_rationales_of_aqua(shared):
    source = DataSource("local", str(shared / "data" / "arithmetic"))
    rows = [row for row, _ in read_rows(TASKS["AQuA"], "train", source)[0]]
    first = sum(first_letter(row["rationale"]) == row["correct"] for row in rows)
    stated = [stated_letter(row["rationale"]) for row in rows]
    assert (len(rows), first) == (254, 85)
    assert sum(letter == row["correct"] for letter, row in zip(stated, rows, strict=True)) == 210
    assert all(letter in (None, row["correct"]) for letter, row in zip(stated, rows, strict=True))


@pytest.mark.shared
def test_aqua_dev_in_place_of_train_is_reported(shared):
    _, facts = read_rows(TASKS["AQuA"], "train", DataSource("local", str(shared / "data" / "arithmetic")))
    assert facts["from"] == ["AQuA/dev.jsonl"]
    assert "stands in for train" in facts["note"]
