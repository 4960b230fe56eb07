"""GPUs by name, and how long a batch takes at least on one: a roofline (Williams et al. 2009), not a prediction.

The numbers are of NVIDIA's data sheets: matrix products without sparsity, with sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

from ..suggest import check_choice

T = 1e12


class GPU(NamedTuple):
    """What a GPU does at most."""

    memory: float  # bytes
    bandwidth: float  # bytes of memory a second
    half: float  # FLOPs a second in bfloat16 and float16
    tf32: float  # of float32 products that may be rounded to TF32 (``matmul_precision`` of high or medium)
    float32: float  # of float32 products

    def seconds(self, flops: float, weights: float, rate: float) -> float:
        """Return the least time of a batch: of its products, or of reading the weights forward and backward."""
        return max(flops / rate, 2 * weights / self.bandwidth)


GPUS = {
    "a100_40gb": GPU(40e9, 1.555 * T, 312 * T, 156 * T, 19.5 * T),
    "a100_80gb": GPU(80e9, 2.039 * T, 312 * T, 156 * T, 19.5 * T),
    "h100": GPU(80e9, 3.35 * T, 989 * T, 495 * T, 67 * T),  # SXM
    "h200": GPU(141e9, 4.8 * T, 989 * T, 495 * T, 67 * T),
    "l40s": GPU(48e9, 0.864 * T, 362 * T, 183 * T, 91.6 * T),
    "rtx_4090": GPU(24e9, 1.008 * T, 165 * T, 82.6 * T, 82.6 * T),
}


def gpu_named(name: str) -> GPU:
    """Return a GPU."""
    check_choice("gpu", name, GPUS)
    return GPUS[name]
