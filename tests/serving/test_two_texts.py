"""Serving encoder-decoder models: each request gets the same text as it would alone."""

import json
import threading

import httpx
import pytest
import serving_models
import torch
from serving_models import Asked

from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.serving.answers import Answer
from reft_lightning.serving.app import Served
from reft_lightning.serving.engine import JOIN_AFTER, Engine

PROMPTS = ["kept?", "a longer question, with more words", "x"]
CHOICES = [(None, 1.0), ("default", 1.0), ("default", 0.5), ("decoder", 1.0), ("decoder", -1.0)]


@pytest.fixture(scope="module", params=["t5", "bart"])
def served(request):
    return serving_models.two_texts(request.param)


@pytest.fixture
def engine(served):
    engine = Engine(*served, max_batch=5)
    engine.ends = []  # answers of known lengths
    yield engine
    engine.close()


def expected(served, text, adapter, strength, count):
    """Return the greedy text of one request on its own, by plain generate()."""
    model, tokenizer = served
    model.set_adapter({adapter: strength} if adapter else None)
    plain = {"do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 0, "pad_token_id": 0}
    # one token more: BART's own defaults force the last to be the end of text
    found = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=count + 1, **plain)
    return tokenizer.decode(found[0, 1 : count + 1], skip_special_tokens=True)


def test_requests_of_other_adapters_and_strengths_share_batches_and_get_their_own_answers(served, engine):
    wanted = {(text, *choice): expected(served, text, *choice, 9) for text in PROMPTS for choice in CHOICES}
    held = threading.Event()
    engine.submit(Answer([5, 2], lambda part: held.wait(30), max_tokens=1))  # the others come meanwhile
    asked = [Asked(engine, text, adapter, strength=s, max_tokens=9) for text, adapter, s in wanted]
    held.set()
    assert [request.wait() for request in asked] == [(text, "length") for text in wanted.values()]
    assert len(set(wanted.values())) > 8


def test_requests_that_come_later_join_and_change_no_answer(served, engine):
    long, names = 5 * JOIN_AFTER, (None, "default", "decoder")
    wanted = [expected(served, PROMPTS[1], name, 1.0, long) for name in names]
    short = {text: expected(served, text, "decoder", 1.0, 3) for text in ("a", "b")}
    first = [Asked(engine, PROMPTS[1], name, max_tokens=long) for name in names]
    for text, found in short.items():  # one after the other
        assert Asked(engine, text, "decoder", max_tokens=3).wait()[0] == found
        assert len(first[0].answer.tokens) < long  # it did not have to wait for them
    assert [request.wait()[0] for request in first] == wanted


def test_an_answer_ends_at_a_stop_string_or_the_end_of_text(served, engine):
    whole = Asked(engine, "kept?", "decoder", max_tokens=40).wait()[0]
    word = next(letter for letter in whole if letter.isascii())
    assert Asked(engine, "kept?", "decoder", max_tokens=40, stop=(word,)).wait() == (
        whole.split(word)[0],
        "stop",
    )
    tokens = Asked(engine, "kept?", "decoder", max_tokens=40)
    tokens.wait()
    engine.ends = [tokens.answer.tokens[5]]
    ended = Asked(engine, "kept?", "decoder", max_tokens=40)
    assert ended.wait()[1] == "stop"
    assert ended.answer.tokens == tokens.answer.tokens[: tokens.answer.tokens.index(engine.ends[0])]


def test_log_probabilities_are_those_of_the_model(served, engine):
    model, tokenizer = served
    forced = model.base_model.generation_config.forced_bos_token_id
    request, parts = Asked(engine, "kept?", "decoder", top=3, temperature=1.5, seed=3), []
    while not parts or parts[-1].finish is None:
        parts.append(request.parts.get(timeout=60))
    found = [one for part in parts for one in part.likelihoods]
    labels = torch.tensor([request.answer.tokens])
    assert [one.token for one in found] == request.answer.tokens
    with torch.no_grad():
        given = tokenizer("kept?", return_tensors="pt")
        logits = model(**given, labels=labels, adapter_names=["decoder"]).logits[0]
    for step, (one, logprobs) in enumerate(zip(found, logits.float().log_softmax(-1), strict=True)):
        if step == 0 and forced is not None:
            assert (one.token, one.logprob, one.top) == (forced, 0.0, ((forced, 0.0),))
        else:
            assert one.logprob == pytest.approx(logprobs[one.token].item(), abs=1e-5)
            assert [token for token, _ in one.top] == logprobs.topk(3).indices.tolist()


def test_the_server_answers_as_of_any_other_model(served):
    engine = Engine(*served, max_batch=4)
    engine.ends = []
    asked = PromptFormat("alpaca").prompt("kept?", engine.tokenizer).prompt
    adapters = {"base": None, "reads": "default", "writes": "decoder"}
    wanted = {name: expected(served, "kept?", adapter, 1.0, 6) for name, adapter in adapters.items()}
    in_words = None if engine.context < 200 else expected(served, asked, "default", 1.0, 6)
    names = {name: Served(adapter, PromptFormat("alpaca")) for name, adapter in adapters.items()}
    with (
        serving_models.server(engine, served=names) as address,
        httpx.Client(base_url=f"{address}/v1") as client,
    ):

        def post(path, **body):
            return client.post(path, json={"temperature": 0, "max_tokens": 6, **body}, timeout=60)

        for name, text in wanted.items():
            body = {"model": name, "prompt": "kept?"}
            answer = post("/completions", **body, logprobs=2).json()
            assert answer["choices"][0]["text"] == text
            assert answer["usage"]["prompt_tokens"] == len("kept?") + 1  # the end of text
            assert len(answer["choices"][0]["logprobs"]["tokens"]) == 6
            lines = post("/completions", **body, stream=True).text.splitlines()
            pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
        answer = post(
            "/chat/completions", model="reads", messages=[{"role": "user", "content": "kept?"}]
        ).json()
        if in_words is not None:
            assert answer["choices"][0]["message"]["content"] == in_words
            return
        # BART has a table of 96 positions for the prompt, and one for the answer
        said = "this model reads at most 96 tokens of the prompt, and 95 of the answer; the prompt has"
        assert said in answer["error"]["message"]
        for prompt, limit, status in ((95, 95, 200), (95, 96, 400), (96, 1, 400)):
            assert (
                post("/completions", model="base", prompt="x" * prompt, max_tokens=limit).status_code
                == status
            )
