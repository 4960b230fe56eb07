r"""Vectors that steer towards a concept, and find it.

===================  =============================================  ===================================================
name                 Phi(h)                                         paper
===================  =============================================  ===================================================
difference_in_means  h + b, b = mean of h(y+) - mean of h(y-)       CAA: Rimsky et al. 2024, arXiv:2312.06681
reft_r1              h + mean TopK(ReLU(v'h)) v, with |v| = 1       ReFT-r1: Wu et al. 2025, arXiv:2501.17148 (AxBench)
cast                 h + b where the prompt is like c, else h       CAST: Lee et al. 2025, arXiv:2409.05907
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

    with the mean :math:`\bar h` over the selected tokens of a row. With pairs of answers and one token a row
    (contrastive activation addition: ``decode:1`` of answers that are letters) it is the mean difference of the pairs.
    Nothing is trained: where the caller says which rows are which (``row_values={"sign": ...}``, of 1 and -1), the
    penalty, half the squared distance of b from that difference, has its minimum one step of gradient descent with
    lr 1 away. ``objective=difference_in_means`` takes that step once, over all rows together and from b = 0, so that no
    layer is measured under the edits of others.
    """

    closed_form = True

    def edit_rows(self, h: Tensor, tokens: Tokens) -> Tensor | Found:
        """Return b for every token, with the penalty where rows have signs."""
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
    r"""Add a direction as strongly as the prompt has it: rank-1 representation finetuning. Trains d numbers.

    .. math:: \Phi(h) = h + m v, \qquad m = \text{mean TopK}(\text{ReLU}(v^T h)), \qquad \|v\| = 1

    with the mean of the k largest over the tokens of the row's prompt.
    The latents :math:`\text{ReLU}(v^T h)` say where the concept is; the penalty is the mean of those that are not among
    the top k, over the tokens of a row, and over rows, times ``l1``. The authors take the top k of prompt and response,
    which is not there yet in generation, and raise ``l1`` linearly from 0 (``callbacks=penalty_linear``).
    Their code keeps v at length 1 by rescaling it after each step, here it is divided by its length.
    Source: Wu et al. 2025, arXiv:2501.17148, and its code (``LsReFT``).

    Args:
        dim: width d of the representation.
        top_k: k, of prompts with at least as many selected tokens.
        l1: weight of the penalty.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: if top_k is below 1.
    """

    rotations = ("direction",)
    reads_prompt = True  # for its strength

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
    r"""Conditional activation steering: add a vector where the prompt meets a condition, and nothing elsewhere.

    .. math:: \Phi(h) = h + g b, \qquad g = [\cos(\bar h, \tanh(P \bar h)) > \theta], \qquad P = c c^\top / c^\top c

    with the mean :math:`\bar h` of the row's prompt tokens, once a prompt and kept while decoding. One layer may decide
    for those above it (``decides=False`` there), and the condition may be that the similarity is below the threshold.
    P has no sign: a prompt like -c is like c.
    The authors take c and b from two kinds of prompts, as first principal components (``difference_in_means`` is
    another such estimate), and search for the threshold. In training, c learns by the gradient of
    :math:`\sigma((\cos - \theta) / T)`, T = 0.1, in the place of the step's, which has none; a gate that no prompt
    opens learns nothing. Trains 2 d numbers, d in layers that do not decide.
    Source: Lee et al. 2025, arXiv:2409.05907, and its code.

    Args:
        dim: width d of the representation.
        threshold: :math:`\theta`, of a cosine.
        below: whether the condition is met below the threshold.
        decides: whether it has a condition of its own; if not, that of the last layer below with one holds.
        **kwargs: dropout and dropout_on, see :class:`Intervention`.

    Raises:
        ValueError: for a threshold that no cosine can be on both sides of.
    """

    TEMPERATURE = 0.1
    reads_prompt = True
    rotations = ("condition",)

    def __init__(
        self, dim: int, threshold: float = 0.0, *, below: bool = False, decides: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(dim, **kwargs)
        if not -1 < threshold < 1:
            raise ValueError(f"threshold must lie between -1 and 1, as cosines do; got {threshold}")
        self.threshold, self.below, self.decides = threshold, below, decides
        if decides:
            self.condition = nn.Parameter(torch.randn(dim))

    edit = Intervention.edit  # the gate is of a prompt
    null = Intervention.null

    def similarity(self, h: Tensor) -> Tensor:  # (b, d) -> (b,)
        """Return the cosine of prompts' means and what the condition leaves of them."""
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
                "no layer below decides for cast with decides=False: set decides=True in the lowest layer"
            )
        return gate[tokens.rows].unsqueeze(-1) * self.bias
