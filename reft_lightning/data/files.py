"""The rows of one file: JSON, JSON Lines, CSV, TSV, Parquet or text, recognised by its file extension.

A folder that `datasets` wrote with `save_to_disk` counts as a file. Every reader yields pairs (row, source), such as
`({"question": ...}, "mine/train.csv, line 7")`, so that later errors can name the row. Text is UTF-8, or UTF-16 with a
byte order mark; all formats except Parquet may be gzipped. A format error raises ValueError, naming the file and the
line or row; a missing file raises FileNotFoundError, listing the contents of its folder.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Rows = Iterator[tuple[dict[str, Any], str]]
LONGEST_CELL = 2**31 - 1  # characters in a CSV cell; the csv module's default limit is 131,072
DELIMITERS = (",", ";", "\t")  # of CSV files, recognised automatically
BATCH = 1000  # rows converted to Python objects at once
_SPACE = re.compile(r"[ \t\r\n]*")  # white space that JSON allows between two values


def read_file(path: Path, delimiter: str | None = None) -> Rows:
    """Yield (row, where) pairs of a file in the format given by its extension.

    Args:
        path: a file with one of the extensions `READERS`, followed by `.gz` if it is gzipped; or a folder of
            `save_to_disk`.
        delimiter: of a CSV file; None detects it from the header.
    """
    reader = read_saved if is_saved(path) else READERS.get(ending(path))
    if reader is None:
        if not path.exists():  # possibly a misspelt folder name
            _check_exists(path)
        raise ValueError(
            f"{path}: the file extension must be one of {', '.join(READERS)}, with .gz after it if the file is gzipped "
            f"(except .parquet); got {path.name!r}"
        )
    if delimiter is not None:
        if reader is not read_csv:
            raise ValueError(f"{path}: data.delimiter={delimiter!r} applies to .csv files only; remove it")
        reader = partial(read_csv, delimiter=delimiter)
    yield from reader(path)


def ending(path: Path) -> str:
    """Return the extension that gives a file's format: the last one, or the one before `.gz`.

    >>> ending(Path("mine/rows.v2.jsonl.gz"))
    '.jsonl'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:  # Parquet compresses its own columns
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def listing(folder: Path) -> str:
    """Return the names in a folder as one line for error messages."""
    if not folder.is_dir():
        above = next((parent for parent in folder.parents if parent.is_dir()), None)
        return "nothing (no such folder" + (f"; {above} holds {listing(above)})" if above else ")")
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) or "nothing"


# ------------------------------------------------------------------------------------------------------ JSON


def read_json_file(path: Path) -> Rows:
    """Yield (row, where) pairs of a `.json` list (or object of rows) or a `.jsonl` file, gzipped or not."""
    if ending(path) == ".jsonl":
        yield from json_lines(text_lines(path), path)
        return
    text = "".join(text_lines(path))
    try:
        for i, (row, line) in enumerate(_json_values(text, path)):
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, row {i}: a row must be an object with named columns; got {row!r:.80}"
                )
            yield row, f"{label_of(path)}, row {i}" + (f" (line {line})" if line > 1 else "")
    except json.JSONDecodeError as error:
        hint = "; if this is JSON Lines, its name must end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}){hint}") from error


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text; syntax errors raise `json.JSONDecodeError`, so the caller can add the line."""
    return _decoded(_DECODER.decode, where, text)


def _decoded(decode: Callable[..., Any], where: str, *arguments: Any) -> Any:
    try:
        return decode(*arguments)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a repeated key, of which json silently keeps the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"an object contains the key {repeated!r} more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_values(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the elements of a JSON list, or the values of a JSON object, with the line on which each begins.

    A list is decoded element by element, because `json.loads` does not report the positions of elements.
    """
    here = _end_of_space(text, 0)
    if text[here : here + 1] != "[":
        rows = parse_json(text, str(path))
        yield from ((row, 0) for row in (rows.values() if isinstance(rows, dict) else [rows]))
        return
    line, counted, number = 1, 0, 0
    here = _end_of_space(text, here + 1)
    if text[here : here + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, here), here
            value, here = _decoded(_DECODER.raw_decode, f"{path}, row {number} (line {line})", text, here)
            number += 1
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


