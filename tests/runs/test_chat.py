"""The chat: base and adapted answers side by side, and its commands."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import short_runs
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from reft_lightning.adapters.adapt import adapt
from reft_lightning.data.image_data import ImageData
from reft_lightning.data.pictures import Picture
from reft_lightning.evaluation import Decoding
from reft_lightning.evaluation import generate as generate_texts
from reft_lightning.runs import chat
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.runs.run_folder import load_run_config


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    short_runs.run(data, folder, "optimizer.lr=0.3")
    return folder


CHAT = "<s>{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}[a]{% endif %}"


@pytest.fixture
def talk(folder):
    return chat.Conversation(*chat.load(folder), max_new_tokens=8)


@pytest.fixture
def say(monkeypatch, folder, capsys):
    """Type lines into the chat; return what it prints."""
    asked = []

    def ask(self, question):
        asked.append((question, self.max_new_tokens, self.prompts.template))
        return "[/INST] base says", "[bold]adapted[/nonsense] says"

    monkeypatch.setattr(chat.Conversation, "ask", ask)

    def call(*lines, **arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(folder, **arguments)
        return capsys.readouterr().out, asked

    return call


def heard(talk, monkeypatch):
    """The prompts that the models read from here on, base and adapted in turn."""
    prompts, generate = [], talk.model.generate

    def listening(**inputs):
        prompts.append(talk.reader.decode(inputs["input_ids"][0]))
        return generate(**inputs)

    monkeypatch.setattr(talk.model, "generate", listening, raising=False)
    return prompts


def test_the_base_answers_as_the_disabled_model_and_the_adapter_differently(talk):
    model, tokenizer = talk.model, talk.reader
    base, adapted = talk.ask("is zorb kept?")
    ids = tokenizer("is zorb kept?", return_tensors="pt")["input_ids"]
    for name, text in (("base", base), ("adapted", adapted)):
        rows = ids
        for _ in range(8):
            with torch.no_grad():
                if name == "base":
                    logits = model.base_model(rows).logits
                else:
                    mask = torch.zeros_like(rows, dtype=torch.bool)
                    mask[:, : ids.shape[1]] = True
                    logits = model(input_ids=rows, prompt_mask=mask).logits
            rows = torch.cat([rows, logits[:, -1:].argmax(-1)], 1)
            if rows[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert base != adapted


def test_a_question_longer_than_the_model_reads_loses_its_beginning(folder):
    tokenizer = chat.load(folder)[1]
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = adapt(GPT2LMHeadModel(GPT2Config(**sizes)), "loreft", rank=1, positions="l1").eval()
    talk = chat.Conversation(model, tokenizer, PromptFormat(), max_new_tokens=8)
    assert talk.ask("kept? " * 100) == talk.ask("kept? " * 90)
    with pytest.raises(
        ValueError, match="max_new_tokens=60 leaves no room for a question: it must be at most 48"
    ):
        chat.Conversation(model, tokenizer, PromptFormat(), max_new_tokens=60)


def test_the_scale_of_a_saved_adapter_is_that_of_the_loaded_one(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "run")
    path = copied / "adapter" / "reft_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale": 0.25}))
    (model, _, _), (scaled, _, _) = chat.load(folder), chat.load(copied)
    assert (model.scale, scaled.scale) == (1.0, 0.25)


def test_in_a_chat_template_each_model_reads_its_own_earlier_answers(talk, monkeypatch):
    talk.reader.chat_template, talk.prompts = CHAT, PromptFormat("chat")
    prompts = heard(talk, monkeypatch)
    base, adapted = talk.ask("hello")
    assert prompts == ["<s>[u]hello[a]"] * 2  # with the one BOS of the template
    talk.ask("and?")
    assert base != adapted
    assert prompts[2:] == [f"<s>[u]hello[a]{said}[u]and?[a]" for said in (base, adapted)]
    talk.begin_again()
    talk.ask("hello")
    assert prompts[4:] == prompts[:2]


def test_under_other_templates_each_question_stands_by_itself(talk, monkeypatch):
    prompts = heard(talk, monkeypatch)
    assert talk.ask("hello") == talk.ask("hello")
    assert prompts == ["<s>hello"] * 4


def test_a_missing_chat_template_says_what_to_do(talk):
    talk.prompts = PromptFormat("chat")
    with pytest.raises(ValueError, match=r"chat needs a tokenizer with a chat template.* or plain"):
        talk.ask("hello")


def test_a_question_that_a_template_refuses_does_not_end_the_chat(folder, monkeypatch, capsys):
    load = chat.load

    def refusing(*arguments):
        model, tokenizer, prompts = load(*arguments)
        tokenizer.chat_template = (
            "{% if 'no' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + CHAT
        )
        return model, tokenizer, prompts

    monkeypatch.setattr(chat, "load", refusing)
    monkeypatch.setattr("sys.stdin", io.StringIO("no\nyes\n"))
    chat.main(folder, max_new_tokens=2, template="chat")
    out = " ".join(capsys.readouterr().out.split())
    assert "rejects the turns user: not that" in out
    assert out.count("frozen base") == 1


def test_a_line_in_another_encoding_does_not_end_the_chat(say, monkeypatch, folder, capsys):
    out, asked = say("gr\udcfcn", "two")
    assert "This is not valid text" in out
    assert [question for question, *_ in asked] == ["two"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfcn\n"), encoding="utf-8"))
    chat.main(folder)
    assert "This is not valid utf-8" in capsys.readouterr().out


def test_the_chat_ends_at_the_end_of_the_input_and_at_quit(say):
    assert say("one")[1] == [("one", 64, "plain")]
    assert say("two", "/quit", "three", max_new_tokens=3)[1][1:] == [("two", 3, "plain")]


def test_lines_may_go_on_and_empty_ones_and_commands_that_cannot_be_followed_ask_nothing(say):
    out, asked = say("", "   ", "/qiut", "/chat", "one\\", "two")
    assert asked == [("one\ntwo", 64, "plain")]
    assert "/qiut is not a command" in out
    assert "/quit ends" in out
    assert "this tokenizer has no chat template; the template is still plain" in out


def test_templates_can_be_chosen(say, monkeypatch):
    load = chat.load

    def with_template(*arguments):
        model, tokenizer, prompts = load(*arguments)
        tokenizer.chat_template = CHAT
        return model, tokenizer, prompts

    monkeypatch.setattr(chat, "load", with_template)
    assert [a[2] for a in say("a", "/chat", "b", "/plain", "c")[1]] == ["plain", "chat", "plain"]


def test_starting_with_a_missing_template_is_an_error(say):
    with pytest.raises(ValueError, match="use template=plain"):
        say("one", template="chat")


def test_what_models_say_is_shown_as_it_is(say):
    out, _ = say("one")
    assert "[/INST] base says" in out
    assert "[bold]adapted[/nonsense] says" in out


def test_a_plain_question_ends_its_line_only_where_the_rows_did(folder):
    config, tokenizer = load_run_config(folder), chat.load(folder)[1]
    benchmark = PromptFormat.of(config, folder)
    assert benchmark.prompt("is zorb kept?", tokenizer).prompt == "is zorb kept?"
    own = PromptFormat.of(
        replace(config, data=replace(config.data, family="custom", prompt="question")), folder
    )
    assert own.prompt("is zorb kept?", tokenizer).prompt == "is zorb kept?\n"
    assert own.prompt("is zorb kept?\n", tokenizer).prompt == "is zorb kept?\n"


def test_conversations_are_trained_and_talked_to_in_the_chat_template(folder):
    config = load_run_config(folder)
    data = replace(config.data, family="custom", messages="messages")
    assert PromptFormat.of(replace(config, data=data), folder).template == "chat"


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A run on pictures of one colour."""
    rows, folder = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("run")
    short_runs.run_on_colours(rows, folder)
    return folder, rows


