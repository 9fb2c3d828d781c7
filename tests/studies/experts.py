# SPDX-License-Identifier: MIT
"""Experts in a small model: how their loads are balanced, and how finely they are cut.

    python tests/studies/experts.py                 all of it, half an hour or more
    python tests/studies/experts.py --seeds 1 --arms bias 16_4
                                                    only these trainings, no record
    python tests/studies/experts.py --plot          the figures again, from the record
    python tests/studies/experts.py --quick --record PATH
                                                    a small version, in seconds

Chapter 6's TINY without prediction depths learns from the stories, 600 steps of the
chapter's recipe, from two seeds. With the same seed all arms see the same batches in
the same order. Two questions:

    balancing      16 routed experts, 3 active, 1 shared, under four rules. `none`: no
                   rule. `bias`: γ = 0.001 moves the routers' biases
                   (arXiv:2408.15664). `bias_sequence`: beside it the loss over each
                   sequence with α = 0.0001, as DeepSeek-V3 has it. `auxiliary`: no
                   bias, the loss over the batch with α = 0.01
    segmentation   the same width cut into fewer or more experts (arXiv:2401.06066 §3):
                   1408 in all and 352 of them active in each mixture, γ = 0.001 and
                   α = 0.0001. `16_4` has 16 experts, 4 of them active; `15_3_1` has
                   15, 3 of them active, and 1 shared. `dense` has 352 in all

A load is how many tokens chose an expert; those of a batch are what its router counted
while it was trained on it. MaxVio = (largest load - mean load) / mean load
(arXiv:2408.15664 §2): of a batch in `training`, of all held-out data in
`max_violation`, each of every mixture (of three layers the last two).

What is trained is kept in `out/experts/`, a file a run, so that a study that was
stopped goes on where it was, and several can run at once with other `--arms` or
`--seeds`. `--steps` asks for another length; it is not what is recorded.
"""

import argparse
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import record  # noqa: E402
import results  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402

CHAPTER = find("ch06")
moe = load(CHAPTER)
THIS = Path(__file__).resolve().relative_to(ROOT).as_posix()
RECORD = ROOT / "tests" / "studies" / "results" / "experts.json"
RUNS = Path("out") / "experts"
SEEDS = (0, 1)

# ---------------------------------------------------------------------------
# the models
# ---------------------------------------------------------------------------

V3_RULES = {
    "balance_rate": 0.001,
    "balance_loss": 0.0001,
    "balance_per_sequence": True,
}
BALANCING = {
    "none": {"balance_rate": 0.0, "balance_loss": 0.0},
    "bias": {"balance_rate": 0.001, "balance_loss": 0.0},
    "bias_sequence": V3_RULES,
    "auxiliary": {
        "balance_rate": 0.0,
        "balance_loss": 0.01,
        "balance_per_sequence": False,
    },
}
# Of each, the routed experts, the active and the shared ones, and an expert's width.
SEGMENTS = {
    "dense": (0, 0, 0, 0),
    "8_2": (8, 2, 0, 176),
    "16_4": (16, 4, 0, 88),
    "32_8": (32, 8, 0, 44),
    "15_3_1": (15, 3, 1, 88),
    "31_7_1": (31, 7, 1, 44),
}
ARMS = (*BALANCING, *SEGMENTS)


def arm_config(arm: str, base: Any) -> Any:
    """The config of an arm: `base`, but for what is asked there."""
    base = replace(base, n_mtp=0, n_groups=1, n_active_groups=1)
    base = replace(base, renormalise=True, routed_scale=1.0)
    if arm in BALANCING:
        return replace(base, **BALANCING[arm])
    E, A, shared, width = SEGMENTS[arm]
    if not E:
        return replace(base, n_experts=0)
    counts = {"n_experts": E, "n_active": A, "n_shared": shared}
    return replace(base, **V3_RULES, **counts, expert_ffn_dim=width)


def widths(config: Any) -> dict[str, int]:
    """The width of a mixture's experts in all, and of those that one token meets."""
    if not config.n_experts:
        return {"total": config.ffn_dim, "active": config.ffn_dim}
    F, shared = config.expert_ffn_dim, config.n_shared
    return {"total": F * (config.n_experts + shared)} | {
        "active": F * (config.n_active + shared)
    }


