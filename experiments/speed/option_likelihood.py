"""Time of ranking options, and of a whole evaluation batch, with the prompts read once, against one read a question.

    python experiments/speed/option_likelihood.py --random
    python experiments/speed/option_likelihood.py --model FOLDER --dtype bfloat16

``one by one`` reads prompt and option whole for each option, with the logits of the target alone; ``shared`` keeps the
columns that the options of a batch begin with (``evaluation/shared_columns.py``). Options of random tokens share the
prompt alone; options that begin alike ("the correct answer is ...") share four tokens of six more. An evaluation batch
asks for the loss, the ranking of two options and the checked text, which is one of the options as with an adapter that
knows the format. All ways take turns in an order that rotates by one a round. Writes ``OUT.json`` and ``OUT.md``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from figures import add_arguments, header, ratio, write
from models import model_folder
from processes import clocked
from torch import Tensor

import reft_lightning as rl
from reft_lightning.evaluation import (
    ColumnReader,
    Decoding,
    log_likelihood,
    option_log_likelihoods,
    with_draft,
)
from reft_lightning.evaluation.decoding import generate_ids

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
ROWS, LONGEST, TARGET = 8, 115, 6
SPREAD = 7  # prompts are up to this much shorter than the longest, as in a batch of rows of like length
ALIKE = 4  # tokens that options begin with together, where they do
TOKENIZER = SimpleNamespace(eos_token_id=10**9, pad_token_id=0)  # no token: texts do not end of themselves

Batch = dict[str, Any]
# what is measured -> options, whether they begin alike, goal for (one by one) / shared
RANKINGS = {
    "ranking 4 options": (4, False, 2.0),
    "ranking 2 options": (2, False, None),
    "ranking 4 options that begin alike": (4, True, None),
}
EVALUATION = "evaluation batch: loss, 2 options, text"


def prompts(vocabulary: int, device: str) -> Batch:
    """Draw left-padded prompts of random tokens; time does not depend on which they are."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.randint(0, SPREAD + 1, (ROWS, 1), generator=generator)
    padding[0] = 0
    real = torch.arange(LONGEST) >= padding  # (b, s)
    ids = torch.randint(3, vocabulary, real.shape, generator=generator) * real
    batch = {"input_ids": ids, "attention_mask": real.long(), "prompt_mask": real}
    return {**{name: value.to(device) for name, value in batch.items()}, "boundary": LONGEST}


def with_target(prompt: Batch, target: Tensor) -> Batch:  # target: (b, t)
    """Return prompt | target."""
    more = {
        "input_ids": target,
        "attention_mask": torch.ones_like(target),
        "prompt_mask": torch.zeros_like(target, dtype=torch.bool),
    }
    batch = {name: torch.cat([prompt[name], value], 1) for name, value in more.items()}
    return {**batch, "labels": target, "boundary": prompt["boundary"]}


def options_of(prompt: Batch, first: Tensor, count: int, alike: bool, vocabulary: int) -> list[Batch]:
    """Return one batch for each option: ``first`` and others of random tokens, which may begin as it does."""
    generator = torch.Generator().manual_seed(1)
    targets = [first]
    for _ in range(count - 1):
        other = torch.randint(3, vocabulary, first.shape, generator=generator).to(first.device)
        if alike:
            other[:, :ALIKE] = first[:, :ALIKE]
        targets.append(other)
    return [with_target(prompt, target) for target in targets]


def one_by_one(model: rl.ReftModel, options: list[Batch]) -> Tensor:
    """Read each option with its prompt."""
    return torch.cat([option_log_likelihoods(model, [batch]) for batch in options], 1)


