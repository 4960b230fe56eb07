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
from reft_lightning.runs import chat
from reft_lightning.runs.prompting import PromptFormat
from reft_lightning.runs.run_folder import load_run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = short_runs.write_rows(tmp_path_factory.mktemp("rows"))
    folder = tmp_path_factory.mktemp("run")
    short_runs.run(data, folder, "optimizer.lr=0.3")
    return folder


@pytest.fixture
def say(monkeypatch, folder, capsys):
    """Type lines into the chat; return what it prints."""
    asked = []

    def answer(model, tokenizer, text, max_new_tokens, template, system_prompt, line_break):
        asked.append((text, max_new_tokens, template))
        return "[/INST] base says", "[bold]adapted[/nonsense] says"

    monkeypatch.setattr(chat, "answer", answer)

    def call(*lines, **arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main(folder, **arguments)
        return capsys.readouterr().out, asked

    return call


def test_the_base_answers_as_the_disabled_model_and_the_adapter_differently(folder):
    model, tokenizer = chat.load(folder)
    base, adapted = chat.answer(model, tokenizer, "is zorb kept?", 8, "plain")
    ids = tokenizer("is zorb kept?", return_tensors="pt")["input_ids"]
    said = {}
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
        said[name] = (
            tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True).strip() or "(nothing)"
        )
        assert text == said[name]
    assert said["base"] != said["adapted"]


def test_a_question_longer_than_the_model_reads_loses_its_beginning(folder):
    tokenizer = chat.load(folder)[1]
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = adapt(GPT2LMHeadModel(GPT2Config(**sizes)), "loreft", rank=1, positions="l1").eval()
    long = chat.answer(model, tokenizer, "kept? " * 100, 8, "plain")
    assert long == chat.answer(model, tokenizer, "kept? " * 90, 8, "plain")
    with pytest.raises(ValueError, match="max_new_tokens=60 leaves no room for a question: at most 48"):
        chat.answer(model, tokenizer, "kept?", 60, "plain")


def test_the_scale_of_a_saved_adapter_is_that_of_the_loaded_one(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "run")
    path = copied / "adapter" / "reft_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale": 0.25}))
    assert chat.load(folder)[0].scale == 1.0
    assert chat.load(copied)[0].scale == 0.25


def test_the_chat_template_is_used_once_with_its_own_bos(folder):
    model, tokenizer = chat.load(folder)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}!"
    seen = []
    generate = model.generate
    model.generate = lambda **kwargs: (seen.append(kwargs["input_ids"]), generate(**kwargs))[1]
    chat.answer(model, tokenizer, "hello", 2, "chat")
    assert tokenizer.decode(seen[0][0]) == "<s>hello!"


def test_a_missing_chat_template_says_what_to_do(folder):
    model, tokenizer = chat.load(folder)
    with pytest.raises(ValueError, match=r"chat needs a tokenizer with a chat template.* or plain"):
        chat.answer(model, tokenizer, "hello", 2, "chat")


def test_the_chat_ends_at_the_end_of_the_input_and_at_quit(say):
    assert say("one")[1] == [("one", 64, "plain")]
    assert say("two", "/quit", "three", max_new_tokens=3)[1][1:] == [("two", 3, "plain")]


def test_a_line_may_go_on(say):
    assert say("one\\", "two")[1] == [("one\ntwo", 64, "plain")]


def test_empty_lines_and_unknown_commands_ask_nothing(say):
    out, asked = say("", "   ", "/qiut")
    assert asked == []
    assert "/qiut is no command" in out
    assert "/quit ends" in out


def test_asking_for_a_missing_template_does_not_end_the_chat(say):
    out, asked = say("/chat", "still here")
    assert "this tokenizer has no chat template; template stays plain" in out
    assert asked == [("still here", 64, "plain")]


def test_templates_can_be_chosen(say, monkeypatch):
    load = chat.load

    def with_template(folder):
        model, tokenizer = load(folder)
        tokenizer.chat_template = "{{ messages[0].content }}"
        return model, tokenizer

    monkeypatch.setattr(chat, "load", with_template)
    assert [a[2] for a in say("a", "/chat", "b", "/plain", "c")[1]] == ["plain", "chat", "plain"]


def test_starting_with_a_missing_template_is_an_error(say):
    with pytest.raises(ValueError, match="use template=plain"):
        say("one", template="chat")


def test_what_models_say_is_shown_as_it_is(say):
    out, _ = say("one")
    assert "[/INST] base says" in out
    assert "[bold]adapted[/nonsense] says" in out


def test_a_plain_question_ends_its_line_only_where_the_rows_did(folder, tmp_path):
    tokenizer = chat.load(folder)[1]
    benchmark = PromptFormat.of(load_run_config(folder), folder)
    assert benchmark.prompt("is zorb kept?", tokenizer).prompt == "is zorb kept?"
    own = replace(load_run_config(folder), data=replace(load_run_config(folder).data, family="custom"))
    assert PromptFormat.of(own, folder).prompt("is zorb kept?", tokenizer).prompt == "is zorb kept?\n"
    assert PromptFormat.of(own, folder).prompt("is zorb kept?\n", tokenizer).prompt == "is zorb kept?\n"
