# SPDX-License-Identifier: MIT
"""Eight bits a number: what E4M3 and its scales do to real layers, and to training.

    python tests/studies/eight_bits.py                   all of it, most of an hour
    python tests/studies/eight_bits.py --part training   a part of it alone
    python tests/studies/eight_bits.py --plot            the figures, from the record
    python tests/studies/eight_bits.py --quick           a small version, in seconds

E4M3 codes (arXiv:2209.05433 §3) need a scale, and what shares one scale is the choice:

    tensor    a whole matrix: W, or all tokens of a window of text
    row       a row: an output of W, or a token
    block     128 × 128 of W, 1 × 128 of the tokens (arXiv:2412.19437 §3.3.2)

each also with scales rounded up to powers of two ("_2"). All are made by chapter 7's
`quantize` and multiplied by its `scaled_product`, whose sums are float32's on a CPU;
the shorter sums of tensor cores are not measured here. Inputs are scaled as they come,
as DeepSeek-V3 does; one scale for a whole tensor therefore sees later tokens too.

    errors      of every linear layer of SmolLM2 (data/smollm2) and its inputs on real
                text: ‖coded - exact‖ / ‖exact‖ of W, of the inputs x and of x Wᵀ, whose
                two factors are both coded; the largest number over the root mean
                square; and the share of numbers, not 0, whose code is 0
    perplexity  of SmolLM2 with the linear layers of its blocks in eight bits, but not
                embedding, norms and head; and the held-out loss of the small model of
                stories that `training` makes in float32
    training    chapter 7's TINY in float32 and in FP8, from the same weights on the
                same tokens

The text is that of tests/studies/low_rank.py: Python's help texts, perplexity on the
same windows of their second half, the inputs of `errors` on the first of those it takes
moments from. SmolLM2's weights have been rounded to four bits already, in blocks of 32,
and were dequantised from that: E4M3 rounds them a second time, so that float32 here is
not the model as it was trained, and what eight bits add is measured from there. The
model of stories has weights that were never rounded, but it is small.

Training. Of one seed all runs start from the same weights, copied from the model in
float32, and see the same tokens in the same order; `weights` and `tokens` are hashes of
both. Two runs of one recipe drift apart by themselves: "nudged" is float32 with each of
its first weights changed by about one millionth of itself, and so is what no difference
in precision explains; seed 1 has other weights and another order of the tokens. Losses
are of the model itself, without that of its prediction depth. DeepSeek-V3 reports that
the loss stays within 0.25 % of that in bf16 (arXiv:2412.19437 §3.3 and appendix B.1),
of larger models over a trillion tokens or so; here it is float32, and 1,000 steps.

What is measured is kept in `out/eight_bits/` or `--out`, so a run that was stopped goes
on where it was. A part measured alone joins the record, if there is a current one.
"""

