# SPDX-License-Identifier: MIT
"""How fast the chapters are: beside Hugging Face, and beside the machine's own limit.

    python tests/bench.py [ch02 …] [--quick] [--json PATH]

For every chapter that has a model of Hugging Face's to compare with, the same weights'
shapes, the same inputs and the same process: a forward pass of its smallest published
size, and a training step (AdamW, fused; cross-entropy on the logits; no dropout) of a
size that a laptop trains. Where every published size is too large to have two of, the
model in `data/smollm2` takes its place, if it is there and the chapter can read it.
The two sides take turns, so that a busy machine slows both; "ratio" is the median of
ours over the median of theirs, below 1 where ours is faster. "of GEMM" is our rate of
arithmetic, in the products of matrices alone, over that of one large product.

Where a model has a cache, two more: a prefill, which reads a prompt into a fresh cache
and gives the logits after its last token; and a decode step, one token a row behind
those that the cache holds. "at 100" says how many it holds, at every measurement: the
step is undone after each, outside the time. Hugging Face's side is its `forward` with
the cache that its `generate` uses unless asked otherwise, a DynamicCache, which copies
the old keys and values at every step to join the new ones to them. The rest of
`generate` is timed on neither side.

"GB/s" is what our decode step has to read, once, over its time: every weight but the
tables of which it needs a few rows, and the keys and values that are cached. "of
memory" is that over the rate at which 512 MiB of float32 are summed, the fastest of
nine sums, which read them in order and write nothing. It is about memory only where the
weights are too large for the processor's own caches, and one row is decoded: a step of
TINY waits for Python, and eight rows for arithmetic.

Where a model has experts, their layer alone: forward, and forward and backward, of
ours, of Hugging Face's and of the plain loop over the experts, for the same choices at
random. "of the loop" is our time over the loop's.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from chapters import ROOT, Chapter, discover, find, load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 7
# Sizes (batch, tokens) of a forward pass: one long sequence, and several shorter ones.
FORWARD = [(1, 256), (4, 128)]
TRAINING = (8, 256)
PREFILL = 512
# Cached tokens before a decode step, and the rows of a batch.
CACHED = [100, 1000]
DECODING = [1, 8]
# A decode step is short: it is timed this many times a round.
STEPS = 5
# Room of our caches, in tokens; a step must not depend on it.
ROOM = 1024
SMOLLM2 = ROOT / "data" / "smollm2"
# What makes a model wider.
WIDTHS = {"dim", "head_dim", "ffn_dim", "q_latent_dim", "latent_dim"}
WIDTHS |= {"rope_dim", "value_dim", "expert_ffn_dim"}
# A layer of experts, and how many tokens it gets.
EXPERTS = {"n_experts": 64, "n_active": 6, "dim": 512, "expert_ffn_dim": 352}
FEW_EXPERTS = {"n_experts": 8, "n_active": 2, "dim": 64, "expert_ffn_dim": 32}
EXPERT_TOKENS = [1, 1024]
# A published preset above this is left to machines that have the memory for two.
LARGEST = 400e6


@dataclass(frozen=True)
class Case:
    """What is measured: "forward", "step" of training, "prefill", "decode", "experts".

    `cached` is how many tokens a decode step finds in the cache; `folder` holds the
    weights of both sides, which are random without it.
    """

    chapter: Chapter
    label: str
    config: Any
    size: tuple[int, int]
    kind: str
    cached: int = 0
    folder: Path | None = None


@dataclass
class Side:
    """One of the two that take turns: what is timed, and what follows each time."""

    run: Callable[[], Any]
    undo: Callable[[], Any] = lambda: None


def cases(chapter: Chapter, quick: bool) -> Iterator[Case]:
    """What is measured of a chapter: of a real size where there is one, and of TINY."""
    module = load(chapter)
    tiny = plain(module.TINY)
    name, config, folder = ("TINY", tiny, None) if quick else real_size(module)
    for size in FORWARD:
        yield Case(chapter, f"{name} forward", config, size, "forward", folder=folder)
    if quick:
        yield Case(chapter, "TINY step", tiny, (4, 64), "step")
    else:
        wide = widened(tiny)
        yield Case(chapter, f"TINY step, D {wide.dim}", wide, TRAINING, "step")
    if not hasattr(module.Transformer, "new_cache"):
        return
    longest = config.max_seq_len
    size = (1, min(PREFILL, longest))
    yield Case(chapter, f"{name} prefill", config, size, "prefill", folder=folder)
    for batch in DECODING:
        for cached in sorted({min(tokens, longest - 1) for tokens in CACHED}):
            label = f"{name} decode at {cached}"
            yield Case(chapter, label, config, (batch, 1), "decode", cached, folder)
    if hasattr(module, "Experts"):
        sizes = FEW_EXPERTS if quick else EXPERTS
        config = replace(tiny, n_layers=1, n_dense_layers=0, n_mtp=0, **sizes)
        for label in ("forward", "step"):
            for tokens in EXPERT_TOKENS:
                what = f"{sizes['n_experts']} experts {label}"
                yield Case(chapter, what, config, (tokens, 1), "experts")


def plain(config: Any) -> Any:
    """The same without dropout and in float32, where it has such a choice."""
    names = {each.name for each in fields(config)}
    exact = {"dropout": 0.0, "fp8": False}
    return replace(config, **{k: v for k, v in exact.items() if k in names})


def widened(config: Any) -> Any:
    """Three times as wide, each of as many heads too; latents as well."""
    names = {each.name for each in fields(config)} & WIDTHS
    sizes = {name: getattr(config, name) for name in names}
    return replace(
        config, **{name: 3 * n for name, n in sizes.items() if n is not None}
    )


def real_size(module: ModuleType) -> tuple[str, Any, Path | None]:
    """A name, a configuration, and the folder of its weights unless they are random."""
    name, config = published(module)
    if name is not None:
        return name, config, None
    if (config := readable(module, SMOLLM2)) is not None:
        return SMOLLM2.name, plain(config), SMOLLM2
    return "TINY", plain(module.TINY), None


def readable(module: ModuleType, folder: Path) -> Any | None:
    """The configuration of the model in `folder`, if it is there and of the chapter."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return module.Config.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return None


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
    return name, plain(module.presets()[name])


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


