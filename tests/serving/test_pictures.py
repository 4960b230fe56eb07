"""Pictures in messages: each request is answered as it would be alone, and other data is refused."""

import copy
import io
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import pytest
import short_runs
import torch
import vision_models
from fastapi.testclient import TestClient
from laws import shaken
from PIL import Image
from serving_models import Asked, strange

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.config import compose
from reft_lightning.data.example import Example
from reft_lightning.data.image_data import ImageData
from reft_lightning.data.pictures import Picture
from reft_lightning.evaluation import Decoding, generate
from reft_lightning.runs import chat
from reft_lightning.runs.build import load_to_write
from reft_lightning.runs.kinds import KINDS
from reft_lightning.serving.app import MAX_BODY
from reft_lightning.serving.command import load_adapters
from reft_lightning.serving.engine import JOIN_AFTER, Engine

# PaliGemma's processor makes arrays of tensors, in an older way of numpy's
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
NAMES = (None, "default", "everywhere")


def file_of(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(i):
    return file_of(Image.effect_noise((40, 30), 40.0 + i).convert("RGB"))


def url_of(data, kind="png"):
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def attached(base, tokenizer):
    """Adapters on the tokens of images and on all tokens; readable answers."""
    with torch.no_grad():
        base.get_output_embeddings().weight.normal_()[: len(tokenizer)][strange(tokenizer)] = 0
    base.generation_config.eos_token_id = None
    reft = rl.attach(base, "direft", rank=2, positions="image+l1")
    reft.add_adapter("everywhere", "direft", rank=2, positions="all")
    for seed, adapter in enumerate(reft.adapters.values()):
        shaken(adapter, seed=seed, size=1.0)
    return reft.double().eval()


@pytest.fixture(scope="module", params=["llava", *vision_models.PROCESSORS])
def seeing(request):
    """A name, a tiny model with adapters, and its processor."""
    if request.param == "qwen2_vl":
        pytest.importorskip(
            "torchvision", reason="its processor of videos needs torchvision, of torch's own build"
        )
    if request.param == "llava":
        base, processor, _ = load_to_write(compose.compose(["model=tiny_vision"]), KINDS["vision"])
    else:
        processor, base = vision_models.with_processor(request.param)
    return request.param, attached(base, processor.tokenizer), processor


def examples(name, processor):
    """Questions with other numbers of pictures."""
    mark = processor.image_token
    if name == "qwen2_vl":  # as in its chat template
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    counts = (1, 2, 1) if name == "paligemma" else (1, 0, 2)  # its processor rejects a text without a picture
    return [
        Example(
            "question", mark * count + "what" + "?" * (i + 1), "-", "-",
            pictures=tuple(Picture("1", data=noise(10 * i + k), sent=True) for k in range(count)),
        )
        for i, count in enumerate(counts)
    ]  # fmt: skip


def expected(seeing, example, adapter, count):
    """Return the greedy text of one question on its own, with the code of the evaluation."""
    _, model, processor = seeing
    model.set_adapter(adapter)
    batch = ImageData.lay_out(processor, example, 10_000)
    ((text,),) = generate(model, batch, processor.tokenizer, Decoding(count, verify=False))
    return text


def asked(engine, example, adapter, **settings):
    row = engine.encode(example)
    return Asked(engine, row.prompt_ids, adapter, seen=row, **settings)


def test_questions_with_and_without_pictures_share_batches_and_get_their_own_answers(seeing):
    name, model, processor = seeing
    wanted = [(example, adapter) for example in examples(name, processor) for adapter in NAMES]
    texts = [expected(seeing, *one, 6) for one in wanted]
    later = expected(seeing, wanted[0][0], "default", 2 * JOIN_AFTER)
    engine = Engine(model, processor, max_batch=len(wanted))
    engine.ends = []
    long = asked(engine, wanted[0][0], "default", max_tokens=2 * JOIN_AFTER)  # the others join it
    found = [asked(engine, *one, max_tokens=6) for one in wanted]
    assert [request.wait() for request in found] == [(text, "length") for text in texts]
    assert long.wait() == (later, "length")
    engine.close()
    assert len(set(texts)) > 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pictures of one colour."""
    rows, folder = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("runs") / "colours"
    short_runs.run_on_colours(rows, folder)
    return folder, rows


@pytest.fixture(scope="module")
def client(run):
    servers = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("uvicorn.Server.run", lambda server: servers.append(server))
        patched.setattr(sys, "argv", ["reft-serve", str(run[0]), f"adapters.alone={run[0] / 'adapter'}"])
        cli.serve()
    with TestClient(servers[0].config.app) as client:
        yield client


def test_an_adapter_without_its_run_reads_pictures_where_its_model_does(run, monkeypatch):
    servers = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: servers.append(server))
    monkeypatch.setattr(sys, "argv", ["reft-serve", str(run[0] / "adapter"), "model=tiny_vision"])
    cli.serve()
    servers[0].engine.close()
    assert servers[0].engine.sees


def say(client, model, *contents):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]
    body = {"model": model, "messages": turns, "temperature": 0, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=body)


def test_a_run_on_pictures_answers_as_it_does_in_the_chat(run, client):
    folder, rows = run
    talk = chat.Conversation(*chat.load(folder), max_new_tokens=8)
    talk.shown.append(Picture("2.png", rows / "2.png"))
    first = talk.ask("Which colour?")
    second = talk.ask("And now?")
    talk.begin_again()
    without = talk.ask("Which colour?")
    seen = [part(url_of((rows / "2.png").read_bytes())), {"type": "text", "text": "Which colour?"}]
    said = {}
    for who, model in enumerate(("base", "colours")):
        questions = [(seen,), (seen, first[who], "And now?"), ("Which colour?",)]
        with ThreadPoolExecutor() as pool:
            answers = pool.map(lambda contents, model=model: say(client, model, *contents), questions)
            said[model] = [answer.json()["choices"][0]["message"]["content"].strip() for answer in answers]
        assert said[model] == [first[who], second[who], without[who]]
    assert said["base"] != said["colours"]
    alone = say(client, "alone", seen).json()["choices"][0]["message"]["content"].strip()
    assert alone == first[1]
    body = {
        "model": "colours",
        "prompt": "USER: Which colour? ASSISTANT: ",
        "temperature": 0,
        "max_tokens": 8,
    }
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text.strip() == without[1]


LARGE = file_of(Image.new("1", (6000, 6000)))
HUGE = file_of(Image.new("1", (20_000, 20_000)))
RED = file_of(Image.new("RGB", (28, 28), "red"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([part("https://example.org/cat.png")], "nothing is downloaded; got https://example.org/cat.png"),
        ([part("file:///etc/passwd")], "nothing is downloaded; got file:///etc/passwd"),
        ([part("/etc/passwd")], "nothing is downloaded"),
        ([part("data:text/plain;base64,eA==")], "nothing is downloaded"),
        ([part("data:image/png,x")], "must contain the picture, as data:image/png;base64,..."),
        ([part("data:image/png;base64,x")], "the picture '1' is not valid base64"),
        ([part("data:image/png;base64,é")], "the picture '1' is not valid base64"),
        ([part(url_of(RED)), part("data:image/png;base64,")], "the picture '2' cannot be read: it is not a PNG, JPEG"),
        ([part(url_of(RED[:60]))], "the picture '1' cannot be read: "),
        ([part(url_of(file_of(Image.new("RGB", (28, 28)), "EPS")))], "it is not a PNG, JPEG, GIF or WEBP file"),
        ([part(url_of(LARGE)), part(url_of(LARGE))], "may have at most 50,000,000 pixels together; got 72,000,000"),
        ([part(url_of(HUGE))], "the picture '1' cannot be read: Image size (400000000 pixels) exceeds limit"),
        ([part(url_of(RED))] * 17, "a request may have at most 16 pictures; got 17"),
        ("what is <image>?", "as many marks <image> as pictures; got pictures: 0, marks: 1"),
        ([part(url_of(RED)) | {"size": 3}], "size is not a supported option"),
        ([{"type": "image_url", "image_url": {"url": url_of(RED), "detail": "high"}}], "Input should be 'auto'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_no_picture_is_refused_in_words(client, content, said):
    answer = say(client, "colours", content)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_mark_without_a_picture_is_refused_where_text_is_taken_as_it_is(client):
    answer = client.post("/v1/completions", json={"model": "base", "prompt": "USER: <image> what?"})
    assert answer.status_code == 400
    assert "prompt: LlavaProcessor rejects the row: Found 1 <image>" in answer.json()["error"]["message"]


def test_a_mark_that_its_processor_overlooks_is_refused_too():
    processor, base = vision_models.with_processor("gemma3")
    engine = Engine(attached(base, processor.tokenizer), processor)
    with pytest.raises(
        ValueError, match="<image> is a placeholder for a picture: send the picture as a message part"
    ):
        engine.encode(Example("prompt", "what is <image>?", "-", "-"))
    engine.close()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_the_usual_formats_are_read(client, form):
    picture = part(url_of(file_of(Image.new("RGB", (300, 20), "red"), form), form.lower()))
    picture["image_url"]["detail"] = "auto"  # many clients send it
    assert say(client, "colours", [picture]).status_code == 200


def test_a_picture_is_processed_once_for_its_tokens_and_once_for_all_batches(monkeypatch):
    base, processor, _ = load_to_write(compose.compose(["model=tiny_vision"]), KINDS["vision"])
    engine, opened, opens = Engine(attached(base, processor.tokenizer), processor), [], Picture.open
    engine.ends = []
    monkeypatch.setattr(Picture, "open", lambda picture: opened.append(picture) or opens(picture))
    example = Example("question", "<image>what?", "-", "-", pictures=(Picture("1", data=RED),))
    long = asked(engine, example, None, max_tokens=4 * JOIN_AFTER)
    for _ in range(3):  # each joins it
        Asked(engine, [5], seen=engine.encode(Example("question", "x", "-", "-"))).wait()
    long.wait()
    engine.close()
    assert len(opened) == 2


def test_a_photograph_of_several_megabytes_is_taken(client):
    photograph = file_of(Image.effect_noise((1700, 1700), 80.0))
    assert len(photograph) > MAX_BODY / 2
    assert say(client, "colours", [part(url_of(photograph))] * 2).status_code == 200


def test_an_adapter_that_edits_a_vision_tower_is_served_on_its_own(tmp_path):
    base, processor, _ = load_to_write(compose.compose(["model=tiny_vision"]), KINDS["vision"])
    base = attached(base, processor.tokenizer).detach()  # with readable answers
    reft = rl.attach(base, rank=2, component="vision_block_output", layers=[0], positions="image")
    shaken(reft.adapters.first, size=10.0)
    reft.save_pretrained(tmp_path / "tower")
    seeing = ("llava", reft.eval(), processor)
    questions = examples("llava", processor)
    texts = [expected(seeing, question, "default", 6) for question in questions]
    unedited = [expected(seeing, question, None, 6) for question in questions]
    base = reft.detach()
    with pytest.raises(ValueError, match="tower: it edits a vision tower, which would apply to all requests"):
        load_adapters(base, {name: tmp_path / "tower" for name in ("tower", "again")})
    model, names = load_adapters(copy.deepcopy(base), {"tower": tmp_path / "tower"})
    engine = Engine(model, processor)
    engine.ends = []
    found = [asked(engine, question, names["tower"], max_tokens=6) for question in questions]
    assert [request.wait()[0] for request in found] == texts
    assert texts[0] != unedited[0]
    engine.close()
