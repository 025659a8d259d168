"""The consistency term and its gradient on aligned rows.

For the K teachers' rows r_i of one aligned token, log-probabilities a_i and pair coefficients
c_ij = alpha_i alpha_j / n_ij (0 for i = j, for pairs below the floor, for absent rows):

    value       = sum_{i != j} c_ij KL(p_i || p_j)                (each pair in both directions)
    d value / dz_i = p_i (m_i - <p_i, m_i> + C_i) - sum_j c_ij p_j
    m_i = sum_j c_ij (a_i - a_j),   C_i = sum_j c_ij

Three launches: normalisers, one program a row; inner products and gradients, one program an aligned
token and stretch of the vocabulary, for tokens alone are too few to fill a device. Stretches are
summed in order: no atomics.
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


@triton.jit
def _log_p(z, lse):
    """z - lse, finite for a logit of -inf: the difference of two of them is 0."""
    a = z - lse
    return tl.where(a < -1e30, -1e30, a)


@triton.jit(do_not_specialize_on_alignment=["length_ptr"])
def row_lse_kernel(
    z_ptr,  # [n, V] float32, row stride stride_z
    length_ptr,  # [n] int64; 0: no such row
    lse_ptr,  # [n] float32
    V,
    stride_z,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if tl.load(length_ptr + r) == 0:
        tl.store(lse_ptr + r, 0.0)
        return
    # a running maximum and sum a lane: no reduction across the block inside the loop
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + r * stride_z + v, mask=v < V, other=float("-inf"))
        higher = tl.maximum(top, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
    peak = tl.max(top, 0)
    shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - peak))
    tl.store(lse_ptr + r, peak + tl.log(tl.sum(total * shrink, 0)))


@triton.jit
def _group(alpha_ptr, length_ptr, lse_ptr, floor, K, BLOCK_K: tl.constexpr):
    """(first row, places, alpha, length, member, lse, C_i) of the program's aligned token."""
    first = tl.program_id(0).to(tl.int64) * K
    place = tl.arange(0, BLOCK_K)
    alpha = tl.load(alpha_ptr + first + place, mask=place < K, other=0.0)
    length = tl.load(length_ptr + first + place, mask=place < K, other=0)
    lse = tl.load(lse_ptr + first + place, mask=place < K, other=0.0)
    member = (place < K) & (length > 0)
    degree = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for j in range(K):
        degree += _coefficients(
            alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
        )
    return first, place, alpha, length, member, lse, degree


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=["length_ptr"])
def pair_products_kernel(
    z_ptr,  # [B * K, V] float32, row stride stride_z
    alpha_ptr,  # [B * K] float32
    length_ptr,  # [B * K] int64: length of the row's span; 0: no such row
    lse_ptr,  # [B * K] float32
    spread_ptr,  # [stretches, B * K] float32: <p_i, m_i> over a stretch of the vocabulary
    floor,
    K,
    V,
    stride_z,
    STRETCH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, place, alpha, length, member, lse, degree = _group(
        alpha_ptr, length_ptr, lse_ptr, floor, K, BLOCK_K
    )
    z_rows = z_ptr + (first + place) * stride_z
    spread = tl.zeros((BLOCK_K,), dtype=tl.float32)
    start = tl.program_id(1) * STRETCH
    for v0 in range(start, tl.minimum(start + STRETCH, V), BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        keep = (degree > 0)[:, None] & (v < V)[None, :]
        a = _log_p(tl.load(z_rows[:, None] + v[None, :], mask=keep, other=0.0), lse[:, None])
        m = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
        for j in range(K):
            c = _coefficients(
                alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
            )
            lse_j = tl.load(lse_ptr + first + j)
            z_j = tl.load(z_ptr + (first + j) * stride_z + v, mask=v < V, other=0.0)
            a_j = _log_p(z_j, lse_j)
            m += tl.where(c[:, None] > 0, c[:, None] * (a - a_j[None, :]), 0.0)
        spread += tl.sum(tl.where(keep, tl.exp(a) * m, 0.0), 1)
    rows = tl.num_programs(0).to(tl.int64) * K
    at = spread_ptr + tl.program_id(1) * rows + first + place
    tl.store(at, spread, mask=place < K)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=["length_ptr"])
def pair_gradients_kernel(
    z_ptr,  # [B * K, V] float32, row stride stride_z
    g_ptr,  # [B * K, V], row stride stride_g
    alpha_ptr,  # [B * K] float32
    length_ptr,  # [B * K] int64
    lse_ptr,  # [B * K] float32
    spread_ptr,  # [stretches, B * K] float32
    value_ptr,  # [B] float32
    floor,
    K,
    V,
    stride_z,
    stride_g,
    STRETCH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, place, alpha, length, member, lse, degree = _group(
        alpha_ptr, length_ptr, lse_ptr, floor, K, BLOCK_K
    )
    rows = tl.num_programs(0).to(tl.int64) * K
    spread = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for part in range(tl.num_programs(1)):
        spread += tl.load(spread_ptr + part * rows + first + place, mask=place < K, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(value_ptr + tl.program_id(0), tl.sum(spread, 0))
    z_rows = z_ptr + (first + place) * stride_z
    g_rows = g_ptr + (first + place) * stride_g
    start = tl.program_id(1) * STRETCH
    for v0 in range(start, tl.minimum(start + STRETCH, V), BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        keep = (degree > 0)[:, None] & (v < V)[None, :]
        a = _log_p(tl.load(z_rows[:, None] + v[None, :], mask=keep, other=0.0), lse[:, None])
        m = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
        pulled = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)  # sum_j c_ij p_j
        for j in range(K):
            c = _coefficients(
                alpha, length, member, place, j, alpha_ptr + first, length_ptr + first, floor
            )
            lse_j = tl.load(lse_ptr + first + j)
            z_j = tl.load(z_ptr + (first + j) * stride_z + v, mask=v < V, other=0.0)
            a_j = _log_p(z_j, lse_j)
            m += tl.where(c[:, None] > 0, c[:, None] * (a - a_j[None, :]), 0.0)
            pulled += tl.where(c[:, None] > 0, c[:, None] * tl.exp(a_j)[None, :], 0.0)
        grad = tl.exp(a) * (m - spread[:, None] + degree[:, None]) - pulled
        grad = tl.where(keep, grad, 0.0)
        tl.store(
            g_rows[:, None] + v[None, :],
            grad.to(g_ptr.dtype.element_ty),
            mask=(place < K)[:, None] & (v < V)[None, :],
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
    n, V = logits.shape
    lse = torch.empty(n, dtype=torch.float32, device=logits.device)
    row_lse_kernel[(n,)](
        logits, lengths, lse, V, logits.stride(0), BLOCK=min(4096, next_power_of_2(V)),
        num_warps=8, num_stages=1, **UNFUSED,
    )  # fmt: skip
    block_k = next_power_of_2(teachers)
    # 1,024 entries a program: of twice as many, masks do not fit the scalar registers of gfx942;
    # with half the warps sm_100 spills
    block_v = max(32, min(512, 1024 // block_k))
    stretch = 16 * block_v  # 4,096 columns of 4 teachers: 38 stretches of 151,936 words
    grid = (n // teachers, triton.cdiv(V, stretch))
    spread = torch.empty(grid[1], n, dtype=torch.float32, device=logits.device)
    value = torch.empty(grid[0], dtype=torch.float32, device=logits.device)
    sizes = {
        "STRETCH": stretch, "BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": 8,
        "num_stages": 1, **UNFUSED,
    }  # fmt: skip
    pair_products_kernel[grid](
        logits, alpha, lengths, lse, spread, pair_floor, teachers, V, logits.stride(0), **sizes
    )
    pair_gradients_kernel[grid](
        logits, grad, alpha, lengths, lse, spread, value, pair_floor, teachers, V,
        logits.stride(0), grad.stride(0), **sizes,
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