def pair(case: Case, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and Hugging Face's model of a case."""
    module = load(case.chapter)
    if case.folder is None:
        torch.manual_seed(0)
        ours, theirs = module.Transformer(case.config), module.reference(case.config)
    else:
        from transformers.utils import logging

        logging.disable_progress_bar()
        ours = module.Transformer.from_pretrained(case.folder)
        theirs = module.reference(case.folder)
    return ours.to(device).eval(), theirs.to(device).eval()


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


@torch.inference_mode()
def prefill(model: nn.Module, tokens: Tensor) -> Any:
    """Our cache after `tokens`, and the logits of the last one computed, as to sample.

    The head sees one position a row: that is all a prompt is read for.
    """
    room = min(model.config.max_seq_len, ROOM)
    cache = model.new_cache(len(tokens), room)
    model.head(model.hidden(tokens, cache)[:, -1:])
    return cache


@torch.inference_mode()
def their_prefill(model: nn.Module, tokens: Tensor) -> Any:
    """The same of Hugging Face's, as its `generate` does it."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def at_one_place(
    run: Callable[[], Any], length: Callable[[], int], cached: int
) -> Callable[[], Any]:
    """`run` in inference mode; RuntimeError unless it goes from `cached` to one more.

    A cache that grows from step to step would be a longer one at each measurement.
    """

    def step() -> Any:
        before = length()
        with torch.inference_mode():
            out = run()
        if (before, length()) != (cached, cached + 1):
            raise RuntimeError(
                f"a decode step at {cached} went from {before} to {length()} tokens"
            )
        return out

    return step


def decode(model: nn.Module, prompt: Tensor, tokens: Tensor) -> tuple[Side, Any]:
    """Our decode step behind `prompt`, taken back after each time, and its cache."""
    cache, cached = prefill(model, prompt), prompt.shape[1]
    step = at_one_place(
        lambda: model(tokens, cache=cache), lambda: cache.length, cached
    )
    return Side(step, lambda: cache.truncate(cached)), cache


def their_decode(model: nn.Module, prompt: Tensor, tokens: Tensor) -> tuple[Side, Any]:
    """The same of Hugging Face's."""
    cache, cached = their_prefill(model, prompt), prompt.shape[1]
    step = at_one_place(
        lambda: model(tokens, past_key_values=cache, use_cache=True),
        cache.get_seq_length,
        cached,
    )
    return Side(step, lambda: cache.crop(-1)), cache


def seconds(side: Side, device: str) -> float:
    """The time of one call, after which it is undone."""
    started = time.perf_counter()
    side.run()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    side.undo()
    return taken


def take_turns(sides: list[Side], rounds: int, device: str) -> list[list[float]]:
    """The times of each of `sides`, called in turn, the first one alternating."""
    for side in sides:
        seconds(side, device)  # allocators and thread pools warm up
    times: list[list[float]] = [[] for _ in sides]
    for i in range(rounds):
        order = range(len(sides)) if i % 2 == 0 else reversed(range(len(sides)))
        for which in order:
            times[which].append(seconds(sides[which], device))
    return times


def gemm_rate(device: str) -> float:
    """FLOP/s of a float32 matrix product of 1024 by 1024, the median of 15."""
    n = 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    (times,) = take_turns([Side(lambda: a @ b)], 15, device)
    return 2 * n**3 / statistics.median(times)


def memory_rate(device: str) -> float:
    """Bytes/s of reading 512 MiB of float32 in order for their sum, the fastest of 9.

    A busy machine only ever makes a sum slower; the limit is the fastest.
    """
    numbers = torch.ones(1 << 27, device=device)
    (times,) = take_turns([Side(numbers.sum)], 9, device)
    return numbers.nbytes / min(times)


def bytes_read(model: nn.Module, cache: Any, cached: int) -> int:
    """What a decode step with `cached` tokens in our `cache` has to read at least.

    Of a table of embeddings that is a row or two, unless the head is the same matrix;
    of the experts, those that one row chooses, and of prediction depths nothing. All
    other weights count.
    """
    weights = {
        parameter
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and not name.startswith("mtp.")
        for parameter in module.parameters(recurse=False)
    }
    room = min(model.config.max_seq_len, ROOM)
    total = sum(weight.nbytes for weight in weights) + cache.nbytes // room * cached
    if (E := getattr(model.config, "n_experts", 0)) == 0:
        return total
    of_experts = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if ".experts." in name and not name.startswith("mtp.")
    )
    return total - of_experts // E * (E - model.config.n_active)


