"""What the rows of every task become: a digest of examples, encoded rows, batches and data_versions, by task.

    python experiments/house/rows.py FOLDER MODEL --out before.json            # on the tree before
    python experiments/house/rows.py FOLDER MODEL --out after.json --against before.json

FOLDER holds one folder for each family's files, MODEL a tokenizer. Set REFT_CACHE to an empty folder: the names of what
is kept there are digests of texts, tokenizer, settings and versions, and are compared too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

from reft_lightning.base_models.loading import load_tokenizer
from reft_lightning.data import FAMILIES
from reft_lightning.data.classification_data import ClassificationData
from reft_lightning.data.families.custom import custom_family
from reft_lightning.data.generation_data import GenerationData
from reft_lightning.data.option_batches import option_batches

FOLDERS = {
    "commonsense": "commonsense", "arithmetic": "arithmetic", "gsm8k": "arithmetic", "metamathqa": "arithmetic",
    "glue": "glue", "instruction": "instruct", "code": "code", "reading": "reading", "spans": "reading",
    "skills": "basic_skills",
}  # fmt: skip


def digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rows_of(data, part: str) -> object:
    data.setup("test" if part == "test" else "fit")
    sets = {"train": {"": data._train}, "validation": data._validation, "test": data._test}[part]
    return {name: [len(rows), digest([rows[i] for i in range(len(rows))])] for name, rows in sets.items()}


def described(make) -> dict:
    found: dict = {}
    data = make()
    for part in ("train", "validation", "test"):
        try:
            found[part] = rows_of(data, part)
        except (ValueError, OSError) as error:
            found[part] = f"{type(error).__name__}: {error}"
    found["versions"] = data.data_versions
    for name, loaders in (("train", "train_dataloader"), ("test", "test_dataloader")):
        try:
            loader = getattr(data, loaders)()
            batches = [next(iter(one)) for one in (loader if isinstance(loader, list) else [loader])]
            found[f"{name} batches"] = [
                digest([(k, v.tolist() if hasattr(v, "tolist") else v) for k, v in batch.items()])
                for batch in batches
            ]
            if name == "test" and batches and "boundary" in batches[0] and batches[0]["examples"][0].options:
                made = option_batches(data.tokenizer, batches[0]["examples"], 512)
                values = [(k, v) for batch in made for k, v in batch.items()]
                found["options"] = digest([(k, v.tolist() if hasattr(v, "tolist") else v) for k, v in values])
        except (ValueError, OSError) as error:
            found[f"{name} batches"] = f"{type(error).__name__}: {error}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument(
        "--limit", type=int, default=2500, help="train rows of each task; 2,000 and more are kept"
    )
    given = parser.parse_args()
    tokenizer = load_tokenizer(source="local", path=str(given.model))
    settings = {
        "batch_size": 4,
        "eval_batch_size": 4,
        "max_length": 512,
        "limit_train": given.limit,
        "limit_test": 300,
    }
    found: dict = {}
    for family_name, family in FAMILIES.items():
        place = given.folder / FOLDERS[family_name]
        for name in family.tasks:
            source = {"kind": "local", "path": str(place)}

            def make(family=family, name=name, source=source, more=()):
                from reft_lightning.data.rows import DataSource

                if family.kind == "classification":
                    return ClassificationData(
                        family, tokenizer, DataSource(**source), tasks=[name], **settings
                    )
                size = {"validation_size": 40} | dict(more)
                return GenerationData(
                    family, tokenizer, DataSource(**source), tasks=[name], **settings, **size
                )

            found[f"{family_name}/{name}"] = described(make)
            print(family_name, name, flush=True)
            if family.kind == "generation" and name in ("boolq", "dolly"):
                found[f"{family_name}/{name} alpaca"] = described(
                    lambda m=make: m(more={"template": "alpaca"})
                )
    mixture = given.folder / "commonsense/mixture/train_15k_rebuilt.json.gz"
    found["mixture"] = described(lambda: make(FAMILIES["commonsense"], "boolq", {
        "kind": "local", "path": str(given.folder / "commonsense"), "mixture": str(mixture)}))  # fmt: skip
    with_questions = custom_family(
        path=str(given.folder / "arithmetic/gsm8k/train.jsonl.gz"),
        prompt="{question}\nThink.",
        target="{answer}",
    )
    found["custom"] = described(lambda: make(with_questions, "custom", {"kind": "local", "path": "."}))
    talk = custom_family(path=str(given.folder / "instruct/dolly/train_2k_subset.json.gz"), prompt="instruction",
                         context="input", target="output", template="alpaca")  # fmt: skip
    found["custom context"] = described(lambda: make(talk, "custom", {"kind": "local", "path": "."}))
    cache = Path(os.environ["REFT_CACHE"]) / "encoded"
    found["cache"] = sorted(
        p.name.removesuffix(".npz") for p in cache.iterdir() if p.is_dir() or p.suffix == ".npz"
    )
    text = json.dumps(found, indent=1, sort_keys=True, default=str)
    given.out.write_text(text + "\n", encoding="utf-8")
    print(len(found), "entries,", len(found["cache"]), "kept,", digest(text))
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text(encoding="utf-8"))
    now = json.loads(text)
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    for k in differing:
        print("differs:", k, before.get(k), now.get(k), sep="\n  ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
