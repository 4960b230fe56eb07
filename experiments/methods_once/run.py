"""One short run of each method that looks at rows, edits heads or has an objective of its own; collects their results.

    python experiments/methods_once/run.py --model FOLDER --data FOLDER --out RUNS

FOLDERs are stories260K in the Hugging Face format and AI2's basic skills (`data=skills data.source=local`). Writes
`results.jsonl`, a line for each run in the order of `RUNS`, without the places of the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMON = [
    "model=stories260k", "data=skills", "data.source=local", "data.limit_train=1600", "data.validation_size=120",
    "trainer=cpu", "trainer.max_steps=200", "trainer.enable_progress_bar=false", "decoding.max_new_tokens=8",
    "evaluate_base=true", "test=false", "seed=42",
]  # fmt: skip
HEADS = "intervention.layers={LAYERS}"  # filled in from the first stage of LoFiT
CLOSED = ["objective=difference_in_means", "trainer.max_steps=-1", "trainer.max_epochs=1",
          "trainer.accumulate_grad_batches=100000", "trainer.gradient_clip_val=null", "optimizer=closed_form",
          "scheduler=constant"]  # fmt: skip
RUNS = {
    "loreft": ["intervention=loreft", "optimizer.lr=4e-3"],
    "preft": ["intervention=preft", "intervention.rank=16", "optimizer.lr=4e-3"],
    "post_block": ["intervention=post_block", "optimizer.lr=4e-3"],
    "jola": ["intervention=jola", "optimizer.lr=1e-2"],
    "lofit_scale": ["intervention=lofit", "optimizer.lr=1e-2"],
    "lofit_bias": ["intervention=lofit", "intervention.options.stage=bias", HEADS, "optimizer.lr=1e-2"],
    "reft_r1": ["intervention=reft_r1", "intervention.layers=[2]", "optimizer.lr=1e-2"],
    "bias_dpo": ["intervention=bias", "intervention.positions=all", "objective=dpo", "optimizer.lr=5e-3"],
    "bias_reps": ["intervention=bias", "intervention.positions=all", "intervention.layers=[2]", "objective=reps",
                  "optimizer.lr=5e-3"],
    "difference_in_means": ["intervention=difference_in_means", "intervention.layers=[2]", *CLOSED],
    "activation_scaling": ["intervention=activation_scaling", "optimizer.lr=1e-2"],
    "cast": ["intervention=cast", "intervention.layers={1:{threshold:0.05},2:{decides:false},3:{decides:false}}",
             "optimizer.lr=1e-2"],
    "brep": ["intervention=brep", "callbacks=penalty_pid", "data.target_tokens=4", "optimizer.lr=1e-2"],
    "critical": ["intervention=loreft", "intervention.positions=critical:8", "model.attn_implementation=eager",
                 "optimizer.lr=4e-3"],
}  # fmt: skip
FIRST_STAGE = """
import sys
from transformers import AutoModelForCausalLM
import reft_lightning as rl
from reft_lightning.adapters.reft.measuring import longest_heads
reft = rl.ReftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
heads = longest_heads(reft, 8)
print("{" + ",".join(f"{layer}:{{component:'{own['component']}'}}" for layer, own in heads.items()) + "}")
"""


def main() -> None:
    """Run what has not run yet, and collect."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--data", "--out"):
        arguments.add_argument(name, type=Path, required=True)
    options = arguments.parse_args()
    for name, own in RUNS.items():
        folder = options.out / name
        if HEADS in own:
            adapter = options.out / "lofit_scale" / "adapter"
            found = subprocess.run([sys.executable, "-c", FIRST_STAGE, str(options.model), str(adapter)],
                                   check=True, capture_output=True, text=True)  # fmt: skip
            own = [word.replace("{LAYERS}", found.stdout.strip().splitlines()[-1]) for word in own]
        places = [
            f"model.path={options.model}",
            f"data.path={options.data}",
            f"hydra.run.dir={folder}",
            "resume=auto",
        ]
        subprocess.run(
            [sys.executable, "-m", "reft_lightning.cli", *COMMON, *own, *places], check=True, cwd=HERE
        )
    collect = HERE.parent / "collect.py"
    folders = [str(options.out / name) for name in RUNS]
    target = HERE / "results.jsonl"
    subprocess.run([sys.executable, str(collect), str(target), *folders], check=True)
    text = target.read_text(encoding="utf-8")
    for place in (options.model, options.data, options.out):  # in the commands
        text = text.replace(str(place), "FOLDER")
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
