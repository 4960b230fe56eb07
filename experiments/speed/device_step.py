"""Some training steps of a variant on a device, timed there; what they start on it; what the device can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from processes import peak_memory_bytes
from transformers import AutoModelForCausalLM, LlamaConfig
from worker import VARIANTS, Step, frozen, load_batches


class DeviceStep:
    """Some steps of a variant on a device a call.

    Args:
        name: of the variant.
        shape: arguments of ``LlamaConfig``.
        device: of torch.
        batch_file: as ``step.py`` writes it.
        steps: a call.
    """

    def __init__(self, name: str, *, shape: dict[str, Any], device: str, batch_file: str, steps: int) -> None:
        variant = VARIANTS[name]
        self.device, self.steps = place(device), steps
        with self.device:
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**shape), dtype=getattr(torch, variant.dtype)
            )
        self.step = Step(variant, frozen(model), load_batches(batch_file))
        self.built = torch.cuda.memory_allocated() if self.device.type == "cuda" else None
        self.report = self._report

    def __call__(self, number: int) -> dict[str, float]:
        """Train ``steps`` steps; seconds a step."""
        first = number * self.steps
        cpu = time.process_time()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(self.steps):
                loss = self.step.train(first + i)
            end.record()
            torch.cuda.synchronize()
            wall = start.elapsed_time(end) / 1000
            if number == 0:  # weights were tied, and the first batch computed in two ways, before
                torch.cuda.reset_peak_memory_stats()
        else:
            wall = time.perf_counter()
            for i in range(self.steps):
                loss = self.step.train(first + i)
            wall = time.perf_counter() - wall
        spent = time.process_time() - cpu
        return {"wall": wall / self.steps, "cpu": spent / self.steps, "loss": float(loss)}

    def _report(self) -> dict[str, Any]:
        """Memory first: the profiler needs some of its own."""
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else peak_memory_bytes()
        return {
            "peak_memory_bytes": memory,
            "built_memory_bytes": self.built,
            **launches(self.step, self.device),
            "flops": count_flops(self.step),
            **self.step.report,
        }


def place(device: str) -> torch.device:
    """Return a device of torch; a CUDA device becomes that of events, memory and synchronisation."""
    found = torch.device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def launches(step: Step, device: torch.device) -> dict[str, Any]:
    """Return how much a step starts on its device, and the seconds in which the device works on it.

    On a CPU: how many ATen operations it calls, and no seconds.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step.train(0)
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        return on_device(profiler.events())
    return {"kernels": sum(event.name.startswith("aten::") for event in profiler.events()), "busy": None}


def on_device(events: Iterable[Any]) -> dict[str, Any]:
    """Return what a profile says of a CUDA device: kernels, copies and fills, and the seconds they took together.

    A contiguous clone is a copy, and no kernel; ranges that torch names, as that of an optimizer's step, are neither.
    """
    from torch.autograd import DeviceType

    work = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {"kernels": len(work), "busy": sum(e.time_range.elapsed_us() for e in work) / 1e6}


def count_flops(step: Step) -> int:
    """Return the floating-point operations of the products and attentions of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step.train(0)
    return counter.get_total_flops()


def limits(*, device: str, **_: Any) -> Callable[[int], dict[str, float]]:
    """Measure what the device can do: a large bf16 product and a large copy."""
    where = place(device)
    cuda = where.type == "cuda"
    size = 8192 if cuda else 256
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**28 if cuda else 2**20, device=where, dtype=torch.float32)
    target = torch.empty_like(source)

    def seconds(work: Callable[[], Any], times: int) -> float:
        for _ in range(10):  # from rest, clocks take a while to rise
            work()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def run(number: int) -> dict[str, float]:
        return {
            "flops_per_second": 2 * size**3 / seconds(lambda: a @ b, 20),
            "bytes_per_second": 2 * source.nbytes / seconds(lambda: target.copy_(source), 20),
        }

    return run
