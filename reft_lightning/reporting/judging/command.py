"""Let a judge compare a model's outputs with a reference model's: `reft-judge outputs=FILE reference=FILE judge=...`.

Judgements are appended to a JSON Lines file as they arrive. Each carries a key made of the texts of its pair and
of the judge's settings: a judge that fails midway goes on where it stopped when the command is run again, and
judgements of other outputs or by another judge are never taken for these. The file is in AlpacaEval's format
(`preference` 1: the reference, 2: the model, between: in doubt, null: not judged), so it is itself something that
`judge=file` reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...data.example import column
from ...data.rows import read_json_file
from ...evaluation.win_rate import win_rate
from ...suggest import did_you_mean
from .judges import EndpointJudge, FileJudge, Judge, JudgeFailed, ModelJudge, Pair, PairRefused, annotator_of

log = logging.getLogger(__name__)

JUDGES = ("file", "endpoint", "model")
FIRST_PAIRS = 5  # when these are all refused, the judge refuses everything, not these pairs
USAGE = (
    "reft-judge outputs=FILE reference=FILE judge=file annotations=FILE\n"
    "       reft-judge outputs=FILE reference=FILE judge=endpoint url=URL model=NAME [key_env=VARIABLE]\n"
    "       reft-judge outputs=FILE reference=FILE judge=model model=NAME [source=hub|local|wheel]\n"
    "       reft-judge judge=file annotations=FILE"
)
_COMMON = ("judge", "outputs", "reference", "generator", "reference_name", "both_orders", "limit", "out")
_OF_JUDGE: dict[str, tuple[str, ...]] = {
    "file": ("annotations",),
    "endpoint": ("url", "model", "key_env", "temperature", "max_tokens", "timeout", "attempts"),
    "model": ("model", "source", "package", "sha256", "revision", "tokenizer", "dtype", "max_length"),
}
OPTIONS = tuple(dict.fromkeys((*_COMMON, *(name for names in _OF_JUDGE.values() for name in names))))


def main(options: Mapping[str, str]) -> dict[str, Any]:
    """Judge, compute the win rate, and write both.

    Args:
        options: as written on the command line; see `USAGE`. `outputs` and `reference` are files in AlpacaEval's
            format, `[{instruction, output, generator}]`; without them judge=file takes the win rate of the
            annotations as they are. `generator` and `reference_name` name the models where the files do not.
            `both_orders=true` asks twice, either output first, and takes the mean; otherwise the order is
            drawn for each instruction. `limit` judges the first N pairs. `key_env` names the environment
            variable that holds the endpoint's key; `temperature=none` sends none. `out` is the file of the
            result; the judgements lie beside it.

    Returns:
        What `win_rate` returns, with the names of the files.

    Raises:
        ValueError: for options that do not fit, or outputs that do not belong together.
        JudgeFailed: if the judge gave up; what it judged is kept.
    """
    kind = _check(options)
    if kind == "file" and "outputs" not in options:
        path = Path(options["annotations"])
        rows = _rows(path)
        names = {"generator": options.get("generator"), "reference": options.get("reference_name")}
        result = win_rate(rows, **names, judge=annotator_of(rows, path)) | {"annotations": path.name}
        return _finish(result, Path(options.get("out") or _beside(path, "win_rate.json")))
    outputs, references = Path(options["outputs"]), Path(options["reference"])
    pairs = pair_up(
        _rows(outputs), _rows(references), options.get("generator"), options.get("reference_name")
    )
    pairs = pairs[: _number(options, "limit", int)]
    judge = _build(kind, options)
    slug = re.sub(r"[^\w.-]+", "_", f"{references.name.split('.')[0]}.{judge.name}")
    out = Path(options.get("out") or _beside(outputs, f"vs_{slug}.win_rate.json"))
    journal = out.with_name(out.name.removesuffix(".json").removesuffix(".win_rate") + ".judgements.jsonl")
    annotations = judge_pairs(pairs, judge, journal, both_orders=_flag(options, "both_orders"))
    if isinstance(judge, FileJudge) and all(row["preference"] is None for row in annotations):
        raise ValueError(_strangers(pairs, judge, Path(options["annotations"])))
    files = {"outputs": outputs.name, "reference_outputs": references.name, "judgements": journal.name}
    return _finish(win_rate(annotations) | {"judge_settings": dict(judge.settings)} | files, out)


def _finish(result: dict[str, Any], out: Path) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    error = result["standard_error"]
    log.info(
        "%s against %s, judged by %s: win rate %.2f %% (standard error %s) of %d pairs, %d draws, %d unjudged; %s",
        result["generator"], result["reference"], result["judge"], result["win_rate"],
        "unknown" if error is None else f"{error:.2f}", result["n_total"], result["n_draws"],
        result["n_unjudged"], out,
    )  # fmt: skip
    if result["n_unjudged"]:
        log.warning("%d pairs were not judged; they do not count", result["n_unjudged"])
    return result


# -------------------------------------------------------------------------------------------- pairs of outputs


def pair_up(
    outputs: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    generator: str | None = None,
    reference_name: str | None = None,
) -> list[Pair]:
    """Return the pairs to compare, in the order of the outputs.

    Args:
        outputs: {instruction, output, generator} of the model.
        references: the same of the reference model; it may know more instructions.
        generator: overrides the rows' name.
        reference_name: overrides the references' name.

    Raises:
        ValueError: if an instruction has no reference output, or stands twice, or a model has no one name.
    """
    name = generator or _one_generator(outputs, "outputs", "generator")
    known = _by_instruction(references, "reference")
    said = _by_instruction(outputs, "outputs")
    missing = [instruction for instruction in said if instruction not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(said)} instructions of outputs have no output of the reference; the first is "
            f"{missing[0]!r:.100}"
        )
    reference = reference_name or _one_generator(references, "reference", "reference_name")
    if len(known) > len(said):
        log.warning("outputs answer %d of the reference's %d instructions", len(said), len(known))
    return [
        Pair(
            known[instruction]["instruction"],
            row["output"],
            known[instruction]["output"],
            name,
            reference,
            str(row.get("dataset") or known[instruction].get("dataset") or ""),
        )
        for instruction, row in said.items()
    ]


def _by_instruction(rows: Sequence[Mapping[str, Any]], what: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for i, row in enumerate(rows):
        # some of AlpacaEval's instructions end in a newline, which other files have lost
        instruction = column(row, "instruction", f"{what}, row {i}").strip()
        if not isinstance(column(row, "output", f"{what}, row {i}"), str):
            raise ValueError(f"{what}, row {i}: output must be text; got {row['output']!r:.60}")
        if instruction in found and found[instruction]["output"] != row["output"]:
            raise ValueError(f"{what}, row {i}: a second output for the instruction {instruction!r:.80}")
        found[instruction] = row
    if not found:
        raise ValueError(f"{what} has no rows")
    return found


def _one_generator(rows: Iterable[Mapping[str, Any]], what: str, option: str) -> str:
    names = sorted({str(row["generator"]) for row in rows if row.get("generator")})
    if len(names) != 1:
        raise ValueError(
            f"the rows of {what} name {', '.join(names) or 'no generator'}: write {option}=NAME, a win rate is "
            "recorded with both models"
        )
    return names[0]


# --------------------------------------------------------------------------------------------- the judgements


def judge_pairs(
    pairs: Sequence[Pair], judge: Judge, journal: Path, both_orders: bool = False
) -> list[dict[str, Any]]:
    """Return one annotation for each pair, asking the judge for those that the journal does not have.

    Args:
        pairs: what to compare.
        judge: whom to ask.
        journal: JSON Lines; read first, and appended to with every judgement. Unjudged pairs are asked again.
        both_orders: ask with either output first and take the mean, against a judge's liking for one place.

    Raises:
        JudgeFailed: if the judge gives up, which says how many judgements are kept, or refuses every one of the
            first pairs. A judge that has answered before may refuse as many as it likes.
        ValueError: if the journal holds something else than judgements, or another process writes to it.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{journal}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process judges into {journal}; wait for it, or give out=FILE") from error
    try:
        return _judge_pairs(pairs, judge, journal, both_orders)
    finally:
        lock.release()