def measure(case: Case, rounds: int, device: str) -> dict:
    """One row of the table."""
    kinds = {"decode": measure_decode, "experts": measure_experts}
    return kinds.get(case.kind, measure_pass)(case, rounds, device)


def measure_pass(case: Case, rounds: int, device: str) -> dict:
    """A forward pass, a training step or a prefill, against the rate of a product."""
    module, config = load(case.chapter), case.config
    ours, theirs = pair(case, device)
    batch = [ids.to(device) for ids in inputs(module, config, case.size)]
    if case.kind == "prefill":
        sides = [
            Side(lambda: prefill(ours, *batch)),
            Side(lambda: their_prefill(theirs, *batch)),
        ]
    else:
        asked = module.reference_inputs(config, *batch)
        target, training = batch[-1].roll(-1, 1), case.kind == "step"
        sides = [
            Side(work(ours, lambda: ours(*batch), target, training)),
            Side(
                work(theirs, lambda: theirs(**asked, use_cache=False), target, training)
            ),
        ]
    with FlopCounterMode(display=False) as counter:
        sides[0].run()
    rate = gemm_rate(device)
    row = compared(case, list(batch[0].shape), take_turns(sides, rounds, device))
    row["gflops"] = counter.get_total_flops() / row["ours_ms"] / 1e6
    row["gemm_gflops"] = rate / 1e9
    row["of_gemm"] = row["gflops"] / row["gemm_gflops"]
    return row


def measure_decode(case: Case, rounds: int, device: str) -> dict:
    """A decode step, against the rate at which the machine reads its memory."""
    module = load(case.chapter)
    ours, theirs = pair(case, device)
    (ids,) = inputs(module, case.config, (case.size[0], case.cached + 1))
    prompt, tokens = ids.to(device).split([case.cached, 1], dim=1)
    mine, cache = decode(ours, prompt, tokens)
    other, _ = their_decode(theirs, prompt, tokens)
    rate = memory_rate(device)
    times = take_turns([mine, other], STEPS * rounds, device)
    row = compared(case, list(case.size), times)
    row["cached"] = case.cached
    row["tokens_per_second"] = case.size[0] / row["ours_ms"] * 1e3
    row["bytes"] = bytes_read(ours, cache, case.cached)
    row["gb_per_second"] = row["bytes"] / row["ours_ms"] / 1e6
    row["memory_gb_per_second"] = rate / 1e9
    row["of_memory"] = row["gb_per_second"] / row["memory_gb_per_second"]
    return row