import argparse
import datetime
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import low_rank  # noqa: E402
import record  # noqa: E402
import results  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402
from running import tokens_digest  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CHAPTER, LLAMA = find("ch07"), find("ch04")
module, llama = load(CHAPTER), load(LLAMA)
THIS = Path(__file__).resolve().relative_to(ROOT).as_posix()
RECORD = ROOT / "tests" / "studies" / "results" / "eight_bits.json"
RUNS = Path("out") / "eight_bits"
# What shares a scale, and whether scales are powers of two.
FORMATS = {
    "tensor": ("tensor", False),
    "row": ("row", False),
    "block": ("block", False),
    "tensor_2": ("tensor", True),
    "row_2": ("row", True),
    "block_2": ("block", True),
}
# An arm, and its seed. Of one seed all start from the same weights and see the same
# tokens, but "nudged" has each of its first weights changed by some millionths.
TRAININGS = (("fp32", 0), ("fp8", 0), ("nudged", 0), ("fp32", 1))
NUDGE = 1e-6
# The relative error of the loss that DeepSeek-V3 stays below, against bf16
# (arXiv:2412.19437 §3.3 and appendix B.1).
PAPER = 0.0025


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of one run of the study."""

    config: Any  # of what is trained
    recipe: Any  # with the steps between two looks at the held-out loss
    every: int  # of the held-out windows, those that the curve looks at
    bins: int  # of the training loss, each a mean
    text: Any  # low_rank's sizes: the model and the windows of text
    windows: int  # of its calibration text, whose activations are looked at
    documents: int | None = None  # None: all of the data


def full() -> Sizes:
    """What is recorded."""
    return Sizes(
        config=module.TINY,
        recipe=module.Recipe(steps=1000, eval_every=100),
        every=4,
        bins=40,
        text=low_rank.full(),
        windows=2,
    )


def quick() -> Sizes:
    """The same in seconds; its numbers mean nothing."""
    small = {"dim": 32, "n_heads": 2, "q_latent_dim": 24, "latent_dim": 24}
    small |= {"head_dim": 8, "rope_dim": 4, "value_dim": 8, "ffn_dim": 40}
    return Sizes(
        config=replace(module.TINY, **small, expert_ffn_dim=24, max_seq_len=48),
        recipe=module.Recipe(steps=6, eval_every=2, warmup=2, seq_len=48, batch_size=2),
        every=2,
        bins=3,
        text=low_rank.quick(),
        windows=2,
        documents=12,
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


def new_model(config: Any, arm: str, seed: int) -> nn.Module:
    """A model of an arm with the initial weights of the float32 one.

    They are copied: torch's own linear layer draws random numbers when it is made,
    and FP8Linear draws none.
    """
    torch.manual_seed(seed)
    first = module.Transformer(replace(config, fp8=False))
    model = module.Transformer(replace(config, fp8=arm == "fp8"))
    model.load_state_dict(first.state_dict())
    if arm == "nudged":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.mul_(1 + NUDGE * noise)
    return model


def weights_digest(model: nn.Module) -> str:
    """A hash of all of a model's weights."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


@torch.no_grad()
def window_losses(model: nn.Module, data: Any) -> list[float]:
    """Nats a token of each window of `data`, one window at a time."""
    model.eval()
    return [
        module.loss(model, data.stream[start + data.span][None]).item()
        for start in data.starts
    ]


