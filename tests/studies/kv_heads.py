# SPDX-License-Identifier: MIT
"""How many key/value heads: what they cost, what they buy, and turning many into few.

    python tests/studies/kv_heads.py                 all of it, half an hour or more
    python tests/studies/kv_heads.py --only speed    one part of the record again
    python tests/studies/kv_heads.py --quick         a small version, in seconds

Chapter 3's model with H query heads and G = H … 1 key/value heads. Four parts:

    trained  TINY with each G, by the chapter's default recipe: parameters, held-out
             loss, how its stories hold together, bytes of the cache
    pooled   the trained model with G = H turned into one with fewer heads, before and
             after training it for 5 and for 10 % of its steps again (the "uptraining"
             of arXiv:2305.13245 §2.1); the new heads are the mean of the old ones, the
             first of them, or random (as in figure 4 there); beside it the model with
             G = H, trained as much longer
    seeds    the first part's training from another seed: what chance alone does
    speed    a decode step of GPT2_124M's shape, whose cache is large enough to matter

All trainings again have one schedule, the chapter's: warm-up over a tenth of the steps,
then half a cosine down to a tenth of the peak. The peak is the one of PEAKS after which
the mean-pooled models are best, by the held-out loss after the shorter time. The
optimizer starts empty, and the data come in another order than in the first training.

What is trained is kept in `out/kv_heads/`, in a folder of its own for each version of
the model, the recipe and the data, so a run that was stopped goes on where it was.
"""

import argparse
import datetime
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import bench  # noqa: E402
import record  # noqa: E402
import results  # noqa: E402
import running  # noqa: E402
import story_consistency  # noqa: E402
import torch  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CHAPTER = find("ch03")
module = load(CHAPTER)
RECORD = ROOT / "tests" / "studies" / "results" / "kv_heads.json"
RUNS = Path("out") / "kv_heads"
# What "trained again" is in steps, as shares of the first training.
SHARES = {"short": 0.05, "long": 0.10}
# Highest learning rates of the second training; the first one's is the last.
PEAKS = (5e-4, 1e-3, 2e-3, 5e-3)
# How the new key/value heads come from the old ones.
WAYS = ("mean", "first", "random")
OTHER_SEEDS = (1,)


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of one run of the study."""

    config: Any
    recipe: Any
    heads: tuple[int, ...]
    stories: int
    large: Any
    large_heads: tuple[int, ...]
    cached: int
    batches: tuple[int, ...]
    rounds: int
    points: int  # of the first training's curve of the held-out loss
    documents: int | None = None  # None: all of the data


def full() -> Sizes:
    """What is recorded."""
    return Sizes(
        config=module.TINY,
        recipe=module.Recipe(),
        heads=(4, 2, 1),
        stories=200,
        large=replace(module.GPT2_124M, dropout=0.0),
        large_heads=(12, 4, 1),
        cached=1000,
        batches=(1, 8),
        rounds=41,
        points=25,
    )


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    small = replace(module.TINY, dim=32, n_layers=1, ffn_dim=64, max_seq_len=64)
    return Sizes(
        config=small,
        recipe=module.Recipe(steps=20, warmup=2, lr=1e-2),
        heads=(4, 2, 1),
        stories=3,
        large=small,
        large_heads=(4, 2, 1),
        cached=50,
        batches=(1, 2),
        rounds=3,
        points=1,
        documents=60,
    )


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


class Runs:
    """The trainings of the study, each made once and then read from its folder."""

    def __init__(self, sizes: Sizes, folder: Path, version: str) -> None:
        self.sizes = sizes
        self.folder = folder / version
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = module.load_tokenizer(module.default_tokenizer())
        self.config = replace(
            sizes.config,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
        )
        self.data = lru_cache(self._data)

    def _data(self, seed: int) -> tuple[Any, Any]:
        """The stories' training batches in the order of `seed`, and the held-out."""
        path = module.DEFAULT_DATA
        if self.sizes.documents is not None:
            parts = module.split_documents(module.read_text(path))[0]
            path = self.folder / "stories.txt"
            mark = f"\n{module.END_OF_TEXT}\n"
            path.write_text(mark.join(parts[: self.sizes.documents]), encoding="utf-8")
        recipe = replace(self.sizes.recipe, seed=seed)
        return module.open_data(path, self.tokenizer, self.config, recipe)

    def run(
        self, name: str, start: Callable[[], nn.Module], recipe: Any, stories: int = 0
    ) -> dict:
        """Train the model that `start` gives; with `stories`, let it write so many.

        Returns what is recorded of it, the curve of the held-out loss included; the
        trained model is in the folder `name`.
        """
        out = self.folder / name
        if (out / "run.json").exists():
            return module.read_json(out / "run.json")
        batches, held_out = self.data(recipe.seed)
        torch.manual_seed(recipe.seed)
        training = module.Training(start(), batches, held_out, recipe)
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            training.restore(module.read_torch(checkpoint))
        else:
            out.mkdir(exist_ok=True)
            first = module.held_out_loss(training)
            (out / "before.json").write_text(json.dumps({"held_out": first}))
        print(f"{name}, from step {training.step}", flush=True)
        if not module.train(training, self.tokenizer, out):
            raise KeyboardInterrupt
        found = described(training, module.read_json(out / "before.json")["held_out"])
        if stories:
            found |= consistency(out, stories)
        with module.replacing(out / "run.json") as partial:
            partial.write_text(json.dumps(found), encoding="utf-8")
        return found

    def train(self, n_kv_heads: int, seed: int = 0) -> dict:
        """TINY with so many key/value heads, from its initialisation."""
        return self.run(
            f"g{n_kv_heads}_seed{seed}",
            lambda: module.Transformer(replace(self.config, n_kv_heads=n_kv_heads)),
            first_recipe(self.sizes, seed),
            self.sizes.stories,
        )

    def original(self) -> nn.Module:
        """The trained model with a key/value head for every query head."""
        H = self.sizes.config.n_heads
        self.train(H)
        return module.Transformer.from_pretrained(self.folder / f"g{H}_seed0")

    def again(self, n_kv_heads: int, how: str, share: str, peak: float) -> dict:
        """The original with fewer heads, trained for a `share` of the steps again."""
        steps = round(SHARES[share] * self.sizes.recipe.steps)
        return self.run(
            f"g{n_kv_heads}_{how}_{steps}_{peak}",
            lambda: converted(self.original(), n_kv_heads, how),
            again_recipe(self.sizes, steps, peak),
            self.sizes.stories if share == "long" else 0,
        )


