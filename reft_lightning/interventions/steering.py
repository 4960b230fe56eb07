r"""Vectors that steer towards a concept, and that detect it.

===================  =============================================  ===================================================
name                 Phi(h)                                         paper
===================  =============================================  ===================================================
difference_in_means  h + b, b = mean of h(y+) - mean of h(y-)       CAA: Rimsky et al. 2024, arXiv:2312.06681
reft_r1              h + mean TopK(ReLU(v'h)) v, with |v| = 1       ReFT-r1: Wu et al. 2025, arXiv:2501.17148 (AxBench)
cast                 h + b if the prompt is like c, else h          CAST: Lee et al. 2025, arXiv:2409.05907
===================  =============================================  ===================================================

Shapes: b rows, n selected tokens, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Intervention
from .elementwise import Bias
from .rows import Found, Tokens


class MeanDifference(Bias, name="difference_in_means"):
    r"""Add the difference between the mean hidden states of two kinds of rows: :math:`\Phi(h) = h + b`.

    .. math:: b = \text{mean of } \bar h \text{ over the rows } y^+ - \text{mean of } \bar h \text{ over the rows } y^-

    with the mean :math:`\bar h` over the selected tokens of a row. With pairs of answers and one token per row
    (contrastive activation addition: ``decode:1`` with letters as answers) it is the mean difference over the pairs.
    Nothing is trained: if the caller labels the rows (``row_values={"sign": ...}`` with 1 and -1), the penalty is half
    the squared distance of b from that difference, and one step of gradient descent with lr 1 reaches its minimum.
    ``objective=difference_in_means`` takes that step once, over all rows together and from b = 0, so no layer is
    measured under the edits of others.
    """

    closed_form = True

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Tensor | Found:
        """Return b for every token, with the penalty if rows have signs."""
        edit = self.edit(h)
        sign = tokens.given.get("sign")
        if sign is None:
            return edit
        counts = tokens.counts()
        means = tokens.sums(h.detach()) / counts.clamp(min=1).unsqueeze(-1)  # (b, d)
        parts = [(sign == side) & (counts > 0) for side in (1, -1)]
        plus, minus = (means[part].sum(0) / part.sum().clamp(min=1) for part in parts)
        return Found(edit, (self.bias - (plus - minus)).square().sum() / 2)


class ReFTr1(Intervention, name="reft_r1"):
    r"""Add a direction, as strongly as it occurs in the prompt: rank-1 representation finetuning. Trains d numbers.

    .. math:: \Phi(h) = h + m v, \qquad m = \text{mean TopK}(\text{ReLU}(v^T h)), \qquad \|v\| = 1

    where m is the mean of the k largest values over the tokens of the row's prompt.
    The latents :math:`\text{ReLU}(v^T h)` locate the concept. The penalty is ``l1`` times the sum of those outside the
    top k, divided by the number of tokens in the row and averaged over rows. The authors take the top k of prompt and
    response (generation has no response yet) and raise ``l1`` linearly from 0 (``callbacks=penalty_linear``).
    Their code rescales v to length 1 after each step; here v is divided by its length.
    Source: Wu et al. 2025, arXiv:2501.17148, and its code (``LsReFT``).

    Args:
        dim: width d of the representation.
        top_k: k; a prompt with fewer selected tokens uses them all.
        l1: weight of the penalty.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if top_k is below 1.
    """

    rotations = ("direction",)
    reads_prompt = True  # for m

    def __init__(self, dim: int, top_k: int = 8, l1: float = 0.005, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        self.top_k, self.l1 = top_k, l1
        self.direction = nn.Parameter(torch.full((dim,), 0.01))  # as in the authors' code

    @property
    def directions(self) -> Tensor:  # (1, d)
        """The unit vector v."""
        return (self.direction / self.direction.norm()).unsqueeze(0)

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Found:
        """Return the edit, the penalty and the latents."""
        v = self.directions
        latents = (h @ v[0]).relu()  # (n,)
        columns = tokens.padded(latents * tokens.prompt)  # (b, m)
        top = columns.topk(min(self.top_k, columns.shape[1])).values.sum(-1)
        strength = tokens.keep(self, top / tokens.counts(tokens.prompt).clamp(1, self.top_k))
        others = (tokens.sums(latents) - top) / tokens.counts().clamp(min=1)
        return Found(strength[tokens.rows].unsqueeze(-1) * v, self.l1 * others.mean(), latents.unsqueeze(-1))


class CAST(Bias, name="cast"):
    r"""Conditional activation steering: add a vector only if the prompt meets a condition.

    .. math:: \Phi(h) = h + g b, \qquad g = [\cos(\bar h, \tanh(P \bar h)) > \theta], \qquad P = c c^\top / c^\top c

    where :math:`\bar h` is the mean of the row's prompt tokens, computed once per prompt and kept while decoding. One
    layer can decide for those above it (``decides=False`` there), and the condition can be that the similarity is below
    the threshold. P ignores the sign: a prompt like -c counts as like c.
    The authors take c and b from two kinds of prompts, as first principal components (``difference_in_means`` is
    another such estimate), and search for the threshold. In training, c gets the gradient of
    :math:`\sigma((\cos - \theta) / T)`, T = 0.1, instead of the step function's, which is 0. As b starts at 0, a gate
    that no prompt opens learns nothing. Trains 2 d numbers, d in layers that do not decide.
    Source: Lee et al. 2025, arXiv:2409.05907, and its code.

    Args:
        dim: width d of the representation.
        threshold: :math:`\theta`, a cosine.
        below: whether the condition is met below the threshold.
        decides: whether this layer has a condition; if not, it uses that of the nearest layer below that has one.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if threshold is not between -1 and 1.
    """

    TEMPERATURE = 0.1
    reads_prompt = True
    rotations = ("condition",)

    def __init__(
        self, dim: int, threshold: float = 0.0, *, below: bool = False, decides: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(dim, **kwargs)
        if not -1 < threshold < 1:
            raise ValueError(f"threshold is a cosine and must lie between -1 and 1; got {threshold}")
        self.threshold, self.below, self.decides = threshold, below, decides
        if decides:
            self.condition = nn.Parameter(torch.randn(dim))

    edit = Intervention.edit  # the gate depends on the prompt
    null = Intervention.null

    def similarity(self, h: Tensor) -> Tensor:  # (b, d) -> (b,)
        """Return the cosine between each prompt's mean and tanh(P mean)."""
        c = self.condition
        left = torch.tanh((h @ c / c.square().sum()).unsqueeze(-1) * c)
        return F.cosine_similarity(h, left, dim=-1)

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Tensor:
        """Return b for the tokens of rows whose prompts meet the condition."""
        if self.decides:
            far = self.similarity(tokens.mean_of_prompts(h)) - self.threshold
            far = -far if self.below else far
            soft = torch.sigmoid(far / self.TEMPERATURE)
            gate = tokens.keep(self, (far > 0).to(h.dtype) + (soft - soft.detach()))
            tokens.kept["cast"] = gate
        elif "cast" in tokens.kept:
            gate = tokens.kept["cast"].to(h)
        else:
            raise ValueError(
                "cast with decides=False needs a layer below that decides: set decides=True in the lowest layer"
            )
        return gate[tokens.rows].unsqueeze(-1) * self.bias