def evaluate(model: rl.ReftModel, gold: Batch, options: list[Batch], shared: bool) -> tuple[Tensor, ...]:
    """Return likelihoods of the targets and of the options, and texts, as an evaluation of a batch does."""
    reader = ColumnReader(model) if shared else None
    loss = log_likelihood(reader or ColumnReader(model), gold)
    if shared:
        ranked = option_log_likelihoods(model, options, reader)
        gold = with_draft(gold, options, ranked.argmax(-1))
    else:
        ranked = one_by_one(model, options)
    return loss, ranked, generate_ids(model, gold, TOKENIZER, Decoding(TARGET), reader)


def rounds_of(ways: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Time each way once a round."""
    cuda = args.device.startswith("cuda")

    def run(number: int, work: Callable[[], Any]) -> None:
        work()
        if cuda:
            torch.cuda.synchronize()

    times: dict[str, dict[str, list]] = {name: {"wall": [], "cpu": []} for name in ways}
    for number in range(-args.warmup, args.rounds):
        names = list(ways)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            answer = clocked(lambda number, work=ways[name]: run(number, work), number)
            if number >= 0:
                for clock in ("wall", "cpu"):
                    times[name][clock].append(answer[clock])
        log.info("round %d of %d", number + 1, args.rounds)
    return times


def check(model: rl.ReftModel, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return how far the likelihoods of both ways lie apart, by what is measured.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    apart = {}
    for name in {name.partition(", ")[0]: None for name in ways if name.startswith("ranking")}:
        a, b = ways[f"{name}, one by one"](), ways[f"{name}, shared"]()
        apart[name] = float((a - b).abs().max())
        if apart[name] > (1e-3 if model.base_model.dtype == torch.float32 else 0.5):
            raise RuntimeError(f"{name}: the likelihoods differ by {apart[name]:.3g}")
    return apart


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "option_likelihood", rounds=8)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model"
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Measure all ways and write both files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), local_files_only=True
        )
    torch.manual_seed(0)
    model = rl.attach(base, "loreft", rank=8, layers="all", positions="f7+l7").eval().to(args.device)
    vocabulary = base.config.vocab_size
    prompt = prompts(vocabulary, args.device)
    says = generate_ids(
        model, prompt, TOKENIZER, Decoding(TARGET)
    )  # (b, t), the text of the evaluation batch
    ways: dict[str, Callable[[], Any]] = {}
    for name, (count, alike, _) in RANKINGS.items():
        options = options_of(prompt, says, count, alike, vocabulary)
        ways[f"{name}, one by one"] = lambda options=options: one_by_one(model, options)
        ways[f"{name}, shared"] = lambda options=options: option_log_likelihoods(model, options)
    options = options_of(prompt, says, 2, True, vocabulary)
    ways[f"{EVALUATION}, one by one"] = lambda: evaluate(model, options[0], options, shared=False)
    ways[f"{EVALUATION}, shared"] = lambda: evaluate(model, options[0], options, shared=True)
    apart = check(model, ways)
    times = rounds_of(ways, args)
    goals = {name: goal for name, (_, _, goal) in RANKINGS.items()} | {EVALUATION: None}
    figures = [
        ratio(
            f"{name}, one by one / shared",
            times[f"{name}, one by one"]["wall"],
            times[f"{name}, shared"]["wall"],
            goal=goal,
            better="higher",
        )
        for name, goal in goals.items()
    ]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    facts = header(
        "Options ranked, and a batch evaluated, with the prompts read once",
        args,
        rows=ROWS,
        prompt_columns=LONGEST,
        target_columns=TARGET,
        dtype=args.dtype,
        device=device,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        likelihoods_apart=apart,
    )
    lines = ["| way | best s | median s | cpu s |", "|---|---|---|---|"]
    for name, clocks in times.items():
        wall = sorted(clocks["wall"])
        lines.append(f"| {name} | {wall[0]:.3f} | {wall[len(wall) // 2]:.3f} | {min(clocks['cpu']):.3f} |")
    write(args.out, facts, times, figures, "\n".join(lines))
    log.info("wrote %s and %s", args.out.with_suffix(".json").name, args.out.with_suffix(".md").name)


if __name__ == "__main__":
    main()
