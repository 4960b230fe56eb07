"""The code family: prompts, cutting, programs, pass@k, sources."""

import json
from pathlib import Path

import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import encode
from reft_lightning.data.example import placed
from reft_lightning.data.families.code import DONE, FAMILY, TASKS, cut, program, score
from reft_lightning.data.rows import DataSource, read_rows
from reft_lightning.evaluation import run_programs

FIXTURES = Path(__file__).parents[2] / "fixtures" / "code"
NAMES = ("humaneval", "mbpp", "mbpp_validation", "mbpp_sanitized")
MBPP = NAMES[1:]


def local(folder=FIXTURES):
    return DataSource("local", str(folder))


def examples(task, split, source=None):
    rows, _ = read_rows(TASKS[task], split, source or local())
    return [placed(TASKS[task].example, row, where) for row, where in rows]


@pytest.fixture(params=NAMES)
def found(request):
    return examples(request.param, "test")


class TestFamily:
    def test_every_task_has_test_rows_and_all_but_humaneval_train_rows(self):
        assert tuple(TASKS) == NAMES
        for name, task in TASKS.items():
            splits = {"test"} if name == "humaneval" else {"train", "test"}
            assert set(task.hub) == set(task.local) == splits

    def test_no_stop_string_of_the_family_occurs_in_a_solution(self, found):
        for example in found:
            assert not any(
                stop in example.target.removesuffix(DONE) for stop in FAMILY.tasks[example.task].stop_strings
            )


class TestPrompts:
    def test_humaneval_is_asked_as_it_stands(self):
        rows, _ = read_rows(TASKS["humaneval"], "test", local())
        for (row, where), example in zip(rows, examples("humaneval", "test"), strict=True):
            assert (example.prompt, example.target) == (row["prompt"], row["canonical_solution"])
            assert example.source == where

    def test_the_indentation_of_the_first_line_is_learnt(self):
        tokenizer = byte_tokenizer()
        for example in examples("humaneval", "test"):
            target = tokenizer.decode(encode(tokenizer, example, 4096).target_ids[:-1])
            assert target.startswith("    ")
            assert target == example.target

    def test_mbpp_is_asked_as_published(self):
        example = examples("mbpp", "test")[0]
        assert example.prompt == (
            "You are an expert Python programmer, and here is your task: Write a function to sum a pair "
            "(number 11). Your code should pass these tests:\n\nassert total(pair) + 1 == 3 + 1\n"
            "assert total(pair) + 2 == 3 + 2\nassert total(pair) + 3 == 3 + 3\n[BEGIN]\n"
        )

    @pytest.mark.parametrize("task", MBPP)
    def test_mbpp_code_has_plain_line_ends_and_ends_in_done(self, task):
        for example in examples(task, "train"):
            assert "\r" not in example.target + example.prompt
            assert example.target.endswith(f"\n{DONE}")

    def test_rows_are_the_published_splits(self):
        numbers = {
            (task, split): [row["task_id"] for row, _ in read_rows(TASKS[task], split, local())[0]]
            for task in MBPP
            for split in ("train", "test")
        }
        train, test = [601, 602, 603, 604, 605, 974], [11, 12, 13, 14, 510]
        assert numbers == {
            ("mbpp", "train"): train,
            ("mbpp", "test"): test,
            ("mbpp_validation", "train"): train,
            ("mbpp_validation", "test"): [511, 512, 600],
            ("mbpp_sanitized", "train"): train,
            ("mbpp_sanitized", "test"): test,
        }

    def test_humaneval_has_no_train_rows(self):
        with pytest.raises(
            ValueError, match=r"humaneval has no train split in source local; available: .*\(test\)"
        ):
            examples("humaneval", "train")

    def test_a_row_without_tests_is_refused(self):
        row = {"text": "Do.", "code": "x = 1", "task_id": 11, "test_list": []}
        with pytest.raises(ValueError, match=r"row 3: test_list is empty"):
            placed(TASKS["mbpp"].example, row, "row 3")
        row = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "entry_point": "f", "test": "pass"}
        with pytest.raises(ValueError, match=r"row 4: the test must define a function check"):
            placed(TASKS["humaneval"].example, row, "row 4")


