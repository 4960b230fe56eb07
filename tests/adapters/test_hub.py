"""Adapters are read from the hub by name, revision and subfolder; errors name the address that failed."""

import copy
import json
import re
import subprocess
import sys

import pytest
import tiny
from local_hub import LocalHub

import reft_lightning as rl
from reft_lightning.adapters.reft.config import CONFIG_FILE, TENSOR_FILE

ASK = """
import json, sys, time
from reft_lightning.adapters.hub import download
time.sleep = lambda seconds: None  # between the hub's own retries
said = {}
for name, options in json.loads(sys.argv[1]).items():
    try:
        said[name] = str(download(name, ["reft_config.json", "reft.safetensors"], **options))
    except FileNotFoundError as error:
        said[name] = f"error: {error}"
print(json.dumps(said))
"""


FAULTS = {
    "silent": "close",
    "broken": "500",
    "missing": "404",
    "private": "401",
    "page": "page",
    "truncated": "cut",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    rl.attach(tiny.model("llama"), "loreft", rank=1, positions="f1").save_pretrained(
        folder / "adapter" / "best"
    )
    hub = LocalHub(folder / "store")
    for name in ("me/good", "me/truncated"):
        hub.publish(name, folder / "adapter", branch="v2" if name == "me/good" else "main")
    hub.faults = [(f"{'GET ' if fault == 'cut' else ''}/me/{kind}/", fault) for kind, fault in FAULTS.items()]
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    """What is said of each repository, all of them asked in one process of its own."""
    asked = {f"me/{kind}": {} for kind in FAULTS}
    asked["me/truncated"] = {"subfolder": "best"}
    asked["me/good"] = {"subfolder": "best", "revision": "v2", "token": "hf_secret"}
    command = [sys.executable, "-c", ASK, json.dumps(asked)]
    environment = hub.environment(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("silent", "Server disconnected without sending a response"),
        ("broken", "500"),
        ("missing", "it does not exist"),
        ("private", "it is private or does not exist: give token="),
        (
            "page",
            "to be served by a Hugging Face Hub|configuration issue",
        ),  # versions of huggingface_hub differ
    ],
)
def test_a_hub_that_fails_is_one_error_with_what_was_asked(kind, reason, answers, hub):
    said = answers[f"me/{kind}"]
    asked = f"{hub.url}/me/{kind}/resolve/main/{CONFIG_FILE}"
    assert said.startswith(f"error: 'me/{kind}' is not a folder, and {asked} could not be read: ")
    assert re.search(reason, said)
    assert "\n" not in said


def test_a_truncated_file_is_not_used(answers):
    assert "could not be read: RemoteProtocolError: peer closed connection" in answers["me/truncated"]


def test_revision_subfolder_and_token_reach_the_hub(answers, hub):
    found = answers["me/good"]
    assert found.endswith("best")
    rl.ReftModel.from_pretrained(tiny.model("llama"), found)
    asked = [what for what, token in hub.requests if token == "Bearer hf_secret"]
    assert {f"HEAD /me/good/resolve/v2/best/{file}" for file in (CONFIG_FILE, TENSOR_FILE)} <= set(asked)


def test_offline_only_the_cache_is_read_and_the_error_says_so():
    for name, said in (("me/adapter", " HF_HUB_OFFLINE is set"), ("not a name", "not a name on the hub"),
                       ("missing/folder/here", "not a name on the hub")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder.*{said}"):
            rl.ReftModel.from_pretrained(tiny.model("llama"), name)


def test_only_the_named_cache_is_read_for_the_adapter_and_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # a hub would be asked
    base, cache = tiny.model("llama"), tmp_path / "cache"
    base.config.name_or_path = "me/base"
    for name, saved in (("base", base), ("adapter", rl.attach(copy.deepcopy(base), "loreft", rank=1))):
        place = cache / f"models--me--{name}"
        saved.save_pretrained(place / "snapshots" / "c0ffee")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("c0ffee")
    found = {"cache_dir": cache, "local_files_only": True}
    reft = rl.ReftModel.from_pretrained("me/adapter", **found)
    reft.load_adapter("me/adapter", "again", **found)
    assert (reft.config.base_model, reft.adapter_names) == ("me/base", ["default", "again"])
    reason = "local_files_only=True is set, so only the hub's cache was read"
    with pytest.raises(FileNotFoundError, match=reason):
        rl.ReftModel.from_pretrained(
            tiny.model("llama"), "me/adapter", cache_dir=tmp_path, local_files_only=True
        )


def test_a_folder_has_subfolders_and_no_revisions(tmp_path):
    rl.attach(tiny.model("llama"), "loreft", rank=1, positions="f1").save_pretrained(tmp_path / "best")
    reft = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path, subfolder="best")
    reft.load_adapter(tmp_path, "second", subfolder="best")
    assert reft.adapter_names == ["default", "second"]
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG_FILE} is missing; no such folder"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path, subfolder="last")
    with pytest.raises(ValueError, match="revision='v2' is for the hub"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path, revision="v2")
    with pytest.raises(ValueError, match="revision='v2' is for the hub"):
        reft.load_adapter(tmp_path, "third", revision="v2")
    assert reft.adapter_names == ["default", "second"]
