"""Requests in shared batches get the same answers as they would alone."""

import random
import threading
import time

import pytest
import serving_models
import torch
from serving_models import Asked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import reft_lightning as rl
from reft_lightning.serving.answers import AGAIN, Answer
from reft_lightning.serving.engine import JOIN_AFTER, Busy, Engine

PROMPTS = ["kept?", "a longer question, with more words", "x", "two and two"]
ADAPTERS = [None, "default", "everywhere", "late"]


@pytest.fixture(scope="module")
def model():
    return serving_models.model(torch.float64)


@pytest.fixture
def engine(model):
    engine = Engine(model, serving_models.tokenizer(), max_batch=4)
    engine.ends = []  # answers of known lengths
    yield engine
    engine.close()


def expected(model, text, adapter, count):
    """Greedy ids of one request on its own, by plain generate()."""
    ids = serving_models.tokenizer()(text, return_tensors="pt")["input_ids"]
    model.set_adapter(adapter)
    found = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    model.set_adapter("default")
    return found[0, ids.shape[1] :].tolist()


def test_requests_of_other_adapters_share_batches_and_get_their_own_answers(model, engine):
    wanted = [(text, adapter) for text in PROMPTS for adapter in ADAPTERS]
    asked = [Asked(engine, text, adapter, max_tokens=5) for text, adapter in wanted]
    for request in asked:
        assert request.wait()[1] == "length"
    for (text, adapter), request in zip(wanted, asked, strict=True):
        assert request.answer.tokens == expected(model, text, adapter, 5)
    assert len({tuple(request.answer.tokens) for request in asked}) > 8


def test_requests_that_come_later_join_and_change_no_answer(model, engine):
    long = 3 * JOIN_AFTER
    first = [Asked(engine, PROMPTS[1], adapter, max_tokens=long) for adapter in ADAPTERS[:3]]
    while not first[0].answer.tokens:
        time.sleep(0.001)
    later = Asked(engine, PROMPTS[3], "late", max_tokens=4)
    later.wait()
    assert not first[0].answer.done  # it did not have to wait for them
    for adapter, request in zip(ADAPTERS[:3], first, strict=True):
        request.wait()
        assert request.answer.tokens == expected(model, PROMPTS[1], adapter, long)
    assert later.answer.tokens == expected(model, PROMPTS[3], "late", 4)


def test_a_strength_is_that_of_its_request_only(model, engine):
    half, whole, none = (Asked(engine, "kept?", "everywhere", strength=s) for s in (0.5, 1, 0))
    for request in (half, whole, none):
        request.wait()
    assert none.answer.tokens == expected(model, "kept?", None, 6)
    assert whole.answer.tokens == expected(model, "kept?", "everywhere", 6)
    model.adapters["everywhere"].scale = 0.5
    assert half.answer.tokens == expected(model, "kept?", "everywhere", 6)
    model.adapters["everywhere"].scale = 1.0


