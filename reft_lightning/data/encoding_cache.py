"""Columns of numbers computed from columns of texts by `datasets.map` in several processes, and cached as Arrow files.

The name of a folder of kept files is a digest of all that the numbers depend on: the texts, the tokenizer, the
settings, the versions of the libraries and `VERSION`. Whatever changes gets another name, so that no file is ever
stale. A folder is moved to its place when it is complete, and its files are checked against their sha256 whenever
they are read::

    <cache>/encoded/<digest>/rows*.arrow   one file for each process that wrote
    <cache>/encoded/<digest>/about.json    what it was made of, rows, sha256 of the files

Nothing removes old folders; the whole of `encoded` can be deleted at any time: it is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..storage.digests import sha256_of
from ..storage.wheels import cache_folder
from ..terminal.bars import Bar, library_bars

log = logging.getLogger(__name__)

VERSION = 1  # raise when the same texts, tokenizer and settings should give other numbers
# fewer rows are computed in this process: importing `datasets` takes as long (experiments/speed/encoding.py)
SMALL = 2000
PROCESSES = 8  # at most; each gets PER_PROCESS rows or more, as starting them takes about half a second
PER_PROCESS = 5000
CHUNK = 1024  # texts a call; fast tokenizers are about 3 times faster on lists
NUMBERS = {"int8": np.int8, "int32": np.int32, "bool": np.bool_}

Texts = Mapping[str, Sequence[str]]  # column -> n texts
Columns = dict[str, np.ndarray]


def prepare(
    function: Callable[[dict[str, list[str]]], dict[str, list]],
    texts: Texts,
    types: Mapping[str, str],
    *,
    depends_on: Callable[[], Mapping[str, Any] | None],
    what: str = "rows",
) -> Columns:
    """Return what a function makes of texts, n rows, from a file if it was computed before.

    Args:
        function: columns of k texts -> columns of k numbers, or of k lists of numbers; can be pickled.
        texts: columns of n texts.
        types: column -> the type of its numbers (`NUMBERS`), in brackets for lists: `"[int32]"`.
        depends_on: returns what else the numbers depend on, in addition to the texts, to be written as JSON; None keeps
            no file and starts no process. Not called for small sets.
        what: names the rows in the log and the progress bar.

    Returns:
        column -> (n,) numbers. A column of lists is one array of all numbers, and `<column>.lengths` (n,) int64.
    """
    rows = len(next(iter(texts.values())))
    settings = depends_on() if rows >= SMALL else None
    if settings is None:
        return _in_this_process(function, texts, types, what)
    about = {
        "rows": rows,
        "texts": digest_of(texts),
        "types": dict(types),
        "version": VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        **settings,
    }
    folder = cache_folder() / "encoded" / hashlib.sha256(_json(about).encode()).hexdigest()[:40]
    try:
        columns = _read(folder, rows, types)
        if columns is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # one process computes, the other ranks wait and read
                columns = _read(folder, rows, types)
                if columns is None:
                    _build(folder, function, texts, types, about, what)
                    columns = _read(folder, rows, types)
        if columns is not None:
            return columns
        log.warning("%s: the encoded %s cannot be read back; nothing is kept", folder, what)
    except OSError as error:
        log.warning(
            "%s cannot be kept in %s (%s): computed again in each run. $REFT_CACHE names another folder",
            what, folder.parent, error,
        )  # fmt: skip
    return _in_this_process(function, texts, types, what)


def digest_of(texts: Texts) -> str:
    """Return a digest of columns of texts: of their names, their texts and their order."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(_json([name, len(texts[name])]).encode())
        for start in range(0, len(texts[name]), CHUNK):
            digest.update(_json(list(texts[name][start : start + CHUNK])).encode())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


# --- computing ------------------------------------------------------------------------------------------------


def _in_this_process(function: Callable, texts: Texts, types: Mapping[str, str], what: str) -> Columns:
    parts: list[Columns] = []
    rows = len(next(iter(texts.values())))
    with Bar(f"encoding {what}", rows) as bar:
        for start in range(0, rows, CHUNK):
            made = function({name: list(column[start : start + CHUNK]) for name, column in texts.items()})
            parts.append({})
            for name, kind in types.items():
                values = made[name]
                if kind.startswith("["):
                    parts[-1][f"{name}.lengths"] = np.asarray([len(row) for row in values], dtype=np.int64)
                    values = [number for row in values for number in row]
                parts[-1][name] = np.asarray(values, dtype=NUMBERS[kind.strip("[]")])
            bar.show(min(start + CHUNK, rows))
    return _joined(parts, types)


