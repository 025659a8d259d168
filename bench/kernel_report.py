"""Static report on every kernel and launch configuration: `python -m bench.kernel_report`.

Compiles for GPUs that are not there and writes bench/results/kernels.csv and docs/kernels.md.
Registers, spills, shared memory and instruction counts are read from the machine code. Times are a
roofline MODEL, never a measurement: the larger of FLOPs / peak and bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

from bench.aot import TARGETS, Compiled, compiling
from bench.kernel_cases import ROWS, VOCAB, WIDTH, Case, cases

ROOT = Path(__file__).parent.parent

# dense bfloat16 TFLOP/s and TB/s, vendors' data sheets (A100 80 GB SXM, H100 SXM, B200, MI300X)
CHIPS = {
    "sm_80": ("A100", 312.0, 2.04),
    "sm_90": ("H100", 989.0, 3.35),
    "sm_100": ("B200", 2250.0, 8.0),
    "gfx942": ("MI300X", 1307.0, 5.3),
}


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

Nothing on this page was run on a GPU; what was is in [gpu.md](gpu.md).
`python -m bench.kernel_report` compiles every kernel in every launch configuration for four
architectures and reads the machine code; all {total} rows are in
[`bench/results/kernels.csv`](../bench/results/kernels.csv), the main ones below. That the
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
