"""The public loss: one call from hidden states to scores, weights and a differentiable loss."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_fast import ops
from compact_fast.backends import CompactBackend
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput
from compact_fast.sharded_head import refuse_parts, whole

__all__ = ["CompactOutput", "compact_loss", "token_logp"]

_DEFAULT = CompactConfig()


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
    softcap: float = 0.0,
) -> CompactOutput:
    """The COMPACT loss of one packed batch, with everything that was measured on the way.

    hidden: the student's last hidden states after the final norm, [T, D], any float dtype.
    lm_head_weight: the unembedding, [V, D]. A DTensor, as under FSDP, is gathered, so that all
        processes of its mesh must call; its gradient is a DTensor placed alike, the mean over them.
    layout: where questions, teachers and labels lie; on the CPU, or on the device of `hidden`. One
        that was made on the CPU is read there, also after `layout.to(device)`.
    consensus: graph consensus of each rationale in [0, 1], [S]. None leaves the graph term out.
    attention: attention consensus of each rationale, [S], for consensus="attention" and "both".
    config: the method's choices, CompactConfig() when None.
    backend: a name, a backend object, or "auto".
    normalizer: what the sum over questions is divided by; default the number of questions that
        are not skipped. Give the global number under gradient accumulation or data parallelism.
    head_bias: bias of the unembedding, [V].
    statistics: also return token_entropy and token_correct.
    softcap: logits are softcap tanh(logit / softcap), as in Gemma 2; 0: as they are.

    Gradients flow to `hidden`, `lm_head_weight` and `head_bias` through the log-likelihoods and
    the consistency term, never through the weights alpha. They are made in the forward pass:
    backward may run once.

    Raises ValueError for arguments that contradict each other or the configuration.
    """
    live = torch.is_grad_enabled()
    refuse_parts("hidden", hidden)
    lm_head_weight = whole("lm_head_weight", lm_head_weight)
    head_bias = None if head_bias is None else whole("head_bias", head_bias)
    values = torch.ops.compact_fast.score_and_loss(
        hidden,
        lm_head_weight,
        head_bias,
        *ops.layout_tensors(layout.on_host),
        consensus,
        attention,
        (_DEFAULT if config is None else config).text,
        normalizer,
        live and hidden.requires_grad,
        live and lm_head_weight.requires_grad,
        live and head_bias is not None and head_bias.requires_grad,
        statistics,
        ops.backend_name(backend),
        softcap,
    )
    out = dict(zip(ops.RESULTS, values, strict=True))
    # an operator's results all hang on the graph; only the loss is to be differentiated
    out = {name: value if name == "loss" else value.detach() for name, value in out.items()}
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        del out[name]
    if not statistics:
        out["token_entropy"] = out["token_correct"] = None
    if config is None or config.skip_below == 0:
        out["kept_share"] = out["gradient_error"] = None
    return CompactOutput(**out)


def token_logp(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64; on the CPU or where hidden is
    *,
    backend: str | CompactBackend = "auto",
    head_bias: Tensor | None = None,  # [V]
    softcap: float = 0.0,
) -> Tensor:
    """log softmax(W h_t)[targets_t] in nats, [T], 0 at negative targets.

    With `softcap` > 0, of softcap tanh(logit / softcap). Never holds [T, V] logits; differentiable.
    Rows with a negative target are not multiplied. A DTensor for a head is treated as by
    `compact_loss`.
    On a GPU, targets on the CPU are checked and sorted there, and nothing waits for the device;
    those on the device have to be read back.
    Raises ValueError for shapes that do not fit and for targets outside the vocabulary.
    """
    refuse_parts("hidden", hidden)
    lm_head_weight = whole("lm_head_weight", lm_head_weight)
    head_bias = None if head_bias is None else whole("head_bias", head_bias)
    logp: Tensor = torch.ops.compact_fast.token_logp(
        hidden, lm_head_weight, head_bias, targets, False, ops.backend_name(backend), softcap
    )[0]
    return logp