def thinned(log: Sequence[dict], bins: int) -> list[list[float]]:
    """Of each of `bins` stretches of the log its last step, and the mean loss."""
    width = -(-len(log) // bins)
    stretches = [log[i : i + width] for i in range(0, len(log), width)]
    return [
        [rows[-1]["step"], statistics.fmean(row["main"] for row in rows)]
        for rows in stretches
    ]


class Runs:
    """The trainings of the study, each made once and then read from its folder."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self.tokenizer = module.load_tokenizer(module.default_tokenizer())
        text = module.read_text(module.DEFAULT_DATA)
        self.seen, self.held_out = (
            part[: sizes.documents] for part in module.split_documents(text)
        )

    def batches(self, documents: Sequence[str], seed: int = 0) -> Any:
        """Windows of the documents, in batches."""
        recipe = self.sizes.recipe
        shape = (recipe.seq_len, recipe.batch_size, seed)
        return module.Batches(documents, self.tokenizer, *shape)

    def training(self, arm: str, seed: int) -> Training:
        """A training that has not begun, looking at some of the held-out windows."""
        recipe = replace(self.sizes.recipe, seed=seed)
        held_out = self.batches(self.held_out)
        held_out.starts = held_out.starts[:: self.sizes.every]
        config = replace(
            self.sizes.config,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
        )
        model = new_model(config, arm, seed)
        return Training(model, self.batches(self.seen, seed), held_out, recipe)

    def place(self, arm: str, seed: int) -> Path:
        """Where a run is kept."""
        return self.folder / f"{arm}_seed{seed}"

    def train(self, arm: str, seed: int) -> dict:
        """Train a model; returns what is recorded of it."""
        out = self.place(arm, seed)
        if (out / "run.json").exists():
            return module.read_json(out / "run.json")
        out.mkdir(parents=True, exist_ok=True)
        training = self.training(arm, seed)
        begun = {
            "weights": weights_digest(training.model),
            "tokens": tokens_digest(training.data, training.recipe.steps),
        }
        if (out / "checkpoint.pt").exists():
            training.restore(module.read_torch(out / "checkpoint.pt"))
        print(f"{arm}, seed {seed}, from step {training.step}", flush=True)
        if not module.train(training, self.tokenizer, out):
            raise KeyboardInterrupt
        found = {"arm": arm, "seed": seed} | begun | self.described(training)
        with module.replacing(out / "run.json") as unfinished:
            unfinished.write_text(json.dumps(found), encoding="utf-8")
        return found

    def described(self, training: Training) -> dict:
        """Losses and time of a finished run."""
        log = training.log
        windows = window_losses(training.model, self.batches(self.held_out))
        return {
            "steps": training.step,
            "seconds": sum(row["seconds"] for row in log),
            "held_out": statistics.fmean(windows),
            "windows": windows,
            "curve": [[row["step"], row["held_out"]] for row in log if row["held_out"]],
            "log": thinned(log, self.sizes.bins),
            "machine": results.machine(),
            "date": datetime.date.today().isoformat(),
        }

    def weights(self, arm: str, seed: int) -> dict[str, Tensor]:
        """The trained weights as they were trained; in FP8 the master copy."""
        self.train(arm, seed)
        return module.read_torch(self.place(arm, seed) / "checkpoint.pt")["model"]


def measure_training(study: "Study") -> dict:
    """All trainings, and each one's losses relative to those of the first."""
    runs = [study.runs.train(arm, seed) for arm, seed in TRAININGS]
    base, rows = runs[0], []
    for run in runs[1:]:
        gap = compared(run["windows"], base["windows"])
        rows.append(
            {
                "arm": run["arm"],
                "seed": run["seed"],
                "held_out": gap["difference"] / base["held_out"],
                "error": gap["error"] / base["held_out"],
                "curve": relative_losses(run["curve"], base["curve"]),
                "log": relative_losses(run["log"], base["log"]),
            }
        )
    for run in runs:
        run["held_out_windows"] = len(run.pop("windows"))
        del run["seconds"]  # the machine may have done other work meanwhile
    config, recipe = study.sizes.config, asdict(study.sizes.recipe)
    del recipe["seed"]
    return {
        "recipe": recipe,
        "config": asdict(config),
        "nudge": NUDGE,
        "paper": PAPER,
        "curve_windows": -(-runs[0]["held_out_windows"] // study.sizes.every),
        "runs": runs,
        "differences": rows,
    }


def relative_losses(found: Sequence, base: Sequence) -> list[list[float]]:
    """Of each step (found - base) / base."""
    return [
        [step, (loss - other) / other]
        for (step, loss), (_, other) in zip(found, base, strict=True)
    ]


def compared(losses: Sequence[float], base: Sequence[float]) -> dict:
    """The mean loss, and its difference with that of the same windows in `base`.

    The error is the standard error of the difference over the windows.
    """
    gaps = [a - b for a, b in zip(losses, base, strict=True)]
    return {
        "loss": statistics.fmean(losses),
        "perplexity": math.exp(statistics.fmean(losses)),
        "difference": statistics.fmean(gaps),
        "error": statistics.stdev(gaps) / math.sqrt(len(gaps)),
    }


# ---------------------------------------------------------------------------
# codes and products
# ---------------------------------------------------------------------------


def coded(x: Tensor, form: str, tile: tuple[int, int]) -> Any:
    """`x` (M, K) as codes and scales of a format; `tile` is its block, if it has such.

    A scale of a row or of all of it stands in every column of blocks of 128, since
    that is what `scaled_product` reads.
    """
    kind, power_of_two = FORMATS[form]
    M, K = x.shape
    if kind == "block":
        return module.quantize(x, tile, power_of_two)
    q = module.quantize(x, (M if kind == "tensor" else 1, K), power_of_two)
    columns = -(-K // module.BLOCK)
    scale = q.scale.expand(-1, columns)
    return module.Quantized(q.codes, scale, (q.block[0], module.BLOCK))


class CodedLinear(nn.Module):
    """A linear layer without bias: W (N, K) is coded once, its input in every pass."""

    def __init__(self, weight: Tensor, form: str) -> None:
        super().__init__()
        self.form, self.coded = form, coded(weight.detach(), form, module.SQUARE)

    def forward(self, x: Tensor) -> Tensor:
        rows = coded(x.reshape(-1, x.shape[-1]), self.form, module.TILE)
        out = module.scaled_product(rows, self.coded).type_as(x)
        return out.view(*x.shape[:-1], -1)


def fp8_linear_as(
    form: str, x: Tensor, weight: Tensor, scale: None, power_of_two: bool
) -> Tensor:
    """What stands for the chapter's `fp8_linear` in a model of another format."""
    return CodedLinear(weight, form)(x)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks, by name: not embedding, norms and head."""
    found = dict(model.blocks.named_modules(prefix="blocks"))
    return {name: m for name, m in found.items() if isinstance(m, nn.Linear)}


@contextmanager
def swapped(model: nn.Module, form: str) -> Iterator[None]:
    """Within it the blocks of chapter 4's model multiply in that format."""
    old = linear_layers(model)
    try:
        for name, layer in old.items():
            model.set_submodule(name, CodedLinear(layer.weight, form))
        yield
    finally:
        for name, layer in old.items():
            model.set_submodule(name, layer)


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    """The root mean square."""
    return x.double().square().mean().sqrt().item()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖."""
    return rms(found - exact) / rms(exact)


def lost(q: Any, x: Tensor) -> float:
    """The share of the numbers of `x`, not 0, whose code is 0."""
    return ((q.codes.float() == 0) & (x != 0)).sum().item() / (x != 0).sum().item()


@torch.no_grad()
def layer_errors(weight: Tensor, windows: Sequence[Tensor]) -> dict:
    """What every format does to W (N, K) and to its inputs, windows of (T, K)."""
    x = torch.cat(list(windows))  # (windows·T, K)
    y = x @ weight.T
    found: dict[str, dict] = {
        "outliers": {
            "weight": weight.abs().max().item() / rms(weight),
            "input": x.abs().max().item() / rms(x),
        },
        **{part: {} for part in ("weight", "input", "output", "lost")},
    }
    for form in FORMATS:
        q = coded(weight, form, module.SQUARE)
        rows = [coded(window, form, module.TILE) for window in windows]
        out = torch.cat([module.scaled_product(row, q) for row in rows])
        back = torch.cat([module.dequantize(row) for row in rows])
        found["weight"][form] = relative_error(module.dequantize(q), weight)
        found["input"][form] = relative_error(back, x)
        found["output"][form] = relative_error(out, y)
        shares = [lost(row, w) for row, w in zip(rows, windows, strict=True)]
        found["lost"][form] = statistics.fmean(shares)
    return found


def measure_errors(study: "Study") -> dict:
    """Every linear layer, by the matrix's name a list over blocks; and a summary.

    `normal` is a matrix of normal numbers, 576 × 576, with 256 rows of such.
    """
    found = study.stored("errors", "layers", lambda: errors_of_all(study))
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 576, generator=generator) for n in (576, 256))
    parts = ("weight", "input", "output", "lost")
    return {
        "text": study.texts.facts,
        "model": study.model_facts(),
        "tokens": study.inputs().numel(),
        "layers": found,
        "summary": {
            part: {
                form: low_rank.quartiles(
                    [value for rows in found.values() for value in rows[part][form]]
                )
                for form in FORMATS
            }
            for part in parts
        },
        "outliers": {
            part: low_rank.quartiles(
                [value for rows in found.values() for value in rows["outliers"][part]]
            )
            for part in ("weight", "input")
        },
        "normal": shortened(layer_errors(weight, [x])),
    }


def errors_of_all(study: "Study") -> dict:
    """`layer_errors` of the whole model, by matrix, kind and block."""
    model, found = study.model, {}
    layers = linear_layers(model)
    names = [f"{name}:in" for name in layers]
    seen = [llama.watch(model, names, tokens=row[None]) for row in study.inputs()]
    for i, (name, layer) in enumerate(layers.items()):
        windows = [inputs[i][0] for inputs in seen]  # (T, K) each
        row = shortened(layer_errors(layer.weight.detach(), windows))
        _, block, matrix = name.split(".", 2)
        if i % 7 == 0:
            print(f"errors: block {block}", flush=True)
        rows = found.setdefault(matrix, {part: {} for part in row})
        for part, values in row.items():
            for form, value in values.items():
                rows[part].setdefault(form, []).append(value)
    return found


def shortened(found: dict) -> dict:
    """Four digits of every number."""
    return {
        part: {form: low_rank.short(value) for form, value in values.items()}
        for part, values in found.items()
    }


# ---------------------------------------------------------------------------
# perplexity
# ---------------------------------------------------------------------------


def measure_perplexity(study: "Study") -> dict:
    """SmolLM2 and the model of stories, in float32 and in every format.

    `stories_fp8` is the one that was trained in FP8, in float32 and in its own format.
    """
    forms = ("fp32", *FORMATS)
    smollm2 = {
        form: study.stored("perplexity", form, partial(smollm2_losses, study, form))
        for form in forms
    }
    stories, trained_in_fp8 = (
        {
            form: study.stored(
                "perplexity",
                f"{arm}_{form}",
                partial(stories_losses, study, arm, form),
            )
            for form in asked
        }
        for arm, asked in (("fp32", forms), ("fp8", ("fp32", "block")))
    )
    found = {"text": study.texts.facts, "model": study.model_facts()}
    found["smollm2"] = against_fp32(smollm2)
    for form, losses in smollm2.items():
        found["smollm2"][form]["losses"] = losses
    found["stories"] = against_fp32(stories)
    found["stories_fp8"] = against_fp32(trained_in_fp8)
    found["stories_windows"] = len(stories["fp32"])
    return found


def against_fp32(losses: dict[str, list[float]]) -> dict:
    """`compared` of every format with float32."""
    return {form: compared(row, losses["fp32"]) for form, row in losses.items()}


def smollm2_losses(study: "Study", form: str) -> list[float]:
    """Nats a token of each held-out window of the help texts."""
    rows = study.texts.held_out
    if form == "fp32":
        return [low_rank.window_loss(study.model, row) for row in rows]
    with swapped(study.model, form):
        return [low_rank.window_loss(study.model, row) for row in rows]


def stories_losses(study: "Study", arm: str, form: str) -> list[float]:
    """Nats a token of each held-out window of the stories, by a model of an arm."""
    runs = study.runs
    config = runs.training(arm, 0).model.config
    model = module.Transformer(replace(config, fp8=form != "fp32"))
    model.load_state_dict(runs.weights(arm, 0))
    data = runs.batches(runs.held_out)
    if form == "fp32":
        return window_losses(model, data)
    with patch.object(module, "fp8_linear", partial(fp8_linear_as, form)):
        return window_losses(model, data)


# ---------------------------------------------------------------------------
# the study
# ---------------------------------------------------------------------------

PARTS: dict[str, Callable[["Study"], dict]] = {
    "errors": measure_errors,
    "perplexity": measure_perplexity,
    "training": measure_training,
}


class Study:
    """The models and texts of a run, and what is measured of them, now or before."""

    def __init__(self, sizes: Sizes, out: Path, sources: dict[str, str]) -> None:
        self.sizes = sizes
        self.folders = {
            part: out / f"{part}_{version(part, sizes, sources)}" for part in PARTS
        }
        self.runs = Runs(sizes, self.folders["training"])

    @cached_property
    def opened(self) -> tuple[nn.Module, Any]:
        """SmolLM2, or what stands for it, and its texts."""
        model, tokenizer = low_rank.open_model(self.sizes.text)
        return model, low_rank.open_texts(self.sizes.text, tokenizer)

    @property
    def model(self) -> nn.Module:
        return self.opened[0]

    @property
    def texts(self) -> Any:
        return self.opened[1]

    def inputs(self) -> Tensor:
        """The windows of text whose inputs `errors` looks at, (windows, tokens)."""
        return self.texts.calibration[: self.sizes.windows]

    def model_facts(self) -> dict:
        """What the model is, and how many numbers its linear layers hold."""
        linear = sum(m.weight.numel() for m in linear_layers(self.model).values())
        facts = {
            "weights": "random",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "linear": linear,
        }
        if self.sizes.text.config is None:
            facts["weights"] = "SmolLM2-135M-Instruct, dequantised from 4 bits (Q4_1)"
        return facts

    def stored(self, part: str, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under that name, now or before."""
        path = self.folders[part] / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = measure()
            mean = f": {statistics.fmean(found):.4f}" if isinstance(found, list) else ""
            print(f"{part}, {name}{mean}", flush=True)
            with module.replacing(path) as unfinished:
                unfinished.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def measured(self, part: str) -> dict:
        """A part of the record, and where and when it was measured."""
        return PARTS[part](self) | {
            "machine": results.machine(),
            "date": datetime.date.today().isoformat(),
        }


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

# What of the chapter's model is used: it holds much else, as checkpoints and decoding.
USED = (
    "Config TINY FP8 FP8_MAX BLOCK TILE SQUARE Quantized quantize dequantize "
    "scaled_product FP8Product fp8_linear FP8Linear linear LATENT_EPS RMSNorm "
    "yarn_scale rope_frequencies rope_table apply_rope positions_and_mask attend_naive "
    "parts Attention FeedForward Routing Router Experts grouped_linear has_grouped_mm "
    "Mixture Block MTPModule Outputs Transformer MTP_EARLY after_step held_out_loss "
    "split_documents"
)
CODES = tuple(
    f"{CHAPTER.path}::{name}"
    for name in (
        *("FP8", "FP8_MAX", "BLOCK", "TILE", "SQUARE", "Quantized", "quantize"),
        *("dequantize", "scaled_product"),
    )
)
TRAINED = (
    *(s for s in record.sources(CHAPTER) if not s.endswith("::model")),
    *(f"{CHAPTER.path}::{name}" for name in USED.split()),
    *(f"{THIS}::{name}" for name in ("Training", "new_model", "Runs", "NUDGE")),
    *(f"{THIS}::{name}" for name in ("window_losses", "thinned")),
)
SMOLLM2 = (
    *(f"{LLAMA.path}::{name}" for name in ("model", "real_text", "json_tokenizer")),
    *("data/download.py::write_model", "data/download.py::write_tokenizer"),
    "data/stories.txt",
    *(
        f"tests/studies/low_rank.py::{name}"
        for name in ("paragraphs", "halves", "windows", "open_texts", "full")
    ),
    *CODES,
    *(f"{THIS}::{name}" for name in ("FORMATS", "coded")),
)
# What each part follows from, as far as its numbers are kept in `out/`.
FOLLOWS = {
    "training": TRAINED,
    "errors": (
        *SMOLLM2,
        f"{LLAMA.path}::watch",
        *(f"{THIS}::{name}" for name in ("linear_layers", "layer_errors", "rms")),
        *(f"{THIS}::{name}" for name in ("relative_error", "lost", "errors_of_all")),
    ),
    "perplexity": (
        *(SMOLLM2 + TRAINED),
        "tests/studies/low_rank.py::window_loss",
        *(f"{THIS}::{name}" for name in ("CodedLinear", "fp8_linear_as", "swapped")),
        *(f"{THIS}::{name}" for name in ("smollm2_losses", "stories_losses")),
    ),
}
SOURCES = tuple(
    dict.fromkeys(
        (
            *sum(FOLLOWS.values(), ()),
            "tests/studies/low_rank.py::quartiles",
            *(f"{THIS}::{name}" for name in ("full", "TRAININGS", "PAPER", "Study")),
            *(f"{THIS}::{name}" for name in ("compared", "relative_losses")),
            *(f"{THIS}::measure_{part}" for part in PARTS),
        )
    )
)


def version(part: str, sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what a part's numbers follow from; `sources` are digests."""
    known: list[Any] = [sources[name] for name in FOLLOWS[part]]
    if part != "training":
        sums = low_rank.FOLDER / "SHA256SUMS"
        known.append(sums.read_text(encoding="utf-8") if sums.exists() else "")
        known.append(llama.real_text())
    text = repr((sizes, known))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def study(args: argparse.Namespace) -> None:
    """Measure what is asked, and write the record or that part of it."""
    sizes = quick() if args.quick else full()
    path = args.record or (args.out / "quick.json" if args.quick else RECORD)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    if args.plot:
        joined(path, {})
        return
    before = {source: results.digest(source) for source in SOURCES}
    measured = Study(sizes, args.out, before)
    # The model of stories comes first; it is what takes longest.
    order = [args.part] if args.part else ["training", "errors", "perplexity"]
    found = {part: measured.measured(part) for part in order}
    running.unchanged(before)
    if args.part:
        if not path.exists() or results.changed(path):
            print(f"kept: {measured.folders[args.part]}; run all of it for a record")
            return
        joined(path, found)
        return
    found = {part: found[part] for part in PARTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = draw(found, path)
    command = f"python {THIS}" + (" --quick" if args.quick else "")
    results.write(path, command, found, before, files=figures)
    print(f"written: {path}")


def joined(path: Path, parts: dict) -> None:
    """Put `parts` into the record at `path`; the rest stays. Draws the figures."""
    kept = results.read(path)
    kept["data"] |= parts
    figures = draw(kept["data"], path)
    kept["files"] = {figure.name: results.file_digest(figure) for figure in figures}
    results.save(path, kept)
    print(f"written: {path}" if parts else f"drawn: {', '.join(kept['files'])}")


COLOURS = {"tensor": "#d55e00", "row": "#009e73", "block": "#0072b2"}
NAMES = {"tensor": "a scale a tensor", "row": "a row", "block": "a block"}


def draw(data: dict, path: Path) -> list[Path]:
    """Both figures beside the record at `path`; returns where they are."""
    figures = {
        "errors": draw_errors(data["errors"]),
        "training": draw_training(data["training"]),
    }
    found = []
    for name, figure in figures.items():
        found.append(path.with_name(f"{path.stem}_{name}.png"))
        with module.replacing(found[-1]) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
    return found


# Matrices that read the same input have one line.
INPUTS = {
    "attention.wq": ("Q, K, V", "#0072b2"),
    "attention.wo": ("output of attention", "#e69f00"),
    "ffn.w_gate": ("gate, up", "#009e73"),
    "ffn.w_down": ("down", "#d55e00"),
}


def draw_errors(errors: dict) -> Any:
    """Outliers of inputs and weights; the errors of inputs, weights and outputs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1.15, 1, 1, 1))
    draw_outliers(axes[0], errors["layers"])
    labels = {"weight": "weights", "input": "inputs", "output": "products"}
    for ax, (part, label) in zip(axes[1:], labels.items(), strict=True):
        draw_part(ax, errors["layers"], part)
        ax.set_title(label, fontsize="medium")
    for ax in axes[2:]:
        ax.sharey(axes[1])
        ax.tick_params(axis="y", which="both", labelleft=False)
    axes[1].set(yscale="log", ylabel="relative error, %")
    for ax in axes:
        ax.set_xlabel("block of SmolLM2", fontsize="small")
        steps = (1,) if ax is axes[0] else (1, 2, 5)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    for ax, place in ((axes[0], "left"), (axes[1], "right")):
        handles, names = ax.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc=f"outside lower {place}",
            ncols=3,
            fontsize="small",
            frameon=False,
        )
    return figure


def draw_outliers(ax: Any, layers: dict) -> None:
    """Largest over root mean square: inputs, a line a kind; weights, their range."""
    for matrix, (label, colour) in INPUTS.items():
        ax.plot(layers[matrix]["outliers"]["input"], color=colour, lw=1.2, label=label)
    low, high = extremes([rows["outliers"]["weight"] for rows in layers.values()])
    ax.fill_between(
        range(len(low)), low, high, color="#999999", alpha=0.5, lw=0, label="weights"
    )
    ax.set(yscale="log", ylabel="largest / root mean square")
    ax.set_title("outliers", fontsize="medium")
    ax.grid(alpha=0.3)


def extremes(rows: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Least and largest of each column."""
    columns = list(zip(*rows, strict=True))
    return [min(column) for column in columns], [max(column) for column in columns]


def draw_part(ax: Any, layers: dict, part: str) -> None:
    """The median over a block's matrices, and for plain scales the range."""
    for form, (kind, power_of_two) in FORMATS.items():
        rows = [[100 * v for v in found[part][form]] for found in layers.values()]
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        label = NAMES[kind] + (", 2ⁿ" if power_of_two else "")
        line = "--" if power_of_two else "-"
        ax.plot(middle, line, color=COLOURS[kind], lw=1.2, label=label)
        if not power_of_two:
            band = extremes(rows)
            ax.fill_between(
                range(len(middle)), *band, color=COLOURS[kind], alpha=0.15, lw=0
            )
    ax.grid(alpha=0.3, which="both")


RUN_LOOKS = {
    ("fp32", 0): ("#000000", "float32"),
    ("fp8", 0): ("#0072b2", "FP8"),
    ("nudged", 0): ("#d55e00", "float32, nudged"),
    ("fp32", 1): ("#999999", "float32, seed 1"),
}


def draw_training(training: dict) -> Any:
    """The losses of every run, and how far they are from those of the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    for run in training["runs"]:
        colour, label = RUN_LOOKS[run["arm"], run["seed"]]
        steps, losses = zip(*run["log"], strict=True)
        left.plot(steps, losses, color=colour, lw=0.8, alpha=0.7, label=label)
        steps, losses = zip(*run["curve"], strict=True)
        left.plot(steps, losses, "o", color=colour, ms=3.5, mfc="none")
    last = training["runs"][0]["steps"]
    left.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, 1.02 * last))
    left.set_title("lines: training; circles: held out", fontsize="medium")
    left.legend(fontsize="small")
    for row in training["differences"]:
        colour, label = RUN_LOOKS[row["arm"], row["seed"]]
        steps, gaps = zip(*row["curve"], strict=True)
        gaps = [100 * gap for gap in gaps]
        right.plot(steps, gaps, "o-", color=colour, ms=3.5, lw=1, label=label)
    paper = 100 * training["paper"]
    right.axhspan(
        -paper, paper, color="#009e73", alpha=0.2, lw=0, label=f"±{paper:g} %"
    )
    right.set(xlabel="step", ylabel="difference from float32, %")
    right.set_xlim(0, 1.02 * last)
    right.set_title("held-out loss", fontsize="medium")
    right.legend(fontsize="small")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="eight_bits.py", description=__doc__.split("\n")[0]
    )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    command.add_argument(
        "--part", choices=list(PARTS), help="only this; it joins a record that is there"
    )
    command.add_argument("--plot", action="store_true", help="draw the record again")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "eight_bits.py", "measured")


if __name__ == "__main__":
    sys.exit(main())
