"""Runs of models with an encoder and a decoder: rows as two texts, the loss, options, texts, and what is refused."""

import json

import pytest
import short_runs
import torch
from tokenizers.processors import TemplateProcessing
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

import reft_lightning as rl
from reft_lightning.adapters.saving import load_saved, load_state
from reft_lightning.base_models.loading import byte_tokenizer, load_tokenizer
from reft_lightning.config import compose
from reft_lightning.data.encoding import encode, encode_all
from reft_lightning.data.example import Example
from reft_lightning.data.option_batches import option_batches
from reft_lightning.data.text_to_text import side_by_side
from reft_lightning.evaluation import Decoding, target_log_likelihood, write
from reft_lightning.runs import chat, evaluate, experiment, shared_base
from reft_lightning.runs.build import build, outline
from reft_lightning.training.objectives import inputs_of

COLOURS = {"red": "rot", "blue": "blau", "pink": "rosa", "grey": "grau"}
SIZES = {
    "t5": "model_type:t5,d_model:32,d_kv:8,d_ff:64,num_layers:2,num_heads:4",
    "bart": "model_type:bart,d_model:32,encoder_layers:2,decoder_layers:2,encoder_ffn_dim:64,decoder_ffn_dim:64,"
    "encoder_attention_heads:4,decoder_attention_heads:4,init_std:0.4",
}
EXAMPLES = [
    Example("t", "say red", "rot", "rot", ("rot", "blau")),
    Example("t", "and now say blue", "blau", "blau", ("rot", "blau", "rosarot")),
]