def measure_experts(case: Case, rounds: int, device: str) -> dict:
    """The experts of one layer: ours, Hugging Face's, and the loop over them."""
    model, reference = pair(case, device)
    ours, theirs = model.blocks[0].ffn.experts, reference.model.layers[0].mlp.experts
    load(case.chapter).copy_to_reference(model, reference)
    c, N = case.config, case.size[0]
    x = torch.randn(N, c.dim, device=device, requires_grad=True)
    weights = torch.rand(N, c.n_active, device=device)
    chosen = torch.rand(N, c.n_experts, device=device).topk(c.n_active).indices
    calls = [
        lambda: ours(x, weights, chosen),
        lambda: theirs(x, chosen, weights),
        lambda: ours.one_by_one(x, weights, chosen),
    ]
    for call in calls[1:]:
        torch.testing.assert_close(call(), calls[0](), rtol=1e-4, atol=1e-5)

    def run(call: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(case.label.endswith("step")):
            out = call()
        if out.requires_grad:
            out.square().sum().backward()
            for module in (ours, theirs):
                module.zero_grad()

    sides = [Side(lambda call=call: run(call)) for call in calls]
    *pair_, loop = take_turns(sides, rounds, device)
    row = compared(case, [N, 1], pair_)
    row["loop_ms"] = statistics.median(loop) * 1e3
    row["of_loop"] = row["ours_ms"] / row["loop_ms"]
    return row


def compared(case: Case, batch: list[int], times: list[list[float]]) -> dict:
    """What every row has: ours beside theirs."""
    a, b = (statistics.median(side) for side in times)
    return {
        "chapter": case.chapter.name,
        "what": case.label,
        "batch": batch,
        "ours_ms": a * 1e3,
        "theirs_ms": b * 1e3,
        "ratio": a / b,
        "best_ratio": min(times[0]) / min(times[1]),
    }


HEADER = (
    f"{'chapter':<22} {'what':<26} {'batch':>8} {'ours':>10} {'theirs':>10} "
    f"{'ratio':>6} {'GFLOP/s':>8} {'of GEMM':>8} {'GB/s':>6} {'of memory':>9}"
)


def line(row: dict) -> str:
    """A row as text; of the two limits of the machine it has one."""
    batch = " x ".join(map(str, row["batch"]))
    if "of_loop" in row:
        limits = f"{row['of_loop']:>8.2f} of the loop"
    elif "of_gemm" in row:
        limits = f"{row['gflops']:>8.1f} {row['of_gemm']:>8.0%}"
    else:
        limits = f"{'':>17} {row['gb_per_second']:>6.1f} {row['of_memory']:>9.0%}"
    return (
        f"{row['chapter']:<22} {row['what']:<26} {batch:>8} {row['ours_ms']:>7.1f} ms "
        f"{row['theirs_ms']:>7.1f} ms {row['ratio']:>6.2f} {limits}"
    )


def count(text: str) -> int:
    """A positive number from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="bench.py", description="Measure the chapters beside Hugging Face."
    )
    root.add_argument("chapters", nargs="*", metavar="chNN", help="default: all")
    root.add_argument("--quick", action="store_true", help="TINY alone, in seconds")
    root.add_argument("--rounds", type=count, metavar="N", help=f"default: {ROUNDS}")
    root.add_argument("--threads", type=count, metavar="N", help="default: torch's")
    root.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    root.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        chosen = [find(name) for name in args.chapters] or discover()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("no CUDA device was found; leave out --device cuda")
        if args.json is not None:  # better now than after minutes
            args.json.parent.mkdir(parents=True, exist_ok=True)
            if args.json.is_dir():
                raise ValueError(f"{args.json} is a folder; --json names a file")
    except (OSError, ValueError) as error:
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
            print(f"{chapter.name:<22} has no model of Hugging Face's to compare with")
            continue
        for case in cases(chapter, args.quick):
            rows.append(measure(case, rounds, args.device))
            gc.collect()
            print(line(rows[-1]), flush=True)
    print("\nratio: the median time of ours over that of Hugging Face's.")
    if any("of_memory" in row for row in rows):
        print(
            "decode at N: one token a row, N tokens in the cache; Hugging Face's is a "
            "DynamicCache.\nof memory: the bytes that a step has to read over its "
            "time, beside the rate of a long sum."
        )
    if args.json is not None:
        text = json.dumps(
            {"threads": torch.get_num_threads(), "rounds": rounds, "rows": rows},
            indent=1,
        )
        args.json.write_text(text + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
