"""Everything there is to say about a CUDA or ROCm device, in one command.

    python -m bench.gpu                             # checks, then times and memory: some 20 minutes
    python -m bench.gpu --rows 8192 --shape 152k-1536 --head frozen
    python -m bench.gpu --device cpu --backend torch --tiny      # the same path without a device

First the backend is judged by the conformance suite and against float64; if anything is wrong,
nothing is timed. Then every shape in turns against the bare matrix products, eager torch,
torch.compile, F.linear_cross_entropy, and liger-kernel, cut-cross-entropy and quack where they are
installed. One table, and bench/results/gpu.csv with device, versions and date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.gpu_accuracy import judge
from bench.gpu_peers import PEERS, peer_variants
from bench.measure import print_table, write_csv
from compact_fast.backends import RunSpec, choose
from compact_fast.backends.triton_backend import TritonBackend
from compact_fast.benchmark.loss import Shape, make_problem, own_variants
from compact_fast.benchmark.timing import measure
from compact_fast.testing import check_backend

# vocabulary and width of: Qwen2.5 0.5B, 1.5B, 7B; SmolLM2-135M; Llama 3.1 8B
SHAPES = {
    "152k-896": (151_936, 896),
    "152k-1536": (151_936, 1536),
    "152k-3584": (151_936, 3584),
    "49k-576": (49_152, 576),
    "128k-4096": (128_256, 4096),
}
ROWS = (8192, 4096)
TINY = {"tiny": (1009, 24)}
SKIP_BELOW = 2.0**-12


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backend", default="triton", help="default: triton")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--rows", type=int, action="append", help="default: 8192 and 4096")
    parser.add_argument("--head", choices=("frozen", "trained"), action="append", help="both")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each variant; default: 10")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the command")
    parser.add_argument("--checks-only", action="store_true", help="stop before the timing")
    parser.add_argument(
        "-o", "--output", type=Path, help="default: bench/results/gpu.csv; not on a CPU"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """0: done; 1: the backend is wrong; 2: it cannot run here."""
    options = parse(words)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say("no CUDA or ROCm device: torch.cuda.is_available() is False", options)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        choice = choose(options.backend, RunSpec(device, dtype, 1009, 24))
    except ValueError as error:
        say(str(error), options)
        return 2
    for name, value in versions(device).items():
        print(f"{name:<20}{value}")
    if not check(choice.backend, device, tiny=options.tiny):
        return 1
    if options.checks_only:
        return 0
    rows = list(timings(options, choice.backend, device, dtype))
    print()
    print_table([{k: "" if v is None else v for k, v in row.items()} for row in rows])
    for name, why in absent().items():
        print(f"left out: {name} ({why})")
    if options.output is not None or device.type == "cuda":
        print(write_csv("gpu", [{**r, **versions(device)} for r in rows], path=options.output))
    return 0


def say(line: str, options: argparse.Namespace) -> None:
    print(f"bench.gpu: {line}", file=sys.stderr)
    if options.device != "cpu":
        hint = "to try the command without one: --device cpu --backend torch --tiny"
        print(f"bench.gpu: {hint}", file=sys.stderr)


def versions(device: torch.device) -> dict[str, str]:
    """What a row of the results has to say of where it comes from, beside `measure.where`."""
    out = {"compact_fast": metadata.version("compact-fast"), "torch": torch.__version__}
    if device.type == "cuda":
        out["device"] = torch.cuda.get_device_name(device)
        out["runtime"] = str(torch.version.hip or torch.version.cuda)
    for name in ("triton", *(peer.distribution for peer in PEERS)):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def absent() -> dict[str, str]:
    """Peers that are not installed."""
    found = {}
    for peer in PEERS:
        try:
            metadata.version(peer.distribution)
        except metadata.PackageNotFoundError:
            found[peer.name] = f"pip install {peer.distribution}"
    return found


def check(backend: Any, device: torch.device, *, tiny: bool) -> bool:
    """Conformance, then accuracy; says what is wrong."""
    print(f"\nconformance of {backend.name} on {device} ...", flush=True)
    tiers = [backend]
    if isinstance(backend, TritonBackend) and backend.tier == "auto":
        tiers.append(TritonBackend(tier="library"))
    for judged in tiers:
        try:
            check_backend(judged, str(device))
        except AssertionError as faults:
            print(faults)
            return False
    print("passed\n\naccuracy: largest error against float64, from the same inputs", flush=True)
    rows = [row for judged in tiers for row in judge(judged, device, tiny=tiny)]
    print_table(rows)
    if not never_waits(backend, device):
        return False
    wrong = [row for row in rows if row["verdict"] != "good"]
    if wrong:
        print(f"{len(wrong)} figures are less accurate than allowed: nothing is timed")
    return not wrong


def never_waits(backend: Any, device: torch.device) -> bool:
    """Whether a step runs through without the host asking the device for anything."""
    if device.type != "cuda" or not getattr(backend, "takes_host_layout", False):
        return True
    shape = Shape(256, 4003, 64)
    for frozen in (False, True):
        problem = make_problem(shape, frozen=frozen, dtype=torch.bfloat16, device=device)
        step = own_variants(problem, backend)["compact_loss"]
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            print(f"a step waits for the device: {error}")
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print("a step never waits for the device")
    return True


def timings(
    options: argparse.Namespace, backend: Any, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """One row a variant of every case, told as they come."""
    shapes = TINY if options.tiny else {n: SHAPES[n] for n in options.shape or SHAPES}
    for name, (vocab, width) in shapes.items():
        for count in options.rows or ((64,) if options.tiny else ROWS):
            for head in options.head or ("frozen", "trained"):
                print(f"timing {name}, {count} rows, {head} head ...", flush=True)
                yield from case(options, backend, device, dtype, Shape(count, vocab, width), head)


def case(
    options: argparse.Namespace,
    backend: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    head: str,
) -> Iterator[dict[str, Any]]:
    """One shape with one kind of head."""
    problem = make_problem(shape, frozen=head == "frozen", dtype=dtype, device=device)
    skip = (SKIP_BELOW,) if getattr(backend, "skips_blocks", False) else ()
    variants = own_variants(problem, backend, skip_below=skip) | peer_variants(problem)
    found = measure(variants, device, clear=problem.clear, rounds=options.rounds)
    notes = {name: figures.error or "" for name, figures in found.items()}
    for name, figures in found.items():
        if "skip_below" in name and figures.error is None:
            kept = getattr(variants[name](), "kept_share", None)
            notes[name] = "nothing skipped" if kept is None else f"{float(kept):.1%} kept"
    problem.clear()
    bare = found["bare products"].milliseconds
    for variant, figures in found.items():
        ms = figures.milliseconds
        yield {
            "rows": problem.shape.rows,
            "vocab": shape.vocab,
            "width": shape.width,
            "head": head,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": variant,
            "times_bare": ms / bare if ms and bare else None,
            "ms": ms,
            "peak_mb": figures.peak_mb,
            "note": notes[variant],
        }


if __name__ == "__main__":
    sys.exit(main())
