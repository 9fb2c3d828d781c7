# SPDX-License-Identifier: MIT
"""From GPT-2 to Llama 3, one swap at a time: what each part does to a small model.

    python tests/studies/one_swap.py             all of it, half an hour or more
    python tests/studies/one_swap.py --seeds     all trainings from another seed too
    python tests/studies/one_swap.py --speed     the speed part of the record again
    python tests/studies/one_swap.py --quick     a small version, in seconds

Five models, each the one before it with one part of chapter 2 replaced by chapter 4's;
the first is chapter 2's TINY, the last chapter 4's, weight for weight:

    gpt2       LayerNorm, learned positions, GELU, as many key/value heads as queries
    rmsnorm    RMSNorm in the place of LayerNorm
    rope       rotary positions; the table of learned ones leaves
    swiglu     SwiGLU, F narrower so that its three matrices cost what two did
    gqa        half as many key/value heads: Llama 3

GPT-2 has biases and Llama none. A bias leaves with its part: those of the norms with
LayerNorm, those of attention with the positions, those of the feed-forward with GELU.
So each swap is of the part as it is published, and a rung changes that much together.
There is no dropout on any rung: chapter 2's TINY sets it to 0, chapter 4 has none.

Data, their order, recipe and seed are the same for all. The initial weights are drawn
by one rule, yet not the same numbers where the shapes differ. What such chance does is
measured by `--seeds`, which trains all of them once more; differences no larger than
that, or than the standard errors of the shares of stories, say nothing about the parts.

    trained  parameters, held-out loss, and how the written stories hold together
    seeds    loss and stories of all five, trained from another seed
    speed    training and decode steps of all five in turns, in one process; the ratios
             are medians over the rounds, since other work may share the machine

What is trained is kept in `out/one_swap/`, in a folder of its own for each version of
the models, the recipe and the data, so a run that was stopped goes on where it was.
`--train RUNG` trains one model and records nothing, so that several can run at once.
"""

import argparse
import datetime
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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

CHAPTERS = [find(name) for name in ("ch02", "ch03", "ch04")]
gpt2, kv_cache, llama3 = (load(chapter) for chapter in CHAPTERS)
RECORD = ROOT / "tests" / "studies" / "results" / "one_swap.json"
RUNS = Path("out") / "one_swap"
LABELS = {
    "gpt2": "GPT-2",
    "rmsnorm": "+ RMSNorm",
    "rope": "+ RoPE",
    "swiglu": "+ SwiGLU",
    "gqa": "+ GQA",
}
RUNGS = tuple(LABELS)
OTHER_SEED = 1

# ---------------------------------------------------------------------------
# the models
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(llama3.Config):
    """Chapter 4's fields, the rung, and the dropout that GPT-2's attention reads."""

    rung: str = "gqa"
    dropout: float = 0.0

    def has(self, swap: str) -> bool:
        """Whether chapter 4's part is in place on this rung."""
        return RUNGS.index(swap) <= RUNGS.index(self.rung)


def rung_config(rung: str, first: Any, last: Any) -> Config:
    """The shape on a rung between the configs `first` (GPT-2) and `last` (Llama 3)."""
    config = Config(**asdict(last), rung=rung)
    if not config.has("swiglu"):
        config = replace(config, ffn_dim=first.ffn_dim)
    return config if config.has("gqa") else replace(config, n_kv_heads=first.n_heads)