def _judge_pairs(
    pairs: Sequence[Pair], judge: Judge, journal: Path, both_orders: bool
) -> list[dict[str, Any]]:
    keys = [judgement_key(pair, judge, both_orders) for pair in pairs]
    wanted = set(keys)
    rows = {row["key"]: row for row in read_journal(journal) if row["key"] in wanted}
    kept = sum(row["preference"] is not None for row in rows.values())
    if kept:
        log.info("%s has %d of %d judgements already", journal, kept, len(pairs))
    answered, refused = kept > 0, 0
    with journal.open("a", encoding="utf-8") as file:
        for key, pair in zip(keys, pairs, strict=True):
            if key in rows and rows[key]["preference"] is not None:
                continue
            try:
                share = _share(pair, judge, both_orders)
                answered = True
            except PairRefused as error:
                refused += 1
                if not answered and refused == min(FIRST_PAIRS, len(pairs)):
                    raise JudgeFailed(
                        f"the first {refused} pairs were all refused, the last: {error}"
                    ) from error
                log.warning("not judged: %r (%s)", pair.instruction[:60], error)
                share = None
            except JudgeFailed as error:
                raise JudgeFailed(
                    f"{error}\n{kept} of {len(pairs)} judgements are kept in {journal}; "
                    "the same command goes on from there"
                ) from error
            rows[key] = _annotation(key, pair, judge, share)
            file.write(json.dumps(rows[key]) + "\n")  # in ASCII: half a surrogate pair has no UTF-8
            file.flush()
            os.fsync(file.fileno())  # a judgement may have cost money
            kept += share is not None
    return [rows[key] for key in keys]


