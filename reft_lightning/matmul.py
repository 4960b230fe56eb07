"""The products of float32 matrices during a run: on a CPU by the faster library, where that is as exact.

PyTorch multiplies float32 matrices on x86 CPUs by MKL, or by oneDNN where
``torch.set_float32_matmul_precision("medium")`` allows it. oneDNN is up to twice as fast on AMD CPUs. On CPUs with
matrix units for bfloat16 (AMX) the same switch gives bfloat16 products, which err a thousand times more: so the error
is measured on the CPU at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

EXACT = 1e-5  # error of float32 products 1500 terms long is 1e-6, of bfloat16 ones 3e-3
ROWS, WIDTH, INNER = 256, 576, 1536  # large enough for every library's fast path


@contextmanager
def matmul_precision(choice: str, device: torch.device) -> Iterator[str]:
    """Multiply float32 matrices with a precision inside the block.

    Args:
        choice: of ``torch.set_float32_matmul_precision``; ``auto`` takes ``medium`` on a CPU where it errs by less
            than 1e-5 of the largest number, and changes nothing elsewhere.
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
            chosen = "medium" if error <= EXACT else before
            log.info(
                "float32 products on this CPU err by %.1e with precision medium: %s is used", error, chosen
            )
    torch.set_float32_matmul_precision(chosen)
    try:
        yield chosen
    finally:
        torch.set_float32_matmul_precision(before)


def product_error(precision: str) -> float:
    """Return the largest error of a product of random float32 matrices, relative to its largest number."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(ROWS, INNER, generator=generator), torch.randn(INNER, WIDTH, generator=generator)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    return float((found - exact).abs().max() / exact.abs().max())
