"""The gold answer's mean logit at every position whose gain enters MI."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_fast.backends.gradients import FEW
from compact_fast.backends.head import Head
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import mean_gold
from compact_fast.scores import information_positions
from compact_fast.softcap import cap_


def gold_logits(
    head: Head,
    hidden: Tensor,  # [T, D]
    layout: TokenLayout,
    config: CompactConfig,
) -> Tensor | None:
    """The mean logit of the question's gold tokens where MI needs it, 0 elsewhere, [T].

    Without a cap that is <h_t, mean of the gold rows>: a head's bias would add a constant, which
    the difference along the sequence cancels. None: MI does not read it.
    """
    if layout.gold_ids is None or layout.cu_gold is None or config.mi == "pvi":
        return None
    gold = head.weight[layout.gold_ids].to(head.dtype)  # [G, D]
    mean = None if head.softcap else mean_gold(gold, layout.cu_gold)  # [Q, D]
    bias = None if head.bias is None else head.bias[layout.gold_ids]
    out = torch.zeros(layout.num_tokens, dtype=head.dtype, device=layout.device)
    counts = layout.cu_gold.diff()
    needed = information_positions(layout, config).nonzero().squeeze(1)
    for at in torch.split(needed, FEW):  # without fresh memory for all of them
        question, x = layout.sequence_question[layout.token_sequence[at]], hidden[at].to(head.dtype)
        if mean is not None:
            out[at] = (x * mean[question]).sum(-1)
        else:
            out[at] = mean_capped(x, gold, bias, counts, question, head.softcap)
    return out


def mean_capped(
    x: Tensor,  # [n, D]
    gold: Tensor,  # [G, D]
    bias: Tensor | None,  # [G]
    counts: Tensor,  # [Q]; of gold tokens
    question: Tensor,  # [n]; of each row
    softcap: float,
) -> Tensor:
    """The mean of the capped logits of a row's gold tokens, [n]; NaN for a question without."""
    z = x @ gold.T
    z = cap_(z if bias is None else z + bias, softcap)
    return segment_mean(z.T.contiguous(), counts).gather(0, question[None]).squeeze(0)


def segment_mean(
    rows: Tensor,  # [G, n]
    counts: Tensor,  # [Q], on the device of `rows`, which is not waited for
) -> Tensor:
    """Mean over each question's rows, [Q, n]; NaN where it has none."""
    # in the order of the rows; on a GPU index_add would use atomics
    total = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)
    return total / counts[:, None]
