"""Build a report from folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..terminal.bars import Bar
from .comparisons import Comparison
from .evidence import RESAMPLES, add_evidence, deviating
from .grouping import compare, used_split
from .runs import RUN_FOLDER, LeftOut, Read, Run, find_folders, read_runs
from .studies import Study, begun_anew, read_study


@dataclass
class Report:
    """The contents of a report."""

    folders: list[Path]  # as given
    runs: list[Run]  # the complete ones
    comparisons: list[Comparison]  # by title
    studies: list[Study] = field(default_factory=list)  # of `reft-search`
    reads: list[Read] = field(default_factory=list)  # every read of a test split, by time
    left: list[LeftOut] = field(default_factory=list)  # folders that are left out, and why
    resamples: int = RESAMPLES  # of the bootstrap and the sign flips
    seed: int = 0  # of the resampling


def build_report(
    folders: Sequence[Path], split: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Report:
    """Read folders and compute the contents of a report.

    ``folders`` are run folders, multiruns, studies, or folders that contain them; ``split`` is ``test`` or
    ``validation``, or None for test if a run has it, else validation.

    Raises:
        ValueError: if there is nothing to report.
    """
    run_folders, study_folders, left = find_folders(folders)
    runs, incomplete, reads = read_runs(run_folders)
    left += incomplete
    studies: list[Study] = []
    for folder in study_folders:
        reads += begun_anew(folder, reads)
        try:
            studies.append(read_study(folder))
        except ValueError as error:
            left.append(LeftOut(folder, str(error)))
    comparisons = compare(runs, split)
    while bad := [item for comparison in comparisons for item in deviating(comparison)]:
        left += bad
        deviating_folders = {item.folder for item in bad}
        runs = [run for run in runs if run.folder not in deviating_folders]
        comparisons = compare(runs, split)
    where = f"the {split} split" if split else "any split"
    left += [LeftOut(run.folder, f"no score on {where}") for run in runs if not used_split(run, split)]
    if not comparisons and not any(study.trials for study in studies):
        reasons = [f"  {item.folder}: {item.reason}" for item in left]
        raise ValueError(
            "\n".join([f"nothing to report: no complete run has a score on {where}", *reasons, RUN_FOLDER])
        )
    with Bar("resampling rows and seeds", len(comparisons)) as bar:
        for comparison in comparisons:
            add_evidence(comparison, resamples, seed)
            bar.advance()
    reads.sort(key=lambda read: (read.time, str(read.folder)))
    return Report(list(folders), runs, comparisons, studies, reads, left, resamples, seed)
