"""Check that the requested accelerator is available; this needs only torch, before Lightning is imported."""

from __future__ import annotations

import torch

GPUS = ("gpu", "cuda", "mps")  # Lightning's names; "gpu" is whichever of the other two is available


def check_accelerator(name: str, instead: str = "write trainer=cpu to compute on the CPU") -> None:
    """Refuse a GPU if torch finds none, with advice what to do instead; others are left to Lightning."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in GPUS or here.get(name, any(here.values())):
        return
    others = [kind for kind, found in here.items() if found]
    found = f"only {', '.join(others)}" if others else "no GPU"
    raise ValueError(
        f"trainer.accelerator={name}: torch {torch.__version__} finds {found} on this machine; {instead}, or run it "
        "on a machine where torch.cuda.is_available() is true"
    )
