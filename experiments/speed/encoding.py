"""Time to encode rows in this process, in several, and from the file that is kept; padding of grouped batches.

    python experiments/speed/encoding.py --out encoding
    python experiments/speed/encoding.py --model FOLDER --mixture commonsense_170k.json --out encoding

Without ``--model`` the tokenizer is a byte-level BPE of 4,096 tokens trained on the invented rows; a slow one, written
in Python (ByT5's), is measured too. Lengths of invented rows are spread as those of the commonsense mixture.

Ways: in this process without and with the threads of fast tokenizers; keeping a file, with and without them, and in one
process a core; reading what was kept.
Padding is (columns x rows) / tokens over one epoch of train batches, as the model gets them.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, add_arguments, fastest, figure, header, number, ratio, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reft_lightning.base_models.loading import load_tokenizer
from reft_lightning.data import FAMILIES
from reft_lightning.data import encoding_cache as prepared
from reft_lightning.data.encoding import Collator, EncodedRows, encode_all
from reft_lightning.data.example import Example
from reft_lightning.data.files import read_json_file
from reft_lightning.data.sampling import TrainBatches

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 512
SIZES = (1000, 2000, 5000)  # where the file begins to pay
BATCHES = (8, 32)
GOAL_GROUPED = 1.06
GOAL_READ = 0.2  # of the time in this process


def invented(count: int) -> list[Example]:
    """Return rows of 20 to 290 words: short questions, middling ones, and stories with four endings."""
    rng = random.Random(0)
    syllables = [a + b for a in ("b", "d", "gr", "k", "l", "m", "n", "st", "v", "th") for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(3000)]
    examples = []
    for i in range(count):
        low, high = rng.choices(((22, 26), (45, 80), (115, 280)), weights=(20, 58, 22))[0]
        text = " ".join(rng.choices(words, k=rng.randint(low, high)))
        target = f"the correct answer is {rng.choice(('true', 'false', 'solution1', 'ending4'))}"
        examples.append(Example("invented", f"{text}? {i}\n", target, target))
    return examples


def trained_on(examples: Sequence[Example]) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer whose merges come from some of the rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([example.prompt for example in examples[:2000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


# --- time --------------------------------------------------------------------------------------------------------


def in_this_process(threads: bool) -> Callable[[], None]:
    """Prepare a way that keeps nothing."""

    def prepare() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
        prepared.SMALL = 1 << 60

    return prepare


def keeping(processes: int, threads: bool = False) -> Callable[[], None]:
    """Prepare a way that writes files."""

    def prepare() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
        prepared.SMALL = 1
        prepared.processes_for = lambda rows: processes
        shutil.rmtree(prepared.cache_folder() / "encoded", ignore_errors=True)

    return prepare


def from_file() -> None:
    """Prepare to read what the way before wrote."""
    prepared.SMALL = 1


def ways(processes: int, fast: bool) -> dict[str, Callable[[], None]]:
    """Return the ways in the order of a round."""
    threads = {"here, threads": in_this_process(True), "kept, threads": keeping(1, threads=True)}
    return {
        "here": in_this_process(False),
        **(threads if fast else {}),
        "kept": keeping(1),
        **({f"kept, {processes} processes": keeping(processes)} if processes > 1 else {}),
        "read": from_file,
    }


Times = dict[str, dict[str, list[float]]]


def cpu_seconds() -> float:
    """Return the processor's time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def time_ways(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rounds: int, processes: int
) -> Times:
    """Return way -> wall, cpu -> seconds of each round; every way must give the rows of the first."""
    times: Times = {}
    expected: EncodedRows | None = None
    for _ in range(rounds):
        for name, prepare in ways(processes, tokenizer.is_fast).items():
            prepare()
            wall, cpu = time.perf_counter(), cpu_seconds()
            rows = encode_all(tokenizer, examples, MAX_LENGTH)
            found = times.setdefault(name, {"wall": [], "cpu": []})
            found["wall"].append(time.perf_counter() - wall)
            found["cpu"].append(cpu_seconds() - cpu)
            expected = expected or rows
            for i in range(0, len(rows), 101):
                if rows[i] != expected[i]:
                    raise RuntimeError(f"{name}: row {i} is {rows[i]}, not {expected[i]}")
    return times


