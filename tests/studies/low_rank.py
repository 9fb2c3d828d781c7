# SPDX-License-Identifier: MIT
"""How low-rank are real keys and values: what a latent of C numbers can hold.

    python tests/studies/low_rank.py             all of it, twenty minutes or more
    python tests/studies/low_rank.py --quick     a small random model, in seconds

Multi-head latent attention (arXiv:2405.04434 §2.1) caches, for each token and layer, C
numbers c = W_DKV x, and makes keys and values from them: k = W_UK c, v = W_UV c. It can
lose nothing only where [k; v], stacked, lie in C dimensions. This study asks a model
that was trained without it, SmolLM2 (data/smollm2), how nearly they do. Its own cache
holds 2·G·K = 384 numbers a token and layer, so C has to be below that.

    spectra    singular values of W_K, W_V and [W_K; W_V], and of the keys and values
               that they make of real text
    noise      the same of the rounding to 4 bits, which the weights have been through
    truncated  perplexity with keys and values of rank C, jointly and apart
    alone      perplexity with only the keys, or only the values, of rank r

Weights and outputs. A weight's spectrum counts every direction of its input alike. The
normed stream x does not: it has a mean, and a few large directions. What is cached is
W x, and its singular values are those of W S^(1/2), where S = E[x xᵀ] is the stream's
second moment on real text. Both are measured; what a cache must hold is the second.

Truncation. Of all M of rank r the one with the least E‖W x - M x‖² is

    M = U Uᵀ W    where U are the first r eigenvectors of W S Wᵀ

which is principal component analysis of the outputs, without centring. For it is
‖(W - M) S^(1/2)‖² that is to be small, M S^(1/2) has at most rank r, and by Eckart and
Young (1936) no such matrix is nearer to W S^(1/2) than U Uᵀ W S^(1/2). With S = I it
is the plain SVD of W. Uᵀ W is the W_DKV of that rank, and the rows of U are W_UK and
W_UV; DeepSeek's norm of the latent is left out. Both ways are measured ("text",
"weights"), the first also with the S of another kind of text ("stories"). Jointly, one
U of C columns makes keys and values; apart, each has its own, C/2 and C/2 ("halves") or
as the squared errors say ("split"). Keys are larger than values, so a joint U, and a
split, serve them first; "balanced" and "relative" are the same two with keys and values
scaled to one size.

Reading the numbers. Nothing is trained after truncation, so a model trained with this C
can do at least as well. Keys are truncated before they are turned: turned, they span
more dimensions (the spectra say how many more), since each position turns them
otherwise. A cache of c alone would therefore have to make and turn all keys again at
every step. DeepSeek turns a few separate numbers of the key instead, which lets W_UK
be absorbed into the query, and needs a model that was trained so: these perplexities
are not that model's.

The weights are dequantised 4-bit ones: blocks of 32 in a row, w = offset + step·(0…15).
Rounding adds noise that has full rank. `noise` draws such noise, uniform over a step of
each block, and gives its spectrum and its share of the squared sum, in the weights and
in what they make of real text; `bands` says how much of the outputs' last directions,
those that a truncation drops first, is no more than that.

S is measured on the first half of Python's help texts, perplexity on the second half;
paragraphs that occur twice in them are taken once, so that none is in both halves.

Each perplexity is kept in `out/low_rank/`, in a folder of its own for each version of
the model and the texts, so a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import results  # noqa: E402
import running  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from chapters import ROOT, find, load  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CHAPTER = find("ch04")
module = load(CHAPTER)
RECORD = ROOT / "tests" / "studies" / "results" / "low_rank.json"
RUNS = Path("out") / "low_rank"
FOLDER = module.DATA / "smollm2"
# How C is spent, and what the truncation is best for.
WAYS = (
    ("joint", "weights"),
    ("halves", "weights"),
    ("joint", "text"),
    ("balanced", "text"),
    ("halves", "text"),
    ("split", "text"),
    ("relative", "text"),
    ("joint", "stories"),
)
SHARES = (0.90, 0.95, 0.99)  # of the squared sum
BLOCK = 32  # weights that Q4_1 rounds together
STEPS = 15  # from the least of them to the largest


@dataclass(frozen=True)
class Sizes:
    """The model, the text and the ranks of one run of the study."""

    config: Any | None  # None: SmolLM2; else a random model of this shape
    latents: tuple[int, ...]
    ranks: tuple[int, ...]  # of keys or values alone
    shown: tuple[int, ...]  # layers whose spectra are recorded in full
    length: int  # of a window of text, in tokens
    calibration: int  # windows
    held_out: int  # windows


def full() -> Sizes:
    """What is recorded."""
    return Sizes(
        config=None,
        latents=(384, 352, 320, 288, 256, 192, 128, 96, 64),
        ranks=(160, 128, 96, 64, 32),
        shown=(0, 14, 29),
        length=256,
        calibration=32,
        held_out=8,
    )


def quick() -> Sizes:
    """The same in seconds, of a random model; its numbers mean nothing."""
    small = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12}
    return Sizes(
        config=replace(module.TINY, **small, ffn_dim=40, max_seq_len=64),
        latents=(48, 32, 16),
        ranks=(12, 6),
        shown=(1,),
        length=40,
        calibration=4,
        held_out=3,
    )


# ---------------------------------------------------------------------------
# the texts
# ---------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each only where it occurs first."""
    kept: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        kept.setdefault(" ".join(paragraph.split()), paragraph)
    return list(kept.values())


