"""Adapters are read from the hub by name, revision and subfolder; errors name the address that failed."""

import copy
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import tiny

import reft_lightning as rl
from reft_lightning.adapters.reft.config import CONFIG_FILE, TENSOR_FILE

COMMIT = "a" * 40
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


class Hub(http.server.BaseHTTPRequestHandler):
    """Behaves as the name of the repository says."""

    folder = None
    asked = ()

    def do_GET(self):
        Hub.asked = (*Hub.asked, (self.path, self.headers.get("Authorization")))
        kind = self.path.split("/")[2] if self.path.startswith("/me/") else ""
        if kind == "silent":  # closes the connection without a word
            return
        file = Hub.folder / self.path.partition("/resolve/")[2].partition("/")[2]
        if kind == "broken" or not kind:
            self.send_error(500)
        elif kind in ("missing", "private"):
            self.send_error(404 if kind == "missing" else 401)
        elif kind == "page":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome to this network")
        elif not file.is_file():
            self.send_error(404)
        else:
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if kind == "truncated" else content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What is said of each repository, all of them asked in one process of its own."""
    folder = tmp_path_factory.mktemp("hub")
    Hub.folder = folder
    rl.attach(tiny.model("llama"), "loreft", rank=1, positions="f1").save_pretrained(folder / "best")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = {f"me/{kind}": {} for kind in ("silent", "broken", "missing", "private", "page", "truncated")}
    asked["me/truncated"] = {"subfolder": "best"}
    asked["me/good"] = {"subfolder": "best", "revision": "v2", "token": "hf_secret"}
    place = {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment = {**os.environ, **place, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-c", ASK, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    server.shutdown()
    server.server_close()
    return json.loads(done.stdout) | place


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
def test_a_hub_that_fails_is_one_error_with_what_was_asked(kind, reason, answers):
    said = answers[f"me/{kind}"]
    asked = f"{answers['HF_ENDPOINT']}/me/{kind}/resolve/main/{CONFIG_FILE}"
    assert said.startswith(f"error: 'me/{kind}' is not a folder, and {asked} could not be read: ")
    assert re.search(reason, said)
    assert "\n" not in said


def test_a_truncated_file_is_not_used(answers):
    assert "could not be read: RemoteProtocolError: peer closed connection" in answers["me/truncated"]


def test_revision_subfolder_and_token_reach_the_hub(answers):
    found = answers["me/good"]
    assert found.endswith("best")
    rl.ReftModel.from_pretrained(tiny.model("llama"), found)
    paths = [path for path, token in Hub.asked if token == "Bearer hf_secret"]
    assert {f"/me/good/resolve/v2/best/{file}" for file in (CONFIG_FILE, TENSOR_FILE)} <= set(paths)


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