def test_draws_depend_on_the_seed_and_not_on_the_batch(engine):
    settings = {"temperature": 1.0, "max_tokens": 8}
    alone = Asked(engine, "kept?", "default", seed=7, **settings)
    alone.wait()
    crowd = [Asked(engine, text, adapter, seed=7, **settings) for text in PROMPTS for adapter in ADAPTERS]
    other = Asked(engine, "kept?", "default", seed=8, **settings)
    for request in [*crowd, other]:
        request.wait()
    again = crowd[ADAPTERS.index("default")]
    assert again.answer.tokens == alone.answer.tokens != other.answer.tokens


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    one = Answer([1], print, temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor([one.choose(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, logits.exp(), atol=0.03, rtol=0)
    nucleus = Answer([1], print, temperature=1.0, top_p=0.7, seed=0)
    assert {nucleus.choose(logits) for _ in range(300)} == {0, 1}
    assert {Answer([1], print, temperature=1.0, top_p=0.01).choose(logits) for _ in range(20)} == {0}


def test_a_stop_string_ends_the_text_before_it(model, engine):
    whole, _ = Asked(engine, "kept?", "default", max_tokens=12).wait()
    word = whole[3:5]
    request = Asked(engine, "kept?", "default", max_tokens=12, stop=(word, "never there"))
    assert request.wait() == (whole[: whole.find(word)], "stop")


def sent_for(text, tokenizer=None, prompt=(1,), tokens=None, **settings):
    """Return the parts that are sent of an answer with a text, until it is done."""
    sent, tokenizer = [], tokenizer or serving_models.tokenizer()
    answer = Answer(list(prompt), sent.append, **{"max_tokens": 5000, **settings})
    for token in tokens or tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not answer.done:
            answer.add(token, torch.zeros(len(tokenizer)), tokenizer, ())
    return sent


def test_pieces_of_a_stop_string_are_held_back_until_they_are_none():
    sent = sent_for("an ENormous END", stop=("END",))
    assert "".join(part.text for part in sent) == "an ENormous "
    assert not any(part.text.endswith(("E", "EN")) for part in sent)
    assert sent[-1].finish == "stop"


@pytest.mark.parametrize(("stop", "kept"), [("：", "Q"), ("Q：", ""), ("Q：é", "")])
def test_a_stop_string_with_characters_of_several_tokens_is_held_back_from_its_start(stop, kept):
    sent = sent_for("Q：é and more", stop=(stop,))
    assert "".join(part.text for part in sent) == kept
    assert sent[-1].finish == "stop"


def test_bytes_that_end_the_prompt_are_no_part_of_the_answers_first_character():
    tokenizer = serving_models.sentence_piece()
    tokens = tokenizer("é a", add_special_tokens=False)["input_ids"][1:]
    sent = sent_for("", tokenizer, tokenizer("a é")["input_ids"], tokens)
    assert [part.text for part in sent] == ["é", " a"]


def test_characters_of_several_tokens_are_sent_whole():
    assert [part.text for part in sent_for("aé漢b")] == ["a", "é", "漢", "b"]


def test_blanks_that_a_tokenizer_takes_away_later_are_not_sent_before():
    letters = ["\u2581", "\u2581'", "\u2581n", *"adnost.'"]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in letters)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    draw, cleans = random.Random(0), {"clean_up_tokenization_spaces": True}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **cleans)
    for _ in range(300):
        tokens = draw.choices(range(1, len(tokenizer)), k=30)
        sent = sent_for("", tokenizer, (), tokens, max_tokens=30, follows=False)
        assert "".join(part.text for part in sent) == tokenizer.decode(tokens)


@pytest.mark.parametrize("tokenizer", [serving_models.tokenizer(), serving_models.sentence_piece()])
def test_a_long_answer_is_the_text_of_all_its_tokens_though_few_are_decoded_again(monkeypatch, tokenizer):
    decoded, decode = [], tokenizer.decode
    text = " a b  aé漢 " * 60
    tokens = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"][1:]
    prompt = tokenizer("a a")["input_ids"]
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **more: decoded.append(len(ids)) or decode(ids, **more)
    )
    sent = sent_for("", tokenizer, prompt, tokens)
    assert len(tokens) > 600
    assert "".join(part.text for part in sent) == text
    assert max(decoded) < 2 * AGAIN


def test_the_end_of_text_token_ends_an_answer(model):
    engine = Engine(model, serving_models.tokenizer(), max_batch=4)
    tokens = expected(model, "kept?", "default", 8)
    engine.ends = [tokens[3]]
    request, other = Asked(engine, "kept?", "default", max_tokens=8), Asked(engine, "x", None, max_tokens=8)
    assert request.wait()[1] == "stop"
    assert request.answer.tokens == tokens[: tokens.index(tokens[3])]
    other.wait()
    engine.close()


def test_the_tokenizers_end_of_text_ends_answers_where_the_base_model_names_another(model):
    base, tokenizer = model.base_model, serving_models.tokenizer()
    for named, also in ((7, [7]), (0, [0]), ([7, 0], [7, 0]), (None, [])):
        base.generation_config.eos_token_id = named
        engine = Engine(model, tokenizer)
        engine.close()
        assert set(engine.ends) == {tokenizer.eos_token_id, *also}
    base.generation_config.eos_token_id = None


