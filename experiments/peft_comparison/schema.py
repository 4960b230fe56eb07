"""Write one run as the JSON file that PEFT's method comparison writes for one experiment.

    python experiments/peft_comparison/schema.py RUN

The schema is that of `method_comparison/MetaMathQA/results` of https://github.com/huggingface/peft at 5d602fdbff04:
the same keys, each with the same meaning, or null where a run does not measure it. Its app reads the file next to those
of its own methods (it wants memory in numbers: of a run on a GPU with `trainer.log_every_n_steps=1`).

=====================================  ===========================================================================
key                                    from
=====================================  ===========================================================================
run_info.total_time                    from start to end; null of a run that was resumed, whose first start is not known
train_info.train_time                  training and the test, without validations, as there
train_info.accelerator_memory_max      the most that torch reserved, from start to end
train_info.accelerator_memory_...      of the steps that were logged: mean and 99th percentile of what was reserved
metrics: train loss, tokens / sec      of the logged steps since the validation before
metrics: eval time                     between the last step before a validation and the first after it
forgetting                             null: the loss on 100 rows of Wikipedia is not measured
run_info.peft_branch                   reft_lightning, its version and commit
run_info.peft_config                   peft's own; of interventions reft_config.json, with the method as peft_type
meta_info: sha, commit hashes, system  null where the run does not record it
=====================================  ===========================================================================
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from reft_lightning.adapters.reft.config import CONFIG_FILE
from reft_lightning.adapters.saving import BASELINE_CONFIG_FILE, BESIDE, PEFT_CONFIG_FILE
from reft_lightning.config.schema import DecodingConfig
from reft_lightning.data.families.metamathqa import FAMILY, prompt
from reft_lightning.reporting.runs import Run, read_runs
from reft_lightning.storage.atomic import write_json

log = logging.getLogger(__name__)

WARMUP = 0.1  # of their schedule, which their configuration does not name
METAMATH, GSM8K = "metamath", "gsm8k"


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the file of a run; return where it lies."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a complete run of data=metamathqa")
    add("--out", type=Path, metavar="FILE", help="default: METHOD--VARIANT.json in the run folder")
    add("--name", metavar="METHOD/VARIANT", help="of the experiment, such as loreft/llama-3.2-3B-rank8")
    options = arguments.parse_args(argv)
    runs, left, _ = read_runs([options.run])
    if not runs:
        raise ValueError(f"{options.run}: {left[0].reason}")
    values = record(runs[0], options.name)
    name = values["run_info"]["experiment_name"].replace("/", "--")
    path = options.out or options.run / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
    print(f"{path}: test accuracy {values['train_info']['metrics'][-1]['test accuracy']:.4f}")
    return path


def record(run: Run, name: str | None = None) -> dict[str, Any]:
    """Return a run in the schema of PEFT's method comparison.

    Args:
        run: a complete run of the family metamathqa, with a test.
        name: `method/variant`; None for the method, and the model with the hash of the configuration.

    Raises:
        ValueError: if it is none.
    """
    config, results = run.config, run.results
    if config.get("data.family") != FAMILY.name:
        raise ValueError(
            f"{run.folder} is a run of the family {config.get('data.family')}; PEFT's comparison trains on MetaMathQA "
            "and tests on GSM8K: data=metamathqa"
        )
    if "test/accuracy" not in results["metrics"]:
        raise ValueError(f"{run.folder} has no test scores, which the comparison reports: run with test=true")
    if name is None:
        method = run.method.replace("peft/", "").replace(" + ", "+")
        name = f"{method}/{str(results['model']).rpartition('/')[2]}-{results['config_hash'][:8]}"
    versions = results.get("versions", {})
    commit = results.get("git_commit") or "of unknown commit"
    method_config = _method_config(run)
    metrics, seconds = _metrics(run)
    reserved = [value for _, value in run.curve("progress/memory_reserved")]
    return {
        "run_info": {
            "created_at": results["started"],
            "total_time": _total_time(run),
            "experiment_name": name,
            "peft_branch": f"reft_lightning {versions.get('reft_lightning')} {commit}",
            "train_config": _train_config(run),
            "peft_config": method_config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": round(float(np.mean(reserved))) if reserved else None,
            "accelerator_memory_max": results.get("peak_reserved_bytes"),
            "accelerator_memory_reserved_99th": round(np.percentile(reserved, 99)) if reserved else None,
            "train_time": seconds,
            "file_size": sum(path.stat().st_size for path in (run.folder / "adapter").rglob("*.safetensors")),
            "num_trainable_params": results["trainable_parameters"],
            "num_total_params": _total_parameters(run),
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": config.get("model.revision"), "created_at": None},
            "dataset_info": {data: {"sha": None, "created_at": None} for data in (METAMATH, GSM8K)},
            "package_info": _packages(versions, method_config),
            "system_info": {
                **dict.fromkeys(("system", "release", "version", "machine", "processor")),
                "accelerator": results.get("device"),
            },
            "pytorch_info": f"torch {versions.get('torch')}",
        },
    }


def _total_time(run: Run) -> float | None:
    """Return the seconds from start to end; None of a run in parts, which records the start of its last one."""
    parts = len(list(run.folder.glob("csv*/metrics.csv")))
    if parts > 1:
        log.warning("%s was resumed, in %d parts: its total time is not known, and null", run.folder, parts)
        return None
    began, ended = (datetime.fromisoformat(run.results[key]) for key in ("started", "finished"))
    return (ended - began).total_seconds()


def _packages(versions: Mapping[str, str], method_config: Mapping[str, Any] | None) -> dict[str, Any]:
    known = dict(versions)
    if method_config:  # only peft's own files name its version
        known["peft"] = str(method_config.get("peft_version") or "").partition("@")[0] or None
    found: dict[str, Any] = {}
    for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
        found |= {f"{package}-version": known.get(package), f"{package}-commit-hash": None}
    return found


def _rows_a_step(run: Run) -> int:
    devices = run.config["trainer.devices"]
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"{run.folder}: trainer.devices={devices!r} does not say how many rows a step has")
    parts = ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.num_nodes")
    return int(np.prod([devices, *(run.config[part] for part in parts)]))


def _train_config(run: Run) -> dict[str, Any]:
    """Return their TrainConfig: what the run was told, by their names."""
    config, results = run.config, run.results
    decoding = {
        key: config[f"decoding.{key}"]
        for key, default in vars(DecodingConfig()).items()
        if key not in ("max_new_tokens", "verify") and config[f"decoding.{key}"] != default
    }
    optimizer = {"lr": config["optimizer.lr"], "weight_decay": config["optimizer.weight_decay"]}
    if config["scheduler.warmup_ratio"] != WARMUP:
        optimizer["warmup_ratio"] = config["scheduler.warmup_ratio"]
    every = config["trainer.val_check_interval"]
    schedule = config["scheduler._target_"].rpartition(".")[2]
    return {
        "model_id": results["model"],
        "dtype": config["model.dtype"],
        "max_seq_length": config["data.max_length"],
        "batch_size": _rows_a_step(run),
        "batch_size_eval": config["data.eval_batch_size"],
        "max_steps": results["steps"],
        "eval_steps": every if isinstance(every, int) else None,
        "compile": config["model.compile"],
        "use_gc": config["model.gradient_checkpointing"],
        "query_template": prompt("{query}"),
        "seed": run.seed,
        "grad_norm_clip": config["trainer.gradient_clip_val"] or 0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": optimizer,
        "lr_scheduler": None if schedule == "constant" else schedule,
        "use_amp": "mixed" in str(config["trainer.precision"]),
        "autocast_adapter_dtype": config["intervention.weight_dtype"] == "float32",
        "generation_kwargs": {
            "max_length": None,
            "max_new_tokens": results["decoding"]["max_new_tokens"],
            **decoding,
        },
        "attn_implementation": config["model.attn_implementation"],
        "init_kv_cache_prefix": None,
    }


def _method_config(run: Run) -> dict[str, Any] | None:
    """Return what says how the method was set up, with a peft_type; None for full finetuning, as there."""
    folder = run.folder / "adapter"
    if (folder / CONFIG_FILE).is_file():
        beside = folder / BESIDE / PEFT_CONFIG_FILE
        own = _read(folder / CONFIG_FILE)
        together = {"beside": _read(beside)} if beside.is_file() else {}
        together |= {"peft_version": together["beside"].get("peft_version")} if together else {}
        return {"peft_type": run.method.upper(), "task_type": "CAUSAL_LM", **own, **together}
    if (folder / PEFT_CONFIG_FILE).is_file():
        return _read(folder / PEFT_CONFIG_FILE)
    if run.method == "full":
        return None
    return {"peft_type": run.method.upper(), **_read(folder / BASELINE_CONFIG_FILE)}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the adapter says how the method was set up")
    return json.loads(path.read_text(encoding="utf-8"))


def _total_parameters(run: Run) -> int:
    """Return the parameters of base and adapter together; those of a base trained in place are counted once."""
    results = run.results
    in_place = (run.folder / "adapter" / BASELINE_CONFIG_FILE).is_file()
    return results["base_parameters"] + (0 if in_place else results["trainable_parameters"])


def _metrics(run: Run) -> tuple[list[dict[str, Any]], float]:
    """Return an entry for each validation and one for the test; and the seconds of training and test alone."""
    results = run.results
    steps, rows = int(results["steps"]), _rows_a_step(run)
    curves = {
        name: {step + 1: value for step, value in run.curve(name)}  # steps are logged from 0, and count from 1 here
        for name in ("train/loss", "progress/seconds", "progress/tokens", "progress/memory_allocated",
                     "progress/memory_reserved", "val/accuracy")
    }  # fmt: skip
    clock, tokens = curves["progress/seconds"], curves["progress/tokens"]
    metrics: list[dict[str, Any]] = []
    before, outside = 0, 0.0
    begun: float | None = 0.0  # when training began or went on after a validation, in seconds
    validated = [
        step for step in sorted(curves["val/accuracy"]) if step <= steps
    ]  # after them, once more after all
    for step in validated:
        inside = range(before + 1, step + 1)
        logged = [s for s in inside if s in clock]
        first, last = (logged[0], logged[-1]) if logged else (0, 0)
        pace = (clock[last] - clock[first]) / (last - first) if last > first else None  # seconds a step
        after = min((s for s in clock if s > step), default=None)
        gap = None
        if pace is not None and last == step:
            resumed = results["train_seconds"] if after is None else clock[after] - pace * (after - step)
            gap = max(resumed - clock[step], 0.0)
        outside += gap or 0.0
        read = tokens[last] - tokens[first] if pace else None
        if begun is not None and last == step:
            spent = clock[step] - begun
        else:
            spent = None if pace is None else pace * len(inside)
        begun = None if gap is None else clock[step] + gap
        metrics.append(
            {
                "step": step,
                "valid accuracy": curves["val/accuracy"][step],
                "train loss": _mean(curves["train/loss"], inside),
                "train samples": step * rows,
                "train time": spent,
                "eval time": gap,
                "tokens / sec": read / (clock[last] - clock[first]) if read else None,
                "mem allocated avg": _mean(curves["progress/memory_allocated"], inside),
                "mem reserved avg": _mean(curves["progress/memory_reserved"], inside),
                "elapsed time": begun,
            }
        )
        before = step
    span = range(validated[-2] + 1 if len(validated) > 1 else 1, steps + 1)
    metrics.append(
        {
            "step": steps,
            "test accuracy": results["metrics"]["test/accuracy"],
            "train loss": metrics[-1]["train loss"] if before == steps else _mean(curves["train/loss"], span),
            "train samples": steps * rows,
            "train total tokens": results["tokens"],
            "forgetting": None,
        }
    )
    return metrics, results["train_seconds"] - outside + results["seconds"]["test"]


def _mean(curve: Mapping[int, float], steps: range) -> float | None:
    values = [curve[step] for step in steps if step in curve]
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
