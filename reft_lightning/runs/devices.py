"""Whether the accelerator that a configuration asks for is here; torch alone is asked, before Lightning is imported."""

from __future__ import annotations

import torch

GPUS = ("gpu", "cuda", "mps")  # names of Lightning; "gpu" is whichever of the other two there is


def check_accelerator(name: str, instead: str = "write trainer=cpu to compute on the CPU") -> None:
    """Refuse a GPU where torch finds none; names that are no GPU's are left to Lightning.

    Args:
        name: ``trainer.accelerator``.
        instead: what to do without one.

    Raises:
        ValueError: with what runs here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in GPUS or here.get(name, any(here.values())):
        return
    others = [kind for kind, found in here.items() if found]
    found = f"only {', '.join(others)}" if others else "no GPU"
    raise ValueError(
        f"trainer.accelerator={name}: torch {torch.__version__} finds {found} on this machine; {instead}, or start it "
        "where torch.cuda.is_available() is true"
    )
