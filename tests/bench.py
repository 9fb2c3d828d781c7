# SPDX-License-Identifier: MIT
"""How fast the chapters are: beside Hugging Face, and beside the machine's own limit.

    python tests/bench.py [ch02 …] [--quick] [--json PATH]

For every chapter that has a model of Hugging Face's to compare with, the same weights'
shapes, the same inputs and the same process: a forward pass of its smallest published
size, and a training step (AdamW, fused; cross-entropy on the logits; no dropout) of a
size that a laptop trains. The two sides take turns, so that a busy machine slows both;
"ratio" is the median of ours over the median of theirs, below 1 where ours is faster.
"of GEMM" is our rate of arithmetic, in the products of matrices alone, over that of one
large product.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from chapters import Chapter, discover, find, load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 7
# Sizes (batch, tokens) of a forward pass: one long sequence, and several shorter ones.
FORWARD = [(1, 256), (4, 128)]
TRAINING = (8, 256)
# A published preset above this is left to machines that have the memory for two.
LARGEST = 400e6


@dataclass(frozen=True)
class Case:
    """A configuration, a batch, and whether a training step is taken."""

    chapter: Chapter
    label: str
    config: Any
    size: tuple[int, int]
    training: bool


def cases(chapter: Chapter, quick: bool) -> Iterator[Case]:
    """What is measured of a chapter, by its presets."""
    module = load(chapter)
    tiny = replace(module.TINY, dropout=0.0)
    name, config = published(module)
    if quick or name is None:
        name, config = "TINY", tiny
    for size in FORWARD:
        yield Case(chapter, f"{name} forward", config, size, False)
    if quick:
        yield Case(chapter, "TINY step", tiny, (4, 64), True)
    else:
        wide = replace(tiny, dim=3 * tiny.dim, ffn_dim=3 * tiny.ffn_dim)
        yield Case(chapter, f"TINY step, D {wide.dim}", wide, TRAINING, True)


def published(module: ModuleType) -> tuple[str | None, Any]:
    """The smallest preset but TINY, without dropout; None if all are too large."""
    sizes = {}
    for name, config in module.presets().items():
        if name != "TINY":
            with torch.device("meta"):
                model = module.Transformer(config)
            sizes[name] = sum(p.numel() for p in model.parameters())
    name = min(sizes, key=sizes.get, default=None)
    if name is None or sizes[name] > LARGEST:
        return None, None
    return name, replace(module.presets()[name], dropout=0.0)


def inputs(module: ModuleType, config: Any, size: tuple[int, int]) -> list[Tensor]:
    """Random ids of `size` for each input of the model, none of them padding."""
    length = min(size[1], config.max_seq_len)
    n = len(module.verify_inputs(config, None))
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        ids = torch.randint(
            config.vocab_size - 1, (size[0], length), generator=generator
        )
        skip = config.vocab_size if config.pad_id is None else config.pad_id
        found.append(ids + (ids >= skip))
    return found


def work(
    model: nn.Module, call: Callable[[], Any], target: Tensor, training: bool
) -> Callable[[], None]:
    """One forward pass, or one training step, of a model."""

    def forward() -> Tensor:
        out = call()
        return getattr(out, "logits", out)

    if not training:

        def run() -> None:
            with torch.inference_mode():
                forward()

        model.eval()
        return run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward().flatten(0, 1), target.flatten()).backward()
        optimizer.step()

    model.train()
    return step


def seconds(run: Callable[[], None], device: str) -> float:
    """The time of one call."""
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(
    runs: list[Callable[[], None]], rounds: int, device: str
) -> list[list[float]]:
    """The times of each of `runs`, called in turn, the first one alternating."""
    for run in runs:
        seconds(run, device)  # allocators and thread pools warm up
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds):
        order = range(len(runs)) if i % 2 == 0 else reversed(range(len(runs)))
        for which in order:
            times[which].append(seconds(runs[which], device))
    return times


def gemm_rate(device: str) -> float:
    """FLOP/s of a float32 matrix product of 1024 by 1024, the median of 15."""
    n = 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    (times,) = take_turns([lambda: a @ b], 15, device)
    return 2 * n**3 / statistics.median(times)


def measure(case: Case, rounds: int, device: str) -> dict:
    """One row of the table."""
    module, config = load(case.chapter), case.config
    torch.manual_seed(0)
    ours = module.Transformer(config).to(device)
    theirs = module.reference(config).to(device)
    batch = [ids.to(device) for ids in inputs(module, config, case.size)]
    asked = module.reference_inputs(config, *batch)
    target = batch[-1].roll(-1, 1)
    runs = [
        work(ours, lambda: ours(*batch), target, case.training),
        work(theirs, lambda: theirs(**asked, use_cache=False), target, case.training),
    ]
    with FlopCounterMode(display=False) as counter:
        runs[0]()
    rate = gemm_rate(device)
    mine, other = take_turns(runs, rounds, device)
    a, b = statistics.median(mine), statistics.median(other)
    row = {
        "chapter": case.chapter.name,
        "what": case.label,
        "batch": list(batch[0].shape),
        "ours_ms": a * 1e3,
        "theirs_ms": b * 1e3,
        "ratio": a / b,
        "best_ratio": min(mine) / min(other),
        "gflops": counter.get_total_flops() / a / 1e9,
        "gemm_gflops": rate / 1e9,
    }
    row["of_gemm"] = row["gflops"] / row["gemm_gflops"]
    return row


HEADER = (
    f"{'chapter':<18} {'what':<26} {'batch':>8} {'ours':>10} {'theirs':>10} "
    f"{'ratio':>6} {'GFLOP/s':>8} {'of GEMM':>8}"
)


def line(row: dict) -> str:
    """A row as text."""
    batch = " x ".join(map(str, row["batch"]))
    return (
        f"{row['chapter']:<18} {row['what']:<26} {batch:>8} {row['ours_ms']:>7.1f} ms "
        f"{row['theirs_ms']:>7.1f} ms {row['ratio']:>6.2f} {row['gflops']:>8.1f} "
        f"{row['of_gemm']:>8.0%}"
    )


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="bench.py", description="Measure the chapters beside Hugging Face."
    )
    root.add_argument("chapters", nargs="*", metavar="chNN", help="default: all")
    root.add_argument("--quick", action="store_true", help="TINY alone, in seconds")
    root.add_argument("--rounds", type=int, metavar="N", help=f"default: {ROUNDS}")
    root.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    root.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    root.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        chosen = [find(name) for name in args.chapters] or discover()
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rounds = args.rounds or (3 if args.quick else ROUNDS)
    print(f"{torch.get_num_threads()} threads, {rounds} rounds, torch float32\n")
    print(HEADER, flush=True)
    rows = []
    for chapter in chosen:
        if not hasattr(load(chapter), "reference"):
            print(f"{chapter.name:<18} has no model of Hugging Face's to compare with")
            continue
        for case in cases(chapter, args.quick):
            rows.append(measure(case, rounds, args.device))
            gc.collect()
            print(line(rows[-1]), flush=True)
    print("\nratio: the median time of ours over that of Hugging Face's.")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"threads": torch.get_num_threads(), "rounds": rounds, "rows": rows},
            indent=1,
        )
        args.json.write_text(text + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
