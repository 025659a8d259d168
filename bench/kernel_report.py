"""Static report on every kernel and launch configuration: `python -m bench.kernel_report`.

Compiles for GPUs that are not there and writes bench/results/kernels.csv and docs/kernels.md.
Registers, spills, shared memory and instruction counts are read from the machine code. Times are a
roofline MODEL, never a measurement: the larger of FLOPs / peak and bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from compact_fast.triton_kernels import consistency as consistency_kernels
from compact_fast.triton_kernels import (
    gradient_rows,
    kept_columns,
    launch,
    logits_gemm,
    row_softmax,
)
from compact_fast.triton_kernels import row_statistics as statistics_kernels
from compact_fast.triton_kernels import teacher_weights as weight_kernels
from torch import Tensor

from bench.aot import TARGETS, Compiled, compiling

ROOT = Path(__file__).parent.parent
BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64

# dense bfloat16 TFLOP/s and TB/s, vendors' data sheets (A100 80 GB SXM, H100 SXM, B200, MI300X)
CHIPS = {
    "sm_80": ("A100", 312.0, 2.04),
    "sm_90": ("H100", 989.0, 3.35),
    "sm_100": ("B200", 2250.0, 8.0),
    "gfx942": ("MI300X", 1307.0, 5.3),
}
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


def gemm_cases(arch: str) -> Iterator[Case]:
    """The logits GEMM in every form that is launched."""
    for keep, statistics, bias, redo, odd, *dtypes in (
        (False, False, False, False, 0, F16),
        (False, True, True, False, 0, F16),
        (False, True, True, True, 0, F16),
        (False, True, True, True, 1, F16),
        (True, False, False, False, 0),
        (True, True, True, False, 0),
        (True, True, True, True, 0),
        (True, True, False, False, 0),
        (True, False, True, False, 0),
        (True, False, False, True, 0),
        (False, False, False, False, 0),
        (False, True, False, False, 0),
        (False, True, False, True, 0),
        (True, False, False, False, 1),  # no size is a multiple of a tile
        (True, True, True, True, 1),
    ):
        dtype = dtypes[0] if dtypes else BF16

        def run(
            keep: bool = keep,
            statistics: bool = statistics,
            bias: bool = bias,
            redo: bool = redo,
            odd: int = odd,
            dtype: torch.dtype = dtype,
        ) -> None:
            rows, vocab, width = ROWS - odd, VOCAB - odd, WIDTH - 8 * odd
            x, weight = meta(rows, width, dtype=dtype), meta(vocab, width, dtype=dtype)
            config = launch.gemm_config(x, statistics=statistics, bias=bias)
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
            )

        names = [
            "E" if keep else "sums only",
            *(["entropy"] if statistics else []),
            *(["bias"] if bias else []),
            *(["redo"] if redo else []),
            *(["odd sizes"] if odd else []),
            *(["float16"] if dtype == F16 else []),
        ]
        tiles = VOCAB / launch.LOGITS_GEMM[arch].block_n
        traffic = 2 * WIDTH + 2 * VOCAB * WIDTH / ROWS + 4 * tiles * (3 if statistics else 2)
        yield Case(
            ", ".join(names),
            run,
            2.0 * VOCAB * WIDTH,
            traffic + (2 * VOCAB if keep else 0),
            matrix=True,
            quick=(keep, statistics, bias, redo, odd)
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
        gemm_cases, candidate_cases, row_cases, score_cases, consistency_cases, kept_cases,
    )  # fmt: skip
    for family in families:
        yield from family(arch)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    case: Case
    compiled: Compiled

    @property
    def model_us(self) -> float:
        """Roofline time of the chunk in microseconds: a model."""
        _, tflops, tbytes = CHIPS[self.compiled.arch]
        peak = tflops if self.case.matrix else tflops / 16  # vector units, float32
        return ROWS * max(self.case.flops / peak, self.case.bytes / tbytes) * 1e-6


def compile_cases(arch: str, *, quick: bool = False) -> list[Row]:
    """Compile them all, or those that the tests look at."""
    rows = []
    for case in cases(arch):
        if quick and not case.quick:
            continue
        with compiling(arch) as found:
            case.launch()
        meant = (c for c in found if case.kernel in ("", c.kernel))
        rows += [Row(case, compiled) for compiled in meant]
    return rows


COLUMNS = (
    "arch", "kernel", "variant", "registers", "spills", "shared_bytes", "shared_limit",
    "instructions", "bytes_per_token", "flops_per_token", "model_us_per_4096_rows", "warps",
    "stages",
)  # fmt: skip


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def record(row: Row) -> dict[str, object]:
    c = row.compiled
    return dict(
        zip(
            COLUMNS,
            (
                c.arch, c.kernel.removesuffix("_kernel"), row.case.variant, c.registers, c.spills,
                c.shared_bytes, c.shared_limit,
                " ".join(f"{n}:{count}" for n, count in c.instructions.items()),
                _figure(row.case.bytes), _figure(row.case.flops), _figure(row.model_us),
                c.num_warps, c.num_stages,
            ),
            strict=True,
        )
    )  # fmt: skip


PAGE = """# Kernels, as compiled