def json_lines(lines: Iterable[str], path: Path) -> Rows:
    """Yield (row, where) pairs of lines that hold one JSON object each; empty lines are skipped."""
    label = label_of(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path}, line {number}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): {line.strip()[:80]}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row must be an object with named columns")
        yield row, f"{label}, line {number}"


# ------------------------------------------------------------------------------------------------ CSV and TSV


def read_csv(path: Path, delimiter: str | None = None) -> Rows:
    """Yield (row, where) pairs of comma-separated values with a header line; quoted cells may contain line breaks.

    Every value is text. `where` names the line on which a row begins. The delimiter defaults to the one of `DELIMITERS`
    that splits the header into the most columns.
    """
    between = delimiter or _delimiter_of(path)
    note = "" if delimiter else f"; the detected delimiter is {between!r} (data.delimiter sets it)"
    yield from _table(_csv_cells(path, between), path, None, note)


def read_tsv(path: Path, columns: Sequence[str] | None = None, torn: bool = False) -> Rows:
    r"""Yield (row, where) pairs of tab-separated values: one row per line; quotation marks have no special meaning.

    The first line names the columns unless `columns` is given. With `torn`, lines with a wrong number of cells are
    skipped.
    """
    cells = (
        (number, line.rstrip("\r\n").split("\t"))
        for number, line in enumerate(text_lines(path), start=1)
        if line.strip("\r\n")
    )
    yield from _table(cells, path, columns, torn=torn)


def _delimiter_of(path: Path) -> str:
    def columns(delimiter: str) -> int:
        try:
            return len(next(_csv_cells(path, delimiter), (0, []))[1])
        except ValueError:  # a quoted name ends before another delimiter
            return 0

    found = max(DELIMITERS, key=columns)  # the first of several
    if found != ",":
        log.info("%s: using the delimiter %r, detected from the header", path, found)
    return found


def _csv_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line of the row, cells) of a CSV file."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(text_lines(path), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for cells in reader:
            if cells:  # an empty line has no cells
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, the row that begins on line {begin}: not CSV ({error})") from error


def _table(
    numbered: Iterator[tuple[int, list[str]]],
    path: Path,
    columns: Sequence[str] | None,
    note: str = "",
    torn: bool = False,
) -> Rows:
    """Yield each row as a mapping from the header's names to its cells."""
    if columns is None:
        line, columns = next(numbered, (0, []))
        if not columns:
            raise ValueError(f"{path} is empty; its first line must name the columns")
        _check_header(columns, f"{path}, line {line}")
    left_out = 0
    for line, cells in numbered:
        if len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True)), f"{label_of(path)}, line {line}"
        elif torn:
            left_out += 1
        else:
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells for the {len(columns)} columns "
                f"{', '.join(columns)}; it begins with {cells[0]!r:.60}{note}"
            )
    if left_out:
        log.info(
            "%s: skipped %d lines without exactly the columns %s", path.name, left_out, ", ".join(columns)
        )


