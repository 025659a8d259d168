"""Every kernel and launch configuration, on tensors without memory, for bench/kernel_report.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from compact_fast.triton_kernels import consistency as consistency_kernels
from compact_fast.triton_kernels import (
    gradient_rows,
    gradient_scale,
    kept_columns,
    launch,
    logits_gemm,
    row_softmax,
)
from compact_fast.triton_kernels import row_statistics as statistics_kernels
from compact_fast.triton_kernels import teacher_weights as weight_kernels
from torch import Tensor

BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64

ROWS = 4096  # rows of a chunk
VOCAB, WIDTH = 151_936, 1536  # Qwen2.5-1.5B
TEACHERS, LENGTH, QUESTIONS = 4, 1024, 4


@dataclass(frozen=True)
class Case:
    """One launch, with its cost a token (a row of the chunk)."""

    variant: str
    launch: Callable[[], object]
    flops: float
    bytes: float
    matrix: bool = False  # its products run on matrix units
    quick: bool = True  # compiled by the tests, too
    kernel: str = ""  # of a launch of several, the one that is meant


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# E kept, entropy, bias, second round, sizes off by one (no multiple of a tile), dtype
FORMS = (
    (False, False, False, False, 0, F16),
    (False, True, True, False, 0, F16),
    (False, True, True, True, 0, F16),
    (False, True, True, True, 1, F16),
    (True, False, False, False, 0, BF16),
    (True, True, True, False, 0, BF16),
    (True, True, True, True, 0, BF16),
    (True, True, False, False, 0, BF16),
    (True, False, True, False, 0, BF16),
    (True, False, False, True, 0, BF16),
    (False, False, False, False, 0, BF16),
    (False, True, False, False, 0, BF16),
    (False, True, False, True, 0, BF16),
    (True, False, False, False, 1, BF16),
    (True, True, True, True, 1, BF16),
)
CAPPED_FORMS = (
    (True, False, False, False, 0, BF16),
    (True, True, True, True, 0, BF16),
    (False, False, False, False, 0, BF16),
    (False, True, True, False, 0, F16),
)
SOFTCAP = 30.0  # of Gemma's logits


def gemm_cases(arch: str) -> Iterator[Case]:
    """The logits GEMM in every form that is launched."""
    forms = (*((form, 0.0) for form in FORMS), *((form, SOFTCAP) for form in CAPPED_FORMS))
    for (keep, statistics, bias, redo, odd, dtype), cap in forms:

        def run(
            keep: bool = keep,
            statistics: bool = statistics,
            bias: bool = bias,
            redo: bool = redo,
            odd: int = odd,
            dtype: torch.dtype = dtype,
            cap: float = cap,
        ) -> None:
            rows, vocab, width = ROWS - odd, VOCAB - odd, WIDTH - 8 * odd
            x, weight = meta(rows, width, dtype=dtype), meta(vocab, width, dtype=dtype)
            config = launch.gemm_config(x, statistics=statistics, bias=bias, softcap=cap)
            padded = logits_gemm.padded_width(vocab)
            logits_gemm.logits_exp(
                x,
                weight,
                meta(vocab, dtype=dtype) if bias else None,
                meta(rows, dtype=I64),
                meta(rows),
                meta(rows, padded, dtype=BF16)[:, :vocab] if keep else None,
                logits_gemm.new_partials(rows, weight, config, statistics=statistics),
                config,
                statistics=statistics,
                redo=meta(rows, dtype=torch.uint8) if redo else None,
                softcap=cap,
            )

        names = [
            "E" if keep else "sums only",
            *(["entropy"] if statistics else []),
            *(["bias"] if bias else []),
            *(["redo"] if redo else []),
            *(["odd sizes"] if odd else []),
            *(["float16"] if dtype == F16 else []),
            *(["softcap"] if cap else []),
        ]
        tiles = VOCAB / launch.LOGITS_GEMM[arch].block_n
        traffic = 2 * WIDTH + 2 * VOCAB * WIDTH / ROWS + 4 * tiles * (3 if statistics else 2)
        yield Case(
            ", ".join(names),
            run,
            2.0 * VOCAB * WIDTH,
            traffic + (2 * VOCAB if keep else 0),
            matrix=True,
            quick=not cap
            and (keep, statistics, bias, redo, odd)
            in ((True, False, False, False, 0), (True, True, True, True, 0)),
        )


def candidate_cases(arch: str) -> Iterator[Case]:
    """What autotuning may choose, with the plain epilogue and with all of it."""
    x, weight = meta(ROWS, WIDTH, dtype=BF16), meta(VOCAB, WIDTH, dtype=BF16)
    for config in launch.LOGITS_GEMM_CANDIDATES[arch]:
        for full in (False, True):

            def run(config: launch.GemmConfig = config, full: bool = full) -> None:
                logits_gemm.logits_exp(
                    x,
                    weight,
                    meta(VOCAB, dtype=BF16) if full else None,
                    meta(ROWS, dtype=I64),
                    meta(ROWS),
                    meta(ROWS, VOCAB, dtype=BF16),
                    logits_gemm.new_partials(ROWS, weight, config, statistics=full),
                    config,
                    statistics=full,
                )

            sizes = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.num_warps} warps"
            traffic = 2 * WIDTH + 2 * VOCAB * WIDTH / ROWS + 2 * VOCAB
            yield Case(
                f"candidate {sizes}" + (", entropy, bias" if full else ""),
                run,
                2.0 * VOCAB * WIDTH,
                traffic + 4 * VOCAB / config.block_n * (3 if full else 2),
                matrix=True,
                quick=False,
            )


def row_cases(arch: str) -> Iterator[Case]:
    """Row statistics, the in-place row kernel, row scaling."""
    block_n = launch.LOGITS_GEMM[arch].block_n
    tiles = -(-VOCAB // block_n)
    targets, x = meta(ROWS, dtype=I64), meta(ROWS, WIDTH, dtype=BF16)
    head = meta(VOCAB, WIDTH, dtype=BF16)
    yield Case("label", lambda: statistics_kernels.row_dot(x, head, targets), 2 * WIDTH, 4 * WIDTH)
    yield Case(
        "gold, by row",
        lambda: statistics_kernels.row_dot(x, meta(4, WIDTH), targets, rows=targets),
        2 * WIDTH,
        2 * WIDTH,
    )
    for dtype in (F16, F32):
        yield Case(
            f"label, {str(dtype).removeprefix('torch.')} head",
            lambda dtype=dtype: statistics_kernels.row_dot(
                meta(ROWS, WIDTH, dtype=dtype), meta(VOCAB, WIDTH, dtype=dtype), targets
            ),
            2 * WIDTH,
            2.0 * dtype.itemsize * WIDTH,
            quick=False,
        )
    yield Case(
        "label, bias",
        lambda: statistics_kernels.row_dot(x, head, targets, bias=meta(VOCAB, dtype=BF16)),
        2 * WIDTH,
        4 * WIDTH,
        quick=False,
    )
    for statistics in (False, True):
        for redone in (False, True):

            def finish(statistics: bool = statistics, redone: bool = redone) -> None:
                total = meta(tiles, ROWS)
                statistics_kernels.finish_rows(
                    logits_gemm.Partials(total, total, total),
                    meta(ROWS),
                    targets,
                    meta(ROWS, VOCAB, dtype=BF16) if redone else None,
                    statistics_kernels.RowStatistics.empty(meta(ROWS), statistics=statistics),
                    redone=redone,
                )

            name = ("entropy, " if statistics else "") + ("second" if redone else "first")
            parts = 3 if statistics else 2
            yield Case(
                name, finish, parts * tiles, 4.0 * parts * tiles, quick=statistics and redone
            )
        for dtype in (BF16, F16, F32):
            yield Case(
                ("entropy, " if statistics else "") + str(dtype).removeprefix("torch."),
                lambda statistics=statistics, dtype=dtype: row_softmax.row_softmax(
                    meta(ROWS, VOCAB), targets, dtype, statistics=statistics
                ),
                4.0 * VOCAB,
                (8 + dtype.itemsize) * VOCAB,
                quick=statistics and dtype != F32,
            )
    yield Case(
        "second, softcap",
        lambda: statistics_kernels.finish_rows(
            logits_gemm.Partials(meta(tiles, ROWS), meta(tiles, ROWS), meta(tiles, ROWS)),
            meta(ROWS),
            targets,
            meta(ROWS, VOCAB, dtype=BF16),
            statistics_kernels.RowStatistics.empty(meta(ROWS), statistics=False),
            redone=True,
            softcap=SOFTCAP,
        ),
        2 * tiles,
        8.0 * tiles,
        quick=False,
    )
    for dtype in (BF16, F16, F32):
        yield Case(
            f"entropy, {str(dtype).removeprefix('torch.')}, softcap",
            lambda dtype=dtype: row_softmax.row_softmax(
                meta(ROWS, VOCAB), targets, dtype, statistics=True, softcap=SOFTCAP
            ),
            4.0 * VOCAB,
            (8 + dtype.itemsize) * VOCAB,
            quick=False,
        )
    factor = meta(ROWS)
    yield Case(
        "",
        lambda: gradient_rows.row_factors(factor, targets, targets, targets, factor),
        2,
        28,
    )
    for name, source, out, add in (
        ("product to dH", meta(ROWS, WIDTH), meta(ROWS, WIDTH), False),
        ("product to dH, add", meta(ROWS, WIDTH), meta(ROWS, WIDTH), True),
        ("x for dW", x, x, False),
        ("x for dW, float16", meta(ROWS, WIDTH, dtype=F16), meta(ROWS, WIDTH, dtype=F16), False),
        ("x for dW, float16 to float32", meta(ROWS, WIDTH, dtype=F16), meta(ROWS, WIDTH), False),
    ):
        yield Case(
            name,
            lambda name=name, source=source, out=out, add=add: gradient_rows.scale_rows(
                source, factor, out, to=targets if name.startswith("product") else None, add=add
            ),
            WIDTH,
            float(source.element_size() + out.element_size() * (2 if add else 1)) * WIDTH,
            quick=add,
        )
    for dtype in (BF16, F16, F32):
        yield Case(
            str(dtype).removeprefix("torch."),
            lambda dtype=dtype: gradient_rows.clear_rows(
                meta(ROWS, VOCAB, dtype=dtype), factor, factor
            ),
            0,
            8,
            quick=dtype == BF16,
        )


def scale_cases(arch: str) -> Iterator[Case]:
    """The head's gradient at the end of a step; a token's share of it."""
    size = VOCAB * WIDTH / ROWS
    for dtype in (BF16, F16, F32):
        name, width = str(dtype).removeprefix("torch."), dtype.itemsize
        grad = meta(VOCAB, WIDTH, dtype=dtype)
        yield Case(
            name,
            lambda grad=grad: gradient_scale.divide_into(meta(VOCAB, WIDTH), meta(1), grad),
            size,
            (4 + width) * size,
            quick=dtype == BF16,
        )
        yield Case(
            f"{name}, by 1",
            lambda grad=grad: gradient_scale.multiply_unless_one(grad, meta(1)),
            0,
            0,
            quick=dtype == BF16,
        )


def score_cases(arch: str) -> Iterator[Case]:
    """Segment sums and weights."""
    T, S = TEACHERS * LENGTH * QUESTIONS, TEACHERS * QUESTIONS
    tokens, flags = meta(T), meta(T, dtype=torch.bool)
    Info = weight_kernels.Information
    for name, information in (
        ("logit", Info(values=tokens, counted=flags, thinking=flags)),
        ("logprob, mean", Info(tokens, tokens, flags, flags, length_norm=True)),
        ("pvi", Info(spans=meta(S, 2, dtype=I64), prior=meta(S))),
    ):
        yield Case(
            name,
            lambda information=information: weight_kernels.sequence_scores(
                tokens, meta(T, dtype=I64), meta(S + 1, dtype=I64), information
            ),
            8,
            22,
            quick=name == "logprob, mean",
        )
    betas = (1.0, 1.0, 0.5)
    for rule, consensus, teachers in (
        ("softmax", "given", 4),
        ("softmax", "both", 16),
        ("best", "none", 1),
        ("shares", "given", 33),
    ):
        yield Case(
            f"{rule}, consensus {consensus}, K={teachers}",
            lambda rule=rule, consensus=consensus, teachers=teachers: (
                weight_kernels.teacher_weights(
                    *(meta(S) for _ in range(5)),
                    meta(QUESTIONS + 1, dtype=I64),
                    weight_kernels.WeightRule(rule, betas, consensus, True, True, filter_below=0.8),
                    most_teachers=teachers,
                )
            ),
            60 * S / ROWS,
            40 * S / ROWS,
            quick=teachers == 16,
        )


def consistency_cases(arch: str) -> Iterator[Case]:
    """The consistency rows, by number of teachers."""
    for teachers, dtype in ((2, BF16), (4, BF16), (7, BF16), (16, BF16), (4, F32)):
        rows = 8 * teachers
        share = VOCAB * rows / ROWS  # an answer of 8 tokens a question
        for kernel, flops, traffic in (
            ("row_lse", 6, 4),
            ("pair_products", 2 + 4 * teachers, 4),
            ("pair_gradients", 4 + 6 * teachers, 6),
        ):
            if dtype == F32 and kernel != "pair_gradients":
                continue  # the others do not see the gradient's dtype
            yield Case(
                f"K={teachers}" + (", float32" if dtype == F32 else ""),
                lambda teachers=teachers, rows=rows, dtype=dtype: consistency_kernels.consistency(
                    meta(rows, VOCAB),
                    meta(rows),
                    meta(rows, dtype=I64),
                    meta(rows, VOCAB, dtype=dtype),
                    teachers=teachers,
                    pair_floor=1e-4,
                ),
                flops * share,
                traffic * share,
                quick=teachers == 4 and dtype == BF16,
                kernel=f"{kernel}_kernel",
            )


def kept_cases(arch: str) -> Iterator[Case]:
    """The gradient products over kept columns, with a fifth of them kept."""
    share = 0.2
    blocks = ROWS // kept_columns.BLOCK_ROWS
    for dtype, of_head in ((BF16, BF16), (F16, F16), (F32, F32), (F32, BF16), (F32, F16)):
        name, size = str(dtype).removeprefix("torch."), dtype.itemsize
        if of_head != dtype:
            name += f", {str(of_head).removeprefix('torch.')} head"
        x, head = meta(ROWS, WIDTH, dtype=dtype), meta(VOCAB, WIDTH, dtype=of_head)
        exps, rows = meta(ROWS, VOCAB, dtype=dtype), meta(ROWS)  # a multiple of the tile
        kept = kept_columns.Kept(
            meta(blocks, VOCAB, dtype=I64),
            meta(blocks, VOCAB, dtype=torch.int32),
            meta(blocks, dtype=torch.int32),
            meta(VOCAB),
        )
        launches: tuple[tuple[Callable[[], object], float, float], ...] = (
            (lambda e=exps, r=rows: kept_columns.keep_columns(e, r, r, r, 2**-12),  # type: ignore[misc]
             4 * VOCAB, size * VOCAB),
            (lambda e=exps, r=rows, k=kept: kept_columns.move_together(e, r, meta(VOCAB), k),  # type: ignore[misc]
             3 * VOCAB, (size * (1 + share)) * VOCAB),
            (lambda e=exps, w=head, k=kept: kept_columns.kept_to_rows(e, w, k),  # type: ignore[misc]
             2 * share * VOCAB * WIDTH,
             share * (size * VOCAB + size * VOCAB * WIDTH / kept_columns.BLOCK_ROWS)),
            (lambda e=exps, x=x, k=kept: kept_columns.kept_to_head(e, x, k, meta(VOCAB, WIDTH)),  # type: ignore[misc]
             2 * share * VOCAB * WIDTH,
             share * (size * VOCAB + 8 * VOCAB * WIDTH / kept_columns.BLOCK_ROWS)),
        )  # fmt: skip
        for i, (run, flops, traffic) in enumerate(launches):
            if of_head == dtype or i == 2:  # the others do not read the head
                products = i > 1 and dtype != F32
                yield Case(name, run, flops, traffic, matrix=products, quick=dtype == BF16)


def cases(arch: str) -> Iterator[Case]:
    """Every kernel and launch configuration of an architecture."""
    families = (
        gemm_cases, candidate_cases, row_cases, scale_cases, score_cases, consistency_cases,
        kept_cases,
    )  # fmt: skip
    for family in families:
        yield from family(arch)
