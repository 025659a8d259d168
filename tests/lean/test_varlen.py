"""Attention by one call for all segments: where keys come from and gradients go, with the kernel
replaced by its definition; on a GPU (tests/trainer/test_training_on_gpu.py) by itself."""

import pytest
import torch

from compact_fast.lean import attention, varlen

TREES = ((3, 2, 4), (5,), (2, 1, 1, 3), (0, 4, 2))
HEADS, KV_HEADS, D = 4, 2, 8


def kernel(query, key, value, places, window, scale):
    """Every sequence by itself, causal from its end."""
    out = []
    for s in range(places.cu_queries.numel() - 1):
        q = query[places.cu_queries[s] : places.cu_queries[s + 1]]
        k, v = (x[places.cu_keys[s] : places.cu_keys[s + 1]] for x in (key, value))
        n, m = len(q), len(k)
        assert n <= places.most_queries
        assert m <= places.most_keys
        distance = torch.arange(n)[:, None] + m - n - torch.arange(m)[None]
        sees = (distance >= 0) & (distance < (m if window is None else window))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=sees, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        )
    return torch.cat(out)


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(varlen, "flash_refusal", lambda device, dtype: None)
    monkeypatch.setattr(varlen, "_flash", kernel)


def tensors(trees, seed=0):
    g = torch.Generator().manual_seed(seed)
    N = sum(map(sum, trees))
    return [
        torch.randn(1, h, N, D, generator=g, dtype=torch.float64).requires_grad_()
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("trees", [TREES, TREES[:1], ((5,), (4,)), ((0, 3),)])
def test_equals_a_call_a_segment(flash, trees, window):
    found = []
    for attend in (varlen.attend_by_flash, attention.attend):
        qkv = tensors(trees)
        out = attend(*qkv, trees, window, 0.3)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
        (out * weight).sum().backward()
        found.append([out, *(t.grad for t in qkv)])
    for mine, theirs in zip(*found, strict=True):
        # a prompt's gradient comes together in float32
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_what_the_kernels_do_not_take_is_left_to_others(flash):
    qkv = tensors(TREES)
    assert varlen.attend_by_flash(*qkv, TREES, None, None) is not None
    odd = [t[..., :7] for t in qkv]
    assert varlen.attend_by_flash(*odd, TREES, None, None) is None


def test_without_the_kernels_the_reason_is_told():
    cuda = torch.device("cuda")
    assert varlen.flash_refusal(torch.device("cpu"), torch.bfloat16) == "no flash kernels on cpu"
    assert "not in float32" in varlen.flash_refusal(cuda, torch.float32)
    if not torch.cuda.is_available():
        assert "sees no CUDA" in varlen.flash_refusal(cuda, torch.bfloat16)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda out, q, k, v: out, 0.0),
        (lambda out, q, k, v: 1.1 * out, 0.09),
        (lambda out, q, k, v: out.detach() + 0 * (q.sum() + k.sum() + v.sum()), 0.99),
        (lambda out, q, k, v: out.detach() + 0 * q.sum(), torch.inf),
    ],
)
def test_the_trial_of_the_kernels_notices(monkeypatch, fault, error):
    def broken(query, key, value, *rest):
        return fault(kernel(query, key, value, *rest), query, key, value)

    monkeypatch.setattr(varlen, "_flash", broken)
    found = varlen.trial_error(torch.device("cpu"), torch.float32)
    assert error <= found <= 1.2 * error + 1e-5


def test_places_are_made_once_for_all_layers():
    cpu = torch.device("cpu")
    assert varlen.lengths_of(TREES, cpu) is varlen.lengths_of(TREES, cpu)


def test_places_made_while_scoring_serve_training():
    with torch.inference_mode():
        places = varlen.lengths_of(((4, 3), (2, 2)), torch.device("cpu"))
    assert not places.keys.is_inference()
