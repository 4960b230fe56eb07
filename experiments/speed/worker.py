"""The variants of a training step: what ``step.py`` and ``gpu.py`` time, each in a process of its own.

A variant loads the model and attaches its method; its function trains one step on batch ``number mod 4``. Imports
of reft_lightning, peft, pyreft and adapters stand in the variants, so that each runs in an environment of its own.

A further variant: an entry of ``VARIANTS`` here, its name in a group of ``step.GROUPS``, its goal in ``step.GOALS``.

Shapes: b rows, s columns, t target columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

RANK, PREFIX, SUFFIX = 8, 7, 7
LORA_SMALL = (8, ["q_proj", "v_proj"])
LORA_LARGE = (32, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
# an ordinary rate: the time of a step does not depend on it, and losses stay finite
LEARNING_RATE = 1e-4
KEPT = 2 * 10**9  # bytes, more than the batches need

Batch = dict[str, Any]
Loss = Callable[[Batch], Tensor]
Attached = tuple[Loss, list[nn.Parameter]]


@dataclass(frozen=True)
class Variant:
    """A way to train, or to run, a step.

    Args:
        attach: model -> loss of a batch, and what is trained; nothing trained: forward alone, without gradients.
        needs: the package whose environment it runs in: peft (this one), pyreft or adapters; none is this one.
        dtype: of the base model.
        matmul: ``torch.set_float32_matmul_precision``; medium lets oneDNN multiply on CPUs, highest is MKL.
    """

    attach: Callable[[nn.Module], Attached]
    needs: str = ""
    dtype: str = "float32"
    matmul: str = "highest"


def plain_inputs(batch: Batch) -> Batch:
    """What every Hugging Face model takes."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}


def target_inputs(batch: Batch) -> Batch:
    """The same with logits of the target columns alone."""
    keep = batch["labels"].shape[1] - batch["boundary"] + 1
    return {**plain_inputs(batch), "labels": batch["labels"][:, -keep:], "logits_to_keep": keep}


def bare(
    model: nn.Module, inputs: Callable[[Batch], Batch] = plain_inputs, behind_first_block: bool = False
) -> Attached:
    """B: the frozen model and one trained vector at the embeddings, so that gradients pass every block.

    After the first block gradients pass those that they pass with interventions on the output of every block.
    """
    width = model.config.hidden_size
    vector = nn.Parameter(torch.zeros(width, device=model.device))
    where = model.get_submodule("model.layers.0") if behind_first_block else model.get_input_embeddings()
    where.register_forward_hook(lambda module, args, out: out + vector.to(out.dtype))
    return lambda batch: model(**inputs(batch)).loss, [vector]


def forward_alone(model: nn.Module) -> Attached:
    """A: the frozen model, forward and loss without gradients."""
    return lambda batch: model(**plain_inputs(batch)).loss, []


