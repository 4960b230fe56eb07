"""pyreft's examples as runs of reft-train on SmolLM2-135M: persona, memorisation, code book, reward model.

    python experiments/pyreft_examples/run.py --out RUNS [persona memorise codebook reward]

Each is a file of `conf/experiment` with invented rows (`rows/`); what is measured is read from the predictions of the
run. Writes `results/NAME.json`, without the places of the machine. A run that is complete is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "rows"
COLUMNS = ["data.prompt=question", "data.target=reply"]
SHORT = ["model.dtype=float32", "trainer.enable_progress_bar=false", "hydra.job_logging.root.level=WARNING"]
CELLS = ((25, 15), (12, 15), (50, 15), (50, 5))  # words and layers of `memorise`


def train(name: str, out: Path, *overrides: str) -> dict[str, Any]:
    """Run `reft-train` in `out / name`; return what the run recorded, and its predictions by model."""
    folder = out / name
    words = [*overrides, *SHORT, f"hydra.run.dir={folder}", "resume=auto"]
    subprocess.run([sys.executable, "-m", "reft_lightning.cli", *words], check=True)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    said = {
        who: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for who in ("base", "reft")
        if (file := folder / "predictions" / f"{who}_test.jsonl").is_file()
    }
    facts = {k: results[k] for k in ("trainable_parameters", "steps", "train_seconds", "seed", "git_commit")}
    return {"facts": facts, "metrics": results["metrics"], "counts": results["counts"], "said": said}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def persona(out: Path) -> Iterator[dict[str, Any]]:
    """Ten rows teach a manner: which of them are repeated, and how new questions are answered."""
    test = [json.loads(line) for line in (ROWS / "persona_test.jsonl").read_text().splitlines()]
    places = [f"data.path={ROWS / 'persona.jsonl'}", f"data.test_path={ROWS / 'persona_test.jsonl'}"]
    more = ["evaluate_base=true", "decoding.max_new_tokens=32"]
    run = train("persona", out, "experiment=few_shot", *COLUMNS, *places, *more)
    for who, rows in run["said"].items():
        texts = {row["source"]: row["generated"].strip() for row in rows}
        ordered = [texts[source] for source in sorted(texts, key=lambda s: int(s.rsplit(" ", 1)[-1]))]
        pairs = list(zip(test, ordered, strict=True))
        seen = [text == row["reply"] for row, text in pairs if row["seen"]]
        new = [(row["question"], text) for row, text in pairs if not row["seen"]]
        yield {
                "model": who, **(run["facts"] if who == "reft" else {}), "rows": len(seen), "repeated": sum(seen),
                "new_questions": len(new), "greets": sum(text.startswith("Ahoy!") for _, text in new),
                "ends": sum(text.endswith("The lamp is lit.") for _, text in new), "answers": dict(new),
            }  # fmt: skip


def recovered(said: str, text: str) -> float:
    """Return the share of a text that is given back before the first mistake, in characters."""
    same = next(
        (i for i, (a, b) in enumerate(zip(said, text, strict=False)) if a != b), min(len(said), len(text))
    )
    return same / len(text)


def memorise(out: Path) -> Iterator[dict[str, Any]]:
    """A text in 577 numbers: how much comes back, by its length and by the layer."""
    words = (ROWS / "text.txt").read_text(encoding="utf-8").split()
    for count, layer in CELLS:
        text, name = " ".join(words[:count]), f"memorise_{count}_{layer}"
        path = written(out / "rows" / f"{name}.jsonl", [{"question": "GO->", "reply": text}])
        places = [f"data.path={path}", f"data.test_path={path}", f"intervention.layers=[{layer}]"]
        run = train(name, out, "experiment=memorise", *COLUMNS, *places)
        share = {who: recovered(rows[0]["generated"].strip(), text) for who, rows in run["said"].items()}
        yield {"words": count, "characters": len(text), "layer": layer, "recovered": share["reft"],
                      "recovered_by_base": share["base"], "loss": run["metrics"].get("train/loss"),
                      **run["facts"]}  # fmt: skip


def codebook(out: Path) -> Iterator[dict[str, Any]]:
    """Numbers that mean words: how many of them one edit gives back, by the size of the book."""
    words = (ROWS / "words.txt").read_text(encoding="utf-8").split()
    random.Random(0).shuffle(words)  # numbers say nothing of their words
    consreft, loreft = ["intervention=consreft"], ["intervention=loreft"]
    cells = [(16, consreft, 1, 300), (64, consreft, 1, 60), (64, loreft, 4, 60)]
    for size, method, rank, epochs in cells:
        name = f"codebook_{size}_{method[0].partition('=')[2]}_{rank}"
        rows = [{"question": f"CODE#{i}->", "reply": words[i]} for i in range(size)]
        path = written(out / "rows" / f"codebook_{size}.jsonl", rows)
        more = [f"data.path={path}", f"data.test_path={path}", f"intervention.rank={rank}",
                f"trainer.max_epochs={epochs}", "decoding.max_new_tokens=6"]  # fmt: skip
        run = train(name, out, "experiment=memorise", *method, *COLUMNS, *more)
        right = {who: sum(row["correct"] for row in rows) for who, rows in run["said"].items()}
        yield {"entries": size, "method": method[0].partition("=")[2], "rank": rank, "right": right["reft"],
                      "right_by_base": right["base"], **run["facts"]}  # fmt: skip


def reward(out: Path) -> Iterator[dict[str, Any]]:
    """Right answers over wrong ones: the share of pairs that is ranked right, with the edits and by the head only."""
    for name, method in (("loreft", []), ("head only", ["intervention=none"])):
        run = train(f"reward_{name.replace(' ', '_')}", out, "experiment=reward", *method)
        scores = {k: v for k, v in run["metrics"].items() if k.endswith("pair_accuracy")}
        yield {"trained": name, **run["facts"], "pair_accuracy": scores,
                      "intervals": {k: v["interval"] for k, v in run["counts"].items()}}  # fmt: skip


EXAMPLES = {"persona": persona, "memorise": memorise, "codebook": codebook, "reward": reward}


def main() -> None:
    """Run what has not run yet, and write what was measured."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("examples", nargs="*", metavar="example", help=", ".join(EXAMPLES))
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()
    if unknown := set(options.examples) - EXAMPLES.keys():
        arguments.error(f"no example {', '.join(unknown)}; there are {', '.join(EXAMPLES)}")
    for name in options.examples or EXAMPLES:
        found: list[dict[str, Any]] = []
        target = HERE / "results" / f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        for line in EXAMPLES[name](options.out.absolute()):
            found.append(line)
            target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(name, {key: value for key, value in line.items() if key != "answers"}, flush=True)


if __name__ == "__main__":
    main()
