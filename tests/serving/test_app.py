"""The endpoint as seen by OpenAI's own client, and what it refuses."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import serving_models

from reft_lightning.data.encoding import prompt_ids
from reft_lightning.serving.answers import Answer, Likelihood, Part
from reft_lightning.serving.app import MAX_BODY, Served
from reft_lightning.serving.engine import Engine
from reft_lightning.serving.protocol import ChatRequest, TextRequest, Writer

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def address():
    engine = Engine(serving_models.model(), serving_models.tokenizer(), max_batch=8)
    engine.ends = []
    with serving_models.server(engine) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address, body, path="/v1/completions", **more):
    content = {"json": body} if isinstance(body, dict) else {"content": body}
    return httpx.post(f"{address}{path}", **{"timeout": 60, **content, **more})


def test_the_models_are_the_base_and_its_adapters(client):
    assert [model.id for model in client.models.list()] == list(serving_models.NAMES)
    assert client.models.retrieve("late").id == "late"
    with pytest.raises(openai.NotFoundError, match=r"got 'lat'.*did you mean 'late'") as caught:
        client.completions.create(model="lat", prompt="x")
    assert caught.value.code == "model_not_found"


def test_each_model_answers_in_its_own_words(client):
    texts = {
        name: client.completions.create(model=name, prompt="kept?", **GREEDY).choices[0].text
        for name in serving_models.NAMES
    }
    assert len(set(texts.values())) == 4
    off = {"model": "everywhere", "prompt": "kept?", "extra_body": {"strength": 0}}
    assert client.completions.create(**off, **GREEDY).choices[0].text == texts["base"]
    answer = client.completions.create(model="late", prompt="kept?", **GREEDY)
    assert answer.choices[0].text == texts["late"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == 6  # the bytes and BOS
    assert answer.usage.total_tokens == 12


def test_a_stream_is_the_answer_in_pieces(client):
    chat = {"model": "everywhere", "messages": [{"role": "user", "content": "kept?"}], **GREEDY}
    whole = client.chat.completions.create(**chat)
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 3
    assert [c.choices[0].delta.role for c in chunks[:-1]] == ["assistant"] + [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    plain = {"model": "late", "prompt": "kept?", **GREEDY}
    pieces = [c.choices[0].text for c in client.completions.create(**plain, stream=True)]
    assert "".join(pieces) == client.completions.create(**plain).choices[0].text


def test_log_probabilities_come_in_both_shapes(client):
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "kept?"}], logprobs=True, top_logprobs=2, **GREEDY
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 6
    assert all(
        len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob <= 0 for one in content
    )
    text = client.completions.create(model="base", prompt="kept?", logprobs=2, **GREEDY).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == 6
    assert all(len(top) == 2 for top in text.logprobs.top_logprobs)
    assert client.completions.create(model="base", prompt="kept?", **GREEDY).choices[0].logprobs is None


def test_tokens_are_spelt_as_they_stand_in_the_text():
    tokenizer = serving_models.sentence_piece()
    words, bytes_ = tokenizer("a a b", add_special_tokens=False)["input_ids"], [tokenizer.vocab["<0xC3>"]]
    found = [Likelihood(token, -1.0, ((token, -1.0),)) for token in words + bytes_]
    chat = ChatRequest(model="a", messages=[{"role": "user", "content": "x"}], logprobs=True)
    spelt = Writer(chat, tokenizer).piece(Part("", found), first=True)["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in spelt[:-1]) == " a a b"
    assert spelt[0]["bytes"] == list(b" a")
    assert spelt[-1]["bytes"] is None  # half a character


def test_of_tokens_that_look_alike_the_likeliest_is_reported():
    tokenizer = serving_models.sentence_piece()
    halves = [tokenizer.vocab[f"<0x{byte}>"] for byte in ("C3", "C4", "C5")]
    found = Likelihood(halves[0], -1.0, tuple(zip(halves, (-1.0, -2.0, -3.0), strict=True)))
    text = TextRequest(model="a", prompt="x", logprobs=3)
    said = Writer(text, tokenizer).piece(Part("", (found,)), first=True)["choices"][0]["logprobs"]
    assert said["top_logprobs"] == [{"\ufffd": -1.0}]


def test_what_clients_write_where_they_ask_for_nothing_is_taken(address, client):
    plain = client.completions.create(model="base", prompt="kept?", **GREEDY).choices[0].text
    nothing = dict.fromkeys(("n", "top_p", "stop", "stream", "strength", "suffix", "logit_bias", "user"))
    for extra in (
        nothing,
        {"n": 1, "best_of": 1, "echo": False},
        {"frequency_penalty": 0.0, "presence_penalty": 0},
    ):
        answer = post(address, {"model": "base", "prompt": "kept?", **GREEDY, **extra})
        assert answer.json()["choices"][0]["text"] == plain
    assert "frequency_penalty: Input should be 0" in post(
        address, {"model": "base", "prompt": "x", "frequency_penalty": 0.5}
    ).json()["error"]["message"]  # fmt: skip


def test_an_answer_of_the_client_is_a_turn_of_the_next_request(client):
    turns = [{"role": "user", "content": "kept?"}]
    said = client.chat.completions.create(model="base", messages=turns, **GREEDY).choices[0].message
    for turn in (said, said.model_dump()):  # the second has a null for every option that was not given
        more = [*turns, turn, {"role": "user", "content": "why?"}]
        assert (
            client.chat.completions.create(model="base", messages=more, **GREEDY).choices[0].message.content
        )


def test_text_in_parts_is_read_as_one_text(client):
    def said(content):
        turn = {"role": "user", "content": content}
        return client.chat.completions.create(model="base", messages=[turn], **GREEDY).choices[0].message

    parts = [{"type": "text", "text": "is it"}, {"type": "text", "text": "kept?"}]
    assert said(parts) == said("is it\nkept?")
    with pytest.raises(openai.BadRequestError, match="reads text only: leave out the pictures"):
        said([*parts, {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}])
    with pytest.raises(openai.BadRequestError, match=r"'audio' found .* 'text', 'image_url'"):
        said([{"type": "audio"}])
    with pytest.raises(openai.BadRequestError, match="must be a string, or a list of parts"):
        said(5)


def test_errors_of_the_framework_have_the_shape_of_the_others(address, client):
    deep = post(address, b"[" * 100_000, headers={"content-type": "application/json"})
    for answer, status, said in (
        (
            post(address, {"model": "base"}, path="/chat/completions"),
            404,
            "did you mean '/v1/chat/completions'?",
        ),
        (httpx.get(f"{address}/v1/completions"), 405, "Method Not Allowed"),
        (deep, 400, "parsing the body"),
        (post(address, b"{}"), 400, "Content-Type: application/json"),
    ):
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="there is nothing at /v1/embeddings"):
        client.embeddings.create(model="base", input="x")


def test_questions_are_written_as_the_adapter_was_trained_on_them(client):
    def tokens(model, *messages):
        made = [{"role": role, "content": text} for role, text in messages]
        return client.chat.completions.create(model=model, messages=made, **GREEDY).usage.prompt_tokens

    assert tokens("base", ("user", "hi")) == 1 + len("<user>hi>")
    assert tokens("base", ("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "hm")) == 1 + len(
        "<system>be<user>hi<assistant>yo<user>hm>"
    )
    assert tokens("late", ("user", "hi")) == 1 + len("hi\n")
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        tokens("base", ("user", "hi"), ("assistant", "yo"))
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        tokens("base", ("system", "be"))
    with pytest.raises(openai.BadRequestError, match="trained on single questions"):
        tokens("late", ("user", "hi"), ("assistant", "yo"), ("user", "hm"))
    with pytest.raises(openai.BadRequestError, match="does not support a system message"):
        tokens("late", ("system", "be"), ("user", "hi"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[]", "the body"),
        ({}, "model: Field required"),
        ({"model": "base"}, "prompt: Field required"),
        ({"model": "base", "prompt": 3}, "prompt: Input should be a valid string"),
        ({"model": "base", "prompt": "x", "max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"model": "base", "prompt": "x", "temperature": 3}, "temperature: Input should be less"),
        ({"model": "base", "prompt": "x", "temprature": 1}, "temprature is not a supported option; did you mean 'temp"),
        ({"model": "base", "prompt": "x", "n": 2}, "n: Input should be 1"),
        ({"model": "base", "prompt": "x", "seed": 2**70}, "seed: Input should be less"),
        ({"model": "base", "prompt": "x", "stop": "x" * 300}, "String should have at most 200"),
        ({"model": "base", "prompt": "x", "strength": float("1e9")}, "strength: Input should be less"),
        ({"model": "base", "prompt": "x", "logprobs": 99}, "logprobs: Input should be less"),
        ({"model": "base", "prompt": "x" * 500}, "; the prompt has 501, and up to 1 were requested"),
        ({"model": "base", "prompt": "x", "max_tokens": 500}, "128 tokens of the prompt and the answer together"),
        ({"model": "base", "messages": [{"role": "user", "content": ""}] * 10_001}, "should have at most 10000 items"),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, str) else None,
)  # fmt: skip
def test_a_malformed_or_oversized_request_says_what_is_wrong(address, body, said):
    path = "/v1/chat/completions" if isinstance(body, dict) and "messages" in body else "/v1/completions"
    response = post(address, body, path, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_an_empty_prompt_is_the_token_of_its_beginning(address):
    assert post(address, {"model": "base", "prompt": "", **GREEDY}).json()["usage"]["prompt_tokens"] == 1


def test_a_body_that_is_huge_or_has_no_stated_length_is_refused_unread(address):
    huge = post(address, b" " * (MAX_BODY + 1), headers={"content-type": "application/json"})
    unstated = post(address, iter([b"{", b"}"]))
    assert (huge.status_code, unstated.status_code) == (413, 411)
    assert "Content-Length" in unstated.json()["error"]["message"]


def test_a_token_is_asked_for_everywhere_but_for_health():
    with serving_models.server(token="secret") as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}):
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 401
            assert post(address, {"model": "base", "prompt": "x"}, headers=headers).status_code == 401
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert client.completions.create(model="base", prompt="x", **GREEDY).choices[0].text


def test_an_adapter_that_fails_is_a_server_error_and_the_next_request_works():
    served = {**serving_models.SERVED, "gone": Served("deleted")}
    with serving_models.server(served=served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="there is no adapter 'deleted'"):
            client.completions.create(model="gone", prompt="x", **GREEDY)
        with pytest.raises(openai.APIError, match="there is no adapter 'deleted'"):
            list(client.completions.create(model="gone", prompt="x", stream=True, **GREEDY))
        assert client.completions.create(model="late", prompt="x", **GREEDY).choices[0].text


def test_answers_under_way_are_told_when_the_server_ends(monkeypatch, caplog):
    monkeypatch.setattr("reft_lightning.serving.app.PATIENCE", 0.1)
    engine = Engine(serving_models.model(), serving_models.tokenizer(), max_batch=8)
    engine.ends, choose = [], Answer.choose

    def slowly(answer, logits):
        time.sleep(0.3 if len(engine._batch) == 2 else 0)
        return choose(answer, logits)

    monkeypatch.setattr(Answer, "choose", slowly)
    body = {"model": "base", "prompt": "x", "temperature": 0, "max_tokens": 100}
    with ThreadPoolExecutor() as pool, serving_models.server(engine) as address:
        whole, stream = (pool.submit(post, address, {**body, "stream": s}, timeout=60) for s in (False, True))
        while len(engine._batch) < 2:
            time.sleep(0.01)
    assert whole.result().status_code == 503
    assert "the server is closing" in whole.result().json()["error"]["message"]
    assert "the server is closing" in stream.result().text.splitlines()[-2]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_server_answers_others_while_it_reads_a_long_prompt(address, monkeypatch, path):
    reading, go_on = threading.Event(), threading.Event()

    def slowly(*given):
        reading.set()
        assert go_on.wait(30)
        return prompt_ids(*given)

    monkeypatch.setattr("reft_lightning.serving.engine.prompt_ids", slowly)
    asks = (
        {"prompt": "kept?"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    )
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(post, address, {"model": "late", **asks, **GREEDY}, path)
        assert reading.wait(30)
        try:
            assert httpx.get(f"{address}/health", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert asked.result().status_code == 200


def test_a_client_that_leaves_frees_its_place(monkeypatch):
    engine = Engine(serving_models.model(), serving_models.tokenizer(), max_batch=2)
    engine.ends, given, submit, choose = [], [], engine.submit, Answer.choose
    monkeypatch.setattr(engine, "submit", lambda answer: given.append(answer) or submit(answer))
    monkeypatch.setattr(Answer, "choose", lambda answer, logits: time.sleep(0.02) or choose(answer, logits))
    with serving_models.server(engine) as address:
        body = {"model": "base", "prompt": "x", "temperature": 0, "max_tokens": 120}
        with pytest.raises(httpx.ReadTimeout):
            post(address, body, timeout=0.05)
        with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
        until = time.monotonic() + 10
        while engine._batch and time.monotonic() < until:
            time.sleep(0.05)
        assert not engine._batch
        assert all(answer.cancelled and len(answer.tokens) < 120 for answer in given)
        assert post(address, {**body, "max_tokens": 2}).status_code == 200


def test_a_hundred_requests_of_all_kinds_lose_nothing(address):
    """A third are answered whole or streamed, others cancelled, malformed or oversized."""
    draw = random.Random(0)
    kinds = draw.choices(["whole", "stream", "cancel", "malformed", "oversized", "unknown"], k=100)
    expected = {}
    for name in serving_models.NAMES:
        for length in (3, 9):
            body = {"model": name, "prompt": "kept?", "temperature": 0, "max_tokens": length}
            expected[name, length] = post(address, body).json()["choices"][0]["text"]

    async def ask(client, kind, number):
        name, length = serving_models.NAMES[number % 4], (3, 9)[number % 2]
        body = {"model": name, "prompt": "kept?", "temperature": 0, "max_tokens": length}
        if kind == "malformed":
            body["max_tokens"] = "many"
        elif kind == "oversized":
            body["prompt"] = "x" * 4000
        elif kind == "unknown":
            body["model"] = "nobody"
        elif kind == "cancel":
            task = asyncio.create_task(client.post("/v1/completions", json={**body, "max_tokens": 100}))
            await asyncio.sleep(0.02)
            task.cancel()
            return await asyncio.gather(task, return_exceptions=True) and "cancelled"
        if kind == "stream":
            text = ""
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            return text == expected[name, length]
        response = await client.post("/v1/completions", json=body)
        if kind == "whole":
            return response.json()["choices"][0]["text"] == expected[name, length]
        return response.status_code

    async def all_of_them():
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(ask(client, kind, i) for i, kind in enumerate(kinds)))

    found = asyncio.run(all_of_them())
    right = {
        "whole": True,
        "stream": True,
        "cancel": "cancelled",
        "malformed": 400,
        "oversized": 400,
        "unknown": 404,
    }
    wrong = [(kind, answer) for kind, answer in zip(kinds, found, strict=True) if answer != right[kind]]
    assert wrong == []
    assert threading.active_count() < 20
