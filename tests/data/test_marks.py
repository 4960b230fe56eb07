"""Marked words in a prompt: the marks are removed before it is tokenised, and the positions `given` edit the words."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import short_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data import encoding_cache
from reft_lightning.data.encoding import Collator, encode, encode_all
from reft_lightning.data.example import Example
from reft_lightning.data.marks import as_marks, unmarked, without_marks
from reft_lightning.data.pairs import EncodedAnswers
from reft_lightning.data.prompts import apply_template
from reft_lightning.inspection import command
from reft_lightning.inspection.plan import plan
from reft_lightning.runs import chat
from reft_lightning.runs.build import outline, prepare
from reft_lightning.runs.evaluate import load_run
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.runs.shared_base import why_alone

MARKS = ("<<", ">>")


def make(prompt, target="here", **more):
    return Example("custom", prompt, target, target, source="rows.jsonl, line 3", **more)


def words_of(row, tokenizer):
    return tokenizer.decode([i for i, edited in zip(row.prompt_ids, row.edited, strict=True) if edited])


class TestUnmarked:
    @pytest.mark.parametrize(
        ("prompt", "marks", "text", "marked"),
        [
            ("<<Ann>> or <<Bo>>?", MARKS, "Ann or Bo?", ((0, 3), (7, 9))),
            ("a<<b>><<c>>", MARKS, "abc", ((1, 2), (2, 3))),
            ("a < b << c >> d", MARKS, "a < b  c  d", ((6, 9),)),
            ("is <b>it</b> <bold>?", ("<b>", "</b>"), "is it <bold>?", ((3, 5),)),
            ("[x] [[y]]", ("[[", "]]"), "[x] y", ((4, 5),)),
            ("a (b) c", ("(", ")"), "a b c", ((2, 3),)),
            ("ab|b|>", ("|", "|>"), "abb", ((2, 3),)),
        ],
    )
    def test_marks_are_taken_out_and_words_are_found(self, prompt, marks, text, marked):
        found = unmarked(make(prompt), marks, needed=True)
        assert (found.prompt, found.marked) == (text, marked)
        assert unmarked(make(prompt), marks, needed=False) == replace(found, marked=())

    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            ("who is it?", "the prompt has no words between '<<' and '>>' for the positions `given` to edit"),
            ("who <<is it?", "'<<' without '>>' after it"),
            ("who is>> it?", "'>>' without '<<' before it"),
            ("<<who <<is>> it?", "'<<' without '>>' before it"),
            ("<<who>> is>> it?", "'>>' without '<<' before it"),
            ("who <<>> is it?", "there is nothing between '<<' and '>>'"),
            ("who<< >>is it?", "there is nothing between '<<' and '>>'"),
        ],
    )
    def test_marks_that_mark_nothing_name_their_row(self, prompt, words):
        with pytest.raises(ValueError, match=f"rows.jsonl, line 3: {words}"):
            unmarked(make(prompt), MARKS, needed=True)

    def test_only_what_needs_marks_asks_for_them(self):
        assert unmarked(make("who?"), MARKS, needed=False) == make("who?")

    @pytest.mark.parametrize("marks", [["<<"], "<<", ["a", "a"], ["<<", " "], ["<<", 3], ["a", "b", "c"]])
    def test_marks_are_two_different_texts(self, marks):
        with pytest.raises(ValueError, match=r"data\.marks must be two different texts"):
            as_marks(marks)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=8)


class TestTokens:
    @given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4), TEXT, st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_the_edited_tokens_of_bytes_are_the_marked_words(self, parts, end, bos):
        tokenizer = byte_tokenizer(add_bos=bos)
        prompt = "".join(f"{before}<<{word}>>" for before, word in parts) + end
        row = encode(tokenizer, unmarked(make(prompt + "?"), MARKS, needed=True), 1000)
        edited = [i - 3 for i, chosen in zip(row.prompt_ids, row.edited, strict=True) if chosen]
        assert bytes(edited) == "".join(word for _, word in parts).encode()

    @pytest.mark.parametrize(
        "words", ["the <<red>> house", "the<< red>> house", "the r<<e>>d house", "the <<red >>house"]
    )
    def test_a_mark_inside_a_token_edits_that_token(self, words):
        tokenizer = of_words()
        row = encode(tokenizer, unmarked(make(words), MARKS, needed=True), 64)
        assert words_of(row, tokenizer).split() == (["red", "house"] if "red >>" in words else ["red"])

    def test_bos_that_is_spelled_out_moves_nothing(self):
        tokenizer = byte_tokenizer()
        plain, spelled = (
            encode(tokenizer, unmarked(make(f"{bos}who <<is>> it?"), MARKS, needed=True), 64)
            for bos in ("", "<s>")
        )
        assert spelled.edited == plain.edited
        assert words_of(plain, tokenizer) == "is"

    def test_what_is_cut_on_the_left_moves_nothing(self):
        tokenizer = byte_tokenizer()
        example = unmarked(make("x" * 40 + "<<y>>" + "z" * 40 + "<<who>> is?"), MARKS, needed=True)
        row = encode(tokenizer, example, 20)
        assert len(row) == 20
        assert words_of(row, tokenizer) == "who"

    def test_a_row_whose_words_are_all_cut_off_is_named(self):
        example = unmarked(make("<<who>> is " + "x" * 40), MARKS, needed=True)
        with pytest.raises(
            ValueError, match=r"line 3: data\.max_length=20 leaves no token of the marked words"
        ):
            encode_all(byte_tokenizer(), [example], 20)

    def test_a_slow_tokenizer_is_refused(self):
        with pytest.raises(
            ValueError, match="ByT5Tokenizer does not provide: choose a model with a fast tokenizer"
        ):
            encode(ByT5Tokenizer(), unmarked(make("<<who>>?"), MARKS, needed=True), 64)

    @pytest.mark.parametrize("template", ["plain", "alpaca", "chat"])
    def test_words_are_found_after_a_template_and_in_its_other_texts(self, template):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        turns = (("user", " <<Hello>>"), ("assistant", "Good day")) if template == "chat" else ()
        example = make("who <<is>> it?", context="of <<Ann>>", turns=turns)
        (text,) = apply_template(template, [example], tokenizer)
        row = encode(tokenizer, unmarked(text, MARKS, needed=True), 1000)
        assert words_of(row, tokenizer) == ("Hello" if turns else "") + "isAnn"

    def test_many_rows_are_those_of_one_by_one_also_from_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REFT_CACHE", str(tmp_path))
        monkeypatch.setattr(encoding_cache, "SMALL", 1)
        tokenizer = byte_tokenizer()
        plain = [make(f"row {i} <<{'ab' * i}c>> and <<d>>?") for i in range(5)]
        other = [make(f"row {i} {'ab' * i}c and <<d>>?") for i in range(5)]
        for examples in (plain, other, plain):
            texts = [unmarked(example, MARKS, needed=True) for example in examples]
            rows = encode_all(tokenizer, texts, 32)
            assert [replace(rows[i], row=-1) for i in range(5)] == [encode(tokenizer, t, 32) for t in texts]
        assert len(list(tmp_path.rglob("*.npz"))) == 2

    def test_a_batch_says_which_columns_they_are(self):
        tokenizer = byte_tokenizer()
        rows = [encode(tokenizer, unmarked(make(p), MARKS, needed=True), 64) for p in ("<<a>>bc", "d<<e>>")]
        batch = Collator(0)(rows)
        assert batch["edit_mask"].int().tolist() == [[0, 1, 0, 0, *[0] * 5], [0, 0, 0, 1, *[0] * 5]]
        assert "edit_mask" not in Collator(0)([encode(tokenizer, make("abc"), 64)])

    def test_pairs_mark_what_the_longer_answer_leaves_of_the_prompt(self):
        tokenizer = byte_tokenizer()
        example = unmarked(make("x" * 30 + "<<who>>?", target="a"), MARKS, needed=True)
        short, long = (encode_all(tokenizer, [replace(example, target=t)], 24) for t in ("a", "b" * 12))
        for row in EncodedAnswers(short, long)[0]:
            assert words_of(row, tokenizer) == "who"


def of_words():
    """A tokenizer whose tokens are words with the preceding blank, as in most models."""
    known = ["<unk>", "</s>", "▁the", "▁red", "▁house", "▁"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Prepend("▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


# --- runs -------------------------------------------------------------------------------------------------------------

GIVEN = ["intervention.positions=given", 'data.marks=["<<",">>"]']
NAMES = ("zorb", "fenk", "mivle", "varr")


def write(folder, count=24):
    path = folder / "marked.jsonl"
    rows = [
        {"q": f"{'so ' * (i % 5)}<<{NAMES[i % 4]}>> and {NAMES[(i + 1) % 4]} {i}?", "a": NAMES[i % 4],
         "b": NAMES[(i + 1) % 4]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path, *overrides):
    base = [o for o in short_runs.arguments(path) if not o.startswith(("data=", "intervention.positions"))]
    return short_runs.compose.compose([*base, "data=custom", "data.prompt=q", "data.target=a", *overrides])


def by_hand(reft, prompt, word, answer, end=2):
    """Return the text after a prompt and the loss of an answer, from calls with edit_mask."""
    ids = torch.tensor([[1, *(byte + 3 for byte in prompt.encode())]])
    start = 1 + prompt.index(word)
    edit_mask = torch.zeros_like(ids).bool()
    edit_mask[:, start : start + len(word)] = True
    found = reft.generate(
        ids, torch.ones_like(ids), edit_mask=edit_mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    target = torch.tensor([[*(byte + 3 for byte in answer.encode()), end]])
    whole, labels = torch.cat([ids, target], 1), torch.cat([torch.full_like(ids, -100), target], 1)
    with torch.no_grad():
        loss = reft(
            whole, labels=labels, edit_mask=torch.nn.functional.pad(edit_mask, (0, target.shape[1]))
        ).loss
    text = byte_tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text, float(loss) * target.shape[1], target.shape[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on marked words: its configuration, folder and results."""
    path, folder = write(tmp_path_factory.mktemp("rows")), tmp_path_factory.mktemp("run") / "mine"
    run = config(path, *GIVEN, "data.options=[a,b]", "optimizer.lr=0.3", "decoding.max_new_tokens=6")
    return run, folder, short_runs.experiment.run(run, folder)


