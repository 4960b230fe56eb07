"""Estimate the cost of a training step without reading weights: ``reft-inspect plan OVERRIDES``.

A batch goes forward and backward through the adapted model on torch's meta device, which has shapes but no values.
torch counts the floating-point operations of matrix products on the way, and the bytes saved for the backward pass.

Shapes: b rows, s columns, t attended columns, n heads, d width of a head.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel

from ..adapters.adapt import adapt, build_on_meta, interventions_of
from ..adapters.adapted import AdaptedModel
from ..adapters.reft.measuring import Seen, watching
from ..base_models.heads import is_classifier, widen_heads
from ..base_models.reading import takes
from ..base_models.stacks import stacks_of
from ..config import compose
from ..config.schema import Config
from ..data.encoding import IGNORED, Collator, Encoded
from ..data.example import Example
from ..data.pairs import EncodedPairs
from ..data.text_to_text import side_by_side
from ..evaluation.prefix_reader import SOURCES
from ..runs.arguments import method_of, needs_marks
from ..runs.build import Outline, outline, prepare
from ..runs.checks import check_batches
from ..runs.kinds import kind_of
from ..runs.own_process import ranks_of
from ..runs.trainer import quiet_lightning
from ..suggest import check_choice
from ..terminal.lines import say
from ..terminal.sizes import size
from ..training.module import optimizer_steps
from ..training.objectives import SFT
from ..training.objectives.base import inputs_of
from .gpus import GPU, GPUS

COUNTED = (  # trainer keys that determine the number of steps
    "max_epochs", "max_steps", "max_time", "fast_dev_run", "limit_train_batches", "overfit_batches",
    "accumulate_grad_batches",
)  # fmt: skip
FUSED = "reft_inspect_fused"
Batch = dict[str, Any]


class _Fused(torch.autograd.Function):
    """Attention as in torch's fused kernels: scores are recomputed in the backward pass, not saved.

    It saves q, k, v, the output, the mask as numbers, and the log-sum-exp of each row (b, n, s).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> Tensor:  # (b, n, s, d), 2 (b, n, t, d)
        out = ((q @ k.mT) @ v).transpose(1, 2).contiguous().transpose(1, 2)  # as the kernels lay it out
        numbers = [] if mask is None else [mask.to(q.dtype)]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *numbers)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (out,), (q, k, v, *_) = grads, ctx.saved_tensors
        scores, scores_grad = q @ k.mT, out @ v.mT
        return scores_grad @ k, scores_grad.mT @ q, scores.mT @ out, None


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    out = _Fused.apply(query, key, value, attention_mask)  # pyright: ignore[reportAttributeAccessIssue]
    return out.transpose(1, 2), None


def main(
    overrides: Sequence[str], prompt: int | None = None, target: int | None = None, gpu: str | None = None
) -> dict[str, Any]:
    """Plan a run, and print its costs.

    ``prompt`` and ``target`` are the tokens per row, instead of the data's rows; ``gpu`` adds the least time on it.

    Raises:
        ValueError, OSError: for anything that ``reft-train`` refuses, or a model that does not run without weights.
    """
    if gpu is not None:
        check_choice("gpu", gpu, GPUS)
    config = compose.compose(overrides)
    found = plan(config, prompt, target or 1)
    if gpu is not None:
        found["gpu"] = {"name": gpu, **on_gpu(found, config, GPUS[gpu])}
    show(found, Console(soft_wrap=True, emoji=False))
    return found