def multiplications(config: Any) -> int:
    """How many numbers of the model's matrices a token is multiplied by.

    That is without the scores and the sums over other tokens in attention, which grow
    with their number and are the same in all arms; the routers are counted.
    """
    c = config
    D, H, Q, C = c.dim, c.n_heads, c.q_latent_dim, c.latent_dim
    K, R, P, E = c.head_dim, c.rope_dim, c.value_dim, c.n_experts
    attention = D * Q + Q * H * (K + R) + D * (C + R) + C * H * (K + P) + H * P * D
    mixtures = c.n_layers - c.n_dense_layers if E else 0
    dense = (c.n_layers - mixtures) * 3 * D * c.ffn_dim
    mixed = mixtures * (3 * D * widths(c)["active"] + E * D)
    return c.n_layers * attention + dense + mixed + D * c.vocab_size


def described(config: Any) -> dict:
    """What the numbers of an arm are to be read with."""
    with torch.device("meta"):
        counts = moe.parameter_counts(moe.Transformer(config))
    E, A = config.n_experts, config.n_active if config.n_experts else 0
    return {
        "experts": E,
        "active": A,
        "shared": config.n_shared if E else 0,
        "expert_width": config.expert_ffn_dim if E else config.ffn_dim,
        "width": widths(config),
        "combinations": math.comb(E, A),
        "parameters": {"total": counts["total"], "active": counts["active"]},
        "multiplications": multiplications(config),
        "balance_rate": config.balance_rate,
        "balance_loss": config.balance_loss,
        "balance_per_sequence": config.balance_per_sequence,
    }


# ---------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------


def max_violation(loads: Sequence[int]) -> float:
    """MaxVio, (largest - mean) / mean: 0 when all are alike (arXiv:2408.15664 §2)."""
    mean = sum(loads) / len(loads)
    return (max(loads) - mean) / mean


def watch_loads(training: Any, every: int) -> list[dict]:
    """The rows to which each `every`-th step, and the first, will add its loads.

    The routers have counted them by then, and have not yet been balanced by them.
    """
    rows, routers = [], training.model.routers()

    def note(*_: object) -> None:
        step = training.step + 1
        if step == 1 or step % every == 0:
            rows.append({"step": step, "loads": [r.load.tolist() for r in routers]})

    training.optimizer.register_step_pre_hook(note)
    return rows


