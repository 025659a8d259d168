"""pytest-benchmark of each operator: python -m pytest bench/test_ops.py

Every group contains the bare products of the same shape: read ratios within a group.
"""

from __future__ import annotations

import pytest
import torch

from bench import loss_variants as lv
from compact_fast import CompactConfig, token_logp
from compact_fast.benchmark.loss import Shape, bare_products

SHAPE = Shape(512, 49152, 576)
NAMES = tuple(lv.variants(lv.problem(Shape(256, 100, 16), frozen=True)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_score_and_loss(benchmark, head, name):
    """Loss and gradients; everything but `compact_loss` is told the weights."""
    benchmark.group = f"score_and_loss, {head} head"
    problem = lv.problem(SHAPE, frozen=head == "frozen")
    slow = name == "F.linear_cross_entropy"
    run = lv.variants(problem)[name]
    benchmark.pedantic(run, rounds=1 if slow else 5, warmup_rounds=0 if slow else 1)


@pytest.mark.parametrize("name", ["one bare product", "token_logp", "log_softmax"])
def test_token_logp(benchmark, name):
    """Log-likelihoods alone."""
    benchmark.group = "token_logp"
    p = lv.problem(SHAPE, frozen=True)
    hidden, targets = p.hidden.detach(), p.layout.targets
    runs = {
        "one bare product": lambda: hidden @ p.weight.T,
        "token_logp": lambda: token_logp(hidden, p.weight, targets, backend="torch"),
        "log_softmax": lambda: (
            (hidden @ p.weight.T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])
        ),
    }
    benchmark.pedantic(runs[name], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ["bare products", "gradients of token_logp"])
def test_token_logp_gradients(benchmark, name):
    """Gradients from given upstream ones: logits are made again, so three products."""
    benchmark.group = "token_logp_gradients"
    p = lv.problem(SHAPE, frozen=False)
    hidden, weight, targets = p.hidden.detach(), p.weight.detach(), p.layout.targets
    runs = {
        "bare products": bare_products(p),
        "gradients of token_logp": lambda: torch.ops.compact_fast.token_logp_gradients(
            -p.scale, hidden, weight, None, targets, True, True, False, "torch"
        ),
    }
    benchmark.pedantic(runs[name], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("questions", [1, 64])
def test_teacher_weights(benchmark, questions):
    """Weights of four teachers from scores that are there."""
    benchmark.group = "teacher_weights"
    mi, nll, consensus = torch.rand(3, 4 * questions)
    cu = torch.arange(questions + 1) * 4
    op = torch.ops.compact_fast.teacher_weights
    text = CompactConfig().text
    benchmark(lambda: op(mi, nll, consensus, None, cu, None, None, None, text))
