"""The method as it was published, in the plain eager form that one would write from its formulas:
one question's rationales as a padded batch, all logits at once, MI over every position with
padding, attention consensus, consistency over all positions. The yardstick of bench.end_to_end;
`mode="reference"` of the package computes the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compact_fast.layout import IGNORE

THINKING_WEIGHT, OTHER_WEIGHT = 1.0, 0.1
BETAS = (1.0, 1.0, 0.5)
CONSISTENCY = 0.1
PAIR_FLOOR = 1e-4


def published_loss(
    causal: Any,
    input_ids: Tensor,  # [K, L]
    attention_mask: Tensor,  # [K, L]
    labels: Tensor,  # [K, L]; labels[t] is the token at t
    gold_ids: Tensor,  # [G]
    thinking_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss, weights [K]) of one question; `causal` is the transformers model, adapters inside."""
    out = causal(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        use_cache=False,
    )
    logits, hidden = out.logits, out.hidden_states[-1]  # [K, L, V], [K, L, D]
    K, _, V = logits.shape
    targets = labels[:, 1:]
    token_nll = functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), targets.reshape(-1), ignore_index=IGNORE, reduction="none"
    ).view(K, -1)
    nll = token_nll.sum(1) / (targets != IGNORE).sum(1)
    with torch.no_grad():
        thinking = torch.isin(input_ids, thinking_ids)
        mi = adaptability(logits[..., gold_ids].mean(-1), thinking)
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        consensus = attention_consensus(causal, hidden[torch.arange(K), last])
        score = BETAS[0] * z_score(mi) + BETAS[1] * z_score(consensus) - BETAS[2] * z_score(nll)
        weights = score.softmax(0)
    loss = (weights * nll).sum()
    logp = functional.log_softmax(logits, -1)
    for i in range(K):
        for j in range(i + 1, K):
            if weights[i] * weights[j] < PAIR_FLOOR:
                continue
            n = int(min(attention_mask[i].sum(), attention_mask[j].sum()))
            forth = functional.kl_div(logp[j, :n], logp[i, :n], log_target=True, reduction="none")
            back = functional.kl_div(logp[i, :n], logp[j, :n], log_target=True, reduction="none")
            divergence = (forth.sum(-1) + back.sum(-1)).mean()
            loss = loss + CONSISTENCY * weights[i] * weights[j] * divergence
    return loss, weights


def adaptability(information: Tensor, thinking: Tensor) -> Tensor:  # [K, L] -> [K]
    """Sum of the gains, thinking tokens in full."""
    gain = functional.pad(information.diff(dim=1), (1, 0)).clamp(min=0)
    return (torch.where(thinking, THINKING_WEIGHT, OTHER_WEIGHT) * gain).sum(1)


def attention_consensus(causal: Any, last: Tensor) -> Tensor:  # [K, D] -> [K]
    """In-degree of the softmax attention among the rationales' last tokens."""
    attention = causal.base_model.layers[-1].self_attn
    training = attention.training
    attention.eval()
    queries, keys = attention.q_proj(last), attention.k_proj(last)
    attention.train(training)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    share = (queries @ keys.T / queries.shape[1] ** 0.5).softmax(1)
    return share.fill_diagonal_(0.0).sum(0)


def z_score(values: Tensor) -> Tensor:  # [K] -> [K]
    if values.numel() == 1:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-4)