class TestScore:
    @pytest.fixture
    def doubled(self):
        return examples("humaneval", "test")[0]

    @pytest.mark.parametrize(
        "after",
        [
            "\ndef g():\n    broken(",
            "\nclass A(",
            "\n# so",
            "\nif __name__",
            "\nprint(doubled([",
            "\n\n\ndef other",
        ],
    )
    def test_text_after_the_body_does_not_count(self, doubled, after):
        assert score([doubled.target + after], doubled).scores == {"pass@1": 1.0}

    def test_what_is_indented_belongs_to_the_body(self, doubled):
        text = "    def twice(x):\n        return 2 * x\n    # all\n    return [twice(x) for x in xs]\n"
        assert cut(text, TASKS["humaneval"].stop_strings) == text
        assert score([text], doubled).scores == {"pass@1": 1.0}

    @pytest.mark.parametrize(
        "text",
        ["    return xs\n", "    return [\n", "return [2 * x for x in xs]\n", "    exit(0)\n", "\n", ""],
    )
    def test_wrong_and_broken_programs_fail(self, doubled, text):
        assert score([text], doubled).scores == {"pass@1": 0.0}

    def test_leaving_early_does_not_pass(self, doubled):
        for call in ("import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit(0)"):
            assert score([f"    {call}\n"], doubled).scores == {"pass@1": 0.0}

    def test_a_blank_text_has_no_answer(self, doubled):
        assert score(["\ndef g(): pass"], doubled).answer is None
        assert score(["    return xs\nprint(1)"], doubled).answer == "    return xs"

    def test_samples_give_pass_at_k_up_to_their_number(self, doubled):
        right, wrong = doubled.target, "    return xs\n"
        assert score([right] + [wrong] * 9, doubled).scores == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}
        assert set(score([wrong] * 100, doubled).scores) == set(FAMILY.measures)

    def test_mbpp_text_ends_at_done_and_its_setup_follows_the_code(self):
        pair = examples("mbpp", "test")[0]
        assert "Pair(1, 2)" in json.loads(pair.answer)["after"]
        assert score([pair.target + "\nfor ever and ever"], pair).scores == {"pass@1": 1.0}
        assert score(["def total(p):\n    return p\n"], pair).scores == {"pass@1": 0.0}

    def test_a_template_around_the_prompt_does_not_reach_the_program(self, doubled):
        from dataclasses import replace

        dressed = replace(doubled, prompt=f"### Instruction:\n{doubled.prompt}\n### Response:\n")
        assert score([doubled.target], dressed).scores == {"pass@1": 1.0}


# ------------------------------------------------------------------------------------- real rows


@pytest.fixture
def real(shared):
    return DataSource("local", str(shared / "data" / "code"))


def outcomes_of(found, change=lambda text: text):
    return run_programs([program(change(example.target), example) for example in found])


# number of real rows per test, as programs take a while; `slow` runs them all
FEW_OR_ALL = pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])


def failures(found):
    return {e.source: o.reason for e, o in zip(found, outcomes_of(found), strict=True) if not o.passed}


@pytest.mark.shared
@FEW_OR_ALL
def test_canonical_solutions_of_humaneval_pass(real, step):
    found = examples("humaneval", "test", real)
    assert (len(found), failures(found[::step])) == (164, {})
    assert all(cut(example.target, TASKS["humaneval"].stop_strings) == example.target for example in found)
    assert all(example.prompt.endswith("\n") for example in found)


@pytest.mark.shared
@FEW_OR_ALL
def test_broken_solutions_of_humaneval_fail(real, step):
    found = examples("humaneval", "test", real)[::step]
    for change in (lambda text: "    return None\n", lambda text: text.replace("return", "retrun")):
        assert not any(outcome.passed for outcome in outcomes_of(found, change))


@pytest.mark.shared
@FEW_OR_ALL
@pytest.mark.parametrize(
    ("task", "split", "rows"),
    [("mbpp", "train", 374), ("mbpp_validation", "test", 90), ("mbpp_sanitized", "train", 120)],
)
def test_mbpp_rows_pass_with_their_own_code(real, task, split, rows, step):
    found = examples(task, split, real)
    assert (len(found), failures(found[::step])) == (rows, {})


@pytest.mark.shared
def test_fixture_rows_match_the_real_schema(real):
    for task, split in (("humaneval", "test"), ("mbpp", "train"), ("mbpp_sanitized", "train")):
        mine, theirs = (read_rows(TASKS[task], split, source)[0][0][0] for source in (local(), real))
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in theirs.items()}


@pytest.mark.shared
def test_a_sentencepiece_tokenizer_keeps_the_indentation(shared, real):
    from reft_lightning.base_models.loading import load_tokenizer

    tokenizer = load_tokenizer(source="local", path=str(shared / "models" / "stories260K"))
    for example in examples("humaneval", "test", real)[:40]:
        encoded = encode(tokenizer, example, 4096)
        assert encoded.joint
        whole = tokenizer.decode(encoded.prompt_ids + encoded.target_ids[:-1], skip_special_tokens=True)
        assert whole == example.prompt + example.target
