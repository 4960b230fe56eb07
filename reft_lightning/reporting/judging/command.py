"""Compare a model's outputs with a reference model's: ``reft-judge outputs=FILE reference=FILE judge=...``.

Judgements are appended to a JSON Lines file as they arrive, each with a key made from the texts of its pair and the
settings of the judge: if a judge fails midway, the same command resumes where it stopped, and judgements of other
outputs or by another judge are never reused. The file has AlpacaEval's format, so ``judge=file`` can read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...data.example import column
from ...data.files import read_json_file
from ...storage.atomic import json_text, write_json
from ...storage.reading import naming
from ...suggest import check_choice, did_you_mean
from ...terminal.bars import Bar
from .judges import EndpointJudge, JudgeFailed, Pair, PairRefused, look_up
from .win_rate import one_name, win_rate

log = logging.getLogger(__name__)

FIRST_PAIRS = 5  # if all of these are refused, the judge presumably refuses every pair
HELP = """\
reft-judge: compare a model's outputs with those of a reference model; print the win rate
usage: reft-judge judge=file annotations=FILE
       reft-judge outputs=FILE reference=FILE judge=file annotations=FILE
       reft-judge outputs=FILE reference=FILE judge=endpoint url=URL model=NAME [key_env=VARIABLE]
  outputs, reference        files of [{instruction, output, generator}]; a run's are in its outputs/
  judge                     file: judgements in AlpacaEval's format; endpoint: a served model
  annotations               the file of judgements
  url, model, key_env       endpoint (OpenAI's API), its model, the environment variable of its key
  temperature, max_tokens   of the endpoint's answers
  generator, reference_name names of the models, if the files do not have them
  limit, out                judge only the first N pairs; the file to write the result to
examples:
  reft-judge outputs=RUN/outputs/reft_alpaca_eval.json reference=davinci.json \\
             judge=endpoint url=http://localhost:8000/v1 model=NAME
  reft-judge judge=file annotations=annotations.json
If a judge stops, the same command continues there; each judgement is saved as it arrives.
"""
_COMMON = ("judge", "outputs", "reference", "generator", "reference_name", "limit", "out")
_OF_JUDGE = {"file": ("annotations",), "endpoint": ("url", "model", "key_env", "temperature", "max_tokens")}
OPTIONS = (*_COMMON, *_OF_JUDGE["file"], *_OF_JUDGE["endpoint"])


def main(options: Mapping[str, str]) -> dict[str, Any]:
    """Judge, compute the win rate, and write both; the judgements are written next to ``out``. Options: see ``HELP``.

    Without ``outputs`` and ``reference``, ``judge=file`` computes the win rate of the annotations as is.
    ``temperature=none`` sends no temperature.

    Raises:
        ValueError: for invalid options, or outputs that do not match.
        JudgeFailed: if the judge failed; its judgements so far are kept.
    """
    kind = _check(options)
    names = options.get("generator"), options.get("reference_name")
    pairs, files, versus = None, {}, ""
    if "outputs" in options:
        outputs, references = Path(options["outputs"]), Path(options["reference"])
        pairs = pair_up(_rows(outputs), _rows(references), *names)[: _number(options, "limit", int)]
        files = {"outputs": outputs.name, "reference_outputs": references.name}
        versus = f"vs_{references.name.split('.')[0]}."
    if kind == "file":
        path = Path(options["annotations"])
        annotations, judge = _from_file(path, pairs)
        result = win_rate(annotations, *names, judge) | files | {"annotations": path.name}
        return _finish(result, _out(options, f"{versus}{judge}" if versus else ""))
    endpoint = _endpoint(options)
    out = _out(options, f"{versus}{endpoint.name}")
    journal = out.with_name(out.name.removesuffix(".json").removesuffix(".win_rate") + ".judgements.jsonl")
    result = win_rate(judge_pairs(pairs or [], endpoint, journal))
    more = {"judge_settings": dict(endpoint.settings), **files, "judgements": journal.name}
    return _finish(result | more, out)


def _from_file(path: Path, pairs: Sequence[Pair] | None) -> tuple[list[dict[str, Any]], str]:
    """Return the annotations in a file, restricted to the given pairs if any, and the judge's name."""
    rows = _rows(path)
    named = any(row.get("annotator") for row in rows)
    judge = one_name(rows, "annotator", None if named else path.name, "judge")
    if pairs is None:
        return rows, judge
    shares = look_up(pairs, rows)
    if not any(share is not None for share in shares):
        raise ValueError(
            f"{path} has no judgement of these {len(pairs)} pairs. A judgement counts only for the exact texts that "
            "were judged; leave out outputs and reference to compute the win rate of the file as is"
        )
    return [_annotation(pair, share, judge) for pair, share in zip(pairs, shares, strict=True)], judge


def _finish(result: dict[str, Any], out: Path) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    error = result["standard_error"]
    log.info(
        "%s against %s, judged by %s: win rate %.2f %% (standard error %s) of %d pairs, %d draws, %d unjudged; %s",
        result["generator"], result["reference"], result["judge"], result["win_rate"],
        "unknown" if error is None else f"{error:.2f}", result["n_total"], result["n_draws"],
        result["n_unjudged"], out,
    )  # fmt: skip
    if unjudged := result["n_unjudged"]:
        log.warning(
            "%d pairs were not judged and do not count; run the same command to ask for them again", unjudged
        )
    return result


# -------------------------------------------------------------------------------------------- pairs of outputs


def pair_up(
    outputs: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    generator: str | None = None,
    reference_name: str | None = None,
) -> list[Pair]:
    """Return the pairs to compare, in the order of the outputs; the reference may have additional instructions.

    Names that are given override those in the rows.

    Raises:
        ValueError: if an instruction has no reference output or two outputs, or a model has no name or several.
    """
    name = generator or one_name(outputs, "generator", None, "generator")
    reference = reference_name or one_name(references, "generator", None, "reference_name")
    known, own = _by_instruction(references, "reference"), _by_instruction(outputs, "outputs")
    missing = [instruction for instruction in own if instruction not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(own)} instructions in outputs have no output in reference; the first is "
            f"{missing[0]!r:.100}"
        )
    if len(known) > len(own):
        log.warning("outputs has %d of the %d instructions in reference", len(own), len(known))
    return [
        {
            "instruction": known[key]["instruction"], "output_1": known[key]["output"], "generator_1": reference,
            "dataset": str(row.get("dataset") or known[key].get("dataset") or ""),
            "output_2": row["output"], "generator_2": name,
        }
        for key, row in own.items()
    ]  # fmt: skip


