"""Rows encoded in several processes or read from files are the same as in this process, never stale or damaged."""

import io
import json
import logging
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data import FAMILIES, encoding, texts
from reft_lightning.data import encoding_cache as prepared
from reft_lightning.data.encoding import encode, encode_all
from reft_lightning.data.encoding_cache import digest_of, prepare
from reft_lightning.data.example import Example
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.labelled import LabelledText
from reft_lightning.data.rows import DataSource
from reft_lightning.data.texts import EncodedTexts
from reft_lightning.data.tokenizer_digest import tokenizer_digest

# Python 3.12 warns about forking in a process with threads, which the libraries start
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A separate cache for the test, with a low threshold for large sets."""
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "SMALL", 4)
    monkeypatch.setattr(prepared, "CHUNK", 3)
    monkeypatch.setattr(prepared, "processes_for", lambda rows: 1)
    return tmp_path / "cache" / "encoded"


def kept(cache):
    return sorted(path.name for path in cache.glob("*.npz")) if cache.is_dir() else []


def merging():
    """A tokenizer with a token, `ba`, that can span the boundary of prompt and target."""
    backend = Tokenizer(
        models.BPE(
            vocab={"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "ba": 4}, merges=[("b", "a")], unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
    )


TOKENIZERS = {"fast": byte_tokenizer, "spanning": merging, "slow": ByT5Tokenizer}
EXAMPLES = [
    Example("t", prompt, target, target, (), f"row {i}")
    for i, (prompt, target) in enumerate(
        [("a", "b"), ("aab", "aa"), ("ab" * 30, "b"), ("é?\n", "ja"), ("a", "a" * 40), ("b a", "ba</s>")] * 3
    )
]


def lines(caplog):
    found = [record.getMessage() for record in caplog.records if record.name == encoding.__name__]
    caplog.clear()
    return found


class TestRows:
    @pytest.mark.parametrize(("kind", "processes"), [("fast", 1), ("spanning", 2), ("slow", 1)])
    def test_rows_of_processes_and_of_files_are_those_of_one_call_each(
        self, kind, processes, monkeypatch, caplog, cache
    ):
        tokenizer = TOKENIZERS[kind]()
        caplog.set_level(logging.INFO)
        alone = [encode(tokenizer, example, 24) for example in EXAMPLES]
        monkeypatch.setattr(prepared, "SMALL", 1000)
        here, said = encode_all(tokenizer, EXAMPLES, 24, "train rows"), lines(caplog)
        assert kept(cache) == []  # a small set leaves no file
        monkeypatch.setattr(prepared, "SMALL", 4)
        monkeypatch.setattr(prepared, "processes_for", lambda rows: processes)
        mapped, said_by_map = encode_all(tokenizer, EXAMPLES, 24, "train rows"), lines(caplog)
        assert len(kept(cache)) == 1
        monkeypatch.setattr(encoding, "encode_texts", pytest.fail)  # it is not called again
        read, said_by_file = encode_all(tokenizer, EXAMPLES, 24, "train rows"), lines(caplog)
        for rows in (here, mapped, read):
            assert [rows[i] for i in range(len(rows))] == alone
            assert rows.lengths == [len(row) for row in alone]
            assert {type(value) for value in (*rows[0].prompt_ids, rows[0].cut_prompt)} == {int}
        assert said == said_by_map == said_by_file
        assert len(said) == (3 if kind == "spanning" else 2)
        assert any(not row.joint for row in alone) == (kind == "spanning")

    @pytest.mark.parametrize(("processes", "pairs"), [(1, False), (2, True)])
    def test_a_classifiers_texts_are_the_same_from_files(self, processes, pairs, monkeypatch, cache):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
        )
        tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
        examples = [
            LabelledText("t", ("x" * i, "y" * (9 - i))[: 1 + pairs], i % 2, "no") for i in range(1, 10)
        ]
        monkeypatch.setattr(prepared, "SMALL", 1000)
        here = EncodedTexts(tokenizer, examples, 10)
        monkeypatch.setattr(prepared, "SMALL", 4)
        monkeypatch.setattr(prepared, "processes_for", lambda rows: processes)
        mapped = EncodedTexts(tokenizer, examples, 10)
        monkeypatch.setattr(texts, "encode_texts", pytest.fail)
        read = EncodedTexts(tokenizer, examples, 10)
        assert len(kept(cache)) == 1
        assert ("token_type_ids" in here[0]) == pairs
        for rows in (mapped, read):
            assert (rows.lengths, rows.truncated) == (here.lengths, here.truncated)
            for i in range(9):
                assert rows[i].keys() == here[i].keys()
                assert rows[i]["input_ids"].tolist() == here[i]["input_ids"].tolist()
                if pairs:
                    assert rows[i]["token_type_ids"].tolist() == here[i]["token_type_ids"].tolist()
        assert here.truncated == (9 if pairs else 0)

    def test_a_data_module_reads_its_rows_from_files_in_the_next_run(self, monkeypatch, cache, root):
        def module():
            source = DataSource("local", str(root / "tests" / "fixtures" / "commonsense" / "rendered"))
            data = GenerationData(
                FAMILIES["commonsense"], byte_tokenizer(), source, tasks=("boolq", "piqa"), batch_size=4,
                eval_batch_size=3, max_length=64, validation_size=6,
            )  # fmt: skip
            return [batch["input_ids"].tolist() for batch in data.train_dataloader()]

        first = module()
        assert kept(cache)
        monkeypatch.setattr(prepared, "write_whole", None)
        assert module() == first

    def test_an_empty_part_names_its_row_before_anything_is_computed(self, cache):
        with pytest.raises(ValueError, match="row 9: the target is empty"):
            encode_all(byte_tokenizer(), [*EXAMPLES, Example("t", "a", " ", "", (), "row 9")], 24)
        assert kept(cache) == []

    def test_processes_say_nothing_and_the_environment_is_as_it_was(self, monkeypatch, capfd):
        monkeypatch.setattr(prepared, "processes_for", lambda rows: 2)
        byte_tokenizer()(["a", "b"] * 9)  # starts threads, and a later fork would warn about them
        for value in ("true", None):
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
            if value:
                monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
            encode_all(byte_tokenizer(), EXAMPLES[: 8 + bool(value)], 24)
            assert os.environ.get("TOKENIZERS_PARALLELISM") == value
        assert capfd.readouterr() == ("", "")


def lengths_of(columns, log=None):
    """Return the lengths of texts, and record the call in a file."""
    if log is not None:
        with open(log, "a", encoding="utf-8") as file:
            file.write("x")
    return {"n": [len(text) for text in columns["text"]], "codes": [[*map(ord, t)] for t in columns["text"]]}


TYPES = {"n": "int32", "codes": "[int32]"}
WORDS = {"text": ["one", "", "three", "é", "five"]}


def run(log=None, words=WORDS, **settings):
    return prepare(partial(lengths_of, log=log), words, TYPES, depends_on=lambda: settings)


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def check(columns):
    assert columns["n"].tolist() == columns["codes.lengths"].tolist() == [3, 0, 5, 1, 4]
    assert "".join(map(chr, columns["codes"])) == "onethreeéfive"
    assert (columns["n"].dtype, columns["codes"].dtype) == (np.int32, np.int32)
    assert columns["codes"].flags.writeable


def compressed_by(method, content):
    """Change one byte of the directory of a zip file: how its first file is compressed."""
    place = content.index(b"PK\x01\x02") + 10
    return content[:place] + bytes([method]) + content[place + 1 :]


def without_a_column(content):
    """Leave out one array of a file."""
    with np.load(io.BytesIO(content)) as file:
        columns = {name: file[name] for name in file.files[1:]}
    np.savez(target := io.BytesIO(), allow_pickle=False, **columns)
    return target.getvalue()


class TestFiles:
    def test_the_function_is_called_in_the_first_run_alone(self, tmp_path):
        log = tmp_path / "calls"
        for _ in range(3):
            check(run(log))
        assert log.read_text() == "xx"  # two chunks, once

    def test_fewer_rows_are_computed_here(self, cache):
        few = {"text": WORDS["text"][:3]}
        columns = prepare(lengths_of, few, TYPES, depends_on=pytest.fail)
        assert columns["n"].tolist() == [3, 0, 5]
        assert not cache.exists()
        none = prepare(lengths_of, {"text": []}, TYPES, depends_on=pytest.fail)
        assert {name: len(column) for name, column in none.items()} == {
            "n": 0,
            "codes": 0,
            "codes.lengths": 0,
        }

    def test_unknown_dependence_keeps_nothing(self, tmp_path, cache):
        log = tmp_path / "calls"
        for _ in range(2):
            check(prepare(partial(lengths_of, log=log), WORDS, TYPES, depends_on=lambda: None))
        assert log.read_text() == "xxxx"
        assert not cache.exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-64],
            lambda content: content[: len(content) // 2],
            lambda content: content.replace(b"o\0\0\0n\0\0\0e", b"o\0\0\0n\0\0\0f"),
            lambda content: b"",
            lambda content: b"{}",
            lambda content: compressed_by(99, content),
            lambda content: without_a_column(content),
            lambda content: b"\x80\x04N.",  # a pickle
        ],
        ids=["cut", "half", "changed", "empty", "other", "directory", "column", "pickle"],
    )
    def test_a_damaged_file_is_made_anew_with_a_warning(self, damage, cache, tmp_path, caplog):
        check(run())
        (name,) = kept(cache)
        before = (cache / name).read_bytes()
        (cache / name).write_bytes(damage(before))
        assert (cache / name).read_bytes() != before
        log = tmp_path / "calls"
        check(run(log))
        assert "is damaged and will be rebuilt" in caplog.text
        assert log.read_text() == "xx"
        with np.load(cache / name) as again, np.load(io.BytesIO(before)) as first:
            assert {n: a.tolist() for n, a in again.items()} == {n: a.tolist() for n, a in first.items()}
        caplog.clear()
        check(run(log))
        assert (log.read_text(), caplog.text) == ("xx", "")

    @pytest.mark.parametrize("processes", [1, 2])
    def test_an_error_in_the_middle_leaves_nothing(self, processes, monkeypatch, cache):
        monkeypatch.setattr(prepared, "processes_for", lambda rows: processes)

        def broken(columns):
            if "five" in columns["text"]:
                raise RuntimeError("in the middle")
            return lengths_of(columns)

        with pytest.raises(RuntimeError, match="in the middle"):
            prepare(broken, WORDS, TYPES, depends_on=dict)
        assert kept(cache) == []
        check(prepare(lengths_of, WORDS, TYPES, depends_on=dict))
        assert len(kept(cache)) == 1

    def test_processes_end_with_the_one_that_started_them(self, monkeypatch, cache, tmp_path):
        monkeypatch.setattr(prepared, "processes_for", lambda rows: 2)

        def slow(columns):
            (tmp_path / str(os.getpid())).touch()
            time.sleep(60)

        starter = multiprocessing.get_context("fork").Process(
            target=prepare, args=(slow, WORDS, TYPES), kwargs={"depends_on": dict}
        )
        starter.start()
        until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2)
        starter.kill()
        starter.join()
        until(lambda: not any(Path(f"/proc/{path.name}/cwd").exists() for path in tmp_path.glob("[0-9]*")))

    def test_a_folder_that_cannot_be_written_costs_the_file_alone(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("REFT_CACHE", str(tmp_path / "file"))
        check(run())
        assert "set $REFT_CACHE to another folder" in caplog.text

    def test_of_two_processes_one_computes_and_both_have_the_rows(self, cache, tmp_path):
        log = tmp_path / "calls"
        context = multiprocessing.get_context("fork")
        barrier, results = context.Barrier(2), context.Queue()

        def rank():
            barrier.wait()
            results.put({name: column.tolist() for name, column in run(log).items()})

        ranks = [context.Process(target=rank) for _ in range(2)]
        for process in ranks:
            process.start()
        found = [results.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join()
        assert found[0] == found[1]
        assert found[0]["n"] == [3, 0, 5, 1, 4]
        assert log.read_text() == "xx"
        assert len(kept(cache)) == 1

    def test_the_file_says_what_it_is_made_of(self, cache):
        run(max_length=7)
        (name,) = kept(cache)
        about = json.loads(str(np.load(cache / name)["about"]))
        assert (about["rows"], about["max_length"]) == (5, 7)
        assert set(about["libraries"]) == {"tokenizers", "transformers"}


def changed(**changes):
    tokenizer = byte_tokenizer(changes.pop("add_bos", True))
    for name, value in changes.items():
        if name == "normalizer":
            tokenizer.backend_tokenizer.normalizer = value
        elif name == "token":
            tokenizer.add_tokens([value])
        else:
            setattr(tokenizer, name, value)
    return tokenizer


class TestNames:
    """Everything that the ids depend on, and nothing else, is part of the file name."""

    @pytest.mark.parametrize(
        "tokenizer",
        [
            changed(add_bos=False),
            changed(normalizer=normalizers.Lowercase()),
            changed(token="where"),
            changed(eos_token="<s>"),
            changed(bos_token="</s>"),
            changed(pad_token="</s>"),
            changed(split_special_tokens=True),
            changed(truncation_side="left"),
            changed(model_input_names=["input_ids", "token_type_ids"]),
            ByT5Tokenizer(),
        ],
        ids=lambda tokenizer: "",
    )
    def test_another_tokenizer_has_another_name(self, tokenizer):
        assert tokenizer_digest(tokenizer) != tokenizer_digest(byte_tokenizer())

    def test_slow_tokenizers_are_told_apart_by_their_files(self):
        more = ByT5Tokenizer()
        more.add_tokens(["where"])
        names = {
            tokenizer_digest(t) for t in (ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(extra_ids=3), more)
        }
        assert len(names) == 3
        assert None not in names

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_use_and_place_change_no_name(self, kind, tmp_path):
        tokenizer, used = TOKENIZERS[kind](), TOKENIZERS[kind]()
        used(["aaaa", "a"], padding=True, truncation=True, max_length=2)
        used.chat_template = "{{ messages }}"
        used.name_or_path = "elsewhere"
        assert tokenizer_digest(used) == tokenizer_digest(tokenizer)
        names = set()
        for folder in ("one", "two"):
            tokenizer.save_pretrained(tmp_path / folder)
            names.add(tokenizer_digest(type(tokenizer).from_pretrained(tmp_path / folder)))
        assert len(names) == 1

    def test_a_tokenizer_of_ones_own_has_no_name(self, cache):
        class Own(PreTrainedTokenizerFast):
            pass

        class Spaces:
            def pre_tokenize(self, text):
                text.split(lambda i, part: part.split(" ", "removed"))

        own = Own(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="</s>")
        python = byte_tokenizer()
        python.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Spaces())
        assert tokenizer_digest(own) is tokenizer_digest(python) is None
        encode_all(own, EXAMPLES, 24)
        assert kept(cache) == []

    def test_texts_order_columns_and_settings_change_the_name(self, cache, monkeypatch):
        run(max_length=7)
        run(max_length=8)
        run(words={"text": [*WORDS["text"][:4], "size"]}, max_length=7)
        run(words={"text": WORDS["text"][::-1]}, max_length=7)
        assert len(kept(cache)) == 4
        monkeypatch.setattr(prepared, "VERSION", 2)
        run(max_length=7)
        monkeypatch.setattr(prepared, "version", lambda name: "9.9")
        run(max_length=7)
        assert len(kept(cache)) == 6

    def test_a_digest_tells_columns_and_borders_of_texts_apart(self):
        some = [
            {"a": ["x", "y"], "b": ["z", "w"]},
            {"a": ["z", "w"], "b": ["x", "y"]},
            {"a": ["xy", ""], "b": ["z", "w"]},
            {"a": ["x", "y", "z", "w"], "b": []},
            {"a": ["x", "y"], "c": ["z", "w"]},
            {"a": ['x", "y'], "b": ["z", "w"]},
        ]
        assert len({digest_of(columns) for columns in some}) == len(some)
        assert digest_of({"b": ["z", "w"], "a": ("x", "y")}) == digest_of(some[0])

    def test_max_length_changes_the_name_of_rows_and_of_texts(self, cache):
        tokenizer = byte_tokenizer()
        for length in (24, 25):
            encode_all(tokenizer, EXAMPLES, length)
            EncodedTexts(tokenizer, [LabelledText("t", (e.prompt,), 0, "0") for e in EXAMPLES], length)
        assert len(kept(cache)) == 4


class TestProcesses:
    def test_each_has_enough_rows_and_a_daemon_starts_none(self, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
        monkeypatch.setattr(prepared.sys, "platform", "linux")
        enough = prepared.PER_PROCESS
        counts = [
            prepared.processes_for(rows) for rows in (1, enough, 2 * enough, 4 * enough + 1, 100 * enough)
        ]
        assert counts == [1, 1, 2, 4, prepared.PROCESSES]
        monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
        assert prepared.processes_for(100 * enough) == 1
