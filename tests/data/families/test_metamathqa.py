"""The data and the scorer of PEFT's method comparison: MetaMathQA to GSM8K."""

import numpy as np
import pytest
from comparison_rows import gsm8k_row, metamath_row

from reft_lightning.data import Example
from reft_lightning.data.example import placed
from reft_lightning.data.families.metamathqa import FAMILY, MOST_CHARACTERS, number, score, stated


def examples(train=6, questions=9):
    rows = [placed(FAMILY.task("metamathqa").example, metamath_row(i), f"m{i}") for i in range(train)]
    return rows + [
        placed(FAMILY.task("gsm8k").example, gsm8k_row(i, "train"), f"g{i}") for i in range(questions)
    ]


def test_a_row_becomes_what_the_protocol_says():
    example = placed(FAMILY.task("metamathqa").example, metamath_row(3), "row 3")
    assert example.prompt == "Question: What is 3 and 3? Think step by step.\nAnswer:"
    assert example.target == "3 + 3 = 6.\n#### 6\nThe answer is: 6"
    assert (example.answer, example.source) == ("6", "row 3")
    test = placed(FAMILY.task("gsm8k").example, gsm8k_row(4, "test"), "row 4")
    assert test.prompt == "Question: Of test, row 4: how many? Think step by step.\nAnswer:"
    assert (test.target, test.answer) == ("There are <<4+1=5>>5.\n#### 5", "5")
    with pytest.raises(ValueError, match="row 5: the answer has no '#### '"):
        placed(FAMILY.task("gsm8k").example, {"question": "?", "answer": "5"}, "row 5")
    with pytest.raises(ValueError, match="row 6: no column 'query'"):
        placed(FAMILY.task("metamathqa").example, {"question": "?"}, "row 6")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 1 = 2. The answer is: 2", "2"),
        ("so $4^2 = \\boxed{16}$.The answer is: $16$.", "16"),
        ("The answer is: 3\nQuestion: more", "3"),
        ("The answer is: 3. The answer is: 4!", "4"),
        ("The answer is 50%.", "50"),
        ("The final answer is: 7", "7"),
        ("The final answer is 8?", "8"),
        ("adds up\n#### 1,234", "1,234"),
        ("#### 5\nThe answer is: 6", "6"),  # the order of the triggers decides, not their order in the text
        ("The answer is: 6\n#### 5", "6"),
        ("The answer is:", None),  # the trigger ends in a blank
        ("it is 5", None),
        ("", None),
    ],
)
def test_the_answer_is_read_as_published(text, answer):
    assert stated(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("13", 13.0), ("65.33", 65.33), ("-2", -2.0), ("20/14", 20 / 14), (" 1 / 2 ", 0.5), ("1,000", None),
        ("7/0", None),
        ("1/2/3", None), ("x", None), ("", None), ("sNaN", None), ("1e999999/1e-999999", None), ("1e3", 1000.0),
    ],
)  # fmt: skip
def test_numbers_and_fractions_are_read_as_published(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("said", "gold", "right", "lenient"),
    [
        ("The answer is: 5", "5", 1, 1),
        ("The answer is: 5.00", "5", 1, 1),
        ("The answer is: 1/2", "0.5", 1, 0),
        ("The answer is: 2,125", "2,125", 1, 1),
        ("The answer is: 2125", "2,125", 0, 1),  # the quirk of the published rule
        ("The answer is: 5 apples", "5", 0, 1),
        ("They have 5", "5", 0, 1),
        ("The answer is: 6", "5", 0, 0),
        ("The answer is: nan", "5", 0, 0),
    ],
)
def test_both_rules_score(said, gold, right, lenient):
    judged = score([said], Example("gsm8k", "?", "#### 5", gold))
    assert judged.scores == {"accuracy": right, "last_number_accuracy": lenient}


def test_several_samples_count_by_their_share():
    judged = score(["The answer is: 5", "none"], Example("gsm8k", "?", "#### 5", "5"))
    assert (judged.answer, judged.scores["accuracy"]) == ("5", 0.5)


def test_a_gold_answer_is_right():
    for example in examples():
        assert score([example.target], example).scores["accuracy"] == 1.0


def test_gsm8k_rows_validate_and_metamath_rows_are_learnt():
    train, validation = FAMILY.carve(examples(), 4, 0)
    assert [e.source for e in train] == [f"m{i}" for i in range(6)]
    order = np.arange(9)
    np.random.seed(0)  # noqa: NPY002  the protocol's own two calls
    np.random.shuffle(order)  # noqa: NPY002
    assert [e.source for e in validation] == [f"g{i}" for i in order[:4]]
    assert FAMILY.carve(examples(), 0, 0)[1] == []


def test_long_rows_are_left_out_by_characters_and_repeated_questions_stay(caplog):
    def row(length):
        response = "x" * (length - len("why?") - 1)
        return placed(FAMILY.task("metamathqa").example, metamath_row(0, response, "why?"), str(length))

    again = metamath_row(0, query=gsm8k_row(0, "train")["question"])
    rows = [
        row(MOST_CHARACTERS),
        row(MOST_CHARACTERS + 1),
        placed(FAMILY.task("metamathqa").example, again, "again"),
    ]
    caplog.set_level("INFO")
    train, _ = FAMILY.carve(rows + examples(0, 1), 1, 0)
    assert [e.source for e in train] == [str(MOST_CHARACTERS), "again"]
    assert "1 of 3 MetaMathQA rows" in caplog.text
    assert "1 train rows repeat a validation question" in caplog.text


def test_a_split_without_its_rows_says_what_to_set():
    with pytest.raises(ValueError, match=r"0\.\.9.*got 10"):
        FAMILY.carve(examples(), 10, 0)
    with pytest.raises(ValueError, match=r"data\.train_tasks=\[metamathqa,gsm8k\]"):
        FAMILY.carve(examples(questions=0), 1, 0)
    with pytest.raises(ValueError, match=r"must include metamathqa"):
        FAMILY.carve(examples(train=0), 1, 0)
