"""What it costs to keep a frozen base in less memory: time and peak memory of a LoReFT training step.

    python experiments/speed/base_memory.py --random --out experiments/speed/base_memory
    python experiments/speed/base_memory.py --model FOLDER --rows 4 --out base_memory

LoReFT (r = 8, f7+l7, all layers) with logits of the targets alone, and AdamW. The base in float32, in float32 under
bfloat16 autocast (``trainer.precision=bf16-mixed``) and in bfloat16; with gradient checkpointing; in the 8 and 4 bits
of conf/quantization; with every block on disk (``model.device_map``), read once a pass. Each is loaded as
``reft-train`` loads it, in a process of its own; they take turns. Memory: the largest resident size after the model was
loaded, so that what loading needs for a moment is not counted; nor is the cache of the file that an offloaded block is
read from, which the system keeps. A quantization whose library is missing, or that this machine refuses, is left out.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from figures import add_arguments, figure, header, ratio, seconds_table, write
from models import SMOLLM2_135M, model_folder
from processes import interleaved, is_worker, serve

log = logging.getLogger("speed")

HERE = Path(__file__).resolve().parent
PROMPT, TARGET = 100, 6
QUANTIZED = ("nf4", "llm_int8", "int8", "int4")
PLAIN = ("float32", "bf16-mixed", "bfloat16", "float32 checkpointing", "bfloat16 checkpointing")
OFFLOADED = ("bfloat16 offloaded", "bfloat16 offloaded checkpointing")


def settings_of(name: str, layers: int) -> dict:
    """Return the arguments of ``load_base_model`` that a variant has."""
    from reft_lightning.config.compose import config_dir
    from reft_lightning.storage.reading import read_yaml

    first, *_ = name.split()
    if first in QUANTIZED:
        return {
            "dtype": "bfloat16",
            "quantization": read_yaml(config_dir() / "quantization" / f"{first}.yaml"),
        }
    settings = {"dtype": "bfloat16" if first == "bfloat16" else "float32"}
    if "offloaded" in name:
        rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        settings["device_map"] = dict.fromkeys(rest, "cpu")
        settings["device_map"] |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
    return settings


def step(name: str, folder: str, rows: int):
    """Return a function of the round's number that trains one step of a variant."""
    from transformers import AutoConfig

    import reft_lightning as rl
    from reft_lightning.base_models.loading import load_base_model

    layers = AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers
    base, _ = load_base_model(source="local", path=folder, tokenizer="bytes", **settings_of(name, layers))
    base.config.use_cache = False
    if "checkpointing" in name:
        base.gradient_checkpointing_enable()
    reft = rl.attach(base, "loreft", rank=8, positions="f7+l7").train()
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(
        3, base.config.vocab_size, (rows, PROMPT + TARGET), generator=torch.Generator().manual_seed(0)
    )
    target = (torch.arange(PROMPT + TARGET) >= PROMPT).expand_as(ids)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": ~target,
        "labels": ids[:, -TARGET - 1 :].masked_fill(~target[:, -TARGET - 1 :], -100), "logits_to_keep": TARGET + 1,
    }  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    mixed = name == "bf16-mixed"

    def run(number: int) -> dict:
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            loss = reft(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss)}

    return run


VARIANTS = {
    name: lambda folder, rows, name=name: step(name, folder, rows)
    for name in (*PLAIN, *QUANTIZED, *OFFLOADED)
}


def left_out() -> dict[str, str]:
    """Return the quantizations that cannot run here, with the reason."""
    from reft_lightning.base_models.quantization import check_quantization

    found = {}
    for name in QUANTIZED:
        try:
            check_quantization(settings_of(name, 0)["quantization"])
        except ValueError as error:
            found[name] = str(error).rpartition("}: ")[2]
    return found


def main() -> None:
    """Measure and write both files."""
    if is_worker():
        serve(VARIANTS)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, HERE / "base_memory", rounds=8, warmup=2)
    parser.add_argument("--rows", type=int, default=8, help="of a batch (8)")
    parser.add_argument("--layers", type=int, default=30, help="of the random model (30)")
    args = parser.parse_args()
    missing = left_out()
    with model_folder(args, SMOLLM2_135M | {"num_hidden_layers": args.layers}) as folder:
        records = interleaved(
            __file__, [name for name in VARIANTS if name not in missing], {"folder": folder, "rows": args.rows},
            rounds=args.rounds, warmup=args.warmup, threads=args.threads, name="base_memory",
        )  # fmt: skip
    figures = []
    for name in records:
        below = "float32" if name in PLAIN else "bfloat16"
        if name != below:
            what = f"{name} / {below}"
            figures.append(ratio(f"time of a step: {what}", records[name]["wall"], records[below]["wall"]))
            memory = [records[variant]["peak_memory_bytes"] for variant in (name, below)]
            figures.append(figure(f"peak memory: {what}", memory[0] / memory[1]))
    facts = header(
        "A frozen base in less memory: time and peak memory of a training step", args, rows=args.rows
    )
    facts |= {"left_out": missing}
    write(args.out, facts, records, figures, seconds_table(records, "float32"))
    log.info("wrote %s", args.out.with_suffix(".json").name)


if __name__ == "__main__":
    main()
