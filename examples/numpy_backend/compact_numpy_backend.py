"""A backend for compact_fast written outside of it, in NumPy: what every method has to do.

It imports nothing of compact_fast. The layout it is handed brings its own derived vectors, the
rule from scores to weights is the operator torch.ops.compact_fast.teacher_weights, and results are
plain named tuples with the fields of the interface. It holds full logits: an example, not a tool.
"""

from __future__ import annotations

from collections import namedtuple
from itertools import pairwise

import numpy as np
import torch

Gradients = namedtuple("Gradients", "hidden weight bias")
Result = namedtuple(
    "Result",
    "loss loss_sft loss_consistency gradients weights nll mi consensus score token_logp "
    "consistency filtered nonfinite skipped token_entropy token_correct",
)


class NumpyBackend:
    """CompactBackend by structure."""

    name = "numpy"
    abi = 1

    def can_run(self, spec):
        """NumPy has no GPU, and knows no bfloat16."""
        if spec.device.type != "cpu":
            return f"NumPy runs on the CPU, not on {spec.device}"
        if spec.dtype not in (torch.float32, torch.float64):
            return f"NumPy here computes in float32 or float64, not {spec.dtype}"
        return True

    def token_logp(self, hidden, weight, bias, targets, statistics):
        """(log-likelihood, entropy, correct) of each target."""
        logp = log_softmax(hidden, weight, bias)
        y = targets.numpy()
        entropy = np.where(y >= 0, -(np.exp(logp) * logp).sum(1), 0)
        correct = logp.argmax(1) == y
        picked = tensor(at_targets(logp, y), hidden)
        if not statistics:
            return picked, None, None
        return picked, tensor(entropy, hidden), torch.from_numpy(correct)

    def token_logp_gradients(self, grad_logp, hidden, weight, bias, targets, needs):
        """Gradients of sum_t grad_logp_t logp_t."""
        logp, y = log_softmax(hidden, weight, bias), targets.numpy()
        rows = (onehot(y, logp) - np.exp(logp) * (y >= 0)[:, None]) * wide(grad_logp)[:, None]
        return gradients(rows, hidden, weight, bias, needs)

    def score_and_loss(
        self, hidden, weight, bias, layout, consensus, attention, config, normalizer, needs,
        statistics,
    ):  # fmt: skip
        """Scores, weights, loss and gradients of one batch."""
        logp, y = log_softmax(hidden, weight, bias), layout.targets.numpy()
        S, Q = layout.num_sequences, layout.num_questions
        sequence = layout.token_sequence.numpy()
        label_logp = at_targets(logp, y)
        labels = np.bincount(sequence, y >= 0, S)
        with np.errstate(invalid="ignore", divide="ignore"):
            nll = -np.bincount(sequence, label_logp, S) / labels
        mi = adaptability(logp, wide(hidden), wide(weight), label_logp, layout, config)
        shares = torch.ops.compact_fast.teacher_weights(
            tensor(mi, hidden), tensor(nll, hidden), consensus, attention, layout.cu_teachers,
            layout.teachers, layout.question_ids, layout.correct, config.text,
        )  # fmt: skip
        alpha, skipped = shares[0].double().numpy(), shares[5]
        if normalizer is None:
            normalizer = max(1, int((~skipped).sum()))
        live = (y >= 0) & (alpha[sequence] > 0)
        factor = np.where(live, alpha[sequence] / np.maximum(labels, 1)[sequence], 0)
        clean = np.where(live[:, None], np.exp(logp) - onehot(y, logp), 0)
        rows = clean * factor[:, None]
        divergence = add_consistency(logp, alpha, layout, config, rows)
        sft = np.where(alpha > 0, alpha * nll, 0).sum() / normalizer
        pull = config.consistency_weight * divergence.sum() / normalizer
        assert divergence.shape == (Q,)
        token = self.token_logp(hidden, weight, bias, layout.targets, statistics)
        return Result(
            tensor(sft + pull, hidden), tensor(sft, hidden), tensor(pull, hidden),
            gradients(rows / normalizer, hidden, weight, bias, needs), shares[0],
            tensor(nll, hidden), tensor(mi, hidden), shares[2], shares[1], token[0],
            tensor(divergence, hidden), shares[3], shares[4], skipped, token[1], token[2],
        )  # fmt: skip