class Attention(kv_cache.Attention):
    """GPT-2's attention with a cache, called as chapter 4 calls its own."""

    def forward(
        self, x: Tensor, rope: None, seen: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        return super().forward(x, seen, cache)


class Block(llama3.Block):
    """Chapter 4's block of the parts that the rung has."""

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        norm = llama3.RMSNorm if config.has("rmsnorm") else gpt2.LayerNorm
        attention = llama3.Attention if config.has("rope") else Attention
        ffn = llama3.FeedForward if config.has("swiglu") else gpt2.FeedForward
        self.attention_norm = norm(config.dim, config.norm_eps)
        self.attention = attention(config)
        self.ffn_norm = norm(config.dim, config.norm_eps)
        self.ffn = ffn(config)


class Transformer(llama3.Transformer):
    """Chapter 4's model of such blocks, with learned positions below the rung RoPE."""

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.config = config
        D, V = config.dim, config.vocab_size
        self.embed = nn.Embedding(V, D)
        if not config.has("rope"):
            self.positions = nn.Embedding(config.max_seq_len, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        norm = llama3.RMSNorm if config.has("rmsnorm") else gpt2.LayerNorm
        self.norm = norm(D, config.norm_eps)
        self.head = nn.Linear(D, V, bias=False)
        self.finalise()
        self.reset_parameters()

    def hidden(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """The final norm's output, (B, T, D)."""
        if cache is not None:
            cache.expect(tokens)
        T = tokens.shape[1]
        position, seen = llama3.positions_and_mask(tokens, cache)
        x, rope = self.embed(tokens), None  # (B, T, D)
        if self.config.has("rope"):
            rope = llama3.rope_table(position, self.config)  # (..., T, K/2)
        else:
            x = x + self.positions(position)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, seen, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def save_pretrained(self, directory: str | Path) -> None:
        """Weights and config under this study's own names: no rung has others."""
        state = {name: tensor.detach() for name, tensor in self.named_parameters()}
        llama3.write_checkpoint(
            Path(directory), asdict(self.config), iter(state.items())
        )

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Transformer":
        """What `save_pretrained` wrote, in eval mode."""
        saved = llama3.read_json(Path(source) / "config.json")
        del saved["dtype"]
        model = cls(Config(**saved))
        state = dict(llama3.read_tensors(Path(source)))
        tied = {"head.weight": state["embed.weight"]}
        model.load_state_dict(tied | state)
        return model.eval()


# A chapter as story_consistency.py wants one, whose model is of any rung.
AUTHOR = SimpleNamespace(**{**vars(llama3), "Transformer": Transformer})

# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of one run of the study."""

    first: Any
    last: Any
    recipe: Any
    points: int  # of the curve of the held-out loss
    stories: int
    cached: int  # tokens in the cache before the decoding that is timed
    decoded: int
    batches: tuple[int, ...]
    rounds: int
    documents: int | None = None  # None: all of the data


def full() -> Sizes:
    """What is recorded."""
    return Sizes(
        first=gpt2.TINY,
        last=llama3.TINY,
        recipe=llama3.Recipe(),
        points=20,
        stories=200,
        cached=128,
        decoded=32,
        batches=(1, 32),
        rounds=41,
    )


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    small = {"dim": 32, "n_layers": 1, "max_seq_len": 64}
    return Sizes(
        first=replace(gpt2.TINY, **small, ffn_dim=48),
        last=replace(llama3.TINY, **small, head_dim=8, ffn_dim=32),
        recipe=llama3.Recipe(steps=20, warmup=2, lr=1e-2, seq_len=64),
        points=2,
        stories=3,
        cached=8,
        decoded=4,
        batches=(1, 2),
        rounds=4,
        documents=60,
    )


class Runs:
    """The trainings of the study, each made once and then read from its folder."""

    def __init__(self, sizes: Sizes, folder: Path, version: str) -> None:
        self.sizes, self.folder = sizes, folder / version
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = llama3.load_tokenizer(llama3.default_tokenizer())

    def config(self, rung: str) -> Config:
        """The shape on a rung, with the vocabulary of the data."""
        return replace(
            rung_config(rung, self.sizes.first, self.sizes.last),
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
        )

    def training(self, rung: str, seed: int = 0) -> Any:
        """A training that has not begun, its held-out loss looked at often."""
        sizes = self.sizes
        every = max(1, sizes.recipe.steps // sizes.points)
        recipe = replace(sizes.recipe, seed=seed, eval_every=every)
        parts = llama3.split_documents(llama3.read_text(llama3.DEFAULT_DATA))
        batches, held_out = (
            llama3.Batches(
                documents[: sizes.documents],
                self.tokenizer,
                recipe.seq_len,
                recipe.batch_size,
                seed,
            )
            for documents in parts
        )
        torch.manual_seed(seed)
        return llama3.Training(
            Transformer(self.config(rung)), batches, held_out, recipe
        )

    def train(self, rung: str, seed: int = 0) -> dict:
        """Train a model and let it write; returns what is recorded of it."""
        out = self.folder / f"{rung}_seed{seed}"
        if (out / "run.json").exists():
            return llama3.read_json(out / "run.json")
        out.mkdir(exist_ok=True)
        training = self.training(rung, seed)
        if (out / "checkpoint.pt").exists():
            training.restore(llama3.read_torch(out / "checkpoint.pt"))
        print(f"{rung}, seed {seed}, from step {training.step}", flush=True)
        if not llama3.train(training, self.tokenizer, out):
            raise KeyboardInterrupt
        found = described(training) | written(out, self.sizes.stories)
        with llama3.replacing(out / "run.json") as partial:
            partial.write_text(json.dumps(found), encoding="utf-8")
        return found


def described(training: Any) -> dict:
    """Size, loss and time of a finished run."""
    curve = [
        [row["step"], row["held_out"]]
        for row in training.log
        if row["held_out"] is not None
    ]
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "biases": sum(
            p.numel()
            for name, p in training.model.named_parameters()
            if name.endswith("bias")
        ),
        "ffn_dim": training.model.config.ffn_dim,
        "n_kv_heads": training.model.config.n_kv_heads,
        "cache_bytes_per_token": training.model.new_cache(1, 1).nbytes,
        "steps": training.step,
        "tokens": sum(row["tokens"] for row in training.log),
        "seconds": sum(row["seconds"] for row in training.log),
        "held_out": curve[-1][1],
        "curve": curve,
    }


def written(folder: Path, n: int) -> dict:
    """How `n` stories by the model in `folder` hold together."""
    return shares(story_consistency.measure(AUTHOR, folder, n), n)


def shares(found: dict, n: int) -> dict:
    """The counts of `story_consistency.measure`, the shares of `n` with their errors.

    The standard error of a share p is √(p(1 - p)/n). It is 0 where p is 0 or 1, which
    is not to be believed, so Wilson's interval at 95 % stands beside it.
    """
    kept = {}
    for name in ("consistency", "without_faults"):
        p = kept[name] = found[name]
        kept[f"{name}_error"] = math.sqrt(p * (1 - p) / n)
        kept[f"{name}_interval"] = list(wilson(p, n))
    return kept | {name: found[name] for name in ("distinct_sentences", "example")}


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The shares that p of `n` trials is compatible with (Wilson 1927)."""
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (end / (1 + z * z / n) for end in (middle - half, middle + half))
    # Rounding must not put an end beyond p, nor beyond 0 or 1.
    return min(max(0.0, low), p), max(min(1.0, high), p)


def measure_trained(runs: Runs) -> dict:
    """Every rung, and the same counts on real stories."""
    found: dict[str, Any] = {
        "recipe": asdict(runs.sizes.recipe),
        "stories": runs.sizes.stories,
        "rungs": list(RUNGS),
        **{rung: runs.train(rung) for rung in RUNGS},
    }
    return found | {"real": real_stories(runs.sizes.stories)}


def real_stories(n: int) -> dict:
    """The same counts on the held-out stories whose openings were continued."""
    stories = story_consistency.load_stories()
    real = llama3.split_documents(llama3.read_text(llama3.DEFAULT_DATA))[1][:n]
    text = f"\n{llama3.END_OF_TEXT}\n".join(real)
    return {
        "consistency": stories.consistency(text),
        "without_faults": sum(not stories.faults(story) for story in real) / len(real),
        "distinct_sentences": stories.distinct_sentences(text),
    }


def measure_seeds(runs: Runs) -> dict:
    """Loss and stories of every rung from another seed."""
    found: dict[str, Any] = {"seed": OTHER_SEED}
    for rung in RUNGS:
        run = runs.train(rung, OTHER_SEED)
        names = ("held_out", "curve", "distinct_sentences", "example")
        names += tuple(
            f"{share}{end}"
            for share in ("consistency", "without_faults")
            for end in ("", "_error", "_interval")
        )
        found[rung] = {name: run[name] for name in names}
    return found


# ---------------------------------------------------------------------------
# speed
# ---------------------------------------------------------------------------


def measure_speed(runs: Runs) -> dict:
    """Training and decode steps of all rungs in turns, with untrained weights."""
    sizes = runs.sizes
    found: dict[str, Any] = {
        "rounds": sizes.rounds,
        "cached": sizes.cached,
        "decoded": sizes.decoded,
        "batches": list(sizes.batches),
        **{rung: {} for rung in RUNGS},
    }
    trainings = [runs.training(rung) for rung in RUNGS]
    recipe = trainings[0].recipe
    tokens = recipe.batch_size * recipe.seq_len
    found["training_tokens"] = tokens
    sides = [bench.Side(training.take_step) for training in trainings]
    timed(found, "training", sides, tokens, sizes.rounds)
    models = [training.model.eval() for training in trainings]
    for batch in sizes.batches:
        sides = [decoding(model, batch, sizes) for model in models]
        timed(found, f"decode_{batch}", sides, batch * sizes.decoded, sizes.rounds)
    return found


def decoding(model: nn.Module, batch: int, sizes: Sizes) -> bench.Side:
    """`decoded` greedy tokens behind `cached` random ones, a pass a token."""
    cache = model.new_cache(batch, sizes.cached + sizes.decoded)
    generator = torch.Generator().manual_seed(0)
    size = (batch, sizes.cached)
    prompt = torch.randint(model.config.vocab_size, size, generator=generator)
    with torch.inference_mode():
        model.hidden(prompt, cache)

    @torch.inference_mode()
    def run() -> Tensor:
        tokens = prompt[:, -1:]
        for _ in range(sizes.decoded):
            tokens = model(tokens, cache=cache).argmax(dim=-1)  # (B, 1)
        return tokens

    return bench.Side(run, lambda: cache.truncate(sizes.cached))


def timed(
    found: dict, what: str, sides: list[bench.Side], tokens: int, rounds: int
) -> None:
    """Enter tokens a second of each side, and its ratio to the first, in `found`."""
    times = bench.take_turns(sides, rounds, "cpu")
    for rung, taken in zip(RUNGS, times, strict=True):
        row = found[rung][what] = speed_row(times[0], taken, tokens)
        print(
            f"{what}, {rung}: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['ratio']:.2f} times GPT-2's",
            flush=True,
        )


def speed_row(first: Sequence[float], taken: Sequence[float], tokens: int) -> dict:
    """Median time; median and quartiles of the speed relative to `first`, by rounds."""
    ratios = [a / b for a, b in zip(first, taken, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    seconds = statistics.median(taken)
    return {
        "ms": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "ratio": median,
        "ratio_quartiles": [low, high],
    }


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

PARTS: dict[str, Callable[[Runs], dict]] = {
    "trained": measure_trained,
    "seeds": measure_seeds,
    "speed": measure_speed,
}
THIS = "tests/studies/one_swap.py"
# What of the chapters' models is used: theirs hold much else, as loading from Meta.
USED = {
    "ch02": "TINY LayerNorm FeedForward",
    "ch03": "Attention",
    "ch04": "Config TINY RMSNorm rope_frequencies rope_table apply_rope LayerCache "
    "KVCache positions_and_mask Attention FeedForward Block Transformer sample stream",
}
# What a trained model follows from, and what the record follows from beside it.
TRAINED = (
    *(
        f"{chapter.path}::{name}"
        for chapter in CHAPTERS
        for name in USED[chapter.prefix].split()
    ),
    *(s for s in record.sources(CHAPTERS[2]) if not s.endswith("::model")),
    *(
        f"{THIS}::{name}"
        for name in ("Config", "rung_config", "Attention", "Block", "Transformer")
    ),
)
SOURCES = (
    *TRAINED,
    "data/make_stories.py::consistency",
    "data/make_stories.py::faults",
    "tests/studies/story_consistency.py::write_stories",
    *(f"{THIS}::{name}" for name in ("full", "decoding", "speed_row", "shares")),
)


def version(sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what the trainings follow from; `sources` are digests."""
    asked = (sizes.first, sizes.last, sizes.recipe, sizes.points, sizes.stories)
    text = repr((asked, sizes.documents, [sources[name] for name in TRAINED]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measured(name: str, runs: Runs) -> dict:
    """A part of the record, and where and when it was measured."""
    return PARTS[name](runs) | {
        "machine": results.machine(),
        "date": datetime.date.today().isoformat(),
    }


def joined(path: Path, name: str, part: dict) -> None:
    """Put one part into the record at `path`; the rest of it stays as it is."""
    kept = results.read(path)
    parts = kept["data"] | {name: part}
    kept["data"] = {key: parts[key] for key in PARTS if key in parts}
    figure = draw(kept["data"], path.with_suffix(".png"))
    kept["files"] = {figure.name: results.file_digest(figure)}
    results.save(path, kept)


def current(path: Path) -> None:
    """ValueError unless there is a record that a part measured now may join."""
    if not path.exists():
        raise ValueError(f"there is no {path} yet: run all of it first")
    if stale := results.changed(path):
        raise ValueError(
            f"{path} was recorded with another {', '.join(stale)}: run all of it again"
        )


def draw(parts: dict, path: Path) -> Path:
    """The curves of the loss, and beside them the shares of sound stories."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    trained, seeds = parts["trained"], parts.get("seeds", {})
    colours = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for rung, colour in zip(RUNGS, colours, strict=True):
        row = trained[rung]
        label = f"{LABELS[rung]}: {row['held_out']:.3f}"
        left.plot(*zip(*row["curve"], strict=True), color=colour, lw=1.4, label=label)
        if seeds:
            again = zip(*seeds[rung]["curve"], strict=True)
            left.plot(*again, color=colour, lw=1, ls=":")
    left.set(xlabel="step", ylabel="held-out loss, nats a token", yscale="log")
    low, high = left.get_ylim()
    ticks = (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 5, 6)
    left.set_yticks([tick for tick in ticks if low <= tick <= high])
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.grid(alpha=0.3)
    left.legend(title="at the end", fontsize="small")
    names = {"consistency": ("o", "#0072b2"), "without_faults": ("s", "#d55e00")}
    labels = {
        "consistency": "at most 3 characters and 2 things",
        "without_faults": "without any fault",
    }
    again = f", from seed {seeds['seed']}" if seeds else ""
    for shift, (name, (marker, colour)) in zip((-0.1, 0.1), names.items(), strict=True):
        for runs, filled in ((trained, True), (seeds, False)):
            if not runs:
                continue
            values = [runs[rung][name] for rung in RUNGS]
            ranges = [runs[rung][f"{name}_interval"] for rung in RUNGS]
            aside = shift if filled else 2.2 * shift
            right.errorbar(
                [i + aside for i in range(len(RUNGS))],
                values,
                [
                    [p - low for p, (low, _) in zip(values, ranges, strict=True)],
                    [high - p for p, (_, high) in zip(values, ranges, strict=True)],
                ],
                fmt=marker,
                color=colour,
                mfc=colour if filled else "white",
                capsize=3,
                label=labels[name] + ("" if filled else again),
            )
    right.set_xticks(range(len(RUNGS)), LABELS.values(), fontsize="small")
    right.set(ylabel=f"share of {trained['stories']} written stories", ylim=(0, 1.02))
    right.grid(alpha=0.3, axis="y")
    shown = right.get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower right", ncols=2, fontsize="small")
    with llama3.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


def study(args: argparse.Namespace) -> None:
    """Measure what is asked, and write the record."""
    sizes = quick() if args.quick else full()
    path = args.record or (args.out / "quick.json" if args.quick else RECORD)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    if args.part:
        current(path)
    before = {source: results.digest(source) for source in SOURCES}
    runs = Runs(sizes, args.out, version(sizes, before))
    if args.train:
        runs.train(args.train)
        return
    if args.part:
        part = measured(args.part, runs)
        running.unchanged(before)
        joined(path, args.part, part)
    else:
        parts = {name: measured(name, runs) for name in ("trained", "speed")}
        running.unchanged(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(parts, path.with_suffix(".png"))
        command = f"python {THIS}" + (" --quick" if args.quick else "")
        results.write(path, command, parts, before, files=[figure])
    print(f"written: {path}")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="one_swap.py", description=__doc__.split("\n")[0]
    )
    what = command.add_mutually_exclusive_group()
    for part, said in (
        ("seeds", "train all again from another seed, for the record that is there"),
        ("speed", "measure the speed again, for the record that is there"),
    ):
        what.add_argument(
            f"--{part}", dest="part", action="store_const", const=part, help=said
        )
    what.add_argument("--train", choices=RUNGS, help="train one model, record nothing")
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "one_swap.py")


if __name__ == "__main__":
    sys.exit(main())
