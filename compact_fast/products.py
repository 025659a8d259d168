"""Matrix products on a CPU, by what is quickest there.

torch's products go through Intel's MKL. The native module (csrc/products.h) is made for a few
hundred rows by a block of a large vocabulary, and keeps less memory. On an AMD processor with
AVX-512 oneDNN, also part of torch, takes half of MKL's time. All work in float32 throughout; they
add up in another order. The choice depends on the processor alone, so a machine repeats its
numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compact_fast.native import load_native

logger = logging.getLogger(__name__)

PART_BYTES = 2 << 20  # of a product that is added to what is there
# oneDNN compiles a product for every number of rows, 0.3 to 0.7 MB each, and keeps a thousand: rows
# come in so many, the last ones made up, so that questions of any length share a few dozen
ROWS = 32
FEW = 32  # rows; for fewer the native module would pack a weight to read it hardly ever
LONGEST = 4096  # terms of a sum: oneDNN adds them in a row and rounds more, where MKL parts them

Linear = Callable[[Tensor, Tensor], Tensor]
Room = Callable[[tuple[int, ...], Tensor], Tensor]


def _room(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def quick(like: Tensor) -> Linear | None:
    """x [..., in], w [out, in] -> x w^T [..., out] where that beats torch.mm, else None.

    w may be a transposed view. It knows no autograd and always makes new memory.
    """
    return _onednn() if _plain(like) and torch.backends.mkldnn.enabled else None


def linear(x: Tensor, w: Tensor, room: Room = _room) -> Tensor:
    """x [..., in], w [out, in] -> x w^T [..., out]; w may be a transposed view.

    `room(shape, like)`: memory for it, which a library may not ask for. It knows no autograd.
    """
    product = quick(x)
    if product is not None:
        return product(x, w)
    if x.device.type != "cpu" or x.numel() < FEW * x.shape[-1]:
        return torch.nn.functional.linear(x, w)
    out = room((*x.shape[:-1], w.shape[0]), x)
    multiply(out.view(-1, w.shape[0]), x.reshape(-1, x.shape[-1]), w.T)
    return out


def add_linear(into: Tensor, x: Tensor, w: Tensor) -> None:
    """into [n, out] += x [n, in] times w^T; as `linear`."""
    product = quick(into)
    if product is not None:
        into += product(x, w)
    elif len(x) < FEW:
        into.addmm_(x, w.T)
    else:
        multiply(into, x, w.T, add=True)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out [m, n] = a [m, k] b [k, n], or += with `add`; all of one dtype. Returns `out`."""
    product = _native() if all(map(_plain, (out, a, b))) else None
    along = out.stride(1) == 1 and 1 in a.stride() and 1 in b.stride()
    if product is None or not along or 0 in (*out.shape, a.shape[1]):
        return out.addmm_(a, b, beta=int(add))
    product(
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr(), out.stride(0),
        *out.shape, a.shape[1], add, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


@cache
def _native() -> Callable[..., None] | None:
    """The native module's product, or None."""
    module = load_native()
    if isinstance(module, str) or not getattr(module, "can_multiply", lambda: False)():
        return None
    found: Callable[..., None] = module.multiply
    return found


def add_transposed(into: Tensor, g: Tensor, x: Tensor, *, overwrite: bool = False) -> None:
    """into [m, k] += g^T x for g [n, m] and x [n, k], or = instead; all of one dtype.

    The quicker library makes memory for a product, so it makes one in parts.
    """
    product, n, whole = quick(into), g.shape[0], 0
    if product is not None and n <= LONGEST:
        whole = n // ROWS * ROWS
    if whole < n or not whole:  # the last rows, or all
        multiply(into, g[whole:].T, x[whole:], add=not overwrite)
        overwrite = False
    if product is None or not whole:
        return
    step = max(1, PART_BYTES // (ROWS * into.shape[1] * into.itemsize)) * ROWS
    g, x = g[:whole], x[:whole]
    for part, columns in zip(torch.split(into, step), torch.split(g, step, 1), strict=True):
        made = product(columns.T, x.T)
        if overwrite:
            part.copy_(made)
        else:
            part += made
        del made  # its place takes the next one


@cache
def _onednn() -> Linear | None:
    """oneDNN's product, where it is there, works, and is known to be the quicker one."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() != "AuthenticAMD":
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        x, w = torch.arange(12.0).view(3, 4), torch.arange(20.0).view(5, 4)
        found = [op(x, w, None, "none", [], ""), op(x, w.T.contiguous().T, None, "none", [], "")]
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("products on this CPU take longer than they could: no oneDNN (%s)", error)
        return None
    if not all(torch.equal(f, x @ w.T) for f in found):  # whole numbers: exact in any order
        logger.info("products on this CPU take longer than they could: oneDNN's are wrong")
        return None

    def product(x: Tensor, w: Tensor) -> Tensor:
        if w.shape[1] > LONGEST:
            return x @ w.T
        rows = x.reshape(-1, x.shape[-1])
        missing = -rows.shape[0] % ROWS
        if missing:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        result: Tensor = op(rows, w, None, "none", [], "")
        return result[: result.shape[0] - missing].view(*x.shape[:-1], w.shape[0])

    return product


def _vendor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""