def adaptability(logp, hidden, weight, label_logp, layout, config):
    """S_MI of each sequence."""
    sequence, S = layout.token_sequence.numpy(), layout.num_sequences
    question = layout.sequence_question.numpy()
    if config.mi == "pvi" and layout.prior_logp is not None:
        stated = np.full(S, np.nan)
        for s, (a, b) in enumerate(layout.answer_spans.tolist()):
            if b > a:
                stated[s] = label_logp[a:b].sum()
        return stated - layout.prior_logp.double().numpy()[question]
    if config.mi == "pvi" or layout.gold_ids is None:
        return np.full(S, np.nan)
    source = hidden @ weight.T if config.mi == "logit" else logp
    bounds = layout.cu_gold.tolist()
    gold = [layout.gold_ids[a:b].numpy() for a, b in pairwise(bounds)]
    info = np.array([source[t, gold[question[s]]].mean() for t, s in enumerate(sequence)])
    gain = np.maximum(np.diff(info, prepend=info[:1]), 0) * (layout.token_index.numpy() > 0)
    everywhere = config.mi_positions == "all"
    counted = np.ones_like(gain, bool) if everywhere else layout.assistant_mask.numpy()
    thinks = counted & False if layout.thinking is None else layout.thinking.numpy()
    factor = np.where(thinks, config.thinking_weight, config.other_weight)
    total = np.bincount(sequence, np.where(counted, factor * gain, 0), S)
    count = np.maximum(np.bincount(sequence, counted, S), 1) if config.mi_length_norm else 1
    return total / count


def add_consistency(logp, alpha, layout, config, rows):
    """sum alpha_i alpha_j D_ij of each question; lambda times its gradient is added to rows."""
    out = np.zeros(layout.num_questions)
    if config.consistency == "off":
        return out
    if config.consistency == "all":
        ends = (layout.last_real + 1).tolist()
        spans = list(zip(layout.cu_seqlens[:-1].tolist(), ends, strict=True))
    else:
        empty = torch.zeros((layout.num_sequences, 2), dtype=torch.long)
        spans = (empty if layout.answer_spans is None else layout.answer_spans).tolist()
    bounds = layout.cu_teachers.tolist()
    for q, (first, end) in enumerate(pairwise(bounds)):
        for i in range(first, end):
            for j in range(i + 1, end):
                n = min(spans[i][1] - spans[i][0], spans[j][1] - spans[j][0])
                share = alpha[i] * alpha[j]
                if n == 0 or share == 0 or share < config.pair_floor:
                    continue
                at, other = (slice(spans[k][0], spans[k][0] + n) for k in (i, j))
                a, b = np.maximum(logp[at], -1e30), np.maximum(logp[other], -1e30)  # of -inf too
                p, r = np.exp(a), np.exp(b)
                kl_ab, kl_ba = (p * (a - b)).sum(1), (r * (b - a)).sum(1)
                out[q] += share * (kl_ab + kl_ba).sum() / n
                c = config.consistency_weight * share / n
                rows[at] += c * (p * (a - b - kl_ab[:, None]) + p - r)
                rows[other] += c * (r * (b - a - kl_ba[:, None]) + r - p)
    return out


def wide(t):
    return t.detach().double().numpy()


def tensor(values, like):
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.from_numpy(np.array(values)).to(dtype)


def log_softmax(hidden, weight, bias):
    z = wide(hidden) @ wide(weight).T + (0 if bias is None else wide(bias))
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def at_targets(logp, y):
    return np.where(y >= 0, logp[np.arange(len(y)), np.maximum(y, 0)], 0)


def onehot(y, like):
    out = np.zeros_like(like)
    out[np.arange(len(y))[y >= 0], y[y >= 0]] = 1
    return out


def gradients(rows, hidden, weight, bias, needs):
    """Through logits = hidden W^T + bias, where wanted."""
    used = np.where(rows.any(1)[:, None], wide(hidden), 0)  # a NaN row with weight 0 counts for 0
    found = (lambda: rows @ wide(weight), lambda: rows.T @ used, lambda: rows.sum(0))
    owners = (hidden, weight, bias)
    return Gradients(
        *(
            torch.from_numpy(np.array(make())).to(owner.dtype) if need else None
            for make, owner, need in zip(found, owners, needs, strict=True)
        )
    )
