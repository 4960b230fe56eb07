"""Number columns computed from text columns in several processes, and cached in files.

A file's name is a digest of everything that the numbers depend on: the texts, the tokenizer, the settings, the library
versions and `VERSION`. Any change leads to a different name, so no file is ever stale. A file is moved into place once
it is complete, and the checksums of its format, a zip file of arrays, reveal damage::

    <cache>/encoded/<digest>.npz    the columns, and `about`: what they were computed from, as JSON

Old files are never removed automatically. The folder `encoded` can be deleted at any time and is then rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..storage.atomic import write_whole
from ..storage.wheels import cache_folder
from ..terminal.bars import Bar

log = logging.getLogger(__name__)

VERSION = 1  # raise if the same texts, tokenizer and settings should give different numbers
SMALL = 2000  # fewer rows take less than a second, and are computed in each run
PROCESSES = 8  # at most; each gets at least PER_PROCESS rows, because starting one takes about half a second
PER_PROCESS = 5000
CHUNK = 1024  # texts per call; fast tokenizers are about 3 times faster on lists
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
    """Return the result of a function of n texts, from the cache if it was computed before.

    Args:
        function: columns of k texts -> columns of k numbers, or of k lists of numbers.
        texts: columns of n texts.
        types: column -> the type of its numbers (`NUMBERS`), in brackets for lists: `"[int32]"`.
        depends_on: returns what the numbers depend on in addition to the texts, as JSON data; if it returns None,
            nothing is cached and no process is started. Not called for small sets.
        what: names the rows in the log and the progress bar.

    Returns:
        column -> (n,) numbers. A column of lists is a single array of all numbers, with `<column>.lengths` (n,) int64.
    """
    rows = len(next(iter(texts.values())))
    settings = depends_on() if rows >= SMALL else None
    compute = partial(_computed, function, texts, types, what)
    if settings is None:
        return compute()
    about = _json({
        "rows": rows,
        "texts": digest_of(texts),
        "types": dict(types),
        "version": VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        **settings,
    })  # fmt: skip
    path = cache_folder() / "encoded" / f"{hashlib.sha256(about.encode()).hexdigest()[:40]}.npz"
    columns = _read(path, types)
    try:
        if columns is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # one process computes, the other ranks wait and read
                columns = _read(path, types)
                if columns is None:
                    if path.exists():
                        log.warning("%s is damaged and will be rebuilt", path)
                    columns = compute(processes_for(rows))
                    write_whole(path, partial(_write, {**columns, "about": np.array(about)}))
    except OSError as error:
        log.warning(
            "%s cannot be cached in %s (%s) and will be recomputed in each run; set $REFT_CACHE to another folder",
            what, path.parent, error,
        )  # fmt: skip
    return compute() if columns is None else columns


def digest_of(texts: Texts) -> str:
    """Return a digest of text columns, which covers their names, their texts and the order of the texts."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(_json([name, len(texts[name])]).encode())
        for start in range(0, len(texts[name]), CHUNK):
            digest.update(_json(list(texts[name][start : start + CHUNK])).encode())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _write(columns: Columns, path: Path) -> None:
    arrays: dict[str, Any] = {**columns}  # numbers and text, so nothing is pickled
    with path.open("wb") as file:  # savez would append .npz to a name without it
        np.savez(file, **arrays)


def _read(path: Path, types: Mapping[str, str]) -> Columns | None:
    """Return the columns of a file; None if it does not exist or is damaged."""
    names = {*types, *(f"{name}.lengths" for name, kind in types.items() if "[" in kind)}
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in names} if {*file.files} == {*names, "about"} else None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile):  # RuntimeError: "encrypted"
        return None


# --- computing ------------------------------------------------------------------------------------------------


def _computed(
    function: Callable, texts: Texts, types: Mapping[str, str], what: str, processes: int = 1
) -> Columns:
    empty = {name: np.zeros(0, dtype=NUMBERS[kind.strip("[]")]) for name, kind in types.items()}
    empty |= {f"{name}.lengths": np.zeros(0, dtype=np.int64) for name, kind in types.items() if "[" in kind}
    parts, rows = [empty], len(next(iter(texts.values())))
    with Bar(f"encoding {what}", rows) as bar:
        for part in _parts(partial(_chunk, function, texts, types), range(0, rows, CHUNK), processes):
            parts.append(part)
            bar.show(min(bar.done + CHUNK, rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in empty}


def _chunk(function: Callable, texts: Texts, types: Mapping[str, str], start: int) -> Columns:
    made = function({name: list(column[start : start + CHUNK]) for name, column in texts.items()})
    columns: Columns = {}
    for name, kind in types.items():
        values = made[name]
        if kind.startswith("["):
            columns[f"{name}.lengths"] = np.asarray([len(row) for row in values], dtype=np.int64)
            values = [number for row in values for number in row]
        columns[name] = np.asarray(values, dtype=NUMBERS[kind.strip("[]")])
    return columns


def _parts(chunk: Callable[[int], Columns], starts: Sequence[int], processes: int) -> Iterator[Columns]:
    if processes == 1:
        yield from map(chunk, starts)
        return
    with _forks_without_threads(), ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _inherit, (chunk,)
    ) as pool:  # fmt: skip
        yield from pool.map(_inherited, starts)


_work: Callable[[int], Columns]


def _inherit(chunk: Callable[[int], Columns]) -> None:
    """Give a worker access to the function and texts that it inherited without copying; it exits with its parent."""
    global _work
    _work = chunk
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # otherwise it would wait for work after its parent was killed


def _inherited(start: int) -> Columns:
    return _work(start)


@contextmanager
def _forks_without_threads() -> Iterator[None]:
    """Keep tokenizers from starting threads, which do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def processes_for(rows: int) -> int:
    """Return the number of processes for a given number of rows."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1  # without fork, they would run the user's script again; daemons cannot start processes
    return max(min(len(os.sched_getaffinity(0)), PROCESSES, rows // PER_PROCESS), 1)