def time_figures(kind: str, times: Times, rows: int) -> list[Figure]:
    """Return seconds in this process, and the other ways in ratios to it."""
    found = [fastest(f"{kind} tokenizer, {rows:,} rows, in this process", times["here"]["wall"], unit="s")]
    for name in (name for name in times if name != "here"):
        above, below = times[name]["wall"], times["here"]["wall"]
        goal = GOAL_READ if name == "read" else None
        found.append(ratio(f"{kind} tokenizer, {name} / here", above, below, goal=goal))
    return found


# --- padding -----------------------------------------------------------------------------------------------------


def padding(rows: EncodedRows, batch_size: int, grouped: bool) -> float:
    """Return (columns x rows) / tokens of an epoch."""
    collate = Collator(0)
    laid_out = tokens = 0
    for batch in TrainBatches(rows.lengths, batch_size, seed=0, group_by_length=grouped).batches(epoch=0):
        mask = collate([rows[i] for i in batch])["attention_mask"]
        laid_out, tokens = laid_out + mask.numel(), tokens + int(mask.sum())
    return laid_out / tokens


def padding_figures(what: str, rows: EncodedRows) -> list[Figure]:
    """Return the padding of random and of grouped batches."""
    return [
        figure(
            f"padding, {what}, batch {size}, {'grouped' if grouped else 'random'}",
            padding(rows, size, grouped),
            goal=GOAL_GROUPED if grouped else None,
        )
        for size in BATCHES
        for grouped in (False, True)
    ]


# --- the whole ---------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder with a tokenizer; one is made without it")
    parser.add_argument("--mixture", type=Path, help="file of commonsense rows as LLM-Adapters has them")
    parser.add_argument("--count", type=int, default=20000, help="invented rows (20000)")
    parser.add_argument("--processes", type=int, help="that encode (one a core, at most 8)")
    add_arguments(parser, HERE / "results" / "encoding", rounds=4, warmup=None, model=False)
    return parser.parse_args()


def main() -> None:
    """Measure times and padding and write both files."""
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("reft_lightning").setLevel(logging.ERROR)
    examples = invented(args.count)
    fast = load_tokenizer(source="local", path=str(args.model)) if args.model else trained_on(examples)
    processes = args.processes or min(args.threads, prepared.PROCESSES)
    figures: list[Figure] = []
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REFT_CACHE"] = cache
        slow_count = max(args.count // 10, 1)
        for kind, tokenizer, count in (("fast", fast, args.count), ("slow", ByT5Tokenizer(), slow_count)):
            times = time_ways(tokenizer, examples[:count], args.rounds, processes)
            records[f"{kind}, {count} rows"] = times
            figures += time_figures(kind, times, count)
        for count in (size for size in SIZES if size < args.count):
            records[f"fast, {count} rows"] = times = time_ways(fast, examples[:count], args.rounds, 1)
            figures.append(
                ratio(
                    f"fast tokenizer, {count:,} rows, read / here",
                    times["read"]["wall"],
                    times["here"]["wall"],
                )
            )
        in_this_process(False)()
        figures += padding_figures("invented rows", encode_all(fast, examples, MAX_LENGTH))
        if args.mixture:
            make = FAMILIES["commonsense"].mixture_example
            mixture = [make(row) for row, _ in read_json_file(args.mixture)]
            figures += padding_figures("commonsense mixture", encode_all(fast, mixture, MAX_LENGTH))
    facts = header(
        "Time to encode rows, and padding of batches",
        args,
        model=args.model.resolve().name if args.model else "BPE of 4,096 tokens and ByT5",
        processes=processes,
    )
    if not args.mixture:
        facts["left_out"] = {"padding of the commonsense mixture": "needs --mixture"}
    lines = ["| rows | way | best s | cpu s | rows / s |", "|---|---|---|---|---|"]
    for what, times in records.items():
        count = int(what.split()[1])
        for way, found in times.items():
            best, cpu = min(found["wall"]), min(found["cpu"])
            lines.append(f"| {what} | {way} | {number(best)} | {number(cpu)} | {count / best:,.0f} |")
    write(args.out, facts, records, figures, "\n".join(lines))
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)


if __name__ == "__main__":
    main()
