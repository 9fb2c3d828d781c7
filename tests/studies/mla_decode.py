# SPDX-License-Identifier: MIT
"""What a decoded token costs in multi-head latent attention, naive and absorbed.

    python tests/studies/mla_decode.py            all of it, some minutes
    python tests/studies/mla_decode.py --quick    a small version, in seconds

New tokens attend to those in the cache, in a model with the attention of DeepSeek-V2-
Lite (D 2048, H 16, C 512, K and P 128, R 64), two layers of it and next to nothing
else. Three ways take turns in one process:

    naive      chapter 5's `attend_naive`: every cached latent is expanded to keys and
               values, at each step
    absorbed   its `attend_latent_cache`, which meets the latents themselves
    reference  Hugging Face's DeepseekV2Model, which caches latents and expands them

Two parts:

    steps      one new token, over the length of the cache and the rows of the batch
    chunks     T new tokens at once: from which T on does expanding cost less? `cross`
               is where the operations of the two forms are equal, by `cost`, and where
               their times are, between the two measured T on either side of it

`cost` counts what a form must do, in operations (two a multiplication) and in bytes
moved in float32: each weight and each cached number once, and for the naive form the
expanded keys and values once out and once in.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import bench  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402
from torch import Tensor  # noqa: E402

CHAPTER = find("ch05")
module = load(CHAPTER)
THIS = Path(__file__).resolve().relative_to(ROOT).as_posix()
RECORD = ROOT / "tests" / "studies" / "results" / "mla_decode.json"
FORMS = ("naive", "absorbed")
WAYS = (*FORMS, "reference")


@dataclass(frozen=True)
class Sizes:
    """The shape and the lengths of one run of the study."""

    config: Any
    steps: tuple[tuple[int, int], ...]  # (rows, tokens in the cache)
    chunks: tuple[tuple[int, int], ...]
    new: tuple[int, ...]  # tokens at once, in a chunk
    rounds: int


def full() -> Sizes:
    """What is recorded."""
    lengths = (16, 64, 256, 1024, 4096)
    return Sizes(
        config=replace(
            module.MLA_V2_LITE, n_layers=2, vocab_size=8, ffn_dim=8, eos_id=None
        ),
        steps=(*((1, S) for S in lengths), *((8, S) for S in lengths[:-1])),
        chunks=((1, 256), (1, 1024), (1, 4096), (4, 1024)),
        new=(1, 8, 32, 64, 96, 128, 192, 256, 384),
        rounds=9,
    )


def quick() -> Sizes:
    """The same in seconds; its times mean nothing."""
    small = replace(full().config, dim=32, n_heads=2, latent_dim=24, rope_dim=8)
    return Sizes(
        config=replace(small, head_dim=8, value_dim=16),
        steps=((1, 8), (2, 8)),
        chunks=((1, 32),),
        new=(1, 2, 64),
        rounds=2,
    )


# ---------------------------------------------------------------------------
# what it should cost
# ---------------------------------------------------------------------------


def cost(config: Any, form: str, B: int, T: int, S: int) -> dict[str, int]:
    """Operations and bytes of a layer's attention: B rows, T new tokens, S in all."""
    D, H, Q = config.dim, config.n_heads, config.q_latent_dim
    C, K = config.latent_dim, config.head_dim
    R, P = config.rope_dim, config.value_dim
    queries = D * H * (K + R) if Q is None else D * Q + Q * H * (K + R)
    shared = queries + D * (C + R) + H * P * D
    up = C * H * (K + P)
    products = B * T * shared
    numbers = shared + up + B * S * (C + R)
    if form == "naive":
        products += B * S * up + B * T * S * H * (K + R + P)
        numbers += 2 * B * S * H * (K + R + P)
    else:
        products += B * T * up + B * T * S * H * (C + R + C)
    return {"flops": 2 * products, "bytes": 4 * numbers}


def predicted_crossing(config: Any, S: int, most: int = 100_000) -> int | None:
    """The smallest T for which expanding S + T latents takes fewer operations."""
    for T in range(1, most):
        naive, absorbed = (cost(config, f, 1, T, S + T)["flops"] for f in FORMS)
        if naive < absorbed:
            return T
    return None


