"""The products of float32 matrices during a run: on a CPU by the faster library, where that is as exact.

PyTorch multiplies float32 matrices on x86 CPUs by MKL, or by oneDNN where
``torch.set_float32_matmul_precision("medium")`` allows it. oneDNN is twice as fast on some AMD CPUs and no faster, or
slower, on others. On CPUs with matrix units for bfloat16 (AMX) the same switch gives bfloat16 products, which err a
thousand times more. So both are measured on the CPU at hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

EXACT = 1e-5  # error of float32 products 1500 terms long is 1e-6, of bfloat16 ones 3e-3
# times as fast: the small products inside attention can lose by the same switch (three times as slow in the backward
# pass on one CPU, where large ones were 4 % faster and a step was slower)
GAIN = 1.5
ROWS, WIDTH, INNER = 1024, 576, 1536  # of a batch in a small model
REPEATS = 9


@contextmanager
def matmul_precision(choice: str, device: torch.device) -> Iterator[str]:
    """Multiply float32 matrices with a precision inside the block.

    Args:
        choice: of ``torch.set_float32_matmul_precision``; ``auto`` takes ``medium`` on a CPU where it errs by less
            than 1e-5 of the largest number and is 1.5 times as fast, and changes nothing elsewhere.
        device: of the run.

    Yields:
        the precision in force.
    """
    before = torch.get_float32_matmul_precision()
    chosen = choice
    if choice == "auto":
        chosen = before
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            error = product_error("medium")
            gain = product_gain("medium") if error <= EXACT else 0.0
            chosen = "medium" if gain >= GAIN else before
            log.info(
                "float32 products with precision medium err by %.1e on this CPU and are %.2f times as fast: %s is used",
                error, gain, chosen,
            )  # fmt: skip
    with _precision(chosen):
        yield chosen


def product_error(precision: str) -> float:
    """Return the largest error of a product of random float32 matrices, relative to its largest number."""
    a, b = _matrices()
    exact = a.double() @ b.double()
    with _precision(precision):
        found = a @ b
    return float((found - exact).abs().max() / exact.abs().max())


def product_gain(precision: str) -> float:
    """Return how many times as fast a product is as with precision highest, best of interleaved repeats."""
    a, b = _matrices()
    best = {"highest": float("inf"), precision: float("inf")}
    for name in [*best] * REPEATS:
        with _precision(name):
            start = time.perf_counter()
            torch.mm(a, b)
            best[name] = min(best[name], time.perf_counter() - start)
    return best["highest"] / best[precision]


def _matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, INNER, generator=generator), torch.randn(INNER, WIDTH, generator=generator)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
