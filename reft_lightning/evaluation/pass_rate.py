"""The chance that one of k generated programs passes, estimated from n of them."""

from __future__ import annotations

from math import prod


def pass_at_k(samples: int, passed: int, k: int) -> float:
    r"""Return the unbiased estimate of pass@k for one problem.

    .. math:: \text{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}
        = 1 - \prod_{i = n - c + 1}^{n} \left(1 - \frac{k}{i}\right)

    for n samples of which c pass: the share of all subsets of k samples that hold one that passes. The product
    needs no large binomials. (1 - (1 - c/n)^k would be biased: it draws the same sample twice.)
    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.

    Args:
        samples: n.
        passed: c.
        k: subset size.

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= c <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= the number of samples; got {samples} samples")
    if not 0 <= passed <= samples:
        raise ValueError(f"the number of passing samples must lie in 0..{samples}; got {passed}")
    if samples - passed < k:  # every subset of k holds one that passes
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))