def test_log_probabilities_are_those_of_the_model(model, engine):
    request = Asked(engine, "kept?", "everywhere", top=3, temperature=1.5, seed=3)
    parts = []
    while not parts or parts[-1].finish is None:
        parts.append(request.parts.get(timeout=60))
    found = [one for part in parts for one in part.likelihoods]
    assert [one.token for one in found] == request.answer.tokens
    ids = torch.tensor([request.answer.prompt + request.answer.tokens])
    prompt = torch.arange(ids.shape[1])[None] < len(request.answer.prompt)
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_mask=prompt, adapter_names=["everywhere"]).logits[0]
    expected = logits[len(request.answer.prompt) - 1 : -1].float().log_softmax(-1)
    for step, one in enumerate(found):
        assert one.logprob == pytest.approx(expected[step, one.token].item(), abs=1e-5)
        best = expected[step].topk(3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(model, engine):
    gone, kept = Asked(engine, "x", "default", max_tokens=100), Asked(engine, "kept?", "late", max_tokens=30)
    while not gone.answer.tokens:
        time.sleep(0.001)
    gone.answer.cancelled = True
    kept.wait()
    assert kept.answer.tokens == expected(model, "kept?", "late", 30)
    assert len(gone.answer.tokens) < 100


def test_an_adapter_that_fails_ends_no_answer_of_others_in_its_batch(model, engine):
    names = ["default", "no such adapter", "late", None]
    held = threading.Event()
    engine.submit(Answer([1, 5], lambda part: held.wait(30), max_tokens=1))  # the others come meanwhile
    asked = [Asked(engine, "kept?", name) for name in names]
    held.set()
    for name, request in zip(names, asked, strict=True):
        if name == "no such adapter":
            with pytest.raises(ValueError, match="no adapter 'no such adapter'"):
                request.wait()
        else:
            request.wait()
            assert request.answer.tokens == expected(model, "kept?", name, 6)


def held_engine(model, **settings):
    """Return an engine that waits for an event in its first answer, and the event."""
    engine, held = Engine(model, serving_models.tokenizer(), max_batch=1, **settings), threading.Event()
    first = Answer([1, 5], lambda part: held.wait(30), max_tokens=2)
    engine.submit(first)
    while not first.tokens:
        time.sleep(0.001)
    return engine, held


def test_too_many_waiting_requests_are_refused(model):
    engine, held = held_engine(model, max_waiting=3)
    for _ in range(3):
        engine.submit(Answer([1, 5], print, max_tokens=1))
    with pytest.raises(Busy, match="3 requests are waiting"):
        engine.submit(Answer([1, 5], print, max_tokens=1))
    held.set()
    engine.close()


def test_a_finished_row_does_not_leave_the_positions_of_the_model():
    tokenizer = serving_models.tokenizer()
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    engine = Engine(rl.attach(base, rank=2, positions="f1"), tokenizer, max_batch=4)
    engine.ends = []
    asked = [Asked(engine, text, max_tokens=n) for text, n in (("a" * 59, 4), ("b", 40), ("c", 40))]
    assert [request.wait()[1] for request in asked] == ["length"] * 3
    assert [len(request.answer.tokens) for request in asked] == [4, 40, 40]
    engine.close()


def test_a_request_that_cannot_be_answered_does_not_end_the_others(model, engine):
    bad = Asked(engine, "x", "default", temperature=1.0, seed=2**80)
    good = Asked(engine, "kept?", "late")
    with pytest.raises(ValueError, match="Overflow"):
        bad.wait()
    good.wait()
    assert good.answer.tokens == expected(model, "kept?", "late", 6)


def test_drawing_leaves_torchs_own_generator_alone(engine):
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    Asked(engine, "x", "default", temperature=1.0).wait()
    assert torch.rand(1) == first


def test_a_tiny_temperature_is_greedy(model, engine):
    request = Asked(engine, "kept?", "late", temperature=1e-308)
    request.wait()
    assert request.answer.tokens == expected(model, "kept?", "late", 6)


def test_defaults_of_the_base_model_change_no_answer(engine):
    before = Asked(engine, "kept?", "late", top=1)
    before.wait()
    defaults = engine.model.base_model.generation_config
    defaults.repetition_penalty, defaults.num_beams, defaults.suppress_tokens = 3.0, 3, before.answer.tokens
    after = Asked(engine, "kept?", "late", top=1)
    after.wait()
    defaults.repetition_penalty = defaults.num_beams = defaults.suppress_tokens = None
    assert after.answer.tokens == before.answer.tokens


def test_who_waits_when_it_closes_is_told(model):
    engine, held = held_engine(model)
    waiting = Asked(engine, "x")
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.set()
    closing.join(30)
    with pytest.raises(Busy, match="closing"):
        waiting.wait()
    with pytest.raises(Busy, match="closing"):
        engine.submit(Answer([1, 5], print))


def test_a_listener_that_fails_ends_only_its_own_answer(model, engine):
    def fail(part):
        raise RuntimeError("the loop is closed")

    engine.submit(Answer([1, 5], fail, max_tokens=3))
    assert Asked(engine, "x", "late").wait()[1] == "length"
