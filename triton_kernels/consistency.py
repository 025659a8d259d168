"""The consistency term and its gradient on aligned rows: one program an aligned token.

For the K teachers' rows r_i of one aligned token, log-probabilities a_i and pair coefficients
c_ij = alpha_i alpha_j / n_ij (0 for i = j, for pairs below the floor, for absent rows):

    value       = sum_{i != j} c_ij KL(p_i || p_j)                (each pair in both directions)
    d value / dz_i = p_i (m_i - <p_i, m_i> + C_i) - sum_j c_ij p_j
    m_i = sum_j c_ij (a_i - a_j),   C_i = sum_j c_ij

Three passes over the K rows: normalisers, inner products, gradient. No K x K table, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, next_power_of_2


@triton.jit
def _coefficients(alpha, length, member, place, j, alpha_ptr, length_ptr, floor):
    """c_ij for all i, given j."""
    alpha_j = tl.load(alpha_ptr + j)
    length_j = tl.load(length_ptr + j)
    product = alpha * alpha_j
    keep = member & (place != j) & (length_j > 0) & (product > 0) & (product >= floor)
    aligned = tl.minimum(length, length_j)
    return tl.where(keep, product / tl.maximum(aligned, 1).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["K"])
def consistency_kernel(
    z_ptr,  # [B * K, V] float32, row stride stride_z
    g_ptr,  # [B * K, V], row stride stride_g
    alpha_ptr,  # [B * K] float32
    length_ptr,  # [B * K] int64: length of the row's span; 0: no such row
    value_ptr,  # [B] float32
    floor,
    K,
    V,
    stride_z,
    stride_g,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * K
    place = tl.arange(0, BLOCK_K)
    alpha = tl.load(alpha_ptr + first + place, mask=place < K, other=0.0)
    length = tl.load(length_ptr + first + place, mask=place < K, other=0)
    member = (place < K) & (length > 0)
    z_rows = z_ptr + (first + place) * stride_z
    lanes = tl.arange(0, BLOCK_V)

    # logsumexp of every row
    top = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + lanes
        keep = member[:, None] & (v < V)[None, :]
        z = tl.load(z_rows[:, None] + v[None, :], mask=keep, other=float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
        top = higher
    lse = tl.where(member, top + tl.log(tl.where(member, total, 1.0)), 0.0)

    degree = tl.zeros((BLOCK_K,), dtype=tl.float32)  # C_i
    for j in range(K):
        degree += _coefficients(
            alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
        )

    # <p_i, m_i>: the weighted divergences of row i from all others
    spread = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + lanes
        keep = (degree > 0)[:, None] & (v < V)[None, :]
        a = tl.load(z_rows[:, None] + v[None, :], mask=keep, other=0.0) - lse[:, None]
        m = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
        for j in range(K):
            c = _coefficients(
                alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
            )
            lse_j = tl.sum(tl.where(place == j, lse, 0.0), 0)
            a_j = tl.load(z_ptr + (first + j) * stride_z + v, mask=v < V, other=0.0) - lse_j
            m += tl.where(c[:, None] > 0, c[:, None] * (a - a_j[None, :]), 0.0)
        spread += tl.sum(tl.where(keep, tl.exp(a) * m, 0.0), 1)
    tl.store(value_ptr + tl.program_id(0), tl.sum(spread, 0))

    for v0 in range(0, V, BLOCK_V):
        v = v0 + lanes
        keep = (degree > 0)[:, None] & (v < V)[None, :]
        a = tl.load(z_rows[:, None] + v[None, :], mask=keep, other=0.0) - lse[:, None]
        m = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
        pulled = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)  # sum_j c_ij p_j
        for j in range(K):
            c = _coefficients(
                alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
            )
            lse_j = tl.sum(tl.where(place == j, lse, 0.0), 0)
            a_j = tl.load(z_ptr + (first + j) * stride_z + v, mask=v < V, other=0.0) - lse_j
            m += tl.where(c[:, None] > 0, c[:, None] * (a - a_j[None, :]), 0.0)
            pulled += tl.where(c[:, None] > 0, c[:, None] * tl.exp(a_j)[None, :], 0.0)
        grad = tl.exp(a) * (m - spread[:, None] + degree[:, None]) - pulled
        grad = tl.where(keep, grad, 0.0)
        g_at = g_ptr + ((first + place) * stride_g)[:, None] + v[None, :]
        tl.store(
            g_at, grad.to(g_ptr.dtype.element_ty), mask=(place < K)[:, None] & (v < V)[None, :]
        )


def consistency(
    logits: Tensor,  # [B * K, V] float32, unit column stride
    alpha: Tensor,  # [B * K] float32; weight of the row's teacher
    lengths: Tensor,  # [B * K] int64; length of the row's span, 0: no such row
    grad: Tensor,  # [B * K, V], any float dtype; filled with d value / d logits
    *,
    teachers: int,  # K: rows an aligned token
    pair_floor: float,
) -> Tensor:  # [B] float32
    """Sum over pairs of alpha_i alpha_j / n_ij D_ij at every aligned token."""
    B, V = logits.shape[0] // teachers, logits.shape[1]
    value = torch.empty(B, dtype=torch.float32, device=logits.device)
    block_k = next_power_of_2(teachers)
    consistency_kernel[(B,)](
        logits, grad, alpha, lengths, value, pair_floor, teachers, V, logits.stride(0),
        grad.stride(0), BLOCK_K=block_k, BLOCK_V=max(32, min(512, 1024 // block_k)),
        num_warps=4, num_stages=1, **UNFUSED,
    )  # fmt: skip
    return value


def consistency_ref(
    logits: Tensor,
    alpha: Tensor,
    lengths: Tensor,
    *,
    teachers: int,
    pair_floor: float,
) -> tuple[Tensor, Tensor]:
    """(value [B], its gradient [B * K, V]) in plain torch."""
    z = logits.view(-1, teachers, logits.shape[1])
    a, n = alpha.view(-1, teachers), lengths.view(-1, teachers)
    product = a[:, :, None] * a[:, None, :]
    keep = (product > 0) & (product >= pair_floor) & (n[:, :, None] > 0) & (n[:, None, :] > 0)
    keep &= ~torch.eye(teachers, dtype=torch.bool)
    aligned = torch.minimum(n[:, :, None], n[:, None, :]).clamp(min=1)
    c = torch.where(keep, product / aligned, 0.0)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        logp = z.log_softmax(-1)
        kl = (logp.exp()[:, :, None] * (logp[:, :, None] - logp[:, None])).sum(-1)
        value = (c * kl).sum((1, 2))
        (grad,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), grad.view_as(logits)