def _joined(parts: Sequence[Columns], types: Mapping[str, str]) -> Columns:
    empty = {name: np.zeros(0, dtype=NUMBERS[kind.strip("[]")]) for name, kind in types.items()}
    empty |= {f"{name}.lengths": np.zeros(0, dtype=np.int64) for name, kind in types.items() if "[" in kind}
    return {name: np.concatenate([none, *(part[name] for part in parts)]) for name, none in empty.items()}


def processes_for(rows: int) -> int:
    """Return in how many processes so many rows are computed."""
    import multiprocess  # what `datasets` uses

    if multiprocessing.current_process().daemon or multiprocess.get_start_method() != "fork":  # pyright: ignore[reportAttributeAccessIssue]
        return 1  # a daemon may start none; started in another way, they would run the user's script again
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(min(cores, PROCESSES, rows // PER_PROCESS), 1)


def _build(
    folder: Path,
    function: Callable,
    texts: Texts,
    types: Mapping[str, str],
    about: Mapping[str, Any],
    what: str,
) -> None:
    """Write a folder next to its place and move it there. The caller holds its lock."""
    import datasets

    if folder.exists():
        log.warning("%s is damaged and is made again", folder)
        shutil.rmtree(folder)
    for rest in folder.parent.glob(f"{folder.name}.part*"):  # of a process that was killed
        shutil.rmtree(rest)
    numbers = {name: datasets.Value(kind.strip("[]")) for name, kind in types.items()}
    lists = {name: datasets.List(value) for name, value in numbers.items() if "[" in types[name]}
    processes = processes_for(about["rows"])
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part"))
    try:
        with _guarded(datasets):
            datasets.Dataset.from_dict({name: list(column) for name, column in texts.items()}).map(
                function,
                batched=True,
                batch_size=CHUNK,
                num_proc=processes if processes > 1 else None,
                remove_columns=list(texts),
                features=datasets.Features(numbers | lists),
                cache_file_name=str(part / "rows.arrow"),
                load_from_cache_file=False,
                new_fingerprint=folder.name,  # else it would be a digest of the function, tokenizer and all
                desc=f"encoding {what}",
            )
        files = {path.name: sha256_of(path) for path in sorted(part.glob("rows*.arrow"))}
        (part / "about.json").write_text(json.dumps({**about, "files": files}, indent=1), encoding="utf-8")
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def bars_of_datasets(datasets: Any) -> AbstractContextManager[None]:
    """Let `datasets` draw its bars inside the block where ours are drawn, see `library_bars`."""
    return library_bars(
        not datasets.are_progress_bars_disabled(),
        datasets.disable_progress_bars,
        datasets.enable_progress_bars,
    )


@contextmanager
def _guarded(datasets: Any) -> Iterator[None]:
    """Undo what `map` leaves changed, and draw its progress bar only on a terminal."""
    environment, threads = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with bars_of_datasets(datasets):
            yield
    finally:
        # with processes, datasets 5 puts a copy in the place of os.environ and leaves the variable set
        os.environ = environment  # noqa: B003
        if threads is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


# --- reading --------------------------------------------------------------------------------------------------


def _read(folder: Path, rows: int, types: Mapping[str, str]) -> Columns | None:
    """Return the columns of a folder; None if it does not exist or is damaged."""
    import pyarrow as pa

    try:
        files = json.loads((folder / "about.json").read_text(encoding="utf-8"))["files"]
        if any(sha256_of(folder / name) != expected for name, expected in files.items()):
            return None
        parts = [_columns(folder / name, types) for name in files]
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ):
        return None
    columns = _joined(parts, types)
    whole = all(
        len(columns[f"{name}.lengths" if "[" in kind else name]) == rows for name, kind in types.items()
    )
    return columns if whole else None


def _columns(path: Path, types: Mapping[str, str]) -> Columns:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
        columns: Columns = {}
        for name, kind in types.items():
            column = table.column(name).combine_chunks()
            if kind.startswith("["):
                columns[f"{name}.lengths"] = column.value_lengths().to_numpy().astype(np.int64)
                column = column.flatten()
            # a copy: the file is closed
            columns[name] = column.to_numpy(zero_copy_only=False).astype(NUMBERS[kind.strip("[]")])
    return columns
