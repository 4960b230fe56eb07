"""reft-serve: which folders and addresses it accepts, and a real server that answers."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import short_runs
import tiny
import torch
from fastapi.testclient import TestClient
from laws import shaken

import reft_lightning as rl
from reft_lightning import cli
from reft_lightning.adapters.adapt import adapt
from reft_lightning.runs import chat
from reft_lightning.serving.command import load_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = short_runs.write_rows(tmp_path_factory.mktemp("rows"))
    folder = tmp_path_factory.mktemp("runs") / "polite"
    short_runs.run(data, folder, "optimizer.lr=0.3", "test=false")
    return folder


def started(monkeypatch, *arguments):
    """Return the server that the command would run."""
    servers = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: servers.append(server))
    monkeypatch.setattr(sys, "argv", ["reft-serve", *map(str, arguments)])
    cli.serve()
    return servers[0]


def refused(monkeypatch, capsys, *arguments):
    """Return the command's message before it exits with status 2."""
    monkeypatch.setattr(sys, "argv", ["reft-serve", *map(str, arguments)])
    monkeypatch.delenv("REFT_SERVE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.serve()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_other_machines_are_answered_with_a_token_only(monkeypatch, capsys, folder):
    said = refused(monkeypatch, capsys, folder, "host=0.0.0.0")
    assert "set the environment variable REFT_SERVE_TOKEN" in said


def test_folders_are_checked_before_weights_are_loaded(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setattr("reft_lightning.runs.build.load_base_model", None)
    assert "FOLDER is missing" in refused(monkeypatch, capsys, "port=8000")
    said = refused(monkeypatch, capsys, folder.parent / "polit")
    assert "no such folder" in said
    assert f"did you mean '{folder}'" in said
    assert "two folders are called 'polite'" in refused(
        monkeypatch, capsys, folder, f"adapters.polite={folder}"
    )
    (tmp_path / "empty").mkdir()
    assert "must be a run that trained interventions, or" in refused(monkeypatch, capsys, tmp_path / "empty")
    said = refused(monkeypatch, capsys, folder / "adapter")
    assert "add model=NAME" in said
    assert "port must be at most 65535" in refused(monkeypatch, capsys, folder, "port=70000")
    said = refused(monkeypatch, capsys, folder, "prot=70000")
    assert "did you mean 'port'" in said


def test_an_adapter_of_another_base_is_refused_by_the_name_of_its_folder(
    monkeypatch, capsys, folder, tmp_path
):
    rl.attach(tiny.model("llama"), rank=2).save_pretrained(tmp_path / "other")
    said = refused(monkeypatch, capsys, folder, f"adapters.other={tmp_path / 'other'}")
    assert str(tmp_path / "other") in said
    assert "trained on a different kind of model" in said


def test_each_name_is_that_of_its_own_adapter(tmp_path):
    names = ("first", "default", "1_optimizer.lr=0.3", "two words", "keys")
    for seed, name in enumerate(names):
        reft = rl.attach(tiny.model("llama"), rank=2, positions="all")
        shaken(reft.adapters.first, seed=seed)
        reft.save_pretrained(tmp_path / name)
    reft, inner = load_adapters(tiny.model("llama"), {name: tmp_path / name for name in names})
    ids = torch.tensor([[5, 6, 7]])
    for name in names:
        alone = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / name)
        torch.testing.assert_close(
            reft(input_ids=ids, adapter_names=[inner[name]]).logits, alone(input_ids=ids).logits
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"heads": ["lm_head"]}, "it has a trained head"), ({"beside": "peft/lora"}, "it was trained together")],
)
def test_an_adapter_that_changes_all_requests_is_not_served_with_others(tmp_path, settings, said):
    for name, own in (("changing", settings), ("plain", {})):
        adapt(tiny.model("llama"), "loreft", rank=2, positions="l1", **own).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=f"changing: {said}.*: serve it on its own"):
        load_adapters(tiny.model("llama"), {name: tmp_path / name for name in ("changing", "plain")})
    with pytest.raises(ValueError, match=r"changing: .*base model of its own"):
        load_adapters(tiny.model("llama"), {name: tmp_path / name for name in ("plain", "changing")})