def test_a_picture_is_seen_with_its_question_and_stays_in_the_conversation(seeing, monkeypatch):
    folder, rows = seeing
    talk = chat.Conversation(*chat.load(folder), max_new_tokens=4)
    seen, generate = [], talk.model.generate

    def looking(**inputs):
        seen.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(talk.model, "generate", looking, raising=False)
    talk.shown.append(Picture("0.png", rows / "0.png"))
    first = talk.ask("Which colour?")
    talk.ask("And now?")
    talk.begin_again()
    talk.ask("Which colour?")
    image = talk.model.base_model.config.image_token_id
    assert [int((inputs["input_ids"] == image).sum()) for inputs in seen] == [4, 4, 4, 4, 0, 0]
    assert ["pixel_values" in inputs for inputs in seen] == [True] * 4 + [False] * 2
    example = replace(
        talk.prompts.prompt("<image>\nWhich colour?", talk.reader, (), (Picture("0.png", rows / "0.png"),)),
        target="x",
    )
    batch = ImageData.lay_out(talk.reader, example, 99)
    with talk.model.disabled():
        ((base,),) = generate_texts(talk.model, batch, talk.reader.tokenizer, Decoding(4, verify=False))
    assert first[0] == base.strip()


def test_pictures_are_named_on_the_terminal(seeing, monkeypatch, capsys):
    folder, rows = seeing
    lines = [
        f"/image {rows / 'none.png'}",
        f"/image {rows / '1.png'}",
        "<image> and <image>?",
        "Which colour?",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.main(folder, max_new_tokens=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "/image FILE shows a picture with the next question" in out
    assert "none.png' cannot be read: there is no file" in out
    assert out.count("frozen base") == 1  # of the one question that could be put
    assert "as many marks <image> as pictures; got pictures: 1, marks: 2" in out