def first_recipe(sizes: Sizes, seed: int) -> Any:
    """The first training, its held-out loss looked at more often."""
    every = max(1, sizes.recipe.steps // sizes.points)
    return replace(sizes.recipe, seed=seed, eval_every=every)


def again_recipe(sizes: Sizes, steps: int, peak: float) -> Any:
    """The second training: the first one's schedule, shorter and lower."""
    shorter = replace(sizes.recipe, steps=steps, warmup=steps // 10, lr=peak, seed=1)
    every = max(1, sizes.recipe.steps // (4 * sizes.points))
    return replace(shorter, eval_every=every)


def described(training: Any, first: float) -> dict:
    """Loss and time of a finished run; the curve's first point is before any step."""
    curve = [
        [row["step"], row["held_out"]]
        for row in training.log
        if row["held_out"] is not None
    ]
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": training.step,
        "seconds": sum(row["seconds"] for row in training.log),
        "held_out": curve[-1][1],
        "curve": [[0, first], *curve],
    }


def consistency(folder: Path, n: int) -> dict:
    """How stories that the model in `folder` writes hold together."""
    found = story_consistency.measure(module, folder, n)
    names = ("consistency", "without_faults", "distinct_sentences", "example")
    return {name: found[name] for name in names}


@torch.no_grad()
def converted(model: nn.Module, n_kv_heads: int, how: str) -> nn.Module:
    """A copy of `model` with fewer key/value heads, made by one of WAYS.

    "mean" is the chapter's `pool_heads`; "first" takes the first head of each group,
    "random" draws all anew as the initialisation does.
    """
    new = module.pool_heads(model, n_kv_heads)
    old = dict(model.named_parameters())
    for name, parameter in new.named_parameters():
        if ".wk." not in name and ".wv." not in name:
            continue
        if how == "first":
            G = model.config.n_kv_heads
            heads = old[name].unflatten(0, (n_kv_heads, G // n_kv_heads, -1))
            parameter.copy_(heads[:, 0].flatten(0, 1))
        elif how == "random":
            std = 0.02 if name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * std)
    return new


# ---------------------------------------------------------------------------
# the parts
# ---------------------------------------------------------------------------


def measure_trained(runs: Runs) -> dict:
    """Every G from the start, with its cache; keys are the numbers of heads."""
    found = {"recipe": asdict(runs.sizes.recipe), "stories": runs.sizes.stories}
    for G in runs.sizes.heads:
        config = replace(runs.config, n_kv_heads=G)
        row = runs.train(G) | cache_bytes(config)
        found[str(G)] = row
    return found | {"real": real_stories(runs.sizes.stories)}


def cache_bytes(config: Any) -> dict:
    """Bytes of the cache a token, by the formula, and of a full one, as allocated."""
    S, K = config.max_seq_len, config.head_dim
    return {
        "cache_bytes_per_token": 2 * config.n_layers * config.n_kv_heads * K * 4,
        "cache_nbytes": module.Transformer(config).new_cache(1, S).nbytes,
        "cache_tokens": S,
    }


def real_stories(n: int) -> dict:
    """The same counts on held-out stories, which have no faults."""
    stories = story_consistency.load_stories()
    real = module.split_documents(module.read_text(module.DEFAULT_DATA))[1][:n]
    text = f"\n{module.END_OF_TEXT}\n".join(real)
    return {
        "consistency": stories.consistency(text),
        "without_faults": sum(not stories.faults(story) for story in real) / len(real),
        "distinct_sentences": stories.distinct_sentences(text),
    }


def measure_pooled(runs: Runs) -> dict:
    """The original and its conversions, before and after training again."""
    H, *fewer = runs.sizes.heads
    peaks = []
    for peak in PEAKS:
        row = {"peak": peak, str(H): runs.again(H, "same", "short", peak)["held_out"]}
        row |= {str(G): runs.again(G, "mean", "short", peak)["held_out"] for G in fewer}
        peaks.append(row)
    best = min(peaks, key=lambda row: sum(row[str(G)] for G in fewer))["peak"]
    steps = {
        share: round(part * runs.sizes.recipe.steps) for share, part in SHARES.items()
    }
    return {
        "peaks": peaks,
        "peak": best,
        "steps": steps,
        "recipe": asdict(again_recipe(runs.sizes, steps["long"], best)),
        "original": after(runs, H, "same", best),
        **{str(G): {how: after(runs, G, how, best) for how in WAYS} for G in fewer},
    }


def after(runs: Runs, n_kv_heads: int, how: str, peak: float) -> dict:
    """One conversion: held-out loss before, and after each share of the steps."""
    found = {share: runs.again(n_kv_heads, how, share, peak) for share in SHARES}
    long = found["long"]
    return {
        "before": long["curve"][0][1],
        **{share: run["held_out"] for share, run in found.items()},
        "curves": {share: run["curve"] for share, run in found.items()},
        **{name: long[name] for name in ("consistency", "without_faults")},
    }


def measure_seeds(runs: Runs) -> dict:
    """Held-out loss and stories of every G, from other seeds than the first part's."""
    names = ("held_out", "consistency", "without_faults", "distinct_sentences")
    found: dict[str, Any] = {"seeds": list(OTHER_SEEDS)}
    for G in runs.sizes.heads:
        rows = [runs.train(G, seed) for seed in OTHER_SEEDS]
        found[str(G)] = [{name: row[name] for name in names} for row in rows]
    return found


@torch.inference_mode()
def measure_speed(runs: Runs) -> dict:
    """A decode step behind `cached` tokens, for every G in turns, and what it reads."""
    sizes = runs.sizes
    rate = bench.memory_rate("cpu")
    found: dict[str, Any] = {
        "cached": sizes.cached,
        "rounds": sizes.rounds,
        "config": asdict(sizes.large),
        "memory_gb_per_second": rate / 1e9,
        "rows": [],
    }
    models = []
    for G in sizes.large_heads:
        torch.manual_seed(0)
        config = replace(sizes.large, n_kv_heads=G)
        models.append(module.Transformer(config).eval())
    for batch in sizes.batches:
        sides, rows = [], []
        for model in models:
            side, cache = decode_step(model, batch, sizes.cached)
            sides.append(side)
            rows.append({"n_kv_heads": model.config.n_kv_heads, "batch": batch})
            rows[-1] |= step_bytes(model, cache)
        times = bench.take_turns(sides, sizes.rounds, "cpu")
        for row, taken in zip(rows, times, strict=True):
            low, median, high = statistics.quantiles(taken, n=4)
            row |= {"ms": median * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}
            row["ratio"] = median / statistics.median(times[0])
            row["tokens_per_second"] = batch / median
            row["gb_per_second"] = row["bytes"] / median / 1e9
            print(
                f"G {row['n_kv_heads']:2}, batch {batch}: {row['ms']:6.1f} ms, "
                f"{row['bytes'] / 1e6:6.1f} MB",
                flush=True,
            )
        found["rows"] += rows
    return found


def decode_step(model: nn.Module, batch: int, cached: int) -> tuple[bench.Side, Any]:
    """One more token behind `cached` random keys and values, and back again."""
    cache = model.new_cache(batch, cached + 1)
    for layer in cache.layers:
        layer.k.normal_()
        layer.v.normal_()
    cache.advance(cached)
    token = torch.zeros(batch, 1, dtype=torch.long)

    def step() -> Tensor:
        with torch.inference_mode():
            return model(token, cache=cache)

    return bench.Side(step, lambda: cache.truncate(cached)), cache


def step_bytes(model: nn.Module, cache: Any) -> dict:
    """What a decode step reads: every weight but the positions, and the whole cache.

    The embedding counts because it is the head as well; of the positions a row is read.
    """
    weights = sum(
        p.nbytes for name, p in model.named_parameters() if name != "positions.weight"
    )
    return {
        "weight_bytes": weights,
        "cache_bytes": cache.nbytes,
        "bytes": weights + cache.nbytes,
    }


PARTS: dict[str, Callable[[Runs], dict]] = {
    "trained": measure_trained,
    "pooled": measure_pooled,
    "seeds": measure_seeds,
    "speed": measure_speed,
}

# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

THIS = "tests/studies/kv_heads.py"
# What a trained model follows from, and what the record follows from beside it.
TRAINED = (
    *record.sources(CHAPTER),
    *(f"{THIS}::{name}" for name in ("first_recipe", "again_recipe", "converted")),
)
SOURCES = (
    *TRAINED,
    "data/make_stories.py::consistency",
    "data/make_stories.py::faults",
    "tests/studies/story_consistency.py::write_stories",
    *(f"{THIS}::{name}" for name in ("SHARES", "PEAKS", "full", "decode_step")),
)


def version(sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what the trainings follow from; `sources` are digests."""
    asked = (sizes.config, sizes.recipe, sizes.points, sizes.stories, sizes.documents)
    text = repr((asked, [sources[name] for name in TRAINED]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(path: Path) -> dict:
    """The record at `path`, if any; ValueError when it is of other sources."""
    if not path.exists():
        return {}
    stale = results.changed(path)
    if stale:
        raise ValueError(
            f"{path} was recorded with another {', '.join(stale)}: "
            "run all of it again, without --only"
        )
    return results.read(path)


def write(
    path: Path, parts: dict, command: str, before: dict[str, str], accepted: list
) -> None:
    """Write the record; ValueError when a source is not what it was `before`.

    `accepted` are the changes that the parts taken over from a record have survived.
    """
    ordered = {name: parts[name] for name in PARTS if name in parts}
    with module.replacing(path) as partial:
        results.write(partial, command, ordered, before)
        written = results.read(partial)
        now = written["sources"]
        if changed := [source for source in now if now[source] != before[source]]:
            raise ValueError(
                f"{', '.join(changed)} changed meanwhile, so nothing is recorded; "
                "run it again"
            )
        if accepted:
            results.save(partial, written | {"accepted": accepted})


def study(args: argparse.Namespace) -> None:
    """Measure what is asked, and write the record."""
    sizes = quick() if args.quick else full()
    command = f"python {THIS}" + (" --quick" if args.quick else "")
    path = args.record or (args.out / "quick.json" if args.quick else RECORD)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    old = kept(path) if args.only else {}
    parts = dict(old.get("data", {}))
    before = {source: results.digest(source) for source in SOURCES}
    runs = Runs(sizes, args.out, version(sizes, before))
    for name in [args.only] if args.only else PARTS:
        started = time.perf_counter()
        parts[name] = PARTS[name](runs) | {
            "machine": results.machine(),
            "date": datetime.date.today().isoformat(),
        }
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    write(path, parts, command, before, old.get("accepted", []))
    print(f"written: {path}")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="kv_heads.py", description=__doc__.split("\n")[0]
    )
    command.add_argument("--only", choices=list(PARTS), help="one part of the record")
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "kv_heads.py")


if __name__ == "__main__":
    sys.exit(main())