def _check_header(columns: Sequence[str], where: str) -> None:
    if any(not name.strip() for name in columns):
        place = next(i for i, name in enumerate(columns, start=1) if not name.strip())
        raise ValueError(
            f"{where}: column {place} has no name; the header is {', '.join(map(repr, columns))} "
            "(pandas writes its index this way: use to_csv(..., index=False))"
        )
    repeated = sorted({name for name in columns if list(columns).count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: the header contains {', '.join(map(repr, repeated))} more than once")


# ------------------------------------------------------------------------------------------------------ text


def read_text(path: Path) -> Rows:
    """Yield (row, where) pairs of a text file: each line is a row with the column `text`; empty lines are skipped."""
    label = label_of(path)
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}, f"{label}, line {number}"


# --------------------------------------------------------------------------------------------------- Parquet


def read_parquet(path: Path) -> Rows:
    """Yield (row, where) pairs of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_exists(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, str(path))
            yield from arrow_rows(file.iter_batches(), label_of(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not Parquet ({error})") from error


def is_saved(path: Path) -> bool:
    """Return whether a path is a folder written by `datasets.Dataset.save_to_disk`."""
    return (path / "state.json").is_file()


def read_saved(path: Path) -> Rows:
    """Yield (row, where) pairs of a folder written by `datasets.Dataset.save_to_disk`."""
    import datasets
    import pyarrow as pa

    try:
        rows = datasets.Dataset.load_from_disk(str(path)).with_format("arrow")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: incomplete folder of save_to_disk ({error})") from error
    yield from arrow_rows(rows.iter(BATCH), label_of(path))


def arrow_rows(tables: Iterable[Any], label: str) -> Rows:
    """Yield (row, where) pairs of consecutive Arrow tables or batches.

    Cells of Arrow's JSON type, which `datasets` uses for columns of mixed types, are decoded.
    """
    start = 0
    for table in tables:
        encoded = [column for column in table.schema if _holds_json(column.type)]
        try:
            rows = table.to_pylist()
        except (ValueError, OverflowError):
            _find_unreadable(table, label, start)
            raise
        for i, row in enumerate(rows, start=start):
            for column in encoded:
                try:
                    row[column.name] = _from_json(row[column.name], column.type)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{label}, row {i}: column {column.name!r} is not JSON ({error})"
                    ) from error
            yield row, f"{label}, row {i}"
        start += len(rows)


def _holds_json(kind: Any) -> bool:
    """Return whether cells of an Arrow type are, or contain, JSON texts."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == "arrow.json"
    if pa.types.is_struct(kind):
        return any(_holds_json(field.type) for field in kind)
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_json(kind.value_type)


def _from_json(cell: Any, kind: Any) -> Any:
    """Return a cell with its JSON texts decoded."""
    if cell is None or not _holds_json(kind):
        return cell
    if isinstance(cell, dict):
        return {name: _from_json(value, kind.field(name).type) for name, value in cell.items()}
    if isinstance(cell, list):
        return [_from_json(part, kind.value_type) for part in cell]
    return json.loads(cell)


def _find_unreadable(table: Any, label: str, start: int) -> None:
    for i in range(table.num_rows):
        for name in table.schema.names:
            try:
                table.column(name)[i].as_py()
            except (ValueError, OverflowError) as error:
                raise ValueError(
                    f"{label}, row {start + i}: column {name!r} cannot be read: {error}"
                ) from error


# ------------------------------------------------------------------------------------------------------ lines


def label_of(path: Path) -> str:
    """Return the name of a file for the sources of its rows: that of its folder, and its own."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {path.parent} holds {listing(path.parent)}")


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their line endings; only a line feed ends a line.

    Every text reader opens its file here: UTF-8 with or without a byte order mark, or UTF-16 with one; gzipped if the
    name ends in `.gz`.
    """
    _check_exists(path)
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if marked else "utf-8-sig"
        with opener(path, "rt", encoding=encoding, newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        place = "" if error.encoding != "utf-8" else f", line {_line_that_is_not_utf8(path, opener)}"
        raise ValueError(
            f"{path}{place}: not {error.encoding.upper()} text ({error.reason}); save it as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error


def _line_that_is_not_utf8(path: Path, opener: Callable[..., Any]) -> int:
    with opener(path, "rb") as file:
        return next(
            n for n, line in enumerate(file, start=1) if line.decode(errors="ignore").encode() != line
        )


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": read_json_file,
    ".jsonl": read_json_file,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