def halves(text: str) -> tuple[str, str]:
    """The first and the second half of the paragraphs of a text."""
    parts = paragraphs(text)
    middle = len(parts) // 2
    return "\n\n".join(parts[:middle]), "\n\n".join(parts[middle:])


def windows(ids: Sequence[int], n: int, length: int) -> Tensor:
    """`n` windows spread evenly over a text, (n, length); they do not overlap."""
    if len(ids) < n * length:
        raise ValueError(f"the text has {len(ids)} tokens; {n * length} are needed")
    step = (len(ids) - length) // max(n - 1, 1)
    return torch.stack(
        [torch.tensor(ids[i * step : i * step + length]) for i in range(n)]
    )


def overlap(text: str, other: str, n: int = 8) -> float:
    """The share of the runs of `n` words in `text` that occur in `other` as well."""
    runs, known = (
        [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for words in (text.split(), other.split())
    )
    found = set(known)
    return sum(run in found for run in runs) / len(runs)


@dataclass(frozen=True)
class Texts:
    """Windows of each text, (windows, tokens), and what is recorded of them."""

    calibration: Tensor
    stories: Tensor
    held_out: Tensor
    facts: dict


def open_texts(sizes: Sizes, tokenizer: Any) -> Texts:
    """The help texts in two halves, and stories of the corpus, as windows."""
    text = module.real_text()
    first, second = halves(text)
    stories = module.read_text(module.DEFAULT_DATA)[: len(first)]
    rows = [
        windows(tokenizer.encode(part), n, sizes.length)
        for part, n in (
            (first, sizes.calibration),
            (stories, sizes.calibration),
            (second, sizes.held_out),
        )
    ]
    facts = {
        "of": f"the help texts of Python {platform.python_version()}",
        "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "characters": len(text),
        "repeated": len(text) - len(first) - len(second),
        "overlap": overlap(second, first),
        "window": sizes.length,
        "calibration_tokens": rows[0].numel(),
        "stories_tokens": rows[1].numel(),
        "held_out_tokens": rows[2].numel(),
        "held_out_windows": sizes.held_out,
    }
    return Texts(*rows, facts)


# ---------------------------------------------------------------------------
# spectra and truncation
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """What one layer's normed stream x is on some text; all in float64."""

    second: Tensor  # E[x xᵀ], (D, D)
    mean: Tensor  # E[x], (D,)
    turned: Tensor  # E[k kᵀ] of the keys as they are cached, (G·K, G·K)


@torch.no_grad()
def measure_moments(model: nn.Module, rows: Tensor) -> list[Moments]:
    """The moments of every layer over all tokens of `rows` (n, T)."""
    names = [f"blocks.{i}.attention:in" for i in range(len(model.blocks))]
    rope = module.rope_table(torch.arange(rows.shape[1]), model.config)
    sums: list[list[Tensor]] = []
    for row in rows:
        for i, x in enumerate(module.watch(model, names, tokens=row[None])):
            attention = model.blocks[i].attention
            k = attention.wk(x).unflatten(2, (attention.G, -1)).transpose(1, 2)
            k = module.apply_rope(k, rope)[0]  # (G, T, K)
            k, x = k.transpose(0, 1).flatten(1).double(), x[0].double()
            new = [x.mT @ x, x.sum(dim=0), k.mT @ k]
            if i == len(sums):
                sums.append(new)
            else:
                sums[i] = [a + b for a, b in zip(sums[i], new, strict=True)]
    return [Moments(*(total / rows.numel() for total in layer)) for layer in sums]


def directions(weight: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors, in columns, and values of W S^(1/2), the largest first.

    Without S those of W itself.
    """
    inner = weight @ weight.mT if second is None else weight @ second @ weight.mT
    values, vectors = torch.linalg.eigh(inner)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def factors(
    weight: Tensor, rank: int, second: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Down (rank, D) and up (rows, rank), whose product is the nearest of that rank."""
    up = directions(weight, second)[0][:, :rank]
    return up.mT @ weight, up


def nearest(weight: Tensor, rank: int, second: Tensor | None = None) -> Tensor:
    """The M of that rank with the least E‖W x - M x‖², or without S ‖W - M‖²."""
    down, up = factors(weight, rank, second)
    return up @ down


def truncate(
    wk: Tensor, wv: Tensor, how: str, latent: int, second: Tensor | None = None
) -> tuple[Tensor, Tensor, int | None]:
    """W_K and W_V made from `latent` numbers, and how many of them are the keys' own.

    Jointly the last is None.
    """
    spectra = [directions(w, second)[1] for w in (wk, wv)]
    sizes = [values.norm() for values in spectra]
    if how in ("joint", "balanced"):
        scale = sizes[0] / sizes[1] if how == "balanced" else torch.ones(())
        both = nearest(torch.cat([wk, scale * wv]), latent, second)
        return both[: len(wk)], both[len(wk) :] / scale, None
    keys = latent // 2
    if how == "relative":
        spectra = [v / size for v, size in zip(spectra, sizes, strict=True)]
    if how in ("split", "relative"):
        largest = torch.cat(spectra).argsort(descending=True)[:latent]
        keys = int((largest < len(wk)).sum())
    return nearest(wk, keys, second), nearest(wv, latent - keys, second), keys


def kept(weight: Tensor, new: Tensor, second: Tensor) -> float:
    """The share of E‖W x‖² that is not in the error of `new`."""
    lost = weight - new
    energy = (weight @ second * weight).sum()
    return 1 - ((lost @ second * lost).sum() / energy).item()


def rounding_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """What rounding to a weight's 4-bit steps adds: uniform over one step of a block.

    The step is what lies between a block's least and largest weight, by 15; these two
    are exact.
    """
    blocks = weight.unflatten(1, (-1, BLOCK))  # (rows, D/32, 32)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    uniform = torch.rand(blocks.shape, generator=generator, dtype=weight.dtype) - 0.5
    for end in (blocks.argmin(-1, keepdim=True), blocks.argmax(-1, keepdim=True)):
        uniform.scatter_(-1, end, 0.0)
    return (uniform * step).flatten(1)


def levels(weight: Tensor) -> int:
    """The most different weights within a block of 32; 16 can be told with 4 bits."""
    ordered = weight.unflatten(1, (-1, BLOCK)).sort(dim=-1).values
    return int((ordered.diff(dim=-1) > 0).sum(dim=-1).max()) + 1


# ---------------------------------------------------------------------------
# what is recorded
# ---------------------------------------------------------------------------


def short(x: float) -> float:
    """Four digits of a number."""
    return float(f"{x:.4g}")


def quartiles(values: Sequence[float]) -> list[float]:
    """Least, lower quartile, median, upper quartile and largest, over layers."""
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(points)
    return [short(x) for x in found.tolist()]


def rank_of(values: Tensor, share: float) -> int:
    """How many singular values hold that share of the squared sum."""
    square = values.square()
    return int((square.cumsum(0) < share * square.sum()).sum()) + 1


def spectrum(layers: list[Tensor], shown: Sequence[int]) -> dict:
    """Ranks and curves of the singular values of every layer, over their largest."""
    curves = torch.stack([values / values[0] for values in layers])  # (L, rows)
    every = max(1, curves.shape[1] // 48)
    at = sorted({0, *range(every - 1, curves.shape[1], every)})
    rows = [quartiles(curves[:, i].tolist()) for i in at]
    return {
        "ranks": {
            f"{share:.0%}": quartiles([rank_of(values, share) for values in layers])
            for share in SHARES
        },
        "curve": {
            "rank": [i + 1 for i in at],
            **{
                name: [row[n] for row in rows]
                for n, name in ((1, "lower"), (2, "median"), (3, "upper"))
            },
        },
        "layers": {
            str(i): [short(value) for value in curves[i].tolist()] for i in shown
        },
    }


class Study:
    """The model, its weights before truncation, the texts and their moments."""

    def __init__(self, sizes: Sizes, folder: Path, version: str) -> None:
        self.sizes, self.folder = sizes, folder / version
        self.model, tokenizer = open_model(sizes)
        self.texts = open_texts(sizes, tokenizer)
        self.weights = [
            [w.weight.detach().double() for w in (b.attention.wk, b.attention.wv)]
            for b in self.model.blocks
        ]
        self.moments = {
            name: measure_moments(self.model, rows)
            for name, rows in (
                ("text", self.texts.calibration),
                ("stories", self.texts.stories),
                ("held_out", self.texts.held_out),
            )
        }
        self.whole = self.stored("full", lambda: {"losses": self.losses()})["losses"]

    def losses(self) -> list[float]:
        """Nats a token of each held-out window, with the weights as they are."""
        return [window_loss(self.model, row) for row in self.texts.held_out]

    def second(self, by: str, layer: int) -> Tensor | None:
        """The S of a layer that a truncation is best for; None is the identity."""
        return None if by == "weights" else self.moments[by][layer].second

    def stored(self, name: str, measure: Callable[[], dict]) -> dict:
        """What was measured under that name, now or before."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = measure()
            perplexity = math.exp(statistics.mean(found["losses"]))
            print(f"{name}: {perplexity:.2f}", flush=True)
            with module.replacing(path) as unfinished:
                unfinished.write_text(json.dumps(found), encoding="utf-8")
        return module.read_json(path)

    def measure(self, new: list[tuple[Tensor, Tensor, int | None]]) -> dict:
        """Losses with the W_K and W_V of every block, and what they keep on that text.

        The third of each is the numbers that are the keys' own, if there are such.
        """
        with replaced(self.model, [pair for *pair, _ in new]):
            losses = self.losses()
        shares = [
            [kept(a, b, m.second) for a, b in zip(old, pair, strict=True)]
            for old, (*pair, _), m in zip(
                self.weights, new, self.moments["held_out"], strict=True
            )
        ]
        keys = [own for *_, own in new if own is not None]
        return {
            "losses": losses,
            "kept_keys": statistics.median(share for share, _ in shares),
            "kept_values": statistics.median(share for _, share in shares),
            "keys": quartiles(keys) if keys else None,
        }

    def compare(self, name: str, make: Callable[[Sequence[Tensor], int], Any]) -> dict:
        """What `measure` finds of the weights that `make` gives for each layer.

        The error is the standard error of the difference over the windows.
        """
        found = self.stored(
            name,
            lambda: self.measure([make(p, i) for i, p in enumerate(self.weights)]),
        )
        losses = found.pop("losses")
        gaps = [a - b for a, b in zip(losses, self.whole, strict=True)]
        return {
            "loss": statistics.mean(losses),
            "perplexity": math.exp(statistics.mean(losses)),
            "difference": statistics.mean(gaps),
            "error": statistics.stdev(gaps) / math.sqrt(len(gaps)),
            **found,
        }


def open_model(sizes: Sizes) -> tuple[nn.Module, Any]:
    """SmolLM2, or a random model of the shape that `sizes` says; its tokenizer."""
    if sizes.config is None:
        if not FOLDER.is_dir():
            raise ValueError(
                "there is no data/smollm2: first run python data/download.py smollm2"
            )
        model = module.Transformer.from_pretrained(FOLDER)
        return model, module.load_tokenizer(FOLDER)
    tokenizer = module.load_tokenizer(module.default_tokenizer())
    config = replace(sizes.config, vocab_size=tokenizer.vocab_size)
    model = module.Transformer(config).eval()
    module.randomise(model)
    return model, tokenizer


@contextmanager
def replaced(model: nn.Module, new: list) -> Iterator[None]:
    """Within it the model has the given W_K and W_V, a pair for each block."""
    weights = [w.weight for b in model.blocks for w in (b.attention.wk, b.attention.wv)]
    old = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight, value in zip(weights, sum(map(list, new), []), strict=True):
                weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, old, strict=True):
                weight.copy_(value)


@torch.no_grad()
def window_loss(model: nn.Module, row: Tensor) -> float:
    """Nats a token of `row` (T,), each but the first given those before it."""
    return F.cross_entropy(model(row[None])[0, :-1].float(), row[1:]).item()


def measure_model(study: Study) -> dict:
    """The shape, the size of its cache, and that its weights were rounded."""
    c = study.model.config
    found = {
        "config": asdict(c),
        "weights": "random",
        "sha256": "",
        "levels": max(levels(w) for pair in study.weights for w in pair),
        "cache_numbers": 2 * c.n_kv_heads * c.head_dim,
        "loss": statistics.mean(study.whole),
        "perplexity": math.exp(statistics.mean(study.whole)),
    }
    if study.sizes.config is None:
        found["weights"] = "SmolLM2-135M-Instruct, dequantised from 4 bits (Q4_1)"
        with open(FOLDER / "model.safetensors", "rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measure_spectra(study: Study) -> dict:
    """Of the weights and of their outputs, keys and values apart and stacked.

    "centred" is of the outputs less their mean. `least` are shares of the squared sum
    in the twelfth of a weight's own directions that its plain SVD drops first.
    """
    shown, text = study.sizes.shown, study.moments["text"]
    seconds: dict[str, list] = {
        "weights": [None] * len(text),
        "outputs": [m.second for m in text],
        "centred": [m.second - torch.outer(m.mean, m.mean) for m in text],
    }
    found: dict[str, dict] = {}
    for part, moments in seconds.items():
        found[part] = {
            name: spectrum(
                [
                    directions(pick(pair), second)[1]
                    for pair, second in zip(study.weights, moments, strict=True)
                ],
                () if part == "centred" else shown,
            )
            for name, pick in KINDS.items()
        }
    turned = [torch.linalg.eigvalsh(m.turned).flip(0).clamp(min=0).sqrt() for m in text]
    found["outputs"]["turned_keys"] = spectrum(turned, shown)
    for share, measure in (("mean_share", mean_share), ("least", least_share)):
        found[share] = {
            name: quartiles(
                [
                    measure(pair[i], m)
                    for pair, m in zip(study.weights, text, strict=True)
                ]
            )
            for i, name in enumerate(("keys", "values"))
        }
    found["least_of_weights"] = {
        name: quartiles([least_share(pair[i], None) for pair in study.weights])
        for i, name in enumerate(("keys", "values"))
    }
    return found


# The matrices whose spectra are taken, from the pair of W_K and W_V.
KINDS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "keys": lambda pair: pair[0],
    "values": lambda pair: pair[1],
    "joint": lambda pair: torch.cat(list(pair)),
}


def mean_share(weight: Tensor, moments: Moments) -> float:
    """How much of E‖W x‖² is ‖E[W x]‖²: what all tokens have in common."""
    energy = (weight @ moments.second * weight).sum()
    return ((weight @ moments.mean).square().sum() / energy).item()


def least_share(weight: Tensor, moments: Moments | None) -> float:
    """The share of E‖W x‖² in the last twelfth of W's left singular vectors.

    Without moments that of ‖W‖² itself.
    """
    first = len(weight) - len(weight) // 12
    second = torch.eye(weight.shape[1]).type_as(weight)
    second = second if moments is None else moments.second
    return 1 - kept(weight, nearest(weight, first), second)


def measure_noise(study: Study) -> dict:
    """One draw of rounding noise beside the weights, and what it is in the outputs.

    `share` is of the squared sum; `below` counts the singular values that are smaller
    than the noise's largest. The curves are over the largest value of the whole.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [[rounding_noise(w, generator) for w in pair] for pair in study.weights]
    found: dict[str, dict] = {"weights": {}, "outputs": {}}
    for name, pick in KINDS.items():
        for part, by in (("weights", "weights"), ("outputs", "text")):
            whole, noise = (
                [
                    directions(pick(pair), study.second(by, i))[1]
                    for i, pair in enumerate(pairs)
                ]
                for pairs in (study.weights, drawn)
            )
            over = [n / w[0] for n, w in zip(noise, whole, strict=True)]
            shares, counts = [], []
            for w, n in zip(whole, noise, strict=True):
                shares.append((n.square().sum() / w.square().sum()).item())
                counts.append(float((w < n[0]).sum()))
            middle = torch.stack(over).median(dim=0).values.tolist()
            at = spectrum(whole, ())["curve"]["rank"]
            found[part][name] = {
                "share": quartiles(shares),
                "below": quartiles(counts),
                "curve": {"rank": at, "median": [short(middle[i - 1]) for i in at]},
            }
    return found | {"bands": noise_bands(study, drawn)}


def noise_bands(study: Study, drawn: list[list[Tensor]]) -> list[dict]:
    """The noise's share of the outputs' squared sum, between one C and the next.

    In the directions of the outputs themselves, keys and values stacked, over layers.
    """
    ends = sorted({0, *study.sizes.latents})
    rows = []
    for pair, noise, m in zip(study.weights, drawn, study.moments["text"], strict=True):
        u, values = directions(torch.cat(pair), m.second)
        error = u.mT @ torch.cat(noise)
        of_noise = (error @ m.second * error).sum(dim=1)
        rows.append(band_shares(of_noise, values.square(), ends))
    return [
        {"from": a + 1, "to": b, "share": quartiles(shares)}
        for a, b, shares in zip(
            ends[:-1], ends[1:], zip(*rows, strict=True), strict=True
        )
    ]


def band_shares(part: Tensor, whole: Tensor, ends: Sequence[int]) -> list[float]:
    """What `part` sums to over `whole`, between each two neighbours of `ends`."""
    return [
        (part[a:b].sum() / whole[a:b].sum()).item()
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]


def measure_truncated(study: Study) -> list[dict]:
    """Every way and C. `keys` are the numbers of the keys' own, over layers."""
    rows = []
    whole = 2 * len(study.weights[0][0])
    for how, by in WAYS:
        for latent in study.sizes.latents:
            if latent == whole and (how, by) != ("joint", "text"):
                continue  # nothing is lost in any way
            make = partial(make_truncated, study, how, by, latent)
            row = {"how": how, "by": by, "C": latent, "of_cache": latent / whole}
            rows.append(row | study.compare(f"{how}_{by}_{latent}", make))
    return rows


def measure_alone(study: Study) -> list[dict]:
    """Keys of a lower rank with the values as they are, and the other way round."""
    rows = []
    for which, what in enumerate(("keys", "values")):
        for by in ("weights", "text"):
            for rank in study.sizes.ranks:
                make = partial(make_alone, study, which, by, rank)
                found = study.compare(f"{what}_{by}_{rank}", make)
                del found["keys"]
                rows.append({"what": what, "by": by, "rank": rank} | found)
    return rows


def make_truncated(
    study: Study, how: str, by: str, latent: int, pair: Sequence[Tensor], layer: int
) -> tuple[Tensor, Tensor, int | None]:
    """`truncate` of one layer, best for `by`."""
    return truncate(*pair, how, latent, study.second(by, layer))


def make_alone(
    study: Study, which: int, by: str, rank: int, pair: Sequence[Tensor], layer: int
) -> tuple[Tensor, Tensor, None]:
    """One layer's pair with one of the two of a lower rank."""
    new = list(pair)
    new[which] = nearest(pair[which], rank, study.second(by, layer))
    return new[0], new[1], None


PARTS: dict[str, Callable[[Study], Any]] = {
    "model": measure_model,
    "text": lambda study: study.texts.facts,
    "spectra": measure_spectra,
    "noise": measure_noise,
    "truncated": measure_truncated,
    "alone": measure_alone,
}

# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

THIS = "tests/studies/low_rank.py"
# What a perplexity follows from, and what the record follows from beside it.
MEASURED = (
    f"{CHAPTER.path}::model",
    f"{CHAPTER.path}::real_text",
    f"{CHAPTER.path}::json_tokenizer",
    f"{CHAPTER.path}::watch",
    "data/stories.txt",
    "data/download.py::write_model",
    "data/download.py::write_tokenizer",
    *(
        f"{THIS}::{name}"
        for name in (
            *("paragraphs", "halves", "windows", "open_texts", "measure_moments"),
            *("directions", "factors", "nearest", "truncate", "replaced"),
            *("window_loss", "kept", "quartiles"),
        )
    ),
)
SOURCES = (
    *MEASURED,
    *(
        f"{THIS}::{name}"
        for name in (
            *("full", "WAYS", "SHARES", "BLOCK", "STEPS", "KINDS", "Study"),
            *("rounding_noise", "levels", "rank_of", "spectrum", "mean_share"),
            *("least_share", "measure_spectra", "measure_noise", "measure_truncated"),
            *("measure_alone", "make_truncated", "make_alone"),
            *("noise_bands", "band_shares"),
        )
    ),
)


def version(sizes: Sizes, sources: dict[str, str]) -> str:
    """A name for what a perplexity follows from; `sources` are digests.

    The weights are those that the download checks; the help texts are Python's.
    """
    sums = FOLDER / "SHA256SUMS"
    weights = sums.read_text(encoding="utf-8") if sums.exists() else ""
    asked = (sizes.config, sizes.length, sizes.calibration, sizes.held_out)
    known = (module.real_text(), weights, [sources[name] for name in MEASURED])
    return hashlib.sha256(repr((asked, known)).encode()).hexdigest()[:12]


def draw(parts: dict, path: Path) -> Path:
    """Spectra at the left, perplexity against C at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_spectra(left, parts)
    draw_perplexity(right, parts)
    figure.supxlabel(caption(parts), fontsize="small")
    with module.replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return path


def caption(parts: dict) -> str:
    """What was measured, in a line."""
    text, weights = parts["text"], parts["model"]["weights"]
    return (
        f"{weights.replace('dequantised', 'weights dequantised')}; nothing is "
        f"trained after truncation; {text['held_out_tokens']:,} held-out tokens"
    )


COLOURS = {"keys": "#0072b2", "values": "#d55e00", "joint": "#000000"}


def draw_spectra(ax: Any, parts: dict) -> None:
    """Medians over layers, with the quartiles of what a joint latent has to hold."""
    labels = {"keys": "keys", "values": "values", "joint": "both, stacked"}
    for part, line in (("outputs", "-"), ("weights", "--")):
        for name, label in labels.items():
            curve = parts["spectra"][part][name]["curve"]
            said = f"{label}: {'on real text' if part == 'outputs' else 'weights'}"
            ax.plot(
                *(curve["rank"], curve["median"], line),
                color=COLOURS[name],
                lw=1.4,
                label=said,
            )
            if (part, name) == ("outputs", "joint"):
                band = (curve["rank"], curve["lower"], curve["upper"])
                ax.fill_between(*band, color="#000000", alpha=0.12, lw=0)
    for part, line, label in (
        ("outputs", ":", "4-bit rounding of both: on real text"),
        ("weights", (0, (4, 2, 1, 2)), "4-bit rounding of both: weights"),
    ):
        noise = parts["noise"][part]["joint"]["curve"]
        ax.plot(noise["rank"], noise["median"], ls=line, color="#888888", label=label)
    ax.set(yscale="log", xlabel="number of the singular value")
    ax.set(ylabel="singular value / the largest", title="median of all layers")
    ax.grid(alpha=0.3)
    ax.set_ylim(top=40)
    ax.legend(fontsize="x-small", loc="upper center", ncols=2)


def draw_perplexity(ax: Any, parts: dict) -> None:
    """Every way against C, up to what is no longer a language model."""
    lines = {
        ("joint", "text"): ("o-", "#000000", "jointly, best on text"),
        ("balanced", "text"): ("o-", "#56b4e9", "the same, keys and values scaled"),
        ("relative", "text"): ("s-", "#009e73", "apart, best split, scaled"),
        ("halves", "text"): ("^-", "#cc79a7", "apart, C/2 each, best on text"),
        ("joint", "stories"): ("o:", "#777777", "jointly, best on stories"),
        ("joint", "weights"): ("o--", "#0072b2", "jointly, plain SVD"),
        ("halves", "weights"): ("^--", "#d55e00", "apart, C/2 each, plain SVD"),
    }
    cached, whole = parts["model"]["cache_numbers"], parts["model"]["perplexity"]
    top = 16 * whole
    for (how, by), (form, colour, label) in lines.items():
        rows = [r for r in parts["truncated"] if (r["how"], r["by"]) == (how, by)]
        points = {cached: whole} | {row["C"]: row["perplexity"] for row in rows}
        at = sorted(points, reverse=True)
        least = min(row["perplexity"] for row in rows)
        if least > top:
            label += f" (≥ {least:,.0f})"
        ax.plot(at, [points[c] for c in at], form, color=colour, ms=4, label=label)
    ax.axvline(cached, color="#444444", ls="-.", lw=1)
    ax.text(cached, top * 0.9, f"its own cache: {cached} ", ha="right", va="top")
    ax.axhline(whole, color="#444444", lw=0.6)
    ax.set(yscale="log", ylim=(0.93 * whole, top), ylabel="perplexity, held out")
    ax.set(xlabel="C, numbers cached a token and layer", title="truncated to rank C")
    ax.set_xticks(sorted({cached, *(row["C"] for row in parts["truncated"])}))
    ax.tick_params(axis="x", labelsize=8)
    ax.yaxis.set_major_formatter("{x:g}")
    ticks = [t for t in (12, 15, 20, 30, 50, 100, 200) if 0.93 * whole <= t <= top]
    ax.set_yticks(ticks or [whole])
    ax.yaxis.set_minor_formatter("")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", loc="upper right", bbox_to_anchor=(1, 0.93))


def study(args: argparse.Namespace) -> None:
    """Measure all of it, and write the record."""
    sizes = quick() if args.quick else full()
    path = args.record or (args.out / "quick.json" if args.quick else RECORD)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --record names a file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file; --out names a folder")
    before = {source: results.digest(source) for source in SOURCES}
    measured = Study(sizes, args.out, version(sizes, before))
    parts = {name: measure(measured) for name, measure in PARTS.items()}
    running.unchanged(before)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(parts, path.with_suffix(".png"))
    command = f"python {THIS}" + (" --quick" if args.quick else "")
    results.write(path, command, parts, before, files=[figure])
    print(f"written: {path}")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="low_rank.py", description=__doc__.split("\n")[0]
    )
    command.add_argument("--quick", action="store_true", help="small, in seconds")
    running.add_places(command, RUNS)
    return command


def main(argv: list[str] | None = None) -> int:
    return running.run(study, parser().parse_args(argv), "low_rank.py", kept="measured")


if __name__ == "__main__":
    sys.exit(main())
