"""Compare a model's outputs with a reference model's: `reft-judge outputs=FILE reference=FILE judge=...`.

Judgements are appended to a JSON Lines file as they arrive, each with a key made of the texts of its pair and the
settings of the judge: when a judge fails midway, the same command resumes where it stopped, and judgements of other
outputs or by another judge are never taken for these. The file has AlpacaEval's format, so `judge=file` reads it.
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

FIRST_PAIRS = 5  # if these are all refused, the judge refuses everything, not these pairs
USAGE = (
    "reft-judge judge=file annotations=FILE\n"
    "       reft-judge outputs=FILE reference=FILE judge=file annotations=FILE\n"
    "       reft-judge outputs=FILE reference=FILE judge=endpoint url=URL model=NAME [key_env=VARIABLE]"
)
HELP = f"""\
reft-judge: compare a model's outputs with those of a reference model; print the win rate
usage: {USAGE}
  outputs, reference        files of [{{instruction, output, generator}}]; a run's are in its outputs/
  judge                     file: judgements in AlpacaEval's format; endpoint: a served model
  annotations               the file of the judgements
  url, model, key_env       of the endpoint (OpenAI's API); the variable that holds its key
  temperature, max_tokens   of the endpoint's answers
  generator, reference_name name the models where the files do not
  limit, out                judge the first N pairs; the file of the result
examples:
  reft-judge outputs=RUN/outputs/reft_alpaca_eval.json reference=davinci.json \\
             judge=endpoint url=http://localhost:8000/v1 model=NAME
  reft-judge judge=file annotations=annotations.json
The same command goes on where a judge stopped; each judgement is kept as it arrives.
"""
_COMMON = ("judge", "outputs", "reference", "generator", "reference_name", "limit", "out")
_OF_JUDGE = {"file": ("annotations",), "endpoint": ("url", "model", "key_env", "temperature", "max_tokens")}
OPTIONS = (*_COMMON, *_OF_JUDGE["file"], *_OF_JUDGE["endpoint"])


def main(options: Mapping[str, str]) -> dict[str, Any]:
    """Judge, compute the win rate, and write both; the judgements lie next to `out`. The options are those of `HELP`.

    Without `outputs` and `reference`, judge=file takes the win rate of the annotations as they are. `temperature=none`
    sends none.

    Raises:
        ValueError: for options that do not fit, or outputs that do not belong together.
        JudgeFailed: if the judge gave up; what it judged is kept.
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
    """Return the annotations of a file, of these pairs where there are any, and who judged."""
    rows = _rows(path)
    named = any(row.get("annotator") for row in rows)
    judge = one_name(rows, "annotator", None if named else path.name, "judge")
    if pairs is None:
        return rows, judge
    shares = look_up(pairs, rows)
    if not any(share is not None for share in shares):
        raise ValueError(
            f"{path} judges none of these {len(pairs)} pairs. A judgement counts only for the exact texts that were "
            "judged; leave out outputs and reference to take the win rate of the file as it is"
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
            "%d pairs were not judged and do not count; the same command asks for them again", unjudged
        )
    return result


# -------------------------------------------------------------------------------------------- pairs of outputs


def pair_up(
    outputs: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    generator: str | None = None,
    reference_name: str | None = None,
) -> list[Pair]:
    """Return the pairs to compare, in the order of the outputs; the reference model may have more instructions.

    The names, where given, override those in the rows.

    Raises:
        ValueError: if an instruction has no reference output or two outputs, or a model has no name or several.
    """
    name = generator or one_name(outputs, "generator", None, "generator")
    reference = reference_name or one_name(references, "generator", None, "reference_name")
    known, own = _by_instruction(references, "reference"), _by_instruction(outputs, "outputs")
    missing = [instruction for instruction in own if instruction not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(own)} instructions of outputs have no output of the reference; the first is "
            f"{missing[0]!r:.100}"
        )
    if len(known) > len(own):
        log.warning("outputs answer %d of the reference's %d instructions", len(own), len(known))
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
        # some of AlpacaEval's instructions end in a newline, which other files have lost
        with naming(f"{what}, row {i}"):
            instruction = column(row, "instruction").strip()
            if not isinstance(column(row, "output"), str):
                raise ValueError(f"output must be text; got {row['output']!r:.60}")
            if found.setdefault(instruction, row)["output"] != row["output"]:
                raise ValueError(f"a second output for the instruction {instruction!r:.80}")
    return found


# --------------------------------------------------------------------------------------------- the judgements


def judge_pairs(pairs: Sequence[Pair], judge: EndpointJudge, journal: Path) -> list[dict[str, Any]]:
    """Return one annotation for each pair, asking the judge for those that the journal does not have.

    The journal, JSON Lines, is read first; then each judgement is appended. Unjudged pairs are asked again.

    Raises:
        JudgeFailed: if the judge gives up, or refuses the first pairs without ever having answered.
        ValueError: if the journal holds anything other than judgements, or another process writes to it.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{journal}.lock", timeout=0):
            return _judge_pairs(pairs, judge, journal)
    except Timeout as error:
        raise ValueError(f"another process judges into {journal}; wait for it, or give out=FILE") from error


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
            file.write(json_text(annotations[-1]) + "\n")  # in ASCII: half a surrogate pair has no UTF-8
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
        log.warning("%s: the last line is cut off and left out: %r", path, rest[:60])
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
    """Return the kind of judge, if the options are its own and complete."""
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
        raise ValueError(f"key_env={variable}: there is no such environment variable")
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