def _by_instruction(rows: Sequence[Mapping[str, Any]], what: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for i, row in enumerate(rows):
        # some of AlpacaEval's instructions end in a newline that is missing in other files
        with naming(f"{what}, row {i}"):
            instruction = column(row, "instruction").strip()
            if not isinstance(column(row, "output"), str):
                raise ValueError(f"output must be text; got {row['output']!r:.60}")
            if found.setdefault(instruction, row)["output"] != row["output"]:
                raise ValueError(f"a second output for the instruction {instruction!r:.80}")
    return found


# --------------------------------------------------------------------------------------------- the judgements


def judge_pairs(pairs: Sequence[Pair], judge: EndpointJudge, journal: Path) -> list[dict[str, Any]]:
    """Return one annotation per pair, asking the judge for those that are not in the journal.

    The journal (JSON Lines) is read first; then each judgement is appended. The judge is asked again for unjudged
    pairs.

    Raises:
        JudgeFailed: if the judge fails, or refuses the first pairs without ever having answered.
        ValueError: if the journal contains anything other than judgements, or another process is writing to it.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{journal}.lock", timeout=0):
            return _judge_pairs(pairs, judge, journal)
    except Timeout as error:
        raise ValueError(f"another process is writing to {journal}; wait for it, or give out=FILE") from error


def _judge_pairs(pairs: Sequence[Pair], judge: EndpointJudge, journal: Path) -> list[dict[str, Any]]:
    kept = {row["key"]: row for row in read_journal(journal) if row["preference"] is not None}
    annotations, refused = [], 0
    with journal.open("a", encoding="utf-8") as file, Bar("judging pairs", len(pairs)) as bar:
        for number, pair in enumerate(pairs):
            bar.show(number)
            key = judgement_key(pair, judge)
            if key in kept:
                annotations.append(kept[key])
                continue
            try:
                share = judge(pair)
            except PairRefused as error:
                refused += 1
                if refused == min(FIRST_PAIRS, len(pairs)) > len(annotations):
                    raise JudgeFailed(
                        f"the first {refused} pairs were all refused, the last: {error}"
                    ) from error
                log.warning("not judged: %r (%s)", pair["instruction"][:60], error)
                share = None
            except JudgeFailed as error:
                done = sum(row["preference"] is not None for row in annotations)
                raise JudgeFailed(
                    f"{error}\n{done} of {len(pairs)} judgements are kept in {journal}; the same command resumes there"
                ) from error
            annotations.append(_annotation(pair, share, judge.name) | {"key": key})
            # ASCII, as an unpaired surrogate has no UTF-8 encoding
            file.write(json_text(annotations[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a judgement may have cost money
    return annotations


def _annotation(pair: Pair, share: float | None, annotator: str) -> dict[str, Any]:
    return {**pair, "annotator": annotator, "preference": None if share is None else 1 + share}


def judgement_key(pair: Pair, judge: EndpointJudge) -> str:
    """Return the identity of a judgement: equal keys mean the same texts, models and judge."""
    text = json.dumps([dict(pair), dict(judge.settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the judgements of a journal; a last line cut off by a crash is removed from the file."""
    if not path.is_file():
        return []
    complete, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        log.warning("%s: removed the last line, which is incomplete: %r", path, rest[:60])
        os.truncate(path, path.stat().st_size - len(rest))
    rows = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
            _ = row["key"], row["preference"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: not a judgement by reft-judge: {line[:80]!r}"
            ) from error
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- the options


def _check(options: Mapping[str, str]) -> str:
    """Return the kind of judge, after checking that its options are valid and complete."""
    kind = options.get("judge", "")
    check_choice("judge", kind, _OF_JUDGE)
    allowed = (*_COMMON, *_OF_JUDGE[kind])
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"judge={kind} takes no {name}{did_you_mean(name, allowed)}; it takes {', '.join(allowed)}"
            )
    pairs = () if kind == "file" and not {"outputs", "reference"} & set(options) else ("outputs", "reference")
    for name in (*pairs, *(("annotations",) if kind == "file" else ("url", "model"))):
        if not options.get(name):
            raise ValueError(f"judge={kind} needs {name}=...")
    return kind


def _endpoint(options: Mapping[str, str]) -> EndpointJudge:
    variable = options.get("key_env")
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"key_env={variable}: this environment variable is not set")
    temperature = _number({"temperature": "0", **options}, "temperature", float)
    key, most = os.environ[variable] if variable else None, _number(options, "max_tokens", int)
    return EndpointJudge(options["url"], options["model"], key, temperature, max_tokens=most)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [row for row, _ in read_json_file(path.expanduser())]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _out(options: Mapping[str, str], ending: str) -> Path:
    source = Path(options.get("outputs") or options["annotations"])
    parts = (re.sub(r"\.jsonl?(\.gz)?$", "", source.name), re.sub(r"[^\w.-]+", "_", ending), "win_rate.json")
    return Path(options.get("out") or source.with_name(".".join(filter(None, parts))))


def _number(options: Mapping[str, str], name: str, kind: type) -> Any:
    if name not in options or (name == "temperature" and options[name] == "none"):
        return None
    try:
        value = kind(options[name])
    except ValueError as error:
        wanted = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}; got {options[name]!r}") from error
    if value < 0 or (value == 0 and name != "temperature"):
        raise ValueError(f"{name} must be positive; got {options[name]!r}")
    return value
