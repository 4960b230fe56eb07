"""DDP with a frozen base that is sharded across ranks (PyTorch's FSDP2), for a base that does not fit on one GPU.

Each rank keeps a shard of every block's frozen weights; a block is gathered when it runs, and freed afterwards. The
trained parameters (interventions, heads, LoRA) stay whole on every rank, and their gradients are averaged as in DDP:
they are small, and R is orthonormal only as a whole matrix. Losses, checkpoints and adapter files are therefore those
of DDP. FSDP2 alone, as in Lightning's ``ModelParallelStrategy``, does not average gradients of unsharded parameters.

Gathering is collective, so all ranks must run the base equally often. In training they do. In an evaluation, each rank
runs as many passes as its rows need; with :class:`InStep`, ranks that finish early take part in the passes of the
others.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..base_models.dispatch import keep_in_place
from ..base_models.reading import reading_of


class ShardedBase(DDPStrategy):
    """DDP for trained parameters, with the base's frozen weights sharded block by block. Takes DDP's arguments."""

    def model_to_device(self) -> None:
        """Move the base to the device block by block, keeping only this rank's shard; then move what stays whole."""
        module: Any = self.lightning_module
        base = module.model.base_model
        divided = isinstance(base, FSDPModule)
        if not divided:
            reading_of(base)  # tests a copy of the model, which is not possible once it is sharded
            shard(base, self.root_device, self.world_size)
        frozen = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        module._ddp_params_and_buffers_to_ignore = frozen  # the name that DDP and Lightning look for
        super().model_to_device()
        if not divided:
            # Lightning would move it to the CPU and back, and an error could leave it partly gathered
            keep_in_place(base)


def shard(base: Any, device: torch.device, world_size: int) -> None:
    """Shard the frozen weights of a base across ranks, with one group per block and one for the rest."""
    mesh = init_device_mesh(device.type, (world_size,))
    whole = {parameter for parameter in base.parameters() if parameter.requires_grad}
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    blocks = [
        block for several in lists for block in several if type(block).__name__ in base._no_split_modules
    ]
    for module in (*blocks, base):
        fully_shard(module, mesh=mesh, ignored_params=whole)


class InStep(Callback):
    """Make all ranks run a sharded base equally often in an evaluation."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def _begin(self, trainer: Trainer, pl_module: Any) -> None:
        self._end()
        base = pl_module.model.base_model
        # before FSDP2's own hook, which gathers, because waiting ranks also check before they run
        self._hooks.append(base.register_forward_pre_hook(_reads, prepend=True))

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _wait(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep running the base while another rank still does."""
        self._end()
        base = pl_module.model.base_model
        token = torch.zeros(1, 1, dtype=torch.long, device=pl_module.device)
        while _any_reads(False, pl_module.device):
            base(input_ids=token, attention_mask=torch.ones_like(token))

    on_validation_start = on_test_start = _begin
    on_validation_epoch_end = on_test_epoch_end = _wait  # called before the module computes its scores


def _reads(base: Any, inputs: Any) -> None:
    _any_reads(True, base.device)


def _any_reads(reads: bool, device: torch.device) -> bool:
    count = torch.tensor(int(reads), device=device)
    torch.distributed.all_reduce(count)
    return bool(count)
