# SPDX-License-Identifier: MIT
"""Multi-token prediction in a small model: what it does to the loss, and to decoding.

    python tests/studies/look_ahead.py            all of it, most of an hour
    python tests/studies/look_ahead.py --speed    the speed part of the record again
    python tests/studies/look_ahead.py --plot     the figure again, from the record
    python tests/studies/look_ahead.py --quick    a small version, in seconds

Chapter 6's TINY with none, one and two MTP modules. Of one seed, all have the same
initial weights in what they share, copied from the model without modules, and see the
same tokens in the same order; `weights` and `tokens` of the record are hashes of both.
The gradient of the modules' loss reaches the shared weights, and its norm counts where
gradients are clipped.

    trained  loss of the model itself, without the modules' loss, of two seeds; with two
             modules of the first seed only
    drafts   what `speculate` accepts: the openings of held-out stories are continued,
             greedy and sampled, by every trained model with modules
    speed    training steps of all three in turns; `speculate` and `generate` in turns,
             on the models of the first seed, and what the parts of a round cost

The trainings follow one another, so what else the machine did meanwhile is in their own
`tokens_per_second`; to compare, take those of the part `speed`.

DeepSeek-V3 reports that 85 to 90 % of its second tokens are accepted, and 1.8 times the
tokens a second (arXiv:2412.19437 §5.4.3). Of small models, that more tokens ahead may
make them worse (arXiv:2404.19737, where all heads sit side by side on one trunk).

What is trained is kept in `out/look_ahead/` or `--out`, in a folder of its own for each
version of the model, the recipe and the data, so a run that was stopped goes on where
it was, and `--speed` needs no training while that folder is there.
"""

import argparse
import datetime
import hashlib
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import bench  # noqa: E402
import record  # noqa: E402
import results  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402
from running import tokens_digest  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CHAPTER = find("ch06")
module = load(CHAPTER)
THIS = Path(__file__).resolve().relative_to(ROOT).as_posix()
RECORD = ROOT / "tests" / "studies" / "results" / "look_ahead.json"
RUNS = Path("out") / "look_ahead"
DEPTHS = (0, 1, 2)  # how many MTP modules
HOW = {0.0: "greedy", 0.8: "sampled"}  # by temperature
TEMPERATURES = tuple(HOW)
# DeepSeek-V3 with one module (arXiv:2412.19437 §5.4.3): the share of second tokens that
# is accepted, over various topics, and tokens a second over those without.
PAPER_RATE, PAPER_SPEEDUP = (0.85, 0.9), 1.8


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of one run of the study."""

    config: Any
    recipe: Any
    seeds: tuple[int, ...]
    points: int  # of the curve of the held-out loss
    bins: int  # of the training loss, each a mean
    openings: int
    new: int  # tokens after an opening
    rounds: int  # of decoding an opening
    turns: int  # of a training step, and of each part of a round
    documents: int | None = None  # None: all of the data


def full() -> Sizes:
    """What is recorded."""
    return Sizes(
        config=module.TINY,
        recipe=module.Recipe(steps=1200),
        seeds=(0, 1),
        points=20,
        bins=60,
        openings=20,
        new=100,
        rounds=3,
        turns=50,
    )


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    small = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "ffn_dim": 32}
    return Sizes(
        config=replace(module.TINY, **small, n_experts=4, expert_ffn_dim=8),
        recipe=module.Recipe(steps=20, warmup=2, lr=1e-2, seq_len=64),
        seeds=(0,),
        points=2,
        bins=4,
        openings=3,
        new=12,
        rounds=2,
        turns=3,
        documents=60,
    )


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


class Training(module.Training):
    """The chapter's; the log has the loss of the model itself beside the whole one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.model.register_forward_hook(self.keep)

    def keep(self, model: nn.Module, inputs: tuple, outputs: Any) -> None:
        """Note the logits of a training pass."""
        if isinstance(outputs, module.Outputs):
            self.logits = outputs.logits.detach()  # (B, T, V)

    def take_step(self) -> dict:
        """One optimizer step; returns its row of the log, `main` in it."""
        targets = self.data.batch(self.step)[:, 1:]
        row = super().take_step()
        main = F.cross_entropy(self.logits.flatten(0, 1), targets.flatten())
        row["main"] = main.item()
        return row


