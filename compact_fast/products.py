"""Matrix products with a weight on a CPU, by the library that is quicker there.

torch's products go through Intel's MKL, which reaches four fifths of what oneDNN, also part of
torch, makes of an AMD processor with AVX-512. Both work in float32 throughout; they add up in
another order. The choice depends on the processor alone, so a machine repeats its numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PART_BYTES = 2 << 20  # of a product that is added to what is there
# oneDNN compiles a product for every number of rows, 0.3 to 0.7 MB each, and keeps a thousand: rows
# come in so many, the last ones made up, so that questions of any length share a few dozen
ROWS = 32
LONGEST = 4096  # terms of a sum: oneDNN adds them in a row and rounds more, where MKL parts them

Linear = Callable[[Tensor, Tensor], Tensor]


def quick(like: Tensor) -> Linear | None:
    """x [..., in], w [out, in] -> x w^T [..., out] where that beats torch.mm, else None.

    w may be a transposed view. It knows no autograd and always makes new memory.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return None
    return _onednn() if torch.backends.mkldnn.enabled else None


def add_transposed(into: Tensor, g: Tensor, x: Tensor, *, overwrite: bool = False) -> None:
    """into [m, k] += g^T x for g [n, m] and x [n, k], or = instead; all of one dtype.

    The quicker library makes memory for a product, so it makes one in parts.
    """
    product, n, whole = quick(into), g.shape[0], 0
    if product is not None and n <= LONGEST:
        whole = n // ROWS * ROWS
    if whole < n or not whole:  # the last rows, or all
        into.addmm_(g[whole:].T, x[whole:], beta=0 if overwrite else 1)
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
