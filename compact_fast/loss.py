"""The public loss: one call from hidden states to scores, weights and a differentiable loss."""

from __future__ import annotations

from torch import Tensor

from compact_fast.backends import CompactBackend, RunSpec, choose
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput

__all__ = ["CompactOutput", "compact_loss", "token_logp"]


def compact_loss(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    layout: TokenLayout,
    *,
    consensus: Tensor | None = None,  # [S]
    attention: Tensor | None = None,  # [S]
    config: CompactConfig | None = None,
    backend: str | CompactBackend = "auto",
    normalizer: float | None = None,
    head_bias: Tensor | None = None,  # [V]
    statistics: bool = False,
) -> CompactOutput:
    """The COMPACT loss of one packed batch, with everything that was measured on the way.

    hidden: the student's last hidden states after the final norm, [T, D], any float dtype.
    lm_head_weight: the unembedding, [V, D].
    layout: where questions, teachers and labels lie; on the same device as `hidden`.
    consensus: graph consensus of each rationale in [0, 1], [S]. None leaves the graph term out.
    attention: attention consensus of each rationale, [S], for consensus="attention" and "both".
    config: the method's choices, CompactConfig() when None.
    backend: a name, a backend object, or "auto".
    normalizer: what the sum over questions is divided by; default the number of questions that
        are not skipped. Give the global number under gradient accumulation or data parallelism.
    head_bias: bias of the unembedding, [V].
    statistics: also return token_entropy and token_correct.

    Gradients flow to `hidden`, `lm_head_weight` and `head_bias` through the log-likelihoods and
    the consistency term, never through the weights alpha. They are made in the forward pass:
    backward may run once.

    Raises ValueError for arguments that contradict each other or the configuration.
    """
    taken = choose(backend, _spec(hidden, lm_head_weight, head_bias)).backend
    return taken.compact_loss(
        hidden,
        lm_head_weight,
        layout,
        consensus=consensus,
        attention=attention,
        config=config or CompactConfig(),
        normalizer=normalizer,
        head_bias=head_bias,
        statistics=statistics,
    )


def token_logp(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    *,
    backend: str | CompactBackend = "auto",
    head_bias: Tensor | None = None,  # [V]
) -> Tensor:
    """log softmax(W h_t)[targets_t] in nats, [T], 0 at negative targets.

    Never holds [T, V] logits; differentiable. Rows with a negative target are not multiplied.
    Raises ValueError for shapes that do not fit and for targets outside the vocabulary.
    """
    taken = choose(backend, _spec(hidden, lm_head_weight, head_bias)).backend
    return taken.token_logp(hidden, lm_head_weight, targets, head_bias=head_bias)


def _spec(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> RunSpec:
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            "expected hidden [T, D] and lm_head_weight [V, D]; got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    return RunSpec(hidden.device, hidden.dtype, weight.shape[0], weight.shape[1], bias is not None)