@pytest.mark.parametrize("change", ["intervention=loreft_lora", "intervention.heads=[lm_head]"])
def test_an_adapter_that_changes_all_requests_is_served_on_its_own(monkeypatch, tmp_path, change):
    rows = short_runs.write_rows(tmp_path / "rows")
    short_runs.run(rows, tmp_path / "changing", change, "optimizer.lr=0.3", "test=false")
    text = chat.Conversation(*chat.load(tmp_path / "changing"), max_new_tokens=8).ask("is zorb kept?")[1]
    with TestClient(started(monkeypatch, tmp_path / "changing").config.app) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["changing"]
        body = {"model": "changing", "prompt": "is zorb kept?", "temperature": 0, "max_tokens": 8}
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(3)))
        assert {answer.json()["choices"][0]["text"].strip() for answer in answers} == {text}
        refused = client.post("/v1/completions", json=body | {"strength": 0.5})
        assert refused.status_code == 400
        assert "strength must be 1" in refused.json()["error"]["message"]


def test_an_adapter_of_a_base_of_another_name_is_named(monkeypatch, caplog, folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "other")
    config = tmp_path / "other" / "reft_config.json"
    config.write_text(config.read_text().replace('"tiny_random"', '"them/tiny_instruct"'))
    server = started(monkeypatch, folder, tmp_path / "other")
    server.engine.close()
    # if the server hangs up first, a request in flight is lost; httpx keeps idle connections for five seconds
    assert server.config.timeout_keep_alive > 5
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["other was trained on them/tiny_instruct; it is served on tiny_random"]


def test_a_run_of_a_model_with_an_encoder_and_a_decoder_is_served(monkeypatch, tmp_path):
    sizes = "model_type:t5,d_model:32,d_kv:8,d_ff:64,num_layers:2,num_heads:4"
    rows = short_runs.write_rows(tmp_path / "rows")
    of_t5 = ("model.name=tiny_t5", f"+model.config={{{sizes}}}", "trainer.max_epochs=1", "test=false")
    short_runs.run(rows, tmp_path / "translates", *of_t5)
    texts = chat.Conversation(*chat.load(tmp_path / "translates"), max_new_tokens=12).ask("is zorb kept?")
    assert all(texts)
    with TestClient(started(monkeypatch, tmp_path / "translates").config.app) as client:
        for name, text in zip(("base", "translates"), texts, strict=True):
            body = {"model": name, "prompt": "is zorb kept?", "temperature": 0, "max_tokens": 12}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"].strip() == text


def test_an_adapter_whose_calls_have_to_mark_tokens_is_refused_at_the_start(tmp_path):
    layers = {0: {}, 1: {"positions": "given"}}
    rl.attach(tiny.model("llama"), rank=2).save_pretrained(tmp_path / "first")
    rl.attach(tiny.model("llama"), rank=2, layers=layers).save_pretrained(tmp_path / "marked")
    folders = {name: tmp_path / name for name in ("first", "marked")}
    for order in (["first", "marked"], ["marked", "first"]):
        with pytest.raises(ValueError, match=r"marked: its positions 'given' need an edit_mask"):
            load_adapters(tiny.model("llama"), {name: folders[name] for name in order})


def test_an_adapter_whose_calls_have_to_bring_another_text_is_refused_at_the_start(tmp_path):
    rl.attach(tiny.model("llama"), "das", rank=2, positions="l1").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs hidden states of another text"):
        load_adapters(tiny.model("llama"), {"das": tmp_path})


@pytest.mark.slow
def test_a_run_is_served(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copytree(folder / "adapter", tmp_path / "copy")
    code = "from reft_lightning.cli import serve; serve()"
    arguments = [folder, f"adapters.again={tmp_path / 'copy'}", f"port={port}"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ, stderr=subprocess.PIPE, text=True
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert httpx.get(f"{address}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.1)
        names = [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]]
        assert names == ["base", "polite", "again"]
        texts = {}
        for name in names:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": "is zorb kept?"}],
                "max_tokens": 8,
            }
            answer = httpx.post(f"{address}/v1/chat/completions", json={**body, "temperature": 0}, timeout=60)
            if name == "base":  # its tokenizer has no chat template
                assert "no chat template" in answer.json()["error"]["message"]
                continue
            texts[name] = answer.json()
        assert texts["polite"]["choices"][0]["message"]["content"]
        assert texts["polite"]["usage"]["prompt_tokens"] == 1 + len("is zorb kept?")
    finally:
        process.terminate()
        said = process.communicate(timeout=30)[1]
    assert "models: base, polite, again" in said
    assert "Traceback" not in said
