"""The consistency term on a few rows a question, with its gradient.

For the aligned tokens r of teachers i, j with log-probabilities a_i = log p_i:

    D_ij        = mean_r sum_v (p_i - p_j)(a_i - a_j)
    dD_ij/dz_i  = [p_i (a_i - a_j - KL(p_i || p_j)) + p_i - p_j] / n_ij

so with coefficients c_ij, all pairs of a question come from three products with the K x K matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compact_fast.backends.head import Head
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import consistency_spans

# (rows [n], hidden of the rows [n, D], gradient of their logits [n, V], scale [n])
AddGradient = Callable[[Head, Tensor, Tensor, Tensor, Tensor], None]


def add_consistency(
    head: Head,
    hidden: Tensor,  # [T, D]
    layout: TokenLayout,
    alpha: Tensor,  # [S]
    config: CompactConfig,
    add_gradient: AddGradient,
) -> Tensor:
    """sum_{i<j} alpha_i alpha_j D_ij of each question, [Q]; lambda times its gradient is added."""
    out = alpha.new_zeros(layout.num_questions)
    if config.consistency == "off":
        return out
    starts, lengths = consistency_spans(layout, config)
    bounds = layout.cu_teachers.tolist()
    weights = alpha.tolist()
    for q in range(layout.num_questions):
        members = [s for s in range(bounds[q], bounds[q + 1]) if lengths[s] > 0 and weights[s] > 0]
        pairs = _pair_coefficients(
            alpha.new_tensor([weights[s] for s in members]),
            torch.tensor([lengths[s] for s in members], device=alpha.device),
            config.pair_floor,
        )
        if len(members) < 2 or not bool((pairs > 0).any()):
            continue
        first = torch.tensor([starts[s] for s in members], device=alpha.device)
        n = torch.tensor([lengths[s] for s in members], device=alpha.device)
        longest = int(n.sort().values[-2])  # beyond the second longest span nothing is aligned
        step = max(1, head.max_rows // len(members))
        for r in range(0, longest, step):
            index = torch.arange(r, min(r + step, longest), device=alpha.device)  # [R]
            inside = index[:, None] < n[None, :]  # [R, K]
            at = torch.where(inside, first + index[:, None], first)  # [R, K]
            rows = at.reshape(-1)
            logits = head.logits(hidden[rows]).view(*at.shape, head.vocab)
            coefficients = pairs * (inside[:, :, None] & inside[:, None, :])  # [R, K, K]
            value, grad = _block(logits, coefficients)
            out[q] += value
            keep = inside.reshape(-1)
            add_gradient(
                head,
                rows[keep],
                hidden[rows[keep]],
                grad.view(-1, head.vocab)[keep],
                grad.new_full((int(keep.sum()),), config.consistency_weight),
            )
    return out


def _pair_coefficients(alpha: Tensor, lengths: Tensor, floor: float) -> Tensor:
    """alpha_i alpha_j / n_ij for i != j, [K, K]; 0 for pairs below the floor."""
    product = alpha[:, None] * alpha[None, :]
    aligned = torch.minimum(lengths[:, None], lengths[None, :])
    product = torch.where(product >= floor, product, 0.0).fill_diagonal_(0.0)
    return product / aligned.clamp(min=1)


def _block(logits: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, K, V], symmetric c [R, K, K] -> (sum_{i<j} c_ij D_ij, its gradient [R, K, V])."""
    a = logits.log_softmax(-1)
    p = a.exp()
    # only differences of a matter: without their mean, products stay of the differences' size
    a = a - a.mean(1, keepdim=True)
    cross = p @ a.transpose(1, 2)  # [R, K, K]: <p_i, a_j>
    own = cross.diagonal(dim1=1, dim2=2)
    kl = own[:, :, None] - cross  # KL(p_i || p_j)
    value = (c * kl).sum()  # every unordered pair twice, once for each direction
    total = c.sum(-1, keepdim=True)  # [R, K, 1]
    bracket = total * a - c @ a - (c * kl).sum(-1, keepdim=True) + total
    return value, p * bracket - c @ p