def measured_crossing(new: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Where naive over absorbed time passes 1 for the last time, on log scales."""
    for i in range(len(new) - 1, 0, -1):
        (a, b), (x, y) = ratios[i - 1 : i + 1], new[i - 1 : i + 1]
        if a >= 1 > b:
            share = math.log(a) / (math.log(a) - math.log(b))
            return x * (y / x) ** share
    return None


# ---------------------------------------------------------------------------
# what it does cost
# ---------------------------------------------------------------------------


class Bench:
    """Our model and Hugging Face's with the same weights, and passes of both."""

    def __init__(self, config: Any) -> None:
        self.config = config
        torch.manual_seed(0)
        self.ours = module.Transformer(config).eval()
        self.theirs = module.reference(config)
        module.copy_to_reference(self.ours, self.theirs)

    def kept(self, B: int, S: int) -> list[Tensor]:
        """Random latents and rotary keys of S tokens for each layer, (B, S, C + R)."""
        width = self.config.latent_dim + self.config.rope_dim
        generator = torch.Generator().manual_seed(0)
        shape = (self.config.n_layers, B, S, width)
        return list(torch.randn(shape, generator=generator))

    def form(self, name: str, B: int, T: int, S: int) -> bench.Side:
        """A pass of T tokens behind S random ones by one of our forms, and back."""
        cache = self.ours.new_cache(B, S + T)
        for layer, kept in zip(cache.layers, self.kept(B, S), strict=True):
            layer.kv[:, :S] = kept
        cache.advance(S)
        tokens = torch.zeros(B, T, dtype=torch.long)

        @torch.inference_mode()
        def run() -> Tensor:
            pays = patch.object(
                module, "absorption_pays", lambda *_: name == "absorbed"
            )
            with pays:
                return self.ours.hidden(tokens, cache)

        return bench.Side(run, lambda: cache.truncate(S))

    def reference(self, B: int, T: int, S: int) -> bench.Side:
        """The same pass by Hugging Face's model with its DynamicCache."""
        from transformers import DynamicCache

        C, R = self.config.latent_dim, self.config.rope_dim
        cache = DynamicCache(config=self.theirs.config)
        for i, kept in enumerate(self.kept(B, S)):
            latent, rotary = kept[:, None].split([C, R], dim=3)  # (B, 1, S, C) and R
            rotary = rotary.unflatten(3, (2, -1)).mT.flatten(3)  # V2's order of pairs
            cache.update(latent.contiguous(), rotary.contiguous(), i)
        tokens = torch.zeros(B, T, dtype=torch.long)

        @torch.inference_mode()
        def run() -> Tensor:
            return self.theirs.model(
                tokens, past_key_values=cache, use_cache=True
            ).last_hidden_state

        return bench.Side(run, lambda: cache.crop(-T))


def measure_steps(sizes: Sizes) -> list[dict]:
    """One new token: the times of the three ways, beside what they should cost."""
    place, rows = Bench(sizes.config), []
    for B, S in sizes.steps:
        sides = [place.form(form, B, 1, S) for form in FORMS]
        times = bench.take_turns(
            [*sides, place.reference(B, 1, S)], sizes.rounds, "cpu"
        )
        row: dict[str, Any] = {"batch": B, "cached": S}
        for way, taken in zip(WAYS, times, strict=True):
            form = "absorbed" if way == "absorbed" else "naive"
            row[way] = {"ms": statistics.median(taken) * 1e3}
            row[way] |= {
                name: sizes.config.n_layers * n
                for name, n in cost(sizes.config, form, B, 1, S + 1).items()
            }
        for way in ("naive", "reference"):
            pairs = zip(times[WAYS.index(way)], times[1], strict=True)
            row[way]["over_absorbed"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
        print(
            f"{B} rows, {S:>5} cached: "
            + ", ".join(f"{way} {row[way]['ms']:.1f} ms" for way in WAYS),
            flush=True,
        )
    return rows


def measure_chunks(sizes: Sizes) -> list[dict]:
    """T new tokens at once: naive over absorbed, in time and in operations."""
    place, rows = Bench(sizes.config), []
    for B, S in sizes.chunks:
        row: dict[str, Any] = {"batch": B, "cached": S, "new": list(sizes.new)}
        row |= {"time": [], "flops": []}
        for T in sizes.new:
            sides = [place.form(form, B, T, S) for form in FORMS]
            naive, absorbed = bench.take_turns(sides, sizes.rounds, "cpu")
            pairs = zip(naive, absorbed, strict=True)
            row["time"].append(statistics.median(a / b for a, b in pairs))
            a, b = (cost(sizes.config, f, B, T, S + T)["flops"] for f in FORMS)
            row["flops"].append(a / b)
        row["cross"] = {
            "predicted": predicted_crossing(sizes.config, S),
            "measured": measured_crossing(row["new"], row["time"]),
        }
        rows.append(row)
        print(f"{B} rows, {S:>5} cached: crossing at {row['cross']}", flush=True)
    return rows


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

SOURCES = (
    f"{CHAPTER.script.relative_to(ROOT).as_posix()}::model",
    *(f"{THIS}::{name}" for name in ("full", "cost", "predicted_crossing")),
    *(f"{THIS}::{name}" for name in ("measured_crossing", "Bench")),
    *(f"{THIS}::{name}" for name in ("measure_steps", "measure_chunks")),
)


def draw(data: dict, path: Path) -> Path:
    """Time a step over the cached length, and naive over absorbed time of chunks."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in data["steps"]})
    figure = Figure(figsize=(3.6 * (len(batches) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(batches) + 1)
    looks = {"reference": ("s--", "#777777"), "naive": ("o-", "#d55e00")}
    looks["absorbed"] = ("o-", "#0072b2")
    labels = {"reference": "Hugging Face", "naive": "naive", "absorbed": "absorbed"}
    for ax, B in zip(axes, batches, strict=False):
        rows = [row for row in data["steps"] if row["batch"] == B]
        cached = [row["cached"] for row in rows]
        for way, (mark, colour) in looks.items():
            ms = [row[way]["ms"] for row in rows]
            ax.loglog(cached, ms, mark, color=colour, ms=4, label=labels[way])
        title = f"one token, {B} row{'s' * (B > 1)}"
        ax.set(title=title, xlabel="tokens in the cache", ylabel="ms a step")
    axes[0].legend(fontsize="small")
    right = axes[-1]
    for i, row in enumerate(data["chunks"]):
        label = (
            f"{row['cached']:,} cached, {row['batch']} row{'s' * (row['batch'] > 1)}"
        )
        right.loglog(row["new"], row["time"], "o-", color=f"C{i}", ms=4, label=label)
        right.loglog(row["new"], row["flops"], ":", color=f"C{i}", lw=1)
    right.axhline(1, color="#444444", lw=0.8)
    right.set(title="naive over absorbed; dotted: operations")
    right.set(xlabel="tokens at once")
    right.legend(fontsize="small")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    with module.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


PARTS: dict[str, Callable[[Sizes], list]] = {
    "steps": measure_steps,
    "chunks": measure_chunks,
}


def study(args: argparse.Namespace) -> None:
    """Measure, and write record and figure."""
    sizes = quick() if args.quick else full()
    path = args.record or RECORD
    if args.quick and args.record is None:
        raise ValueError("--quick measures nothing worth keeping: name a --record")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    before = {source: results.digest(source) for source in SOURCES}
    data = {name: part(sizes) for name, part in PARTS.items()}
    if changed := [s for s, hashed in before.items() if results.digest(s) != hashed]:
        raise ValueError(f"{', '.join(changed)} changed meanwhile; run it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(data, path.with_suffix(".png"))
    command = f"python {THIS}" + (" --quick" if args.quick else "")
    results.write(path, command, data, before, files=[figure])
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        prog="mla_decode.py", description=__doc__.split("\n")[0]
    )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    command.add_argument(
        "--record", type=Path, metavar="PATH", help="write here, not to the record"
    )
    try:
        study(command.parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"mla_decode.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