Nothing on this page was run on a GPU. `python -m bench.kernel_report` compiles every kernel in
every launch configuration for four architectures and reads the machine code; all {total} rows are
in [`bench/results/kernels.csv`](../bench/results/kernels.csv), the main ones below. That the
kernels compute the right numbers is tested in Triton's interpreter against float64
(`tests/triton_kernels`).

- Triton {triton}, {date}. Spilled registers: {spills}. Shared memory over a chip's limit: {over}.
- The logits GEMM uses the matrix units of each chip (HMMA, HGMMA, UTCHMMA, v_mfma) and, from sm_90
  on, bulk copies (UTMALDG, UTMASTG); its largest tile needs {largest} bytes of shared memory.
- **Model, not measurement:** the time is max(FLOPs / peak, bytes / bandwidth) for {rows} rows of
  Qwen2.5-1.5B's head (V = {vocab:,}, D = {width:,}) with the data sheets' numbers; vector work
  counts at a sixteenth of the matrix peak. A kernel cannot be faster; how much slower it is, only
  a GPU can say. {chips}.
- One step with a frozen head is the GEMM, finish_rows twice and one library product of the same
  FLOPs; a trained head adds a second product. Nothing else passes over [rows, V].
- In float32, in float16 where gradients are wanted, and where hidden states and head differ in
  dtype, the library's GEMM and row_softmax stand in for the logits GEMM.
- With `skip_below`, column_maxima and move_together pass over [rows, V] once each, and kept_to_rows
  and kept_to_head stand in for the library's products; the table takes a fifth of the columns kept.
- "candidate" rows of the CSV are what `COMPACT_FAST_AUTOTUNE=1` chooses among; the table in
  `triton_kernels/launch.py`, each line with its reason, is what runs otherwise.

{table}
"""


def write(rows: list[Row]) -> None:
    import triton

    records = [record(row) for row in rows]
    with open(ROOT / "bench" / "results" / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    heads = (
        "chip", "kernel", "variant", "registers", "spills", "shared, KB",
        "matrix and copy instructions", "bytes a token", "FLOPs a token", "model, us",
    )  # fmt: skip
    table = f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n" + "\n".join(
        f"| {CHIPS[row.compiled.arch][0]} | {r['kernel']} | {r['variant']} | {r['registers']} "
        f"| {r['spills']} | {row.compiled.shared_bytes / 1024:.0f} | {r['instructions']} "
        f"| {r['bytes_per_token']} | {r['flops_per_token']} | {r['model_us_per_4096_rows']} |"
        for row, r in zip(rows, records, strict=True)
        if row.case.quick
    )
    compiled = [row.compiled for row in rows]
    page = PAGE.format(
        total=len(rows),
        triton=triton.__version__,
        date=time.strftime("%Y-%m-%d"),
        spills=sum(c.spills for c in compiled),
        over=sum(c.shared_bytes > c.shared_limit for c in compiled),
        largest=f"{max(c.shared_bytes for c in compiled):,}",
        rows=f"{ROWS:,}",
        vocab=VOCAB,
        width=WIDTH,
        chips="; ".join(f"{n}: {f:g} TFLOP/s, {b:g} TB/s" for n, f, b in CHIPS.values()),
        table=table,
    )
    (ROOT / "docs" / "kernels.md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(TARGETS), action="append", help="default: all")
    parser.add_argument("--print", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    rows: list[Row] = []
    for arch in options.arch or TARGETS:
        rows += compile_cases(arch)
        print(f"{arch}: {len(rows)} kernels so far", flush=True)
    for row in rows:
        c = row.compiled
        if options.print or c.spills or c.shared_bytes > c.shared_limit:
            print(record(row))
    if not options.print:
        write(rows)


if __name__ == "__main__":
    main()