def _share(pair: Pair, judge: Judge, both_orders: bool) -> float | None:
    if not both_orders:
        return judge(pair, _model_first(pair))
    shares = [judge(pair, model_first) for model_first in (False, True)]
    known = [share for share in shares if share is not None]
    return sum(known) / 2 if len(known) == 2 else None


def _model_first(pair: Pair) -> bool:
    # by the instruction alone: every model and every run is seen in the same order
    return hashlib.sha256(pair.instruction.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


def _annotation(key: str, pair: Pair, judge: Judge, share: float | None) -> dict[str, Any]:
    return {
        "instruction": pair.instruction,
        "output_1": pair.reference_output,
        "generator_1": pair.reference,
        "dataset": pair.dataset,
        "output_2": pair.output,
        "generator_2": pair.generator,
        "annotator": judge.name,
        "preference": None if share is None else 1 + share,
        "key": key,
    }


def judgement_key(pair: Pair, judge: Judge, both_orders: bool) -> str:
    """Return what a judgement belongs to: equal keys mean the same texts, models, judge and way of asking."""
    parts = [pair.instruction, pair.output, pair.reference_output, pair.generator, pair.reference]
    text = json.dumps([*parts, dict(judge.settings), both_orders], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the judgements of a journal; a last line that was cut off by a crash is removed from the file.

    Raises:
        ValueError: if another line is no judgement; names it.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete, _, rest = content.rpartition(b"\n")
    if rest:
        log.warning("%s: the last line is cut off and left out: %r", path, rest[:60])
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    rows = []
    for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
        try:
            row = json.loads(line)
            row["key"], row["preference"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: no judgement by reft-judge: {line[:80]!r}") from error
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- the options


def _check(options: Mapping[str, str]) -> str:
    """Return the kind of judge, when the options are its own and complete."""
    kind = options.get("judge", "")
    if kind not in JUDGES:
        raise ValueError(
            f"judge must be one of {', '.join(JUDGES)}; got {kind!r}{did_you_mean(kind, JUDGES)}"
        )
    allowed = (*_COMMON, *_OF_JUDGE[kind])
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"judge={kind} takes no {name}{did_you_mean(name, allowed)}; it takes {', '.join(allowed)}"
            )
    needed = {"file": ["annotations"], "endpoint": ["url", "model"], "model": ["model"]}[kind]
    if kind != "file" or "outputs" in options or "reference" in options:
        needed = ["outputs", "reference", *needed]
    for name in needed:
        if not options.get(name):
            raise ValueError(f"judge={kind} needs {name}=...")
    return kind


def _build(kind: str, options: Mapping[str, str]) -> Judge:
    if kind == "file":
        path = Path(options["annotations"])
        rows = _rows(path)
        return FileJudge(rows, annotator_of(rows, path))
    if kind == "endpoint":
        numbers = {"temperature": float, "timeout": float, "attempts": int, "max_tokens": int}
        settings = {name: _number(options, name, kind) for name, kind in numbers.items() if name in options}
        return EndpointJudge(options["url"], options["model"], _key(options.get("key_env")), **settings)
    source, model = options.get("source", "hub"), options["model"]
    place = {
        name: options[name]
        for name in ("package", "sha256", "revision", "tokenizer", "dtype")
        if name in options
    }
    place |= {"source": source, "name" if source == "hub" else "path": model}
    name = model if source == "hub" else Path(model).name
    return ModelJudge.load(name, max_length=_number(options, "max_length", int), **place)


def _key(variable: str | None) -> str | None:
    """Return the key of an endpoint; it is sent only where a variable is named, never to any url by default."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"key_env={variable}: there is no such environment variable")
    return os.environ[variable]


def _strangers(pairs: Sequence[Pair], judge: FileJudge, path: Path) -> str:
    shared = sum(pair.instruction in judge.instructions for pair in pairs)
    return (
        f"{path} judges none of these pairs: it has {shared} of the {len(pairs)} instructions, but with other outputs. "
        "A judgement counts for the very texts that were judged; leave outputs and reference out to take the win "
        "rate of the file as it is"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [row for row, _ in read_json_file(path.expanduser())]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _beside(path: Path, ending: str) -> Path:
    stem = re.sub(r"\.jsonl?(\.gz)?$", "", path.name)
    return path.with_name(f"{stem}.{ending}")


def _number(options: Mapping[str, str], name: str, kind: type) -> Any:
    if name not in options or (name == "temperature" and options[name] == "none"):
        return None
    try:
        value = kind(options[name])
    except ValueError as error:
        raise ValueError(f"{name} must be {_WORDS[kind]}; got {options[name]!r}") from error
    if value < 0 or (value == 0 and name != "temperature"):
        raise ValueError(f"{name} must be positive; got {options[name]!r}")
    return value


_WORDS = {int: "an integer", float: "a number"}


def _flag(options: Mapping[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise ValueError(f"{name} must be true or false; got {options[name]!r}")
    return value == "true"
