# SPDX-License-Identifier: MIT
"""The whole book in one picture: models of all chapters, trained on the same tokens.

    python tests/studies/whole_book.py             all of it, an hour or two
    python tests/studies/whole_book.py --only fp8  train this one, and keep it for later
    python tests/studies/whole_book.py --speed     the speed in the record again
    python tests/studies/whole_book.py --plot      the figure again, from the record
    python tests/studies/whole_book.py --quick     a small version, in seconds

    GPT-2      chapter 3's file, with as many key/value heads as query heads
    Llama      chapter 4: rotary positions, RMSNorm, SwiGLU, half the key/value heads
    MLA        chapter 5: keys and values from one latent, feed-forward layers dense
    MoE        chapter 6 without MTP: every feed-forward layer a mixture of experts
    MoE + MTP  chapter 6: and one module that predicts a token further
    FP8        chapter 7: the same model, its products of eight-bit numbers

All are as wide, as deep and read as far, and the matrix of the embedding is also that
of the head. The widths of the feed-forward layers are such that a decoding step uses
as many parameters in each, within 1 %: all but the experts that were not chosen and
the MTP modules, tables of embeddings included. In total they differ.

Each dimension of a product in FP8 takes two blocks of 128 or more, as in chapter 7's
TINY. The latent is therefore as wide as two heads' keys and values, 256, and with the
16 of the rotary part MLA's cache is a little larger than that of this Llama: it is in
larger models, with more heads, that the latent is the smaller one.

One recipe for all, not tuned for any: its rate is below the chapters' own, these models
being wider. Of one seed all see the same tokens in the same order, and the last three
have the same initial weights in what they share; `tokens` and `weights` of the record
are hashes of both. FP8 on a CPU is emulated, at several times the cost of float32, so
it has the first seed alone. Losses are those of the model itself, without its MTP
module's. Three runs that differ by their seed say how far a result moves by itself:
inside that spread nothing is ranked.

    held_out         nats a token, over all windows of the held-out stories
    consistency      of written stories, the share that keeps to at most three
                     characters and two things (tests/studies/story_consistency.py)
    without_faults   the share without any fault that data/make_stories.py can see
    training         tokens a second of optimizer steps, those of all models in turns
    decoding         tokens a second of greedy `generate`, one row, behind a short
                     opening, in turns too, on the models of the first seed
    speculation      the same of `speculate`, which drafts with the MTP module
    cache_bytes      of one token, in all layers, in float32

Speeds are of one thread. What is trained is kept in `out/whole_book/` or `--out`, in a
folder of its own for each model and what it follows from, so a run that was stopped
goes on where it was, and two processes with other `--only` can share the work.
"""

import argparse
import datetime
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import bench  # noqa: E402
import record  # noqa: E402
import results  # noqa: E402
import running  # noqa: E402
import story_consistency  # noqa: E402
import torch  # noqa: E402
from chapters import ROOT, Chapter, find, load  # noqa: E402
from running import tokens_digest  # noqa: E402
from torch import Tensor, nn  # noqa: E402

THIS = Path(__file__).resolve().relative_to(ROOT).as_posix()
RECORD = ROOT / "tests" / "studies" / "results" / "whole_book.json"
RUNS = Path("out") / "whole_book"


@dataclass(frozen=True)
class Entry:
    """A model of the comparison: its name, where it comes from, how it is drawn."""

    label: str
    chapter: Chapter
    colour: str  # of Okabe and Ito's
    first_seed_only: bool = False

    @property
    def module(self) -> ModuleType:
        return load(self.chapter)


