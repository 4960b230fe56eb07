"""The rows of one file: JSON, JSON Lines, CSV, TSV or Parquet, told apart by the ending of its name.

Every reader yields pairs (row, where it stands), such as `({"question": ...}, "mine/train.csv, line 7")`, so that
a later error can name the row. Text is UTF-8, with or without a byte order mark; all but Parquet may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[dict[str, Any], str]]
LONGEST_CELL = 2**31 - 1  # of a CSV file; the csv module allows 131,072 characters unless told otherwise
_SPACE = re.compile(r"[ \t\r\n]*")  # what JSON allows between two values


def read_file(path: Path) -> Rows:
    """Yield (row, where) of a file in the format that its ending names.

    Args:
        path: ends in a key of `READERS`, and for text perhaps in `.gz` after that.

    Raises:
        ValueError: for an unknown ending; lists the known ones. For content that is not in the format; names
            file and line.
        FileNotFoundError: if there is no such file; lists what its folder holds.
    """
    reader = READERS.get(ending(path))
    if reader is None:
        raise ValueError(
            f"{path}: rows are read from files that end in {', '.join(READERS)}, all but .parquet also with "
            f".gz; got {path.name!r}"
        )
    yield from reader(path)


def ending(path: Path) -> str:
    """Return what names a file's format: its last suffix, or the one in front of `.gz`.

    >>> ending(Path("mine/rows.v2.jsonl.gz"))
    '.jsonl'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:  # Parquet compresses its own columns
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def listing(folder: Path) -> str:
    """Return the names in a folder as one line, for error messages."""
    if not folder.is_dir():
        return (
            f"nothing (no such folder; {folder.parent} holds {listing(folder.parent)})"
            if folder.name
            else "nothing"
        )
    return ", ".join(sorted(p.name for p in folder.iterdir())[:30]) or "nothing"


# ------------------------------------------------------------------------------------------------------ JSON


def read_json_file(path: Path) -> Rows:
    """Yield (row, where) of a `.json` list (or object of rows) or a `.jsonl` file, gzipped or not.

    Raises:
        ValueError: if a line or the file is not JSON; names file and line.
        FileNotFoundError: if there is no such file; lists what its folder holds.
    """
    if ending(path) == ".jsonl":
        yield from json_lines(text_lines(path), path, _label(path))
        return
    text = "".join(text_lines(path))
    try:
        for i, (row, line) in enumerate(_json_values(text)):
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, row {i}: a row must be an object with named columns; got {row!r:.80}"
                )
            yield row, f"{_label(path)}, row {i}" + (f" (line {line})" if line > 1 else "")
    except json.JSONDecodeError as error:
        hint = "; is this JSON Lines? then it must end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}){hint}") from error


def _json_values(text: str) -> Iterator[tuple[Any, int]]:
    """Yield the elements of a JSON list, or the values of a JSON object, with the line each begins in.

    A list is decoded element by element: `json.loads` does not tell where an element stood.
    """
    decoder, here = json.JSONDecoder(), _end_of_space(text, 0)
    if text[here : here + 1] != "[":
        rows = json.loads(text)
        yield from ((row, 0) for row in (rows.values() if isinstance(rows, dict) else [rows]))
        return
    line, counted = 1, 0
    here = _end_of_space(text, here + 1)
    if text[here : here + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, here), here
            value, here = decoder.raw_decode(text, here)
            yield value, line
            here = _end_of_space(text, here)
            if text[here : here + 1] == "]":
                break
            if text[here : here + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, here)
            here = _end_of_space(text, here + 1)
    here = _end_of_space(text, here + 1)
    if here != len(text):
        raise json.JSONDecodeError("Extra data", text, here)


def _end_of_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def json_lines(lines: Iterable[str], path: Path, label: str) -> Rows:
    """Yield (row, where) of lines that hold one JSON object each; empty ones are passed over.

    Args:
        lines: the content.
        path: names the file in errors.
        label: names it in `where`.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): {line.strip()[:80]}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row must be an object with named columns")
        yield row, f"{label}, line {number}"


# ------------------------------------------------------------------------------------------------ CSV and TSV


def read_csv(path: Path) -> Rows:
    """Yield (row, where) of comma-separated values with a header line; a quoted cell may hold line breaks.

    Every value is text. `where` names the line in which a row begins.

    Raises:
        ValueError: for a header with an empty or repeated name, a row with too many or too few cells, or a
            quotation mark that is never closed; names file and line.
        FileNotFoundError: if there is no such file; lists what its folder holds.
    """
    yield from _table(_csv_cells(path), path, None)


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Rows:
    r"""Yield (row, where) of tab-separated values: one row a line, quotation marks are ordinary characters.

    Args:
        path: the file.
        columns: names of the columns of a file without a header line; None reads them from its first line.

    Raises:
        ValueError, FileNotFoundError: as `read_csv`.
    """
    cells = (
        (number, line.rstrip("\r\n").split("\t"))
        for number, line in enumerate(text_lines(path), start=1)
        if line.strip("\r\n")
    )
    yield from _table(cells, path, columns)


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line in which the row begins, cells) of a CSV file."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(text_lines(path), strict=True)
    begin = 1
    try:
        for cells in reader:
            if cells:  # an empty line has none
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, the row that begins in line {begin}: not CSV ({error})") from error


def _table(numbered: Iterator[tuple[int, list[str]]], path: Path, columns: Sequence[str] | None) -> Rows:
    """Yield each line's cells under the names of the header."""
    if columns is None:
        line, columns = next(numbered, (0, []))
        if not columns:
            raise ValueError(f"{path} is empty: the names of the columns must stand in its first line")
        _check_header(columns, f"{path}, line {line}")
    for line, cells in numbered:
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells for the {len(columns)} columns "
                f"{', '.join(columns)}; it begins with {cells[0]!r:.60}"
            )
        yield dict(zip(columns, cells, strict=True)), f"{_label(path)}, line {line}"


def _check_header(columns: Sequence[str], where: str) -> None:
    if any(not name.strip() for name in columns):
        place = next(i for i, name in enumerate(columns, start=1) if not name.strip())
        raise ValueError(
            f"{where}: column {place} has no name; the header is {', '.join(map(repr, columns))} "
            "(pandas writes its index so: use to_csv(..., index=False))"
        )
    repeated = sorted({name for name in columns if list(columns).count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: the header names {', '.join(map(repr, repeated))} more than once")


# --------------------------------------------------------------------------------------------------- Parquet


def read_parquet(path: Path) -> Rows:
    """Yield (row, where) of a Parquet file.

    Raises:
        ValueError: if it is not Parquet, or names a column more than once.
        FileNotFoundError: if there is no such file; lists what its folder holds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_exists(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, str(path))
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for i, row in enumerate(rows):
                yield row, f"{_label(path)}, row {i}"
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from error


# ------------------------------------------------------------------------------------------------------ lines


def _label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {path.parent} holds {listing(path.parent)}")


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends; only a line feed ends one.

    Every reader of text opens its file here: UTF-8 with or without a byte order mark, gzipped where the name says so.

    Raises:
        ValueError: for another encoding, or a gzip file that is broken; names the file.
        FileNotFoundError: if there is no such file; lists what its folder holds.
    """
    _check_exists(path)
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": read_json_file,
    ".jsonl": read_json_file,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