def plan(config: Config, prompt: int | None = None, target: int = 1) -> dict[str, Any]:
    """Return the costs of a run; see :func:`main`.

    FLOPs are those of matrix products; a multiplication and an addition count as two. Exact shortcuts
    (:mod:`reft_lightning.speed`), mixed precision, gradient checkpointing, additional passes of an objective and
    kernels' workspaces are not counted.
    """
    config = replace(config, test=False, evaluate_base=False)
    run = outline(config)
    if prompt is None:
        if kind_of(run.family).sees:
            raise ValueError(
                "reft-inspect plan does not read pictures: give row lengths instead, prompt=N target=N, including the "
                "tokens of images; the vision tower is not counted"
            )
        run = prepare(config, run)
        check_batches(config, run.data, _ranks(config))
        batches, rows = _batches_of(run.data)
    else:
        batches, rows = {"given": _given(run, config, prompt, target)}, {}
    base, notes = _build(run)
    notes += _notes(config, run, prompt is not None)
    base.to(getattr(torch, config.model.dtype))
    if run.source["task"] == "sequence_classification" and config.model.float32_logits:
        widen_heads(base)
    base.requires_grad_(False)
    weights = _bytes([*base.parameters(), *base.buffers()])
    with torch.no_grad(), _on_meta(base):
        frozen = {name: _flops_of_base(base, batch) for name, batch in batches.items()}
    model: Any = adapt(base, **run.attached)
    model.train()
    with _on_meta(base):
        costs = {name: _cost(model, batch, run) for name, batch in batches.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        state = model.adapter_state_dict()
    except NotImplementedError:  # peft copies the values of virtual tokens to the CPU
        state = trained
    return {
        "model": config.model.name, "method": method_of(config), "trainable_parameters": run.count.trainable,
        "head_parameters": sum(p.numel() for p in model.parameter_roles()["head"]),
        "base_parameters": run.count.base, "adapter_bytes": file_bytes(state), "base_bytes": weights,
        "optimizer_bytes": 3 * _bytes(trained.values()),  # gradients and Adam's two moments
        "batches": {
            name: {**cost, "base_forward_flops": frozen[name], "rows": len(batches[name]["input_ids"])}
            for name, cost in costs.items()
        },
        **_steps(config, rows), "notes": notes,
    }  # fmt: skip


def _notes(config: Config, run: Outline, given: bool) -> list[str]:
    """Return what the plan of a configuration does not count, or counts otherwise."""
    precision, counted = config.trainer.precision, f"counted in model.dtype={config.model.dtype}"
    callbacks = [str(entry.get("_target_")) for entry in config.callbacks.values()]
    scheduled = any(name.endswith("GradientAccumulationScheduler") for name in callbacks)
    notes = {
        "positions `given`: counted as if the whole prompt were marked": given and needs_marks(config.intervention),
        f"objective {type(run.objective).__name__}: only one pass with the edits is counted, not its passes of the "
        "frozen base or with nulled edits": type(run.objective) is not SFT,
        "callbacks: the count of steps ignores gradient accumulation that changes between epochs": scheduled,
        "gradient checkpointing saves less for the backward pass and recomputes it: not counted":
            config.model.gradient_checkpointing,
        f"model.quantization: the base is {counted}": config.model.quantization,
        f"trainer.precision={precision}: {counted}": "mixed" in str(precision),
    }  # fmt: skip
    return [note for note, holds in notes.items() if holds]


# --- batches ------------------------------------------------------------------------------------------------------


def _batches_of(data: Any) -> tuple[dict[str, Batch], dict[str, int]]:
    """Return the median and the largest batch of an epoch, by their tokens including padding."""
    rows, loader = data.train_rows, data.train_dataloader()
    parts = [rows.first, rows.second] if isinstance(rows, EncodedPairs) else [rows]
    tokens = int(sum(sum(part.lengths) for part in parts))
    batches = sorted(loader.batch_sampler, key=lambda batch: len(batch) * max(rows.lengths[i] for i in batch))
    middle, largest = (loader.collate_fn([rows[i] for i in batches[k]]) for k in (len(batches) // 2, -1))
    return {"median": middle, "largest": largest}, {"batches": len(batches), "tokens": tokens}


def _given(run: Outline, config: Config, prompt: int, target: int) -> Batch:
    """Return a batch of rows of these lengths."""
    rows = config.data.batch_size * (1 + run.objective.pairs)
    if kind_of(run.family).generates:
        collate = partial(side_by_side, 0) if run.source["task"] == "seq2seq_lm" else Collator(0)
        batch = collate([Encoded([0] * prompt, [0] * target, Example("", "", "", ""))] * rows)
    else:
        ids = torch.zeros(rows, prompt, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.data.source_prompt:
        ids, mask = (batch[name][:, :prompt] for name in ("input_ids", "attention_mask"))
        batch |= {"source_ids": ids, "source_mask": mask}
    if needs_marks(config.intervention):
        batch["edit_mask"] = batch["prompt_mask"]
    return batch


def _steps(config: Config, rows: Mapping[str, int]) -> dict[str, int]:
    if not rows:
        return {}
    counted = {name: getattr(config.trainer, name) for name in COUNTED}
    if counted["max_epochs"] is None:  # Lightning's default in fit
        counted["max_epochs"] = 1000 if counted["max_steps"] == -1 and counted["max_time"] is None else -1
    quiet_lightning()
    # Lightning knows how these keys combine; the environment keeps it from reading the tasks of a SLURM job
    try:
        trainer = Trainer(**counted, accelerator="cpu", logger=False, plugins=LightningEnvironment())
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    of_each_process = math.ceil(rows["batches"] / _ranks(config))
    steps = optimizer_steps(trainer, of_each_process)
    found = {"epoch_batches": rows["batches"], "epoch_tokens": rows["tokens"]}
    return found | ({"optimizer_steps": int(steps)} if math.isfinite(steps) else {})


def _ranks(config: Config) -> int:
    """Return the number of processes; if it depends on the run's machine, one per node."""
    nodes = config.trainer.num_nodes
    return ranks_of(config.trainer.devices, nodes) or nodes


def on_gpu(found: Mapping[str, Any], config: Config, gpu: GPU) -> dict[str, Any]:
    """Return the least memory and time on each GPU of a run, every one of which holds all weights."""
    half = config.model.dtype != "float32" or "16" in str(config.trainer.precision)
    full = gpu.float32 if config.matmul_precision == "highest" else gpu.tf32
    costs = list(found["batches"].values())
    flops = [cost["forward_flops"] + cost["backward_flops"] for cost in costs]
    batch = gpu.seconds(flops[0], found["base_bytes"], gpu.half if half else full)
    needed = found["base_bytes"] + found["optimizer_bytes"] + max(cost["saved_bytes"] for cost in costs)
    whole = {}
    if "optimizer_steps" in found:
        whole["seconds"] = batch * found["optimizer_steps"] * config.trainer.accumulate_grad_batches
    return {"count": _ranks(config), "bytes": needed, "memory": gpu.memory, "batch_seconds": batch, **whole}


# --- one step on the meta device ----------------------------------------------------------------------------------


def _build(run: Outline) -> tuple[PreTrainedModel, list[str]]:
    """Return the base model without weights and, if possible, with the attention that the run will use."""
    implementation = run.source["attn_implementation"]
    if implementation in (None, "sdpa"):
        AttentionInterface.register(FUSED, _fused)
        with suppress(KeyError):  # from models with their own table of implementations
            return build_on_meta(run.hf_config, run.source["task"], FUSED), []
    base = build_on_meta(run.hf_config, run.source["task"], implementation)
    return base, [] if implementation == "eager" else ["attention: counted as if all its scores were saved"]


def _inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Return a batch's inputs: ids without values, but masks and labels, which determine positions, with values."""
    inputs = inputs_of(batch)
    if is_classifier(model):
        inputs.pop("labels", None)
    if takes(model, "position_ids"):
        inputs["position_ids"] = torch.empty_like(inputs["input_ids"])
    return {
        name: value.to("meta")
        if isinstance(value, Tensor) and not name.endswith(("_mask", "labels"))
        else value
        for name, value in inputs.items()
    }


@contextmanager
def _on_meta(model: PreTrainedModel) -> Iterator[None]:
    """Pass attention masks of the final shape and labels on the meta device to a model, which cannot read their values.

    Raises:
        ValueError: if the model cannot run without values.
    """

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return args, {name: value.to("meta") if name == "labels" else value for name, value in kwargs.items()}

    stacks = stacks_of(model)
    two = len(stacks) > 1
    # for a single stack, the model without its head, as Hugging Face names it
    parts = [model.get_submodule(path) for path in stacks.values()] if two else [model.base_model]

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        rows, columns = tokens.shape[:2]
        for name in ("attention_mask", "encoder_attention_mask") if two else ("attention_mask",):
            mask = given.get(name)
            if name in names and (two if mask is None else isinstance(mask, Tensor) and mask.ndim == 2):
                seen = columns if mask is None else mask.shape[1]
                given[name] = torch.empty((rows, 1, columns, seen), dtype=torch.bool, device="meta")
        return (), given

    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield
    except Exception as error:  # from torch, or from the model's own code
        raise ValueError(
            f"{type(model).__name__} does not run without weights, so its steps cannot be planned: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _flops_of_base(base: PreTrainedModel, batch: Batch) -> int:
    left_out = ("prompt_mask", *SOURCES)
    inputs = {name: value for name, value in _inputs(batch, base).items() if name not in left_out}
    with FlopCounterMode(display=False) as counter:
        base(**inputs)
    return counter.get_total_flops()


def _cost(model: AdaptedModel, batch: Batch, run: Outline) -> dict[str, Any]:
    """Return FLOPs, edited tokens, and bytes saved for the backward pass."""
    base: Any = model.base_model
    inputs, reft = _inputs(batch, base), interventions_of(model)
    edited: dict[int, int] = {}

    def see(seen: Seen) -> None:
        edited[seen.layer] = edited.get(seen.layer, 0) + len(seen.before)

    constant = {StorageWeakRef(t.untyped_storage()) for t in (*base.parameters(), *base.buffers())}
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (ref := StorageWeakRef(storage)) not in constant:
            saved[ref] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(pack, lambda tensor: tensor),
        watching(reft, see) if reft is not None else torch.enable_grad(),
    ):
        output = model(**inputs)
        loss = output.loss if kind_of(run.family).generates else output.logits.float().sum()
        forward = counter.get_total_flops()
        loss.backward()
    if reft is not None:  # a token counts once even if several of its heads are edited
        edited = {layer: n // len(reft.sites[str(layer)].heads) for layer, n in edited.items()}
    real, columns = int(batch["attention_mask"].sum()), batch["input_ids"].shape[1]
    if "boundary" not in batch and kind_of(run.family).generates:  # the target is a separate sequence
        real, columns = real + int((batch["labels"] != IGNORED).sum()), columns + batch["labels"].shape[1]
    return {
        "columns": columns, "tokens": real, "edited_tokens": sum(edited.values()), "edited_tokens_of_layer": edited,
        "forward_flops": forward, "backward_flops": counter.get_total_flops() - forward,
        "saved_bytes": sum(saved.values()),
    }  # fmt: skip


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the size of a safetensors file: 8 bytes, a JSON header padded to a multiple of 8, the values."""
    header: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64}}
    start = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = start + _bytes([tensor])
        kind = {4: "F32", 2: "BF16", 8: "F64"}[tensor.element_size()]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + start


# --- the view -----------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the plan."""
    tell = partial(say, console)
    trained, base, heads = (found[f"{name}_parameters"] for name in ("trainable", "base", "head"))
    percent = f"{100 * trained / base:.4f} % of {base:,}" + (f"; {heads:,} of heads" if heads else "")
    tell(f"{found['model']}, {found['method']}: {trained:,} trained parameters, {percent}")
    table = Table("", *(f"{name} batch" for name in found["batches"]))
    lines = {
        "rows x columns, including padding": lambda c: f"{c['rows']} x {c['columns']}",
        "tokens": lambda c: f"{c['tokens']:,}",
        "edited tokens, over all layers": lambda c: f"{c['edited_tokens']:,}",
        "FLOPs, forward": lambda c: f"{c['forward_flops']:.3e}",
        "FLOPs, backward": lambda c: f"{c['backward_flops']:.3e}",
        "a step, in forward passes of the frozen base": lambda c: (
            f"{(c['forward_flops'] + c['backward_flops']) / c['base_forward_flops']:.2f}"
        ),
        "saved for the backward pass": lambda c: size(c["saved_bytes"]),
    }
    for name, value in lines.items():
        table.add_row(name, *(value(cost) for cost in found["batches"].values()))
    console.print(table)
    tell(f"the base: {size(found['base_bytes'])}; gradients and Adam's moments: {size(found['optimizer_bytes'])}; "
         f"the adapter's file: {size(found['adapter_bytes'])}")  # fmt: skip
    if "epoch_batches" in found:
        steps = f"{found['optimizer_steps']:,}" if "optimizer_steps" in found else "no fixed number of"
        tell(f"an epoch over all rows has {found['epoch_tokens']:,} tokens and {found['epoch_batches']:,} batches; "
             f"{steps} optimizer steps in total")  # fmt: skip
    if gpu := found.get("gpu"):
        several = f"each of {gpu['count']} " if gpu["count"] > 1 else "one "
        whole = f", {gpu['seconds']:.3g} s in total" if "seconds" in gpu else ""
        tell(f"{several}{gpu['name']}: at least {size(gpu['bytes'])} of its {size(gpu['memory'])}, "
             f"{1000 * gpu['batch_seconds']:.3g} ms per batch{whole}, at its data sheet's peak rate")  # fmt: skip
    for note in found["notes"]:
        tell(note)