def new_model(config: Any, n_mtp: int, seed: int) -> nn.Module:
    """A model with the initial weights of the one without modules, and its modules'."""
    torch.manual_seed(seed)
    first = module.Transformer(replace(config, n_mtp=0))
    model = module.Transformer(replace(config, n_mtp=n_mtp))
    result = model.load_state_dict(first.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("mtp.") for name in result.missing_keys)
    return model


def weights_digest(model: nn.Module) -> str:
    """A hash of all but the MTP modules."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("mtp."):
            hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


class Runs:
    """The trainings of the study, each made once and then read from its folder."""

    def __init__(self, sizes: Sizes, folder: Path, version: str) -> None:
        self.sizes, self.folder = sizes, folder / version
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = module.load_tokenizer(module.default_tokenizer())
        text = module.read_text(module.DEFAULT_DATA)
        self.seen, self.held_out = (
            part[: sizes.documents] for part in module.split_documents(text)
        )

    def training(self, n_mtp: int, seed: int) -> Training:
        """A training that has not begun, its held-out loss looked at often."""
        sizes = self.sizes
        every = max(1, sizes.recipe.steps // sizes.points)
        recipe = replace(sizes.recipe, seed=seed, eval_every=every)
        shape = (self.tokenizer, recipe.seq_len, recipe.batch_size, seed)
        data, held_out = (
            module.Batches(part, *shape) for part in (self.seen, self.held_out)
        )
        config = replace(
            sizes.config,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
        )
        return Training(new_model(config, n_mtp, seed), data, held_out, recipe)

    def place(self, n_mtp: int, seed: int) -> Path:
        """Where a model is kept."""
        return self.folder / f"mtp{n_mtp}_seed{seed}"

    def train(self, n_mtp: int, seed: int) -> dict:
        """Train a model; returns what is recorded of it."""
        out = self.place(n_mtp, seed)
        if (out / "run.json").exists():
            return module.read_json(out / "run.json")
        out.mkdir(exist_ok=True)
        training = self.training(n_mtp, seed)
        begun = {
            "weights": weights_digest(training.model),
            "tokens": tokens_digest(training.data, training.recipe.steps),
        }
        if (out / "checkpoint.pt").exists():
            training.restore(module.read_torch(out / "checkpoint.pt"))
        print(f"{n_mtp} modules, seed {seed}, from step {training.step}", flush=True)
        if not module.train(training, self.tokenizer, out):
            raise KeyboardInterrupt
        found = begun | described(training, self.sizes.bins)
        with module.replacing(out / "run.json") as partial:
            partial.write_text(json.dumps(found), encoding="utf-8")
        return found

    def model(self, n_mtp: int, seed: int, dtype: torch.dtype = torch.float32) -> Any:
        """A trained model, in eval mode."""
        self.train(n_mtp, seed)
        return module.Transformer.from_pretrained(self.place(n_mtp, seed), dtype=dtype)


def described(training: Training, bins: int) -> dict:
    """Size, losses and time of a finished run."""
    log = training.log
    curve = [[row["step"], row["held_out"]] for row in log if row["held_out"]]
    return {
        "parameters": module.parameter_counts(training.model),
        "steps": training.step,
        "seconds": sum(row["seconds"] for row in log),
        "tokens_per_second": statistics.median(
            row["tokens"] / row["seconds"] for row in log
        ),
        "held_out": curve[-1][1],
        "ahead": held_out_ahead(training.model, training.held_out),
        "curve": curve,
        "log": thinned(log, bins),
    }


def thinned(log: Sequence[dict], bins: int) -> list[dict]:
    """The last step of each of `bins` stretches of the log, and means over it."""
    width, rows = -(-len(log) // bins), []
    for start in range(0, len(log), width):
        part = log[start : start + width]
        means = {
            name: statistics.fmean(row[name] for row in part)
            for name in ("loss", "main", "grad_norm")
        }
        rows.append({"step": part[-1]["step"]} | means)
    return rows


@torch.no_grad()
def held_out_ahead(model: nn.Module, held_out: Any) -> list[dict]:
    """Of each depth, on held-out text: nats a token, and how often it agrees.

    It agrees where its likeliest token is the one that the model itself finds
    likeliest when it comes to that place, the text before it being the real one.
    """
    sums = [Counter() for _ in range(model.config.n_mtp)]
    for batch in held_out.all():
        logits, ahead, _ = model.eval()(batch[:, :-1], detail=True)
        for k, (depth, total) in enumerate(zip(ahead, sums, strict=True)):
            targets = batch[:, 2 + k :]  # (B, T - 1 - k)
            nats = F.cross_entropy(depth.mT, targets, reduction="sum")
            same = depth.argmax(dim=2) == logits[:, 1 + k :].argmax(dim=2)
            total["nats"] += nats.item()
            total["agree"] += int(same.sum())
            total["n"] += targets.numel()
    return [{name: s[name] / s["n"] for name in ("nats", "agree")} for s in sums]


def measure_trained(runs: Runs) -> dict:
    """Every model of every seed."""
    sizes = runs.sizes
    found: dict[str, Any] = {
        "recipe": asdict(sizes.recipe),
        "depths": list(DEPTHS),
        "seeds": list(sizes.seeds),
    }
    for n_mtp in DEPTHS:
        found[str(n_mtp)] = [runs.train(n_mtp, s) for s in trained_seeds(n_mtp, sizes)]
    return found


def trained_seeds(n_mtp: int, sizes: Sizes) -> tuple[int, ...]:
    """The seeds of the models with so many modules: with two, the first one only."""
    return sizes.seeds[: 1 if n_mtp == 2 else None]


# ---------------------------------------------------------------------------
# drafts
# ---------------------------------------------------------------------------


def openings(runs: Runs) -> list[Tensor]:
    """The first sentences of held-out stories, (1, T) each."""
    sentences = [story.partition(". ")[0] + "." for story in runs.held_out]
    encode = runs.tokenizer.encode
    return [torch.tensor([encode(text)]) for text in sentences[: runs.sizes.openings]]


def drawing(temperature: float, i: int) -> dict[str, Any]:
    """How opening `i` is continued, with random numbers of its own."""
    generator = torch.Generator().manual_seed(i)
    return {"temperature": temperature, "generator": generator}


def count_drafts(
    model: nn.Module, prompts: Sequence[Tensor], new: int, temperature: float
) -> dict:
    """What is accepted while all of `prompts` are continued.

    `kept[n]` counts the rounds that had a draft of every depth and kept n of them.
    """
    kept, total, accept = Counter(), module.Speculation(), module.accept

    def noted(p: Tensor, q: Sequence[Tensor], *more: Any) -> list[int]:
        chosen = accept(p, q, *more)
        if len(q) == model.config.n_mtp:
            kept[len(chosen) - 1] += 1
        return chosen

    with patch.object(module, "accept", noted):
        for i, prompt in enumerate(prompts):
            said = drawing(temperature, i)
            _, stats = module.speculate(model, prompt, new, **said)
            total.drafted += stats.drafted
            total.accepted += stats.accepted
            total.passes += stats.passes
    return asdict(total) | {
        "rate": total.rate,
        "tokens_per_pass": len(prompts) * new / total.passes,
        "kept": [kept[n] for n in range(model.config.n_mtp + 1)],
    }


def count_equal(model: nn.Module, prompts: Sequence[Tensor], new: int) -> int:
    """How many of `prompts` are continued by the same greedy tokens in both ways."""
    return sum(
        torch.equal(
            module.generate(model, prompt, new),
            module.speculate(model, prompt, new)[0],
        )
        for prompt in prompts
    )


def measure_drafts(runs: Runs) -> dict:
    """Every model with modules, greedy and sampled."""
    sizes, prompts = runs.sizes, openings(runs)
    found: dict[str, Any] = {
        "openings": len(prompts),
        "new": sizes.new,
        "prompt_tokens": sum(prompt.numel() for prompt in prompts),
        "paper": list(PAPER_RATE),
    }
    for n_mtp in DEPTHS[1:]:
        found[str(n_mtp)] = rows = []
        for seed in trained_seeds(n_mtp, sizes):
            model = runs.model(n_mtp, seed)
            row = {
                HOW[t]: count_drafts(model, prompts, sizes.new, t) for t in TEMPERATURES
            }
            row["equal"] = count_equal(model, prompts, sizes.new)
            wide = runs.model(n_mtp, seed, torch.float64)
            row["equal_float64"] = count_equal(wide, prompts, sizes.new)
            rows.append(row)
            rates = ", ".join(f"{row[HOW[t]]['rate']:.3f} at {t}" for t in TEMPERATURES)
            print(
                f"{n_mtp} modules, seed {seed}: accepted {rates}; equal "
                f"{row['equal']} and {row['equal_float64']} of {len(prompts)}",
                flush=True,
            )
    return found


# ---------------------------------------------------------------------------
# speed
# ---------------------------------------------------------------------------


def measure_speed(runs: Runs) -> dict:
    """Training and decoding, of the first seed; what is compared takes turns."""
    sizes, seed = runs.sizes, runs.sizes.seeds[0]
    found: dict[str, Any] = {"seed": seed, "rounds": sizes.rounds, "turns": sizes.turns}
    found["paper"] = PAPER_SPEEDUP
    found["training"] = time_training(runs, seed)
    prompts = openings(runs)
    for n_mtp in DEPTHS[1:]:
        model = runs.model(n_mtp, seed)
        row = found[str(n_mtp)] = time_parts(model, prompts[0], sizes.turns)
        for t in TEMPERATURES:
            row[HOW[t]] = time_decoding(model, prompts, sizes, t)
            row[HOW[t]]["bound"] = bound(row[HOW[t]]["rate"], n_mtp, row["cost"])
            print(
                f"{n_mtp} modules, temperature {t}: "
                f"{row[HOW[t]]['speculate']:,.0f} tokens/s, "
                f"{row[HOW[t]]['speedup']:.2f} times `generate`; bound "
                f"{row[HOW[t]]['bound']:.2f}",
                flush=True,
            )
    return found


def bound(rate: float, n_mtp: int, cost: float) -> float:
    """Tokens of a round over what it costs in steps of one token.

    With one module it makes 1 + `rate` tokens, and with M of them, whose drafts are
    accepted at `rate` on average, 1 + M · rate.
    """
    return (1 + n_mtp * rate) / cost


def time_training(runs: Runs, seed: int) -> dict:
    """Training steps from the first one on: tokens a second and share of speed kept."""
    trainings = [runs.training(n_mtp, seed) for n_mtp in DEPTHS]
    sides = [bench.Side(training.take_step) for training in trainings]
    times = bench.take_turns(sides, runs.sizes.turns, "cpu")
    found, first = {}, statistics.median(times[0])
    for n_mtp, training, taken in zip(DEPTHS, trainings, times, strict=True):
        seconds, tokens = statistics.median(taken), training.log[0]["tokens"]
        found[str(n_mtp)] = {
            "ms": seconds * 1e3,
            "tokens_per_second": tokens / seconds,
            "ratio": first / seconds,
        }
        print(f"training, {n_mtp} modules: {tokens / seconds:,.0f} tokens/s")
    return found


def time_decoding(
    model: nn.Module, prompts: Sequence[Tensor], sizes: Sizes, temperature: float
) -> dict:
    """`generate` and `speculate` in turns, prompt by prompt.

    Tokens a second by the median over prompts and rounds; `speedup` is the ratio of
    the two medians, its quartiles are over the prompts, of each the same ratio.
    """
    times, ratios, total = ([], []), [], module.Speculation()
    for i, prompt in enumerate(prompts):

        def run(way: Callable, prompt: Tensor = prompt, i: int = i) -> Any:
            return way(model, prompt, sizes.new, **drawing(temperature, i))

        stats = run(module.speculate)[1]
        total.drafted += stats.drafted
        total.accepted += stats.accepted
        ways = (module.generate, module.speculate)
        sides = [bench.Side(lambda way=way, run=run: run(way)) for way in ways]
        taken = bench.take_turns(sides, sizes.rounds, "cpu")
        plain, ahead = (statistics.median(each) for each in taken)
        ratios.append(plain / ahead)
        for every, each in zip(times, taken, strict=True):
            every += each
    plain, ahead = (statistics.median(every) for every in times)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "rate": total.rate,
        "generate": sizes.new / plain,
        "speculate": sizes.new / ahead,
        "speedup": plain / ahead,
        "speedup_quartiles": [low, high],
    }


@torch.inference_mode()
def time_parts(model: nn.Module, prompt: Tensor, rounds: int) -> dict:
    """What a plain step and the two parts of a round take, greedy, in ms.

    `verify` is the pass over the last token and a draft of each depth, and accepting
    all of them; `draft` is what the modules do after two more tokens are settled.
    `cost` is both parts over `step`. Behind the prompt and 40 tokens, or what fits. The
    fastest of the rounds counts: other work only ever makes such short ones slower.
    """
    M = model.config.n_mtp
    room = model.config.max_seq_len - prompt.shape[1]
    known = module.generate(model, prompt, min(40, room))
    S, chances = known.shape[1], partial(module.distribution, temperature=0.0)

    def passing(T: int) -> tuple[Any, Tensor]:
        cache = model.new_cache(1, S)
        model.hidden(known[:, : S - T], cache)
        return cache, known[:, S - T :]

    one, last = passing(1)
    more, fed = passing(1 + M)
    p = chances(model.head(model.hidden(fed, more)[0]))  # (1 + M, V)
    more.truncate(S - 1 - M)
    drafts = p[:-1].argmax(dim=1)  # (M,), so that all are accepted
    q = [row[None] for row in p[:-1]]
    drafter = module.Drafter(model, S + M)
    hidden = model.hidden(known[:, :-1])  # (1, S - 1, D)
    drafter.draft(known[:, :-2], hidden[:, :-2], M, chances, None)
    lengths = [cache.length for cache in drafter.caches]
    carried = dict(drafter.carried)

    def step() -> Tensor:
        return module.sample(model.head(model.hidden(last, one)[:, -1]), 0.0)

    def verify() -> list[int]:
        return module.accept(
            chances(model.head(model.hidden(fed, more)[0])), q, drafts, None
        )

    def draft() -> Any:
        return drafter.draft(known, hidden[:, -2:], M, chances, None)

    def undo_draft() -> None:
        drafter.carried = dict(carried)
        for cache, length in zip(drafter.caches, lengths, strict=True):
            cache.truncate(length)

    sides = [
        bench.Side(step, lambda: one.truncate(S - 1)),
        bench.Side(verify, lambda: more.truncate(S - 1 - M)),
        bench.Side(draft, undo_draft),
    ]
    times = bench.take_turns(sides, rounds, "cpu")
    names = ("step", "verify", "draft")
    ms = {name: min(taken) * 1e3 for name, taken in zip(names, times, strict=True)}
    return {"ms": ms, "cost": (ms["verify"] + ms["draft"]) / ms["step"]}


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

PARTS: dict[str, Callable[[Runs], dict]] = {
    "trained": measure_trained,
    "drafts": measure_drafts,
    "speed": measure_speed,
}
# What a trained model follows from, and what the record follows from beside it.
TRAINED = (
    *record.sources(CHAPTER),
    *(f"{CHAPTER.path}::{name}" for name in ("MTP_EARLY", "after_step")),
    f"{CHAPTER.path}::held_out_loss",
    *(f"{THIS}::{name}" for name in ("Training", "new_model", "described")),
    *(f"{THIS}::{name}" for name in ("thinned", "held_out_ahead")),
)
SOURCES = (
    *TRAINED,
    *(f"{THIS}::{name}" for name in ("full", "Runs", "openings", "drawing", "bound")),
    *(f"{THIS}::{name}" for name in ("count_drafts", "count_equal", "time_training")),
    *(f"{THIS}::{name}" for name in ("time_decoding", "time_parts")),
)


def version(sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what the trainings follow from; `sources` are digests."""
    asked = (sizes.config, sizes.recipe, sizes.points, sizes.bins, sizes.documents)
    text = repr((asked, [sources[name] for name in TRAINED]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measured(name: str, runs: Runs) -> dict:
    """A part of the record, and where and when it was measured."""
    return PARTS[name](runs) | {
        "machine": results.machine(),
        "date": datetime.date.today().isoformat(),
    }


def current(path: Path, sizes: Sizes) -> None:
    """ValueError unless there is a record that a part measured now may join."""
    if not path.exists():
        raise ValueError(f"there is no {path} yet: run all of it first")
    if stale := results.changed(path):
        raise ValueError(
            f"{path} was recorded with another {', '.join(stale)}: run all of it again"
        )
    trained = results.read(path)["data"]["trained"]
    asked = (asdict(sizes.recipe), list(sizes.seeds))
    if (trained["recipe"], trained["seeds"]) != asked:
        raise ValueError(f"{path} is of another recipe or of other seeds")


def joined(path: Path, parts: dict) -> None:
    """Put `parts` into the record at `path`; the rest stays. Draws the figure again."""
    kept = results.read(path)
    kept["data"] |= parts
    figure = draw(kept["data"], path.with_suffix(".png"))
    kept["files"] = {figure.name: results.file_digest(figure)}
    results.save(path, kept)


def draw(data: dict, path: Path) -> Path:
    """The loss while training; accepted drafts; tokens a second of both ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    draw_losses(left, data["trained"])
    draw_rates(middle, data["drafts"])
    draw_speed(right, data["speed"])
    with module.replacing(path) as partial_:
        figure.savefig(partial_, format="png", dpi=120)
    return path


COLOURS = {0: "#000000", 1: "#0072b2", 2: "#d55e00"}
NAMES = {0: "without", 1: "1 module", 2: "2 modules"}


def draw_losses(ax: Any, trained: dict) -> None:
    """A line a run, held out; the dots in the corner are the ends of the lines."""
    corner = ax.inset_axes((0.5, 0.47, 0.47, 0.43))
    for M in DEPTHS:
        runs = trained[str(M)]
        for i, run in enumerate(runs):
            steps, losses = zip(*run["curve"], strict=True)
            label = NAMES[M] if i == 0 else None
            ax.plot(steps, losses, color=COLOURS[M], lw=0.9, alpha=0.8, label=label)
        ends = [run["held_out"] for run in runs]
        corner.plot([M] * len(ends), ends, "o", color=COLOURS[M], ms=4, alpha=0.7)
    corner.set_xticks(DEPTHS)
    corner.set(xlim=(-0.5, 2.5))
    corner.margins(y=0.15)
    corner.set_xlabel("modules", fontsize="x-small")
    corner.set_title(f"at step {runs[0]['steps']:,}", fontsize="x-small")
    corner.tick_params(labelsize="x-small")
    corner.grid(alpha=0.3, axis="y")
    ax.set(xlabel="step", ylabel="held-out loss, nats a token")
    ax.set_xlim(0, runs[0]["steps"])
    ax.set_title("the model's own loss", fontsize="medium")
    ax.legend(loc="lower left", fontsize="x-small", frameon=False)


def draw_rates(ax: Any, drafts: dict) -> None:
    """A dot a run: the share of its drafts that is accepted."""
    groups = [(M, t) for M in DEPTHS[1:] for t in TEMPERATURES]
    for x, (M, t) in enumerate(groups):
        rates = [100 * row[HOW[t]]["rate"] for row in drafts[str(M)]]
        fill = COLOURS[M] if t == 0 else "white"
        ax.plot([x] * len(rates), rates, "o", color=COLOURS[M], mfc=fill, ms=5)
    low, high = (100 * end for end in drafts["paper"])
    ax.axhspan(
        low, high, color="#999999", alpha=0.3, lw=0, label="DeepSeek-V3, 1 module"
    )
    ax.legend(loc="lower left", fontsize="x-small", frameon=False)
    name_groups(ax, groups)
    ax.set(ylabel="accepted drafts, %", ylim=(0, 100))
    ax.set_title("drafts", fontsize="medium")
    ax.grid(alpha=0.3, axis="y")


def draw_speed(ax: Any, speed: dict) -> None:
    """Bars in pairs: one token a pass, and with drafts."""
    groups = [(M, t) for M in DEPTHS[1:] for t in TEMPERATURES]
    rows = [speed[str(M)][HOW[t]] for M, t in groups]
    looks = {"generate": (-0.2, "#999999"), "speculate": (0.2, "#009e73")}
    for way, (shift, colour) in looks.items():
        places = [x + shift for x in range(len(groups))]
        ax.bar(places, [row[way] for row in rows], 0.4, color=colour, label=way)
    for x, row in enumerate(rows):
        top = max(row["generate"], row["speculate"])
        ax.annotate(
            f"{row['speedup']:.2f}×",
            (x, top),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    name_groups(ax, groups)
    ax.set(ylabel="new tokens a second")
    ax.margins(y=0.3)
    ax.set_title("decoding", fontsize="medium")
    ax.legend(fontsize="x-small", loc="upper left", frameon=False)


def name_groups(ax: Any, groups: Sequence[tuple[int, float]]) -> None:
    """Modules and temperature under each group."""
    labels = [f"{M}\n{'greedy' if t == 0 else t}" for M, t in groups]
    ax.set_xticks(range(len(groups)), labels, fontsize="x-small")
    ax.set(xlabel="modules, temperature", xlim=(-0.6, len(groups) - 0.4))


def asked_sizes(args: argparse.Namespace) -> Sizes:
    """The sizes of a run, from the flags."""
    sizes = quick() if args.quick else full()
    if args.steps is not None:
        sizes = replace(sizes, recipe=replace(sizes.recipe, steps=args.steps))
    return sizes if args.seeds is None else replace(sizes, seeds=tuple(args.seeds))


def study(args: argparse.Namespace) -> None:
    """Measure what is asked, and write the record."""
    sizes, path = asked_sizes(args), args.record or RECORD
    if sizes != full() and args.record is None:
        raise ValueError("this is not what is recorded: name a --record for it")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    if args.part == "plot":
        if not path.exists():
            raise ValueError(f"there is no {path} to draw: run all of it first")
        joined(path, {})
    elif args.part == "speed":
        current(path, sizes)
        before = {source: results.digest(source) for source in SOURCES}
        runs = Runs(sizes, args.out, version(sizes, before))
        part = measured("speed", runs)
        running.unchanged(before)
        joined(path, {"speed": part})
    else:
        before = {source: results.digest(source) for source in SOURCES}
        runs = Runs(sizes, args.out, version(sizes, before))
        data = {name: measured(name, runs) for name in PARTS}
        running.unchanged(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(data, path.with_suffix(".png"))
        flags = [name for name in ("quick", "steps", "seeds") if getattr(args, name)]
        results.write(path, command_line(args, flags), data, before, files=[figure])
    print(f"written: {path}")


def command_line(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """What was run, with those of `flags` that change the numbers."""
    words = ["python", THIS]
    for name in flags:
        value = getattr(args, name)
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="look_ahead.py", description=__doc__.split("\n")[0]
    )
    what = command.add_mutually_exclusive_group()
    for part, said in (
        ("speed", "measure the speed again, for the record that is there"),
        ("plot", "draw the figure again, from the record that is there"),
    ):
        what.add_argument(
            f"--{part}", dest="part", action="store_const", const=part, help=said
        )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    command.add_argument("--steps", type=int, metavar="N", help="of each training")
    command.add_argument("--seeds", type=int, nargs="+", metavar="N")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "look_ahead.py")


if __name__ == "__main__":
    sys.exit(main())