def test_a_run_reads_edits_and_generates_as_calls_with_edit_mask_do(trained):
    run, folder, results = trained
    reft: Any = load_run(folder, run).model.eval()
    loss, tokens, others = 0.0, 0, 0
    for row in short_runs.predictions(folder, "reft_validation"):
        assert "<<" not in row["prompt"]
        first, second = (name for name in row["prompt"].split() if name in NAMES)
        assert row["gold"] == first
        text, lost, count = by_hand(reft, row["prompt"], first, first)
        assert row["generated"] == text
        loss, tokens = loss + lost, tokens + count
        _, of_other, _ = by_hand(reft, row["prompt"], first, second)
        # the likelihood of an option is that of all its tokens
        assert row["option"] == (first if lost < of_other else second)
        others += by_hand(reft, row["prompt"], second, first)[1] != lost
    assert results["metrics"]["val/loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert others  # it matters which words are edited


@pytest.mark.parametrize("positions", ["given", "f1+l1"])
def test_a_prediction_tells_which_words_of_its_prompt_were_marked(tmp_path, positions):
    path = tmp_path / "rows.jsonl"
    texts = ["does <<zorb>> know fenk?", "does zorb know <<fenk>>?"]
    path.write_text("".join(json.dumps({"q": text, "a": "yes"}) + "\n" for text in texts))
    marks = [f"intervention.positions={positions}", GIVEN[1], f"data.validation_path={path}"]
    short_runs.experiment.run(config(path, *marks), tmp_path / "run")
    found = short_runs.predictions(tmp_path / "run", "reft_validation")
    assert {row["prompt"].strip() for row in found} == {"does zorb know fenk?"}
    assert sorted(row["marked_prompt"].strip() for row in found) == texts


class TestRowsThatDifferInMarks:
    """Without the marks, the model reads the same text for both rows."""

    def rows(self, path, questions):
        path.write_text("".join(json.dumps({"q": q, "a": q[-3:]}) + "\n" for q in questions))
        return path

    def test_they_are_on_one_side_of_the_split(self, tmp_path):
        questions = [text.format(i) for i in range(10) for text in ("is <<a>> or b {}?", "is a or <<b>> {}?")]
        path = self.rows(tmp_path / "rows.jsonl", questions)
        data = prepare(config(path, *GIVEN, "data.validation_size=3")).data
        data.setup("validate")
        train, held_out = (
            [example.prompt for example in rows.examples]
            for rows in (data.train_rows, data._validation["custom"])
        )
        assert (len(train), len(held_out)) == (14, 3)
        assert not set(train) & set(held_out)

    def test_a_part_of_the_rows_is_one_of_their_texts(self, tmp_path):
        questions = [text.format(i) for i in range(10) for text in ("is <<a>> or b {}?", "is a or <<b>> {}?")]
        path = self.rows(tmp_path / "rows.jsonl", questions)
        for more in ([], [f"data.validation_path={path}"]):
            data = prepare(config(path, *GIVEN, "data.validation_size=0.3", *more)).data
            data.setup("validate")
            assert len(data._validation["custom"]) == 3

    def test_they_are_one_question_of_the_overlap(self, tmp_path):
        train = self.rows(tmp_path / "rows.jsonl", [f"is <<a>> or b {i}?" for i in range(6)])
        other = self.rows(tmp_path / "test.jsonl", ["is a or <<b>> 1?", "is a or <<b>> 7?"])
        paths = [f"data.{split}_path={other}" for split in ("validation", "test")]
        data = prepare(config(train, *GIVEN, *paths)).data
        for stage, split in (("fit", "validation"), ("test", "test")):
            data.setup(stage)
            assert data.data_versions[split]["custom"]["overlap"] == 1

    def test_context_and_turns_are_compared_without_marks_too(self):
        turns = (("user", "<<Hello>>"), ("assistant", "Good day"))
        example = without_marks(make("who <<is>> it?", context="of <<Ann>>", turns=turns), MARKS)
        assert example == make(
            "who is it?", context="of Ann", turns=(("user", "Hello"), ("assistant", "Good day"))
        )


def test_a_chat_edits_the_words_that_the_question_marks(trained):
    talk = chat.Conversation(*chat.load(trained[1]), max_new_tokens=6)
    question = "so zorb and fenk 3?\n"
    for word in ("zorb", "fenk"):
        _, said = talk.ask(question.replace(word, f"<<{word}>>"))
        assert said == by_hand(talk.model, question, word, "-")[0].strip()
    with pytest.raises(ValueError, match="the prompt has no words between"):
        talk.ask(question)


def test_such_a_run_is_inspected_on_its_rows(trained, monkeypatch):
    monkeypatch.setattr(command, "draw", lambda found, out: [])
    found = command.main((trained[1],), console=Console(file=io.StringIO()))
    assert found["edit_norm"]["positions"] == ["given"]
    assert found["scores"]["adapted"]["loss"] == pytest.approx(trained[2]["metrics"]["val/loss"], rel=1e-5)
    assert "perplexity" not in found["scores"]["adapted"]


def test_a_step_of_given_lengths_counts_the_prompt_as_marked(tmp_path):
    found = plan(config(write(tmp_path), *GIVEN), prompt=12, target=3)
    assert found["batches"]["given"]["edited_tokens"] == 2 * 3 * 12  # layers, rows, tokens
    assert "positions `given`: counted as if the whole prompt were marked" in found["notes"]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_training_passes_have_the_mask(tmp_path, objective):
    more = [f"objective={objective}", "data.options=[a,b]"]
    objects = short_runs.experiment.build(config(write(tmp_path), *GIVEN, *more))
    batch = objects.data.train_dataloader().collate_fn([objects.data.train_rows[i] for i in range(3)])
    assert batch["edit_mask"].any(-1).all()
    assert len(batch["edit_mask"]) == (6 if objective == "dpo" else 3)
    objects.module.log = lambda *args, **kwargs: None
    objects.module.loss_of(batch).backward()
    assert all(p.grad is not None for p in objects.model.parameters() if p.requires_grad)


def test_what_edits_no_marked_words_reads_the_same_text_without_marks(tmp_path):
    path = write(tmp_path)
    marked, plain = (
        prepare(config(path, *more)).data.train_rows
        for more in (GIVEN, ["intervention.positions=f1+l1", GIVEN[1]])
    )
    assert all(marked[i].prompt_ids == plain[i].prompt_ids for i in range(len(plain)))
    assert all(any(marked[i].edited) and not plain[i].edited for i in range(len(plain)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (GIVEN[:1], r"the positions `given` need marked words: .* 'data\.marks="),
        (["intervention.layers={0: {}, 1: {positions: 'given:0.5'}}"], "the positions `given` need marked words"),
        ([*GIVEN[:1], "data.marks=[a]"], "data.marks must be two different texts"),
        ([*GIVEN, "objective=reward", "data.options=[a,b]"], "data.marks cannot be used with"),
        ([*GIVEN, "intervention=das", "intervention.positions=given", "data.source_prompt=b"], "used with data.source"),
        ([*GIVEN, "model.config={model_type: t5}"], r"data.marks=\['<<', '>>'\] needs a model that reads prompt and"),
    ],
)  # fmt: skip
def test_marks_that_cannot_be_read_are_refused_before_weights(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        outline(config(write(tmp_path), *overrides))


def test_other_rows_have_no_marks(tmp_path):
    rows = short_runs.write_rows(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"data\.marks=.* does not apply to the family commonsense"):
        prepare(short_runs.config(rows, *GIVEN))
    alone = [o for o in short_runs.arguments(write(tmp_path)) if not o.startswith("data=")]
    with pytest.raises(ValueError, match=r"data=custom needs data\.prompt"):
        outline(short_runs.compose.compose([*alone, "data=custom", "data.target=a", *GIVEN]))


def test_a_row_without_marks_is_named_before_weights(tmp_path):
    path = write(tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"q": "who?", "a": "zorb", "b": "fenk"}))
    with pytest.raises(ValueError, match=r"marked\.jsonl, line 25: the prompt has no words between"):
        prepare(config(path, *GIVEN, "data.validation_size=0"))


def test_a_question_is_marked_as_rows_are(tmp_path):
    format = PromptFormat.of(config(write(tmp_path), *GIVEN), "it")
    example = format.prompt("who <<is>> it?", byte_tokenizer())
    assert (example.prompt, example.marked) == ("who is it?\n", ((4, 6),))
    with pytest.raises(ValueError, match="the prompt has no words between"):
        format.prompt("who is it?", byte_tokenizer())


def test_such_runs_share_no_pass(tmp_path):
    assert "need the marks of the run's own rows" in str(why_alone(config(write(tmp_path), *GIVEN)))
