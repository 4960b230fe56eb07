r"""GLUE: nine classification benchmarks, trained one at a time.

Wang et al. 2019, arXiv:1804.07461; https://gluebenchmark.com, on the hub nyu-mll/glue. According to its card, the
collection is licensed under CC BY 4.0; each part has the licence given by its authors.

A row of RTE on the hub, and the same row in GLUE's own tab-separated file::

    {"sentence1": "No Weapons of Mass Destruction Found in Iraq Yet.",
     "sentence2": "Weapons of Mass Destruction Found in Iraq.", "label": 1, "idx": 0}

    index \t sentence1 \t sentence2 \t label
    0 \t No Weapons of Mass Destruction Found in Iraq Yet. \t Weapons of ... in Iraq. \t not_entailment

| task | train rows | validation rows | predicted | measures, the main one first |
|---|---|---|---|---|
| cola | 8,551 | 1,043 | unacceptable, acceptable | matthews, accuracy |
| sst2 | 67,349 | 872 | negative, positive | accuracy |
| mrpc | 3,668 | 408 | not_equivalent, equivalent | accuracy, f1 |
| stsb | 5,749 | 1,500 | similarity 0..5 | pearson, spearman |
| qqp | 363,846 | 40,430 | not_duplicate, duplicate | accuracy, f1 |
| mnli | 392,702 | 9,815 matched, 9,832 mismatched | entailment, neutral, contradiction | accuracy |
| qnli | 104,743 | 5,463 | entailment, not_entailment | accuracy |
| rte | 2,490 | 277 | entailment, not_entailment | accuracy |
| wnli | 635 | 71 | not_entailment, entailment | accuracy |

The labels of GLUE's test sets are hidden, so the published *validation* set is divided into rows for selection and
rows for the test (`classification_data.divide`), as in the ReFT paper (arXiv:2404.03592, appendix C.3). For MNLI this
is the matched set; the mismatched set is an additional test set, undivided. The measures are those of GLUE's own metric
(https://github.com/huggingface/evaluate/blob/main/metrics/glue/glue.py), which for mrpc, qqp and stsb also reports
`combined_score`, the mean of the two; accuracy on cola is our addition.

Tab-separated files are read without quoting, because quotation marks in them are text. WNLI is adversarial between
train and validation: it is normal for a trained model to score below the most common answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import Rows, read_file, read_tsv
from ..labelled import ClassificationFamily, ClassificationTask
from ..rows import HubRows, LocalRows, by_name

PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # the file has no header line


@dataclass(frozen=True)
class Renamed:
    """Read a file of rows and rename its columns to the hub's names.

    Args:
        names: column name in the file -> name on the hub; other columns keep their names.
        columns: column names of a tab-separated file without a header line.
        torn: whether to skip lines with a wrong number of cells: a few questions of QQP contain a line break, and both
            halves are useless. The hub's copy skips them too (363,846 of 363,849 rows).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    torn: bool = False

    def __call__(self, path: Path) -> Rows:
        """Yield (row, where)."""
        own = self.columns or self.torn
        rows = read_tsv(path, self.columns, self.torn) if own else read_file(path)
        for row, where in rows:
            yield {self.names.get(name, name): value for name, value in row.items()}, where


def _task(
    name: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...] = (),
    *,
    folder: str,
    measures: tuple[str, ...] = ("accuracy",),
    read: Renamed | None = None,
    train: tuple[LocalRows, ...] = (),
    validation: Mapping[str, tuple[str, str]] | None = None,
) -> ClassificationTask:
    """Return a task whose sources follow GLUE's common pattern.

    `folder` contains GLUE's own files (`"SST-2"`), `train` lists additional local layouts of the train rows, and
    `validation` is split -> (hub's name, local file), if there is more than one validation set.
    """
    read = read or Renamed()
    validation = validation or {"validation": ("validation", "dev.tsv")}
    hub = {split: (HubRows("nyu-mll/glue", name, of_hub),) for split, (of_hub, _) in validation.items()}
    local = {split: (LocalRows((f"{folder}/{file}",), read=read),) for split, (_, file) in validation.items()}
    return ClassificationTask(
        name,
        texts,
        labels,
        measures,
        further_tests=tuple(split for split in validation if split != "validation"),
        hub={"train": (HubRows("nyu-mll/glue", name, "train"),), **hub},
        local={"train": (LocalRows((f"{folder}/train.tsv",), read=read), *train), **local},
    )


QNLI_SUBSET = LocalRows(
    ("QNLI/train_9k_subset.json",),
    note="QNLI train is a subset of 8,999 rows of the 104,743.",
    read=Renamed({"text_a": "question", "text_b": "sentence"}),
)
MNLI_FILE = Renamed({"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"})
MRPC_FILE = Renamed({"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"})
TWO = ("accuracy", "f1", "combined_score")

FAMILY = ClassificationFamily(
    name="glue",
    version=1,
    tasks=by_name(
        _task(
            "cola", ("sentence",), ("unacceptable", "acceptable"), folder="CoLA",
            measures=("matthews", "accuracy"), read=Renamed(columns=COLA_COLUMNS),
        ),
        _task("sst2", ("sentence",), ("negative", "positive"), folder="SST-2"),
        _task("mrpc", PAIR, ("not_equivalent", "equivalent"), folder="MRPC", measures=TWO, read=MRPC_FILE),
        _task(
            "stsb", PAIR, folder="STS-B", measures=("pearson", "spearman", "combined_score"),
            read=Renamed({"score": "label"}),
        ),
        _task(
            "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), folder="QQP", measures=TWO,
            read=Renamed({"is_duplicate": "label"}, torn=True),
        ),
        _task(
            "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), folder="MNLI",
            read=MNLI_FILE,
            validation={
                "validation": ("validation_matched", "dev_matched.tsv"),
                "mismatched": ("validation_mismatched", "dev_mismatched.tsv"),
            },
        ),
        _task("qnli", ("question", "sentence"), ENTAILMENT, folder="QNLI", train=(QNLI_SUBSET,)),
        _task("rte", PAIR, ENTAILMENT, folder="RTE"),
        _task("wnli", PAIR, ("not_entailment", "entailment"), folder="WNLI"),
    ),
)  # fmt: skip