MODELS = {
    "gpt2": Entry("GPT-2", find("ch03"), "#000000"),
    "llama": Entry("Llama", find("ch04"), "#e69f00"),
    "mla": Entry("MLA", find("ch05"), "#56b4e9"),
    "moe": Entry("MoE", find("ch06"), "#009e73"),
    "moe_mtp": Entry("MoE + MTP", find("ch06"), "#0072b2"),
    "fp8": Entry("FP8", find("ch07"), "#d55e00", first_seed_only=True),
}
# Each begins with the weights of another, in what they share.
BEGINS_AS = {"moe_mtp": "moe", "fp8": "moe_mtp"}


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of one run of the study."""

    configs: dict[str, Any]  # by the name of the model
    recipe: dict[str, Any]  # fields of the chapters' Recipe
    seeds: tuple[int, ...]
    points: int  # of the curve of the held-out loss
    stories: int
    openings: int
    prompt: int  # tokens of an opening that is continued to time it
    new: int  # and tokens after it
    rounds: int  # of decoding an opening
    turns: int  # of a training step
    documents: int | None = None  # None: all of the data

    @property
    def window(self) -> int:
        """Tokens in a row of a batch."""
        return self.configs["gpt2"].max_seq_len


def configs(shape: dict, latent: dict, mixture: dict, widths: dict) -> dict[str, Any]:
    """Each model's Config; `widths` are those of the dense feed-forward layers."""
    H, D, width = shape["n_heads"], shape["dim"], mixture["expert_ffn_dim"]
    active = width * (mixture["n_shared"] + mixture["n_active"])
    one_group = {"n_groups": 1, "n_active_groups": 1, "routed_scale": 1.0}
    sparse = latent | mixture | one_group | {"n_dense_layers": 0, "ffn_dim": active}
    llama = {"n_kv_heads": H // 2, "head_dim": D // H, "rope_theta": 10000.0}
    own = {
        "gpt2": {"n_kv_heads": H, "dropout": 0.0, "ffn_dim": widths["gpt2"]},
        "llama": llama | {"ffn_dim": widths["llama"]},
        "mla": latent | {"ffn_dim": active},
        "moe": sparse | {"n_mtp": 0},
        "moe_mtp": sparse | {"n_mtp": 1},
        "fp8": sparse | {"n_mtp": 1, "fp8": True},
    }
    shape = shape | {"tie_embeddings": True}
    return {
        name: MODELS[name].module.Config(**shape, **more) for name, more in own.items()
    }


def full() -> Sizes:
    """What is recorded."""
    shape = {"vocab_size": 1025, "max_seq_len": 256, "dim": 256, "n_layers": 2}
    latent = {"q_latent_dim": 256, "latent_dim": 256, "head_dim": 48}
    mixture = {"n_experts": 8, "n_active": 2, "n_shared": 1, "expert_ffn_dim": 256}
    return Sizes(
        configs=configs(
            shape | {"n_heads": 4, "eos_id": 1024},
            latent | {"rope_dim": 16, "value_dim": 64},
            mixture,
            widths={"gpt2": 1312, "llama": 1008},
        ),
        recipe={"steps": 800, "batch_size": 4, "lr": 2e-3, "warmup": 100},
        seeds=(0, 1, 2),
        points=20,
        stories=200,
        openings=5,
        prompt=16,
        new=128,
        rounds=5,
        turns=20,
    )


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    shape = {"vocab_size": 1025, "max_seq_len": 48, "dim": 32, "n_layers": 2}
    latent = {"q_latent_dim": 24, "latent_dim": 24, "head_dim": 12}
    mixture = {"n_experts": 4, "n_active": 2, "n_shared": 1, "expert_ffn_dim": 16}
    return Sizes(
        configs=configs(
            shape | {"n_heads": 2, "eos_id": 1024},
            latent | {"rope_dim": 4, "value_dim": 16},
            mixture,
            widths={"gpt2": 80, "llama": 56},
        ),
        recipe={"steps": 4, "batch_size": 2, "lr": 1e-2, "warmup": 2},
        seeds=(0, 1),
        points=2,
        stories=4,
        openings=2,
        prompt=6,
        new=10,
        rounds=2,
        turns=3,
        documents=12,
    )


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


def new_model(name: str, sizes: Sizes, seed: int) -> nn.Module:
    """A model with its initial weights, those that it shares copied from another's.

    They are copied: what a layer draws of the random numbers when it is made differs
    between float32 and FP8, and so does what comes after it.
    """
    torch.manual_seed(seed)
    first = BEGINS_AS.get(name)
    model = None if first is None else new_model(first, sizes, seed)
    made = MODELS[name].module.Transformer(sizes.configs[name])
    if model is not None:
        result = made.load_state_dict(model.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all(each.startswith("mtp.") for each in result.missing_keys)
    return made


def weights_digest(model: nn.Module) -> str:
    """A hash of all but the MTP modules."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("mtp."):
            hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


def trained_seeds(name: str, sizes: Sizes) -> tuple[int, ...]:
    """The seeds that a model is trained with."""
    return sizes.seeds[: 1 if MODELS[name].first_seed_only else None]


class Runs:
    """The trainings of the study, each made once and then read from its folder."""

    def __init__(self, sizes: Sizes, folder: Path, sources: dict[str, str]) -> None:
        self.sizes, self.folder, self.sources = sizes, folder, sources
        module = MODELS["gpt2"].module
        self.tokenizer = module.load_tokenizer(module.default_tokenizer())
        text = module.read_text(module.DEFAULT_DATA)
        self.seen, self.held_out = (
            part[: sizes.documents] for part in module.split_documents(text)
        )

    def training(self, name: str, seed: int) -> Any:
        """A training that has not begun, of the chapter's own class."""
        sizes, module = self.sizes, MODELS[name].module
        every = max(1, sizes.recipe["steps"] // sizes.points)
        recipe = module.Recipe(**sizes.recipe, seed=seed, eval_every=every)
        shape = (self.tokenizer, sizes.window, recipe.batch_size, seed)
        data, held_out = (
            module.Batches(part, *shape) for part in (self.seen, self.held_out)
        )
        return module.Training(new_model(name, sizes, seed), data, held_out, recipe)

    def place(self, name: str, seed: int) -> Path:
        """Where a model is kept."""
        version_ = version(name, self.sizes, self.sources)
        return self.folder / f"{name}_{version_}" / f"seed{seed}"

    def train(self, name: str, seed: int) -> dict:
        """Train a model; returns what is recorded of it."""
        out = self.place(name, seed)
        return kept(out / "run.json", lambda: self.trained(name, seed, out))

    def trained(self, name: str, seed: int, out: Path) -> dict:
        """Losses of a training that is begun, or gone on with, in `out`."""
        module, training = MODELS[name].module, self.training(name, seed)
        begun = {
            "weights": weights_digest(training.model),
            "tokens": tokens_digest(training.data, training.recipe.steps),
        }
        if (out / "checkpoint.pt").exists():
            training.restore(module.read_torch(out / "checkpoint.pt"))
        said = f"{MODELS[name].label}, seed {seed}, from step {training.step}"
        print(said, flush=True)
        if not module.train(training, self.tokenizer, out):
            raise KeyboardInterrupt
        log = training.log
        curve = [[row["step"], row["held_out"]] for row in log if row["held_out"]]
        return begun | {"held_out": curve[-1][1], "curve": curve}

    def stories(self, name: str, seed: int) -> dict:
        """How well a trained model keeps to its stories (story_consistency.py)."""
        self.train(name, seed)
        out, n = self.place(name, seed), self.sizes.stories
        text = repr((n, [self.sources[source] for source in STORIES]))
        hashed = hashlib.sha256(text.encode()).hexdigest()[:12]
        module = MODELS[name].module
        measure = story_consistency.measure
        return kept(out / f"stories_{hashed}.json", lambda: measure(module, out, n))

    def model(self, name: str, seed: int) -> Any:
        """A trained model, in eval mode."""
        self.train(name, seed)
        place = self.place(name, seed)
        return MODELS[name].module.Transformer.from_pretrained(place)


def kept(path: Path, make: Callable[[], dict]) -> dict:
    """What is at `path`, or else what `make` returns, which is written there."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = make()
    with MODELS["gpt2"].module.replacing(path) as partial:
        partial.write_text(json.dumps(found), encoding="utf-8")
    return found


# ---------------------------------------------------------------------------
# what is recorded
# ---------------------------------------------------------------------------


MEASURES = ("consistency", "without_faults")  # of written stories


def summary(values: Sequence[float]) -> dict:
    """Mean and ends of the values of all seeds."""
    mean = statistics.fmean(values)
    ends = {"low": min(values), "high": max(values)}
    return {"mean": mean} | ends | {"seeds": list(values)}


def parameters(model: nn.Module) -> dict[str, int]:
    """All numbers that are trained, MTP modules too, and those of a decoding step."""
    total = sum(weight.numel() for weight in model.parameters())
    count = getattr(sys.modules[type(model).__module__], "parameter_counts", None)
    return {"total": total, "active": count(model)["active"] if count else total}


def cache_bytes(model: nn.Module) -> float:
    """What a token takes in the model's cache, all layers together."""
    S = model.config.max_seq_len
    return model.new_cache(1, S).nbytes / S


def measure_model(runs: Runs, name: str) -> dict:
    """Size, losses and stories of a model, over its seeds."""
    seeds, entry = trained_seeds(name, runs.sizes), MODELS[name]
    trained = [runs.train(name, seed) for seed in seeds]
    stories = [runs.stories(name, seed) for seed in seeds]
    model = new_model(name, runs.sizes, seeds[0])
    found: dict[str, Any] = {
        "label": entry.label,
        "chapter": entry.chapter.name,
        "config": asdict(runs.sizes.configs[name]),
        "seeds": list(seeds),
        "parameters": parameters(model),
        "cache_bytes": cache_bytes(model),
        "held_out": summary([run["held_out"] for run in trained]),
    }
    for measure in MEASURES:
        found[measure] = summary([each[measure] for each in stories])
    for part in ("curve", "weights", "tokens"):
        found[part] = [run[part] for run in trained]
    return found


def measure_trained(runs: Runs) -> dict:
    """All models, and what the real stories score."""
    sizes = runs.sizes
    models = {name: measure_model(runs, name) for name in MODELS}
    real = runs.stories("gpt2", sizes.seeds[0])
    return {
        "recipe": sizes.recipe,
        "window": sizes.window,
        "seeds": list(sizes.seeds),
        "stories": sizes.stories,
        "held_out_windows": len(runs.training("gpt2", sizes.seeds[0]).held_out.starts),
        "real": {name: real[f"real_{name}"] for name in MEASURES},
        "trained": stamp(),
        "models": models,
    }


def stamp() -> dict:
    """Where and when something was measured."""
    today = datetime.date.today().isoformat()
    return {"machine": results.machine(), "date": today}


# ---------------------------------------------------------------------------
# speed
# ---------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """Products of matrices on one thread, as many as there were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_speed(runs: Runs) -> tuple[dict, dict]:
    """Speeds by model, and what they are of; all take turns, in this process."""
    sizes = runs.sizes
    with one_thread():
        training, decoding, ahead = time_training(runs), *time_decoding(runs)
        where = stamp()
    found = {}
    for name in MODELS:
        found[name] = {"training": training[name], "decoding": decoding[name]}
        if name in ahead:
            found[name]["speculation"] = ahead[name]
    names = ("openings", "prompt", "new", "rounds", "turns")
    return found, where | {name: getattr(sizes, name) for name in names}


def rates(speeds: dict[str, float], base: float) -> dict[str, dict]:
    """Tokens a second, and their ratio to `base`."""
    return {
        name: {"tokens_per_second": speed, "ratio": speed / base}
        for name, speed in speeds.items()
    }


def time_training(runs: Runs) -> dict[str, dict]:
    """Training steps from the first one on, the medians over the turns."""
    trainings = [runs.training(name, runs.sizes.seeds[0]) for name in MODELS]
    sides = [bench.Side(training.take_step) for training in trainings]
    times = bench.take_turns(sides, runs.sizes.turns, "cpu")
    speeds = {
        name: training.log[0]["tokens"] / statistics.median(taken)
        for name, training, taken in zip(MODELS, trainings, times, strict=True)
    }
    return rates(speeds, speeds["gpt2"])


def prompts(runs: Runs) -> list[Tensor]:
    """The first tokens of held-out stories, (1, T) each."""
    stories, T = runs.held_out[: runs.sizes.openings], runs.sizes.prompt
    return [torch.tensor([runs.tokenizer.encode(story)[:T]]) for story in stories]


def time_decoding(runs: Runs) -> tuple[dict[str, dict], dict[str, dict]]:
    """`generate` of all models and `speculate` of those with MTP, opening by opening.

    Of each opening the median over the rounds counts, and the speed is all new tokens
    over the sum of these. `ratio` is to the `generate` of GPT-2, `speedup` to that of
    the same model.
    """
    sizes, seed = runs.sizes, runs.sizes.seeds[0]
    models = {name: runs.model(name, seed) for name in MODELS}
    ways = [(name, "generate") for name in MODELS]
    ways += [(name, "speculate") for name in MODELS if has_mtp(sizes.configs[name])]
    seconds, total = dict.fromkeys(ways, 0.0), {}
    for prompt in prompts(runs):

        def run(name: str, way: str, prompt: Tensor = prompt) -> Any:
            return getattr(MODELS[name].module, way)(models[name], prompt, sizes.new)

        sides = [bench.Side(lambda each=each, run=run: run(*each)) for each in ways]
        times = bench.take_turns(sides, sizes.rounds, "cpu")
        for way, taken in zip(ways, times, strict=True):
            seconds[way] += statistics.median(taken)
        for name, way in ways:
            if way == "speculate":
                stats = run(name, way)[1]
                counts = total.setdefault(name, [0, 0])
                counts[0] += stats.accepted
                counts[1] += stats.drafted
    new = sizes.openings * sizes.new
    speeds = {way: new / taken for way, taken in seconds.items()}
    base = speeds["gpt2", "generate"]
    plain = rates({name: speeds[name, "generate"] for name in MODELS}, base)
    ahead = rates({name: speeds[name, "speculate"] for name in total}, base)
    for name, (accepted, drafted) in total.items():
        own = plain[name]["tokens_per_second"]
        ahead[name]["speedup"] = ahead[name]["tokens_per_second"] / own
        ahead[name]["rate"] = accepted / drafted
    return plain, ahead


def has_mtp(config: Any) -> bool:
    """Whether a model of this shape has modules that draft tokens."""
    return getattr(config, "n_mtp", 0) > 0


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------


def chapter_sources(chapter: Chapter) -> list[str]:
    """What a training by the chapter's file follows from, and its data."""
    own = ["held_out_loss"]
    own += [n for n in ("MTP_EARLY", "after_step") if hasattr(load(chapter), n)]
    return [*record.sources(chapter), *(f"{chapter.path}::{name}" for name in own)]


# What a trained model follows from, its written stories beside it, and the record.
TRAINED = {
    name: (
        *chapter_sources(entry.chapter),
        # FP8 begins with the weights that another chapter's file draws.
        *(f"{MODELS[n].chapter.path}::model" for n in [BEGINS_AS.get(name)] if n),
        *(f"{THIS}::{part}" for part in ("BEGINS_AS", "new_model", "Runs")),
    )
    for name, entry in MODELS.items()
}
STORIES = (
    "data/make_stories.py",
    *(f"tests/studies/story_consistency.py::{n}" for n in ("measure", "write_stories")),
)
SOURCES = tuple(
    dict.fromkeys(
        (
            *sum(TRAINED.values(), ()),
            *STORIES,
            *(f"{THIS}::{name}" for name in ("configs", "full", "MODELS", "summary")),
            *(f"{THIS}::{name}" for name in ("parameters", "cache_bytes", "prompts")),
            *(f"{THIS}::{name}" for name in ("measure_model", "measure_trained")),
            *(f"{THIS}::{name}" for name in ("measure_speed", "rates")),
            *(f"{THIS}::{name}" for name in ("time_training", "time_decoding")),
        )
    )
)


def version(name: str, sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what a model's trainings follow from; `sources` are digests."""
    shapes, at = [], name
    while at:
        shapes.append(sizes.configs[at])
        at = BEGINS_AS.get(at)
    asked = (shapes, sizes.window, sizes.recipe, sizes.points, sizes.documents)
    text = repr((asked, [sources[source] for source in TRAINED[name]]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def current(path: Path, sizes: Sizes) -> None:
    """ValueError unless there is a record that speeds measured now may join."""
    if not path.exists():
        raise ValueError(f"there is no {path} yet: run all of it first")
    if stale := results.changed(path):
        raise ValueError(
            f"{path} was recorded with another {', '.join(stale)}: run all of it again"
        )
    data = results.read(path)["data"]
    if (data["recipe"], data["seeds"]) != (sizes.recipe, list(sizes.seeds)):
        raise ValueError(f"{path} is of another recipe or of other seeds")


def with_speed(data: dict, speeds: dict, what: dict) -> dict:
    """`data` with these speeds in place of any that it has."""
    models = {name: row | speeds[name] for name, row in data["models"].items()}
    return data | {"speed": what, "models": models}


def redrawn(path: Path, data: dict) -> None:
    """Put `data` into the record at `path`, and draw the figure again."""
    kept_ = results.read(path) | {"data": data}
    figure = draw(data, path.with_suffix(".png"))
    kept_["files"] = {figure.name: results.file_digest(figure)}
    results.save(path, kept_)


def spread(values: dict, form: str = ".3f", times: float = 1) -> str:
    """The mean, and between which ends the seeds lie."""
    mean, low, high = (times * values[name] for name in ("mean", "low", "high"))
    ends = f" ({low:{form}} to {high:{form}})" if len(values["seeds"]) > 1 else ""
    return f"{mean:{form}}{ends}"


HEADINGS = (
    *("", "held-out loss", "consistent, %", "without faults, %"),
    *("training, tokens/s", "decoding, tokens/s", "cache, bytes/token"),
    *("parameters", "active"),
)


def table(data: dict) -> str:
    """The numbers of the figure, a row a model."""
    rows = [HEADINGS]
    for row in data["models"].values():
        decoding = f"{row['decoding']['tokens_per_second']:,.0f}"
        if "speculation" in row:
            ahead = row["speculation"]["tokens_per_second"]
            decoding += f" (drafts: {ahead:,.0f})"
        rows.append(
            (
                row["label"],
                spread(row["held_out"]),
                spread(row["consistency"], ".1f", 100),
                spread(row["without_faults"], ".1f", 100),
                f"{row['training']['tokens_per_second']:,.0f}",
                decoding,
                f"{row['cache_bytes']:,.0f}",
                f"{row['parameters']['total']:,}",
                f"{row['parameters']['active']:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def draw(data: dict, path: Path) -> Path:
    """The losses while training; at the end, one small panel for each measure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    draw_curves(left.subplots(), data)
    axes = right.subplots(3, 2, sharey=True).flatten()
    models = data["models"].values()
    draw_seeds(axes[0], models, "held_out", 1)
    axes[0].set_title("held-out loss, nats a token", fontsize="small")
    draw_seeds(axes[1], models, "consistency", 100)
    axes[1].set_title("consistent stories, %", fontsize="small")
    axes[1].set_xlim(right=min(axes[1].get_xlim()[1], 101))
    draw_bars(axes[2], models, lambda row: row["training"]["tokens_per_second"])
    axes[2].set_title("training, tokens a second", fontsize="small")
    draw_bars(axes[3], models, lambda row: row["decoding"]["tokens_per_second"])
    draw_drafts(axes[3], models)
    axes[3].set_title("decoding, tokens a second", fontsize="small")
    note(axes[3], "ring: with drafts", 0.02, "bottom")
    draw_bars(axes[4], models, lambda row: row["cache_bytes"])
    axes[4].set_title("cache, bytes a token", fontsize="small")
    draw_bars(axes[5], models, lambda row: row["parameters"]["total"] / 1e6, 0.35)
    draw_bars(axes[5], models, lambda row: row["parameters"]["active"] / 1e6)
    axes[5].set_title("parameters, millions", fontsize="small")
    note(axes[5], "dark: active\nlight: all", 0.98, "top")
    for ax in axes:
        ax.set_yticks(range(len(MODELS)), [row["label"] for row in models])
        ax.set_ylim(len(MODELS) - 0.4, -0.6)
        ax.tick_params(labelsize="x-small")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    with MODELS["gpt2"].module.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


def note(ax: Any, text: str, y: float, side: str) -> None:
    """A few words at the right end of a panel."""
    where = {"transform": ax.transAxes, "ha": "right", "va": side}
    ax.text(0.98, y, text, fontsize="x-small", **where)


COLOURS = [entry.colour for entry in MODELS.values()]


def draw_curves(ax: Any, data: dict) -> None:
    """A line a run: the held-out loss while training."""
    for row, colour in zip(data["models"].values(), COLOURS, strict=True):
        for i, curve in enumerate(row["curve"]):
            steps, losses = zip(*curve, strict=True)
            label = row["label"] if i == 0 else None
            ax.plot(steps, losses, color=colour, lw=0.9, alpha=0.8, label=label)
    ax.set(xlabel="step", ylabel="held-out loss, nats a token", xlim=(0, None))
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="both", labelsize="x-small")
    ax.set_title("a line a seed", fontsize="small")
    ax.grid(alpha=0.3, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(fontsize="small", frameon=False, loc="upper right")
    for line in legend.get_lines():
        line.set(linewidth=2, alpha=1)


def draw_seeds(ax: Any, models: Any, measure: str, times: float) -> None:
    """A dot a seed, on a line from the least to the largest."""
    for y, (row, colour) in enumerate(zip(models, COLOURS, strict=True)):
        values = [times * value for value in row[measure]["seeds"]]
        ax.plot([min(values), max(values)], [y, y], color=colour, lw=1, alpha=0.6)
        ax.plot(values, [y] * len(values), "o", color=colour, ms=4.5, alpha=0.8)
    ax.margins(x=0.15)


def draw_bars(
    ax: Any, models: Any, value: Callable[[dict], float], alpha: float = 1
) -> None:
    """A bar a model, from 0."""
    values = [value(row) for row in models]
    ax.barh(range(len(values)), values, 0.55, color=COLOURS, alpha=alpha, lw=0)


def draw_drafts(ax: Any, models: Any) -> None:
    """A ring where `speculate` gets to, beside the bar of `generate`."""
    for y, (row, colour) in enumerate(zip(models, COLOURS, strict=True)):
        if "speculation" in row:
            x = row["speculation"]["tokens_per_second"]
            ax.plot(x, y, "o", ms=5, color=colour, mfc="white")


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------


def asked_sizes(args: argparse.Namespace) -> Sizes:
    """The sizes of a run, from the flags."""
    sizes = quick() if args.quick else full()
    if args.steps is not None:
        sizes = replace(sizes, recipe=sizes.recipe | {"steps": args.steps})
    return sizes if args.seeds is None else replace(sizes, seeds=tuple(args.seeds))


def study(args: argparse.Namespace) -> None:
    """Do what is asked, and write the record unless that is `--only` or `--plot`."""
    sizes = asked_sizes(args)
    path = args.record or (args.out / "quick.json" if args.quick else RECORD)
    if sizes != full() and path == RECORD and not args.only:
        raise ValueError("this is not what is recorded: name a --record for it")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    if args.plot:
        if not path.exists():
            raise ValueError(f"there is no {path} to draw: run all of it first")
        redrawn(path, results.read(path)["data"])
        print(f"written: {path}")
        return
    if args.speed:
        current(path, sizes)
    before = {source: results.digest(source) for source in SOURCES}
    runs = Runs(sizes, args.out, before)
    if args.only:
        train_only(runs, args.only)
    else:
        write(args, runs, path)


def train_only(runs: Runs, names: Sequence[str]) -> None:
    """Train these models and let them write, for a run that finds them there."""
    for name in names:
        for seed in trained_seeds(name, runs.sizes):
            runs.train(name, seed)
            runs.stories(name, seed)
    print(f"kept in {runs.folder}: {', '.join(names)}; no record is written")


def write(args: argparse.Namespace, runs: Runs, path: Path) -> None:
    """Measure all, or the speed alone, and write it; prints the table."""
    data = results.read(path)["data"] if args.speed else measure_trained(runs)
    data = with_speed(data, *measure_speed(runs))
    running.unchanged(runs.sources)
    if args.speed:
        redrawn(path, data)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(data, path.with_suffix(".png"))
        results.write(path, command_line(args), data, runs.sources, files=[figure])
    print(table(data))
    print(f"written: {path}")


def command_line(args: argparse.Namespace) -> str:
    """What was run, with those flags that change the numbers."""
    words = ["python", THIS] + ["--quick"] * args.quick
    for name in ("steps", "seeds"):
        if (value := getattr(args, name)) is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="whole_book.py", description=__doc__.split("\n")[0]
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--only",
        nargs="+",
        choices=list(MODELS),
        metavar="NAME",
        help=f"train only these and write no record: {', '.join(MODELS)}",
    )
    what.add_argument(
        "--speed", action="store_true", help="measure the speed again, for the record"
    )
    what.add_argument(
        "--plot", action="store_true", help="draw the figure again, from the record"
    )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    command.add_argument("--steps", type=int, metavar="N", help="of each training")
    command.add_argument("--seeds", type=int, nargs="+", metavar="N")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "whole_book.py")


if __name__ == "__main__":
    sys.exit(main())