def reft(
    model: nn.Module,
    *,
    target_logits_only: bool = True,
    positions: str = f"f{PREFIX}+l{SUFFIX}",
    tied: str = "all",
    middle_layer: bool = False,
    rank: int = RANK,
) -> Attached:
    """LoReFT of this project, on all layers or on the middle one (15 of 30)."""
    import reft_lightning as rl
    from reft_lightning.base_models.output_head import join_columns
    from reft_lightning.data.encoding import target_only

    join_columns(model)  # as in models that runs load
    layers = [model.config.num_hidden_layers // 2] if middle_layer else "all"
    adapted = rl.attach(model, "loreft", rank=rank, layers=layers, positions=positions, tied=tied)
    adapted.train()
    # a ReftModel finds positions in masks and numbers tokens itself
    names = ("input_ids", "attention_mask", "labels", "prompt_mask", "boundary")

    def loss(batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in names}
        if target_logits_only:
            inputs = target_only(inputs)
        del inputs["boundary"]
        return adapted(**inputs).loss

    return loss, [p for p in adapted.parameters() if p.requires_grad]


def shortened(model: nn.Module, *, positions: str, middle_layer: bool = False, limit: int = 0) -> Attached:
    """The same with target-only logits, without what no intervention can change; kept up to a limit in bytes."""
    import reft_lightning as rl
    from reft_lightning.base_models.output_head import join_columns
    from reft_lightning.data.encoding import EncodedRows, target_only
    from reft_lightning.data.example import Example
    from reft_lightning.speed.choose_part import ShortenedPass

    join_columns(model)
    layers = [model.config.num_hidden_layers // 2] if middle_layer else "all"
    adapted = rl.attach(model, "loreft", rank=RANK, layers=layers, positions=positions)
    adapted.train()
    example = Example("speed", "prompt", "target", "answer")
    passes: dict[int, Any] = {}  # each batch has rows of its own

    def loss(batch: Batch) -> Tensor:
        if id(batch) not in passes:
            real, prompt = batch["attention_mask"].bool().cpu(), batch["prompt_mask"].cpu()
            columns = {
                "ids": batch["input_ids"].cpu()[real].numpy(),
                "ids.lengths": real.sum(-1).numpy(),
                "prompt": prompt.sum(-1).numpy(),
                **dict.fromkeys(("joint", "cut_prompt", "cut_target"), torch.zeros(len(real)).numpy()),
            }
            rows = EncodedRows([example] * len(real), columns)
            passes[id(batch)] = ShortenedPass(adapted, rows, causal=True, limit=limit)
        names = ("input_ids", "attention_mask", "labels", "prompt_mask", "boundary")
        inputs = target_only({name: batch[name] for name in names})
        del inputs["boundary"]
        return passes[id(batch)](inputs, range(len(batch["input_ids"])), batch["boundary"]).loss

    return loss, [p for p in adapted.parameters() if p.requires_grad]


def lora(model: nn.Module, rank: int, modules: list[str]) -> Attached:
    """LoRA through peft, without dropout."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    return lambda batch: adapted(**plain_inputs(batch)).loss, [
        p for p in adapted.parameters() if p.requires_grad
    ]


def pyreft(model: nn.Module, *, tied: bool) -> Attached:
    """LoReFT of pyreft on all layers, called as its trainer calls it; W and b have the base's precision."""
    adapted, representations = pyreft_model(model, tied)
    adapted.train()
    parameters = [p for r in representations for p in r["intervention"].parameters()]

    def loss(batch: Batch) -> Tensor:
        inputs = plain_inputs(batch)
        labels = inputs.pop("labels")
        where = batch["pyreft_locations.tied" if tied else "pyreft_locations.untied"]
        # (b, 1 or 2, slots) -> (b, interventions, slots): all prefixes, then all suffixes
        where = where.repeat_interleave(len(representations) // where.shape[1], dim=1)
        unit_locations = {"sources->base": (None, where.permute(1, 0, 2).tolist())}
        _, output = adapted(inputs, unit_locations=unit_locations, labels=labels)
        return output.loss

    return loss, parameters


def pyreft_model(model: nn.Module, tied: bool) -> tuple[Any, list[dict[str, Any]]]:
    """Return pyreft's model and its representations: one a layer, or all prefixes and then all suffixes."""
    import pyreft as peer

    representations = []
    for layer in list(range(model.config.num_hidden_layers)) * (1 if tied else 2):
        intervention = peer.LoreftIntervention(
            embed_dim=model.config.hidden_size, low_rank_dimension=RANK, dtype=model.dtype
        )
        representations.append(
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": intervention.to(model.device),
            }
        )
    return peer.get_reft_model(model, peer.ReftConfig(representations=representations)), representations


def adapters(model: nn.Module) -> Attached:
    """LoReFT of adapters, tied: its positions are the first and last of prompt and target together."""
    import adapters as peer

    peer.init(model)
    config = peer.LoReftConfig(
        prefix_positions=PREFIX, suffix_positions=SUFFIX, r=RANK, tied_weights=True, dropout=0.0
    )
    model.add_adapter("loreft", config=config)
    model.train_adapter("loreft")
    model.to(model.device).train()
    return lambda batch: model(**plain_inputs(batch)).loss, [p for p in model.parameters() if p.requires_grad]


full_logits = functools.partial(reft, target_logits_only=False)
lora_small = functools.partial(lora, rank=LORA_SMALL[0], modules=LORA_SMALL[1])
lora_large = functools.partial(lora, rank=LORA_LARGE[0], modules=LORA_LARGE[1])
split_l7 = functools.partial(shortened, positions=f"l{SUFFIX}")
split_l1 = functools.partial(shortened, positions="l1")
# with prefix positions no key or value is constant: the input of the layer is what is kept
middle = functools.partial(shortened, positions="f1+l1", middle_layer=True, limit=KEPT)
pyreft_tied = functools.partial(pyreft, tied=True)

VARIANTS: dict[str, Variant] = {
    "A": Variant(forward_alone),
    "B": Variant(bare),
    "B target-only": Variant(functools.partial(bare, inputs=target_inputs)),
    "reft": Variant(full_logits),
    "reft untied": Variant(functools.partial(full_logits, tied="group")),
    "reft target-only": Variant(reft),
    "reft l7 target-only": Variant(functools.partial(reft, positions=f"l{SUFFIX}")),
    "reft l1 target-only": Variant(functools.partial(reft, positions="l1")),
    "reft middle layer l1 target-only": Variant(functools.partial(reft, positions="l1", middle_layer=True)),
    "reft l7 split": Variant(split_l7),
    "reft l1 split": Variant(split_l1),
    "reft l7 kept": Variant(functools.partial(split_l7, limit=KEPT)),
    "reft l1 kept": Variant(functools.partial(split_l1, limit=KEPT)),
    "reft middle layer kept": Variant(middle),
    "B onednn": Variant(bare, matmul="medium"),
    "reft target-only onednn": Variant(reft, matmul="medium"),
    "B behind the first block, target-only bf16": Variant(
        functools.partial(bare, inputs=target_inputs, behind_first_block=True), dtype="bfloat16"
    ),
    "B bf16": Variant(bare, dtype="bfloat16"),
    "B target-only bf16": Variant(functools.partial(bare, inputs=target_inputs), dtype="bfloat16"),
    "reft bf16": Variant(full_logits, dtype="bfloat16"),
    "reft target-only bf16": Variant(reft, dtype="bfloat16"),
    "lora r8": Variant(lora_small, needs="peft"),
    "lora r32": Variant(lora_large, needs="peft"),
    "lora r8 bf16": Variant(lora_small, needs="peft", dtype="bfloat16"),
    "lora r32 bf16": Variant(lora_large, needs="peft", dtype="bfloat16"),
    "pyreft tied": Variant(pyreft_tied, needs="pyreft"),
    "pyreft untied": Variant(functools.partial(pyreft, tied=False), needs="pyreft"),
    "pyreft tied bf16": Variant(pyreft_tied, needs="pyreft", dtype="bfloat16"),
    "adapters loreft": Variant(adapters, needs="adapters"),
}


def load_batches(path: str) -> list[Batch]:
    """Read the batches of ``step.py`` back: ``i.name`` tensors, where ``boundary`` is a number."""
    batches: dict[str, Batch] = {}
    for name, tensor in load_file(path).items():
        index, _, key = name.partition(".")
        batches.setdefault(index, {})[key] = int(tensor) if key == "boundary" else tensor
    return [batches[index] for index in sorted(batches, key=int)]


def frozen(model: nn.Module) -> nn.Module:
    """Return a base model as it is trained on: frozen, without a cache, in training mode."""
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.train()


class Step:
    """One training step of a variant; called with the number of the step, returns the loss.

    Args:
        variant: an entry of ``VARIANTS``.
        model: a frozen base model, on its device.
        batches: are moved there.
    """

    def __init__(self, variant: Variant, model: nn.Module, batches: list[Batch]) -> None:
        device = model.device
        self.batches = [
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches
        ]
        self.loss_of, self.parameters = variant.attach(model)
        self.optimizer = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self.report = {"trainable_parameters": sum(p.numel() for p in self.parameters)}

    def train(self, number: int) -> Tensor:
        """Train on batch ``number`` mod the number of batches; returns the loss without waiting for a device."""
        batch = self.batches[number % len(self.batches)]
        if self.optimizer is None:
            with torch.no_grad():
                return self.loss_of(batch)
        loss = self.loss_of(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def __call__(self, number: int) -> dict[str, float]:
        """Train one step."""
        return {"loss": float(self.train(number))}


def load_step(name: str, *, folder: str, batch_file: str) -> Step:
    """Load a model from its folder and make a variant's step on the CPU."""
    variant = VARIANTS[name]
    torch.set_float32_matmul_precision(variant.matmul)
    dtype = getattr(torch, variant.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return Step(variant, frozen(model), load_batches(batch_file))
