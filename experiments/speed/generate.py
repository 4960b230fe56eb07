"""Greedy generation with the adapter and with the bare model: tokens a second.

    python experiments/speed/generate.py --random --pyreft-python pyreft-venv/bin/python --out generate

8 rows, prompts of 100 tokens, 64 new tokens, with a cache, through each package's own ``generate``. Every variant is a
process of its own; each round each of them generates once.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from figures import add_arguments, header, ratio, seconds_table, write
from models import model_folder
from processes import interleaved, is_worker, serve
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worker import LORA_LARGE, LORA_SMALL, PREFIX, RANK, SUFFIX, pyreft_model

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
GOAL = 0.98  # of the bare model's tokens a second


def load(folder: str) -> nn.Module:
    """Return the base model; no token ends a text, so that all variants generate as many."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False).eval()


def prompts(model: nn.Module, rows: int, columns: int) -> dict[str, Tensor]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, columns), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def variant(attach):
    """Return a builder: folder, sizes -> a run that generates once and says how many tokens it added."""

    def build(folder: str, rows: int, columns: int, new: int):
        model = load(folder)
        inputs = prompts(model, rows, columns)
        generate = attach(model)

        @torch.inference_mode()
        def run(number: int) -> dict[str, Any]:
            ids = generate(inputs, max_new_tokens=new, do_sample=False, use_cache=True)
            added = ids.shape[1] - columns
            if added != new:
                raise RuntimeError(f"{new} new tokens were asked for, {added} came")
            return {"tokens": added * rows}

        return run

    return build


def bare(model: nn.Module):
    """The model itself."""
    return lambda inputs, **options: model.generate(**inputs, **options)


def ours(model: nn.Module):
    """LoReFT of this project."""
    import reft_lightning as rl

    adapted = rl.attach(model, "loreft", rank=RANK, layers="all", positions=f"f{PREFIX}+l{SUFFIX}").eval()
    return lambda inputs, **options: adapted.generate(**inputs, **options)


def lora(model: nn.Module, rank: int, modules: list[str]):
    """LoRA through peft, not merged."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    return lambda inputs, **options: adapted.generate(**inputs, **options)


def pyreft(model: nn.Module):
    """LoReFT of pyreft, edited on the prompt alone."""
    adapted, representations = pyreft_model(model, tied=True)

    def generate(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        columns = inputs["input_ids"].shape[1]
        where = [*range(PREFIX), *range(columns - SUFFIX, columns)]
        locations = [[where] * len(inputs["input_ids"])] * len(representations)
        _, ids = adapted.generate(
            inputs, unit_locations={"sources->base": (None, locations)}, intervene_on_prompt=True, **options
        )
        return ids

    return generate


VARIANTS = {
    "bare": variant(bare),
    "ours": variant(ours),
    "lora r8": variant(lambda model: lora(model, *LORA_SMALL)),
    "lora r32": variant(lambda model: lora(model, *LORA_LARGE)),
    "pyreft tied": variant(pyreft),
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "generate", rounds=8, peers=("pyreft",))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--columns", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    return parser.parse_args()


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve(VARIANTS)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    missing = {}
    if importlib.util.find_spec("peft") is None:
        missing |= {name: "peft is not installed" for name in VARIANTS if name.startswith("lora")}
    if args.pyreft_python is None:
        missing["pyreft tied"] = "no --pyreft-python"
    sizes = {"rows": args.rows, "columns": args.columns, "new": args.new}
    with model_folder(args) as folder:
        records = interleaved(
            __file__,
            [name for name in VARIANTS if name not in missing],
            {"folder": folder, **sizes},
            rounds=args.rounds,
            warmup=args.warmup,
            threads=args.threads,
            pythons={} if args.pyreft_python is None else {"pyreft tied": args.pyreft_python},
            name="generate",
        )
    size = f"batch {args.rows}, {args.columns} + {args.new} tokens"
    # tokens a second of a variant over those of the bare model = time of the bare model over its own
    figures = [
        ratio(
            f"generate, {size}: tokens/s of {name} / bare",
            records["bare"]["wall"],
            record["wall"],
            goal=GOAL if name == "ours" else None,
            better="higher",
        )
        for name, record in records.items()
        if name != "bare"
    ]
    facts = header("Greedy generation", args, torch=torch.__version__, **sizes, left_out=missing)
    write(args.out, facts, records, figures, seconds_table(records, "bare"))
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