def t5_tokenizer():
    """A tokenizer that ends texts, as T5's does."""
    tokenizer = byte_tokenizer(add_bos=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


@pytest.fixture
def rows(tmp_path):
    """Write train and test rows: colours and what they are called, the answers moved on by ``shift``."""

    def written(shift=0):
        answers = [*COLOURS.values()]
        rows = [
            {
                "question": f"say {word}, please {i}",
                "reply": answers[(k + shift) % 4],
                "options": answers,
            }
            for i in range(12)
            for k, word in enumerate(COLOURS)
        ]
        places = {}
        for name, part in (("path", rows[:32]), ("validation_path", rows[32:40]), ("test_path", rows[40:])):
            places[name] = tmp_path / f"{name}_{shift}.jsonl"
            places[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        return [f"data.{name}={place}" for name, place in places.items()]

    return written


def config(places, *overrides, kind="t5"):
    return compose.compose([
        "model=tiny_random", f"model.name=tiny_{kind}", f"+model.config={{{SIZES[kind]}}}", "data=custom", *places,
        "data.prompt=question", "data.target=reply", "data.options=options", "data.batch_size=16",
        "decoding.max_new_tokens=8", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", *overrides,
    ])  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------


def test_prompt_and_target_have_special_tokens_of_their_own():
    encoded = encode(t5_tokenizer(), Example("t", "ab", " cd", "cd"), 8, two_texts=True)
    a = ord("a") + 3
    assert (encoded.prompt_ids, encoded.target_ids) == ([a, a + 1, 2], [a + 2, a + 3, 2])
    framed = encode(byte_tokenizer(), Example("t", "ab", "cd", "cd"), 8, two_texts=True)
    assert (framed.prompt_ids, framed.target_ids) == ([1, a, a + 1], [1, a + 2, a + 3, 2])


def test_special_tokens_that_a_text_spells_out_are_not_doubled():
    a = ord("a") + 3
    encoded = encode(byte_tokenizer(), Example("t", "<s>a", "b</s>", "b"), 8, two_texts=True)
    assert (encoded.prompt_ids, encoded.target_ids) == ([1, a], [1, a + 1, 2])
    tokenizer = t5_tokenizer()
    tokenizer.backend_tokenizer.post_processor = (
        TemplateProcessing(  # as mBART's: eos, and the code of a language
            single="$A </s> <s>", special_tokens=[("</s>", 2), ("<s>", 1)]
        )
    )
    encoded = encode(tokenizer, Example("t", "a", "b", "b"), 8, two_texts=True)
    assert (encoded.prompt_ids, encoded.target_ids) == ([a, 2, 1], [a + 1, 2, 1])


def languages():
    """A tokenizer as NLLB's, which puts the code of a language before each text."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁b"]
    return NllbTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a"), ("▁", "b")],
        src_lang="eng_Latn", tgt_lang="deu_Latn",
    )  # fmt: skip


def test_a_target_is_in_its_own_language(tmp_path):
    languages().save_pretrained(tmp_path)  # this is how a run gets the languages: model.tokenizer=FOLDER
    tokenizer = load_tokenizer(tokenizer=str(tmp_path), source="random", name="tiny")
    encoded = encode(tokenizer, Example("t", "a b", "b", "b"), 16, two_texts=True)
    assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids)[0] == "eng_Latn"
    assert tokenizer.convert_ids_to_tokens(encoded.target_ids) == ["deu_Latn", "▁b", "</s>"]


def test_what_is_written_begins_as_every_target_does():
    tokenizer = languages()
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(M2M100Config(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, init_std=1.0,
    ))  # fmt: skip
    reft = rl.attach(model.eval(), rank=2, positions="f1")
    seen, generate = [], reft.generate
    reft.generate = lambda **given: seen.append(generate(**given)) or seen[-1]
    encoded = encode(tokenizer, Example("t", "a b", "b", "b"), 16, two_texts=True)
    batch = side_by_side(tokenizer.pad_token_id, [encoded])
    write(reft, batch, tokenizer, Decoding(4))
    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert seen[0][0, :2].tolist() == [model.config.decoder_start_token_id, german]


def test_long_texts_are_cut_on_their_own():
    example = Example("t", "abcdefgh", "ijklmnop", "i")
    encoded = encode(t5_tokenizer(), example, 6, two_texts=True)
    assert bytes(i - 3 for i in encoded.prompt_ids[:-1]) == b"defgh", "the question is at the end"
    assert bytes(i - 3 for i in encoded.target_ids) == b"ijklmn", "without eos"
    assert (encoded.cut_prompt, encoded.cut_target) == (3, 3)
    with pytest.raises(ValueError, match="max_length must be at least 5"):
        encode(t5_tokenizer(), example, 4, two_texts=True)


def test_rows_are_padded_on_the_right_in_both_texts():
    tokenizer = t5_tokenizer()
    batch = side_by_side(tokenizer.pad_token_id, list(encode_all(tokenizer, EXAMPLES, 32, two_texts=True)))
    assert batch["attention_mask"].sum(-1).tolist() == [8, 17]
    assert batch["attention_mask"][0].tolist() == [1] * 8 + [0] * 9
    assert (batch["labels"] == -100).sum(-1).tolist() == [1, 0]
    assert batch["rows"].tolist() == [0, 1]


# --- a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(SIZES))
def objects(request, rows):
    built = build(config(rows(), "intervention.positions=f3+l3", "intervention.rank=2", kind=request.param))
    for parameter in built.model.interventions.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    built.module.eval()
    return built


def batch_of(tokenizer, examples=EXAMPLES):
    rows = list(encode_all(tokenizer, examples, 64, two_texts=True))
    return side_by_side(tokenizer.pad_token_id, rows) | {"examples": examples}


def test_the_loss_is_that_of_each_row_read_alone(objects):
    tokenizer = objects.prepared.tokenizer
    batch = batch_of(tokenizer)
    loss = objects.module.loss_of(batch)
    alone, tokens = 0.0, 0
    for example in EXAMPLES:
        one = batch_of(tokenizer, [example])
        log_p = objects.model(**inputs_of(one)).logits.log_softmax(-1)
        alone -= log_p.gather(-1, one["labels"].unsqueeze(-1)).sum()
        tokens += one["labels"].numel()
    torch.testing.assert_close(loss, alone / tokens)
    assert objects.module.tokens_in(batch) == int(batch["attention_mask"].sum()) + tokens
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in objects.model.interventions.parameters())


def test_the_likelihood_of_options_is_that_of_each_as_a_target(objects):
    tokenizer = objects.prepared.tokenizer
    options = option_batches(tokenizer, EXAMPLES, 64, two_texts=True)
    found = torch.stack([target_log_likelihood(objects.model, option) for option in options], -1)
    for i, example in enumerate(EXAMPLES):
        for k, option in enumerate(example.options):
            one = batch_of(tokenizer, [Example("t", example.prompt, option, option)])
            with torch.no_grad():
                loss = objects.model(**inputs_of(one)).loss
            torch.testing.assert_close(found[i, k], -loss * one["labels"].numel(), rtol=1e-5, atol=1e-4)


def test_the_texts_are_greedy_choices_of_the_decoder(objects):
    tokenizer, model = objects.prepared.tokenizer, objects.model
    texts = write(model, batch_of(tokenizer), tokenizer, Decoding(6))
    for example, (text,) in zip(EXAMPLES, texts, strict=True):
        one = batch_of(tokenizer, [example])
        start = model.base_model.config.decoder_start_token_id
        ids = [tokenizer.bos_token_id]  # as all targets
        while len(ids) < 6 and tokenizer.eos_token_id not in ids:
            read = {"input_ids": one["input_ids"], "decoder_input_ids": torch.tensor([[start, *ids]])}
            with torch.no_grad():
                ids.append(model(**read).logits[0, -1].argmax().item())
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("objects", ["t5"], indirect=True)
def test_samples_are_those_of_the_seed_and_stop_where_they_should(objects):
    tokenizer, model = objects.prepared.tokenizer, objects.model
    drawn = Decoding(6, do_sample=True, samples=2)
    first, again = (write(model, batch_of(tokenizer), tokenizer, drawn) for _ in range(2))
    assert first == again
    assert [len(samples) for samples in first] == [2, 2]
    whole = write(model, batch_of(tokenizer), tokenizer, Decoding(6))[0][0]
    assert len(whole) > 2
    stopped = write(
        model, batch_of(tokenizer, EXAMPLES[:1]), tokenizer, Decoding(6, stop_strings=(whole[1],))
    )
    assert stopped[0][0] == whole[: whole.index(whole[1]) + 1]
    beams = Decoding(6, num_beams=3, samples=2, stop_strings=(whole[1],))
    for samples in write(model, batch_of(tokenizer), tokenizer, beams):
        assert len(samples) == 2
        assert all(text.find(whole[1]) in (-1, len(text) - 1) for text in samples)


# --- runs -------------------------------------------------------------------------------------------------------


def test_an_edit_learns_answers_that_the_frozen_model_does_not_give(rows, tmp_path):
    """The base is trained here to name colours; the edit of its encoder learns to name each by the next one's name."""
    base = tmp_path / "base"
    sparse = "trainer.check_val_every_n_epoch=20"
    taught = config(
        rows(), "intervention=full", "optimizer.lr=3e-3", "trainer.max_epochs=40", "seed=1", sparse
    )
    objects = build(taught)
    results = experiment.run(taught, base)
    assert results["metrics"]["test/accuracy"] == 1.0
    load_saved(objects.model, base / "adapter", load_state(base / "adapter"))
    objects.model.base_model.save_pretrained(tmp_path / "t5")
    run = tmp_path / "run"
    learns = compose.compose([
        "model=local", f"model.path={tmp_path / 't5'}", "model.tokenizer=bytes", "data=custom", *rows(shift=1),
        "data.prompt=question", "data.target=reply", "data.options=options", "data.batch_size=16",
        "decoding.max_new_tokens=8", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
        "intervention.positions=all", "intervention.rank=4", "optimizer.lr=2e-2", "trainer.max_epochs=40",
        "evaluate_base=true", sparse,
    ])  # fmt: skip
    results = experiment.run(learns, run)
    assert results["metrics"]["base/test/accuracy"] == 0.0
    assert results["metrics"]["test/accuracy"] > 0.8
    assert results["metrics"]["test/option_accuracy"] > 0.8
    again = evaluate.evaluate(run, "test")
    assert again["metrics"]["test/accuracy"] == results["metrics"]["test/accuracy"]
    talk = chat.Conversation(*chat.load(run), max_new_tokens=8)
    rows = short_runs.predictions(run, "reft_test")
    bases = short_runs.predictions(run, "base_test")
    for row, base in zip(rows[:3], bases, strict=False):
        assert talk.ask(row["prompt"]) == (base["generated"].strip(), row["generated"].strip())


def test_jobs_of_a_shared_base_run_apart(rows):
    assert shared_base.why_alone(config(rows())) == "an encoder reads prompts separately"


@pytest.mark.parametrize("kind", ["whisper", "pix2struct", "speech_to_text"])
def test_a_model_that_reads_no_text_is_refused_by_name(kind):
    asked = compose.compose(
        ["model=tiny_random", f"model.config.model_type={kind}", "data=arithmetic", "data.source=hub"]
    )
    with pytest.raises(ValueError, match=rf"\({kind}\).*(encoder and a decoder|reads images)"):
        outline(asked)


@pytest.mark.parametrize(
    "override", ["objective=dpo", "model.compile=true", "kept.limit_gb=1", "intervention=peft/prompt_tuning"]
)
def test_what_reads_one_text_is_refused_before_weights(override, rows):
    with pytest.raises(ValueError, match=r"an encoder and a decoder|reads two"):
        outline(config(rows(), override))
