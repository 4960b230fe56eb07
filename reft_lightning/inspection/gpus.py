"""GPUs by name, and a lower bound on the time of a batch: a roofline (Williams et al. 2009), not a prediction.

The numbers are from NVIDIA's data sheets: matrix products without sparsity, with float32 accumulation.
"""

from __future__ import annotations

from typing import NamedTuple

T = 1e12


class GPU(NamedTuple):
    """The peak performance of a GPU."""

    memory: float  # bytes
    bandwidth: float  # bytes per second
    half: float  # FLOPs per second in bfloat16 and float16
    tf32: float  # in float32 products that may be rounded to TF32 (``matmul_precision`` high or medium)
    float32: float  # in float32 products

    def seconds(self, flops: float, weights: float, rate: float) -> float:
        """Return the least time of a batch: for its products, or for reading the weights in both passes."""
        return max(flops / rate, 2 * weights / self.bandwidth)


GPUS = {
    "a100_40gb": GPU(40e9, 1.555 * T, 312 * T, 156 * T, 19.5 * T),
    "a100_80gb": GPU(80e9, 2.039 * T, 312 * T, 156 * T, 19.5 * T),
    "h100": GPU(80e9, 3.35 * T, 989 * T, 495 * T, 67 * T),  # SXM
    "h200": GPU(141e9, 4.8 * T, 989 * T, 495 * T, 67 * T),
    "l40s": GPU(48e9, 0.864 * T, 362 * T, 183 * T, 91.6 * T),
    "rtx_4090": GPU(24e9, 1.008 * T, 165 * T, 82.6 * T, 82.6 * T),
}