@torch.no_grad()
def held_out_loads(training: Any) -> list[list[int]]:
    """How many of the held-out tokens chose each expert, a row a mixture."""
    model = training.model.eval()
    E, found = model.config.n_experts, 0
    for batch in training.held_out.all():
        routed = model(batch[:, :-1], detail=True).routed
        counts = [r.chosen.flatten().bincount(minlength=E) for r in routed]
        found = found + torch.stack(counts) if counts else torch.empty(0, 0)
    return found.tolist()


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The shape and the lengths of one run of the study."""

    config: Any
    recipe: Any
    every: int  # steps between the loads that are kept
    documents: int | None = None  # None: all of the data


def full() -> Sizes:
    """What is recorded."""
    return Sizes(config=moe.TINY, recipe=moe.Recipe(steps=600), every=20)


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    small = {"dim": 16, "n_heads": 2, "q_latent_dim": 12, "latent_dim": 8}
    return Sizes(
        config=replace(moe.TINY, **small, head_dim=8, rope_dim=4, value_dim=8),
        recipe=moe.Recipe(steps=6, warmup=2, seq_len=32, batch_size=2),
        every=2,
        documents=20,
    )


class Runs:
    """The trainings of the study, each made once and then read from its file.

    `sources` are the digests of what they follow from, and part of the files' names.
    """

    def __init__(self, sizes: Sizes, folder: Path, sources: dict[str, str]) -> None:
        self.sizes, self.folder = sizes, folder
        self.sources = [sources[name] for name in TRAINED]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = moe.load_tokenizer(moe.default_tokenizer())

    def config(self, arm: str) -> Any:
        """The config of an arm, with the vocabulary of the data."""
        V, end = self.tokenizer.vocab_size, self.tokenizer.eos_id
        return replace(arm_config(arm, self.sizes.config), vocab_size=V, eos_id=end)

    def path(self, arm: str, seed: int) -> Path:
        """Where a run is kept: another name for whatever could make it another."""
        sizes = self.sizes
        asked = (self.config(arm), sizes.recipe, sizes.every, sizes.documents)
        version = hashlib.sha256(repr((asked, self.sources)).encode()).hexdigest()
        return self.folder / f"{arm}_seed{seed}_{version[:12]}.json"

    def training(self, arm: str, seed: int) -> Any:
        """A training that has not begun."""
        recipe = replace(self.sizes.recipe, seed=seed)
        recipe = replace(recipe, eval_every=recipe.steps)
        parts = moe.split_documents(moe.read_text(moe.DEFAULT_DATA))
        batches, held_out = (
            moe.Batches(
                documents[: self.sizes.documents],
                self.tokenizer,
                recipe.seq_len,
                recipe.batch_size,
                seed,
            )
            for documents in parts
        )
        torch.manual_seed(seed)
        model = moe.Transformer(self.config(arm))
        return moe.Training(model, batches, held_out, recipe)

    def train(self, arm: str, seed: int) -> dict:
        """Train a model; returns what is recorded of it."""
        path = self.path(arm, seed)
        if path.exists():
            return moe.read_json(path)
        print(f"{arm}, seed {seed}", flush=True)
        training = self.training(arm, seed)
        rows = watch_loads(training, self.sizes.every)
        if not moe.train(training, self.tokenizer):
            raise KeyboardInterrupt
        found = {
            "seed": seed,
            "held_out": training.log[-1]["held_out"],
            "loads": held_out_loads(training),
            "tokens": sum(row["tokens"] for row in training.log),
            "seconds": sum(row["seconds"] for row in training.log),
            "machine": results.machine(),
            "date": datetime.date.today().isoformat(),
            "training": rows,
        }
        with moe.replacing(path) as partial:
            partial.write_text(json.dumps(found), encoding="utf-8")
        return found


def measured(runs: Runs, seeds: Sequence[int]) -> dict:
    """All arms from all seeds, as they are recorded."""
    found: dict[str, Any] = {
        "recipe": asdict(replace(runs.sizes.recipe, eval_every=runs.sizes.recipe.steps))
    }
    del found["recipe"]["seed"]
    found |= {"seeds": list(seeds), "every": runs.sizes.every}
    for part, arms in (("balancing", BALANCING), ("segmentation", SEGMENTS)):
        found[part] = {
            arm: described(runs.config(arm))
            | {"runs": [told(runs.train(arm, seed), part) for seed in seeds]}
            for arm in arms
        }
    return found


def told(run: dict, part: str) -> dict:
    """A run as it is recorded: the loads with their MaxVio, over training only of
    the arms that are about balance."""
    run = run | {"max_violation": [max_violation(loads) for loads in run["loads"]]}
    rows = run.pop("training")
    if part == "balancing":
        run["training"] = [
            row | {"max_violation": [max_violation(loads) for loads in row["loads"]]}
            for row in rows
        ]
    return run


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

# What of the chapter's model is used: it holds much else, as checkpoints and decoding.
USED = (
    "Config TINY LATENT_EPS RMSNorm yarn_scale rope_frequencies rope_table apply_rope "
    "positions_and_mask attend_naive parts masked_softmax Attention FeedForward "
    "Routing Router Experts grouped_linear has_grouped_mm Mixture Block Transformer "
    "after_step held_out_loss split_documents"
)
# What a trained model follows from, and what the record follows from beside it.
TRAINED = (
    *(s for s in record.sources(CHAPTER) if not s.endswith("::model")),
    *(f"{CHAPTER.path}::{name}" for name in USED.split()),
    *(f"{THIS}::{name}" for name in ("Runs", "watch_loads", "held_out_loads")),
)
SOURCES = (
    *TRAINED,
    f"{CHAPTER.path}::parameter_counts",
    *(f"{THIS}::{name}" for name in ("V3_RULES", "BALANCING", "SEGMENTS", "full")),
    *(f"{THIS}::{name}" for name in ("arm_config", "widths", "multiplications")),
    *(f"{THIS}::{name}" for name in ("described", "max_violation", "measured", "told")),
)


LABELS = {
    "none": "no balancing",
    "bias": "bias",
    "bias_sequence": "bias, sequence loss",
    "auxiliary": "auxiliary loss",
    "dense": "dense",
    "8_2": "8 experts,\n2 active",
    "16_4": "16 experts,\n4 active",
    "32_8": "32 experts,\n8 active",
    "15_3_1": "15 experts,\n3 active,\n1 shared",
    "31_7_1": "31 experts,\n7 active,\n1 shared",
}
SHADES = ("#0072b2", "#d55e00")  # of the seeds


def draw(data: dict, path: Path) -> list[Path]:
    """Both figures beside the record at `path`; returns where they are."""
    figures = {"balance": draw_balance(data), "segments": draw_segments(data)}
    found = []
    for name, figure in figures.items():
        found.append(path.with_name(f"{path.stem}_{name}.png"))
        with moe.replacing(found[-1]) as partial:
            figure.savefig(partial, format="png", dpi=120)
    return found


def draw_balance(data: dict) -> Any:
    """Each arm's loads over training as a heat map, and its MaxVio below."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots(2, len(BALANCING), sharex=True, sharey="row")
    for (above, below), (arm, row) in zip(
        axes.T, data["balancing"].items(), strict=True
    ):
        first, E, A = row["runs"][0]["training"], row["experts"], row["active"]
        steps = [told["step"] for told in first]
        # E/A times the mean is the load of an expert that every token chooses.
        look = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(1, vmin=0, vmax=E / A)}
        image = above.pcolormesh([0, *steps], range(E + 1), shares(first), **look)
        losses = ", ".join(f"{run['held_out']:.3f}" for run in row["runs"])
        above.set_title(f"{LABELS[arm]}\nheld out {losses}", fontsize="small")
        above.set_yticks([0.5, E - 0.5], ["1", str(E)])
        for run, colour in zip(row["runs"], SHADES, strict=False):
            worst = [told["max_violation"][-1] for told in run["training"]]
            label = f"seed {run['seed']}" if below is axes[1, 0] else None
            below.plot(steps, worst, color=colour, lw=1.2, label=label)
        below.set(xlabel="step", xlim=(0, steps[-1]), ylim=(0, None))
        below.grid(alpha=0.3)
    axes[0, 0].set_ylabel("expert, by last load")
    axes[1, 0].set_ylabel("MaxVio of the batch")
    bar = figure.colorbar(image, ax=axes[0], pad=0.01, ticks=range(E // A + 1))
    bar.set_label("load over mean load")
    title = f"the last mixture; above, seed {data['seeds'][0]}; losses in nats a token"
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower right", ncols=2, fontsize="small")
    return figure


def shares(rows: Sequence[dict]) -> list[list[float]]:
    """Of the last mixture, load over mean load: a row an expert, the last loads
    ascending, and a column a step."""
    loads = [row["loads"][-1] for row in rows]
    order = sorted(range(len(loads[0])), key=lambda i: loads[-1][i])
    return [[load[i] * len(load) / sum(load) for load in loads] for i in order]


def draw_segments(data: dict) -> Any:
    """What each way to cut the experts reaches, a point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax = figure.subplots()
    rows = data["segmentation"]
    for i, row in enumerate(rows.values()):
        losses = [run["held_out"] for run in row["runs"]]
        ax.plot([i, i], [min(losses), max(losses)], color="#bbbbbb", lw=1, zorder=1)
    for k, (seed, colour) in enumerate(zip(data["seeds"], SHADES, strict=False)):
        losses = [row["runs"][k]["held_out"] for row in rows.values()]
        places = range(len(losses))
        ax.scatter(places, losses, color=colour, marker="os"[k], label=f"seed {seed}")
    ax.set_xticks(range(len(rows)), [LABELS[arm] for arm in rows])
    ax.set(ylabel="held-out loss, nats a token", xlim=(-0.5, len(rows) - 0.5))
    ax.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return figure


def study(args: argparse.Namespace) -> None:
    """Measure what is asked and, where that is all of it, write record and figures."""
    path = args.record or RECORD
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    if args.plot:
        draw_again(path)
        return
    other, some = args.quick or args.steps is not None, args.arms or args.seeds
    if other and not some and args.record is None:
        raise ValueError("these numbers are not the record's: name a --record")
    sizes = quick() if args.quick else full()
    if args.steps is not None:
        sizes = replace(sizes, recipe=replace(sizes.recipe, steps=args.steps))
    before = {source: results.digest(source) for source in SOURCES}
    runs = Runs(sizes, args.out, before)
    if some:
        for arm in args.arms or ARMS:
            for seed in args.seeds or SEEDS:
                runs.train(arm, seed)
        return
    data = measured(runs, SEEDS)
    if changed := [s for s, hashed in before.items() if results.digest(s) != hashed]:
        raise ValueError(f"{', '.join(changed)} changed meanwhile; run it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = draw(data, path)
    command = f"python {THIS}" + (" --quick" if args.quick else "")
    command += f" --steps {args.steps}" if args.steps is not None else ""
    results.write(path, command, data, before, files=figures)
    print(f"written: {path}")


def draw_again(path: Path) -> None:
    """The figures of the record at `path`, whose numbers stay as they are."""
    kept = results.read(path)
    figures = draw(kept["data"], path)
    kept["files"] = {figure.name: results.file_digest(figure) for figure in figures}
    results.save(path, kept)
    print(f"drawn: {', '.join(figure.name for figure in figures)}")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="experts.py", description=__doc__.split("\n")[0]
    )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    command.add_argument("--plot", action="store_true", help="draw the record again")
    command.add_argument(
        "--steps", type=int, metavar="N", help="another length; needs a --record"
    )
    command.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"train only these of {', '.join(ARMS)}; record nothing",
    )
    command.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="train only from these seeds; record nothing",
    )
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "experts.py")


if __name__ == "__main__":
    sys.exit(main())
