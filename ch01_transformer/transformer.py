# SPDX-License-Identifier: MIT
# From the companion code of the book, ch01_transformer/transformer.py; it runs alone.
"""The transformer: an encoder reads a sentence, a decoder writes its translation.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), sections 3 and 5.

    Attention(q, k, v) = softmax(q kᵀ / √K + mask) v                      eq. 1
    MultiHead(x, m)    = concat(head_1 … head_H) W_o                      §3.2.2
        head_h         = Attention(x W_q, m W_k, m W_v), each with its own K columns
    FeedForward(x)     = max(0, x W_up + b_up) W_down + b_down            eq. 2
    Sublayer(x)        = LayerNorm(x + Dropout(f(x)))                     §3.1, §5.4
    PE(t, i)           = sin or cos of t / 10000^(2i/D)                   §3.5
    x_0                = √D · E[token] + PE                               §3.4
    logits             = x_L Eᵀ                                           §3.4
    LayerNorm(x)       = (x - mean) / √(var + eps) · w + b       arXiv:1607.06450 eq. 4

Letters: B batch, N source length, T target length, S keys looked at (N or T),
V vocabulary, D model width, H heads, K head width (H·K = D), F feed-forward width.

Lineage: first chapter
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of an encoder-decoder transformer (arXiv:1706.03762 table 3).

    Linear maps have biases, as in published Marian checkpoints; the paper's attention
    has none. `activation` is "relu" in the paper, "silu" in those checkpoints.
    """

    vocab_size: int = 37000
    max_seq_len: int = 512
    dim: int = 512
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    n_heads: int = 8
    ffn_dim: int = 2048
    activation: str = "relu"
    norm_eps: float = 1e-5
    dropout: float = 0.1
    label_smoothing: float = 0.1
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "dim", "n_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be positive"
                )
        if self.dim % self.n_heads or self.dim % 2:
            raise ValueError(
                f"dim {self.dim} must be even and a multiple of n_heads {self.n_heads}"
            )
        for name in ("pad_id", "bos_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be below vocab_size "
                    f"{self.vocab_size}"
                )
        if not (0 <= self.dropout < 1 and 0 <= self.label_smoothing < 1):
            raise ValueError(
                f"dropout {self.dropout} and label_smoothing {self.label_smoothing} "
                "must lie in [0, 1)"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_hf(cls, hf: dict) -> Config:
        """Read Marian's published `config.json`; ValueError for anything else."""
        if hf.get("model_type") != "marian":
            raise ValueError(
                f"this chapter reads Marian checkpoints (model_type 'marian'); "
                f"this one is {hf.get('model_type')!r}"
            )
        if missing := set(HF_CONFIG.values()) - hf.keys():
            raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")
        for ours, theirs in HF_CONFIG.items():
            kind = type(getattr(cls, ours))
            if not isinstance(hf[theirs], (int, float) if kind is float else kind):
                raise ValueError(
                    f"config.json: {theirs} is {hf[theirs]!r}, and no {kind.__name__}"
                )
        other = {
            "normalize_before": hf.get("normalize_before", False),
            "add_final_layer_norm": hf.get("add_final_layer_norm", False),
            "normalize_embedding": hf.get("normalize_embedding", False),
            "scale_embedding false": not hf.get("scale_embedding", False),
            "an own decoder vocabulary": hf["vocab_size"]
            != (hf.get("decoder_vocab_size") or hf["vocab_size"]),
            "a narrower decoder": hf["encoder_ffn_dim"]
            != hf.get("decoder_ffn_dim", hf["encoder_ffn_dim"])
            or hf["encoder_attention_heads"]
            != hf.get("decoder_attention_heads", hf["encoder_attention_heads"]),
        }
        if any(other.values()):
            found = ", ".join(name for name, there in other.items() if there)
            raise ValueError(f"not the transformer of the paper: it has {found}")
        known = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items()}
        name = known["activation"]
        return cls(**known | {"activation": "silu" if name == "swish" else name})

    def to_hf(self) -> dict:
        """The `config.json` of the Hugging Face class with the same shape."""
        return {theirs: getattr(self, ours) for ours, theirs in HF_CONFIG.items()} | {
            "architectures": ["MarianMTModel"],
            "model_type": "marian",
            "is_encoder_decoder": True,
            "scale_embedding": True,
            "share_encoder_decoder_embeddings": True,
            "decoder_vocab_size": self.vocab_size,
            "decoder_attention_heads": self.n_heads,
            "decoder_ffn_dim": self.ffn_dim,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "bos_token_id": self.bos_id,
            "forced_eos_token_id": None,
        }


# Our config fields and Hugging Face's.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "d_model",
    "n_encoder_layers": "encoder_layers",
    "n_decoder_layers": "decoder_layers",
    "n_heads": "encoder_attention_heads",
    "ffn_dim": "encoder_ffn_dim",
    "activation": "activation_function",
    "dropout": "dropout",
    "pad_id": "pad_token_id",
    "bos_id": "decoder_start_token_id",
    "eos_id": "eos_token_id",
}
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}

TRANSFORMER_BASE = Config()
TINY = Config(
    vocab_size=2000,
    max_seq_len=256,
    dim=128,
    n_encoder_layers=2,
    n_decoder_layers=2,
    n_heads=4,
    ffn_dim=512,
    dropout=0.0,
    label_smoothing=0.0,
)


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last dimension, then w and b (arXiv:1607.06450).

    The variance divides by D, not by D - 1, and eps stands inside the root.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def sinusoids(length: int, dim: int) -> Tensor:
    """Position encodings (§3.5): (length, dim), all sines first, then all cosines.

    The paper's formula interleaves them; the authors' code and Marian put the halves
    one after the other. The columns are the same, in another order.
    """
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention (§3.2): queries from `x`, keys and values from `memory`.

    `x` is (B, T, D), `memory` (B, S, D); `seen` is True where a query may look at a
    key, and broadcasts to (B, H, T, S). Self-attention passes `x` twice.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D = config.dim
        self.wq = nn.Linear(D, D)
        self.wk = nn.Linear(D, D)
        self.wv = nn.Linear(D, D)
        self.wo = nn.Linear(D, D)
        self.H, self.K = config.n_heads, D // config.n_heads

    def weights(self, x: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """How much each query takes from each key: (B, H, T, S), rows summing to 1."""
        q = self.wq(x).unflatten(2, (self.H, -1)).transpose(1, 2)  # (B, H, T, K)
        k = self.wk(memory).unflatten(2, (self.H, -1)).transpose(1, 2)  # (B, H, S, K)
        scores = q @ k.mT / math.sqrt(self.K)  # (B, H, T, S)
        scores = scores.masked_fill(~seen, -torch.inf)
        precise = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(dim=-1, dtype=precise).type_as(x)

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        v = self.wv(memory).unflatten(2, (self.H, -1)).transpose(1, 2)  # (B, H, S, K)
        out = self.weights(x, memory, seen) @ v  # (B, H, T, K)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """Two linear maps around a non-linearity, for each position alone (eq. 2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w_up = nn.Linear(config.dim, config.ffn_dim)
        self.w_down = nn.Linear(config.ffn_dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        up = self.activation(self.w_up(x))  # (B, T, F)
        return self.w_down(up)  # (B, T, D)


class EncoderBlock(nn.Module):
    """Self-attention over the source, then feed-forward; post-norm (§3.1, §5.4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = LayerNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = LayerNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, x, seen)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the source, feed-forward (§3.1)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = LayerNorm(config.dim, config.norm_eps)
        self.cross_attention = Attention(config)
        self.cross_norm = LayerNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = LayerNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: Tensor, past: Tensor, source_seen: Tensor
    ) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, x, past)))
        found = self.cross_attention(x, memory, source_seen)  # (B, T, D)
        x = self.cross_norm(x + self.dropout(found))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Transformer(nn.Module):
    """`model(source, target) -> logits`: (B, N) and (B, T) ids to (B, T, V).

    Both are padded at the right with `config.pad_id`. No real target token sees the
    padding that follows it, so the target needs the causal mask alone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        n, m = config.n_encoder_layers, config.n_decoder_layers
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(n))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(m))
        # Published Marian checkpoints add a constant to the logits; the paper does not.
        self.logits_bias = nn.Parameter(torch.zeros(config.vocab_size), False)
        self.finalise()
        self.reset_parameters()

    def finalise(self) -> None:
        """Compute the table of positions, which no checkpoint needs to hold."""
        # In float32 first, as Marian has it: in float64 too the models are then equal.
        table = sinusoids(self.config.max_seq_len, self.config.dim).float()
        weight = self.embed.weight
        table = table.to(weight.device, weight.dtype)
        self.register_buffer("positions", table, persistent=False)

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices; embedding N(0, 1/D), as √D makes it 1; biases 0."""
        for name, parameter in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(parameter, std=self.config.dim**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embedded(self, tokens: Tensor) -> Tensor:
        """√D · E[token] + position: (B, T) ids to (B, T, D).

        Raises ValueError when T exceeds `config.max_seq_len`.
        """
        T, longest = tokens.shape[1], self.config.max_seq_len
        if longest < T:
            raise ValueError(f"{T} tokens are longer than the limit of {longest}")
        scaled = self.embed(tokens) * math.sqrt(self.config.dim)  # (B, T, D)
        return self.dropout(scaled + self.positions[:T])

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Read `source` (B, N): the memory (B, N, D), and which of it is no padding."""
        seen = (source != self.config.pad_id)[:, None, None]  # (B, 1, 1, N)
        x = self.embedded(source)  # (B, N, D)
        for block in self.encoder:
            x = block(x, seen)
        return x, seen

    def decode(self, target: Tensor, memory: Tensor, source_seen: Tensor) -> Tensor:
        """What the decoder makes of `target` (B, T) beside the memory: (B, T, D)."""
        T = target.shape[1]
        past = torch.ones(T, T, dtype=torch.bool, device=target.device).tril()
        x = self.embedded(target)  # (B, T, D)
        for block in self.decoder:
            x = block(x, memory, past, source_seen)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Scores of every token: (…, D) to (…, V), by the embedding itself (§3.4)."""
        return F.linear(x, self.embed.weight, self.logits_bias)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) for the token after each of `target`, given `source`."""
        return self.logits(self.decode(target, *self.encode(source)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Transformer:
        """Load a published checkpoint from a local folder (it wins) or a hub id.

        Reads `config.json` and safetensors (single or sharded) or `pytorch_model.bin`.
        The model is built without memory and filled tensor by tensor, in eval mode.
        Raises ValueError naming any tensor that is missing, unexpected or misshapen.
        """
        folder = find_folder(source)
        try:
            config = Config.from_hf(read_json(folder / "config.json"))
            with torch.device("meta"):
                model = cls(config)
            load_tensors(model, read_tensors(folder), dtype, device)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, as the Hugging Face class reads.

        Where the safetensors package is missing, `pytorch_model.bin` instead.
        """
        write_checkpoint(Path(directory), self.config.to_hf(), export_tensors(self))


# Checkpoint names as data: Hugging Face's modules on the left, ours on the right.
HF_MODULES = {
    "model.encoder.layers.{i}.self_attn.q_proj": "encoder.{i}.attention.wq",
    "model.encoder.layers.{i}.self_attn.k_proj": "encoder.{i}.attention.wk",
    "model.encoder.layers.{i}.self_attn.v_proj": "encoder.{i}.attention.wv",
    "model.encoder.layers.{i}.self_attn.out_proj": "encoder.{i}.attention.wo",
    "model.encoder.layers.{i}.self_attn_layer_norm": "encoder.{i}.attention_norm",
    "model.encoder.layers.{i}.fc1": "encoder.{i}.ffn.w_up",
    "model.encoder.layers.{i}.fc2": "encoder.{i}.ffn.w_down",
    "model.encoder.layers.{i}.final_layer_norm": "encoder.{i}.ffn_norm",
    "model.decoder.layers.{i}.self_attn.q_proj": "decoder.{i}.attention.wq",
    "model.decoder.layers.{i}.self_attn.k_proj": "decoder.{i}.attention.wk",
    "model.decoder.layers.{i}.self_attn.v_proj": "decoder.{i}.attention.wv",
    "model.decoder.layers.{i}.self_attn.out_proj": "decoder.{i}.attention.wo",
    "model.decoder.layers.{i}.self_attn_layer_norm": "decoder.{i}.attention_norm",
    "model.decoder.layers.{i}.encoder_attn.q_proj": "decoder.{i}.cross_attention.wq",
    "model.decoder.layers.{i}.encoder_attn.k_proj": "decoder.{i}.cross_attention.wk",
    "model.decoder.layers.{i}.encoder_attn.v_proj": "decoder.{i}.cross_attention.wv",
    "model.decoder.layers.{i}.encoder_attn.out_proj": "decoder.{i}.cross_attention.wo",
    "model.decoder.layers.{i}.encoder_attn_layer_norm": "decoder.{i}.cross_norm",
    "model.decoder.layers.{i}.fc1": "decoder.{i}.ffn.w_up",
    "model.decoder.layers.{i}.fc2": "decoder.{i}.ffn.w_down",
    "model.decoder.layers.{i}.final_layer_norm": "decoder.{i}.ffn_norm",
}
HF_NAMES = {
    f"{theirs}.{leaf}": [f"{ours}.{leaf}"]
    for theirs, ours in HF_MODULES.items()
    for leaf in ("weight", "bias")
} | {"model.shared.weight": ["embed.weight"], "final_logits_bias": ["logits_bias"]}
# Tensors that a file may hold although another, or a formula, says it already.
REDUNDANT = {
    "lm_head.weight": "embed.weight",
    "model.encoder.embed_tokens.weight": "embed.weight",
    "model.decoder.embed_tokens.weight": "embed.weight",
    "model.encoder.embed_positions.weight": "positions",
    "model.decoder.embed_positions.weight": "positions",
}
# What `verify` compares: label, our module, theirs, and which input's padding counts.
# "module:in" is what goes into the module; "" is the whole model.
STAGES = [
    ("source embedding", "encoder.0:in", "model.encoder.layers.0:in", 0),
    ("encoder block {i}", "encoder.{i}", "model.encoder.layers.{i}", 0),
    ("target embedding", "decoder.0:in", "model.decoder.layers.0:in", 1),
    ("decoder block {i}", "decoder.{i}", "model.decoder.layers.{i}", 1),
    ("logits", "", "", 1),
]


def canonical(name: str) -> str | None:
    """The name as in HF_NAMES: Marian files already spell it so."""
    return name


def to_ours(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a Hugging Face file in our layout: their bias is (1, V)."""
    return tensor.flatten() if name == "final_logits_bias" else tensor


def to_theirs(name: str, tensor: Tensor) -> Tensor:
    """One of our tensors in Hugging Face's layout."""
    return tensor[None] if name == "final_logits_bias" else tensor


def hf_names(model: Transformer) -> dict[str, list[str]]:
    """Hugging Face's tensor names for this model, each with ours, for every layer."""
    ours = {name for name, _ in model.named_parameters()}  # a tied head is none
    names = {}
    for theirs, parts in HF_NAMES.items():
        for i in range(len(ours) if "{i}" in theirs else 1):
            expanded = [part.replace("{i}", str(i)) for part in parts]
            if not ours.issuperset(expanded):
                break
            names[theirs.replace("{i}", str(i))] = expanded
    return names


def export_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Our weights under Hugging Face's names and in its layout."""
    for theirs, parts in hf_names(model).items():
        tensor = torch.cat([model.get_parameter(part).detach() for part in parts])
        yield theirs, to_theirs(theirs, tensor)


@torch.no_grad()
def load_tensors(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Fill `model` (it may be on the meta device) from tensors in Hugging Face's names.

    Strict: raises ValueError for a tensor that is missing, unexpected or misshapen, or
    that repeats another with other values.
    """
    waiting, filled, repeated = hf_names(model), set(), []
    for name, tensor in tensors:
        theirs = canonical(name)
        if theirs in waiting:
            parts = waiting.pop(theirs)
            fill(model, parts, name, to_ours(theirs, tensor), dtype, device)
            filled.update(parts)
        elif theirs in REDUNDANT:
            repeated.append((name, REDUNDANT[theirs], tensor))
            if REDUNDANT[theirs] in filled:  # then there is no need to keep it
                compare(model, *repeated.pop())
        elif theirs is not None:
            raise ValueError(f"unexpected tensor {name} {tuple(tensor.shape)}")
    if waiting:
        raise ValueError(f"missing tensors: {summary(list(waiting))}")
    model.finalise()
    for name, ours, tensor in repeated:
        compare(model, name, ours, tensor)


def compare(model: Transformer, name: str, ours: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` repeats our tensor; some rows at a time."""
    owner, _, leaf = ours.rpartition(".")
    kept = getattr(model.get_submodule(owner), leaf)
    if tensor.shape != kept.shape or not all(
        torch.allclose(a.to(b), b, rtol=1e-3, atol=1e-3)
        for a, b in zip(tensor.split(1024), kept.split(1024), strict=True)
    ):
        raise ValueError(f"{name} should repeat our {ours}, and differs from it")


def fill(
    model: Transformer,
    parts: Sequence[str],
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Cut `tensor` along its rows into the parameters `parts`, cast and moved."""
    shapes = [model.get_parameter(part).shape for part in parts]
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if tensor.shape != whole:
        raise ValueError(
            f"{name} has, in our layout, the shape {tuple(tensor.shape)}; "
            f"the config asks for {whole}"
        )
    pieces = tensor.split([shape[0] for shape in shapes])
    for part, piece in zip(parts, pieces, strict=True):
        owner, _, leaf = part.rpartition(".")
        copied = torch.empty(piece.shape, dtype=dtype, device=device).copy_(piece)
        trained = model.get_parameter(part).requires_grad
        setattr(model.get_submodule(owner), leaf, nn.Parameter(copied, trained))


def summary(names: Sequence[str], most: int = 4) -> str:
    """A few of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def new_token_limit(model: Transformer, source: Tensor, asked: int | None) -> int:
    """How many tokens to write at most: the length + 50 (§6.1), or as asked."""
    asked = source.shape[1] + 50 if asked is None else asked
    return min(asked, model.config.max_seq_len - 1)


@torch.inference_mode()
def greedy(
    model: Transformer, source: Tensor, *, max_new_tokens: int | None = None
) -> Tensor:
    """Translate `source` (B, N) by the likeliest token at each step.

    Returns (B, T) ids that begin with bos; a row that has ended is padded.
    """
    config, B = model.config, source.shape[0]
    memory, seen = model.encode(source)
    target = source.new_full((B, 1), config.bos_id)
    ended = torch.zeros(B, dtype=torch.bool, device=source.device)
    for _ in range(new_token_limit(model, source, max_new_tokens)):
        logits = model.logits(model.decode(target, memory, seen)[:, -1])  # (B, V)
        logits[:, config.pad_id] = -torch.inf
        token = logits.argmax(dim=-1).masked_fill(ended, config.pad_id)  # (B)
        target = torch.cat([target, token[:, None]], dim=1)
        ended |= token == config.eos_id
        if ended.all():
            break
    return target


@torch.inference_mode()
def beam_search(
    model: Transformer,
    source: Tensor,
    *,
    beams: int = 4,
    length_penalty: float = 0.6,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Translate `source` (B, N), keeping the `beams` likeliest beginnings of each row.

    A finished translation of n tokens scores log P / ((5 + n) / 6)^length_penalty
    (arXiv:1609.08144 eq. 14). A row is done when `beams` have finished and the best of
    them scores above all that are open, or when none of these could overtake it any
    more. Returns (B, T) ids from bos on, padded.
    """
    if beams < 1 or not length_penalty >= 0:
        raise ValueError(
            f"beams {beams}, length_penalty {length_penalty}: need at least 1 and 0"
        )
    config, B, device = model.config, source.shape[0], source.device
    limit = new_token_limit(model, source, max_new_tokens)

    def penalty(n: int) -> float:
        return ((5 + n) / 6) ** length_penalty

    memory, seen = model.encode(source)
    memory = memory.repeat_interleave(beams, 0)  # (B*beams, N, D)
    seen = seen.repeat_interleave(beams, 0)
    rows = torch.arange(B, device=device)[:, None]
    open_ = source.new_full((B, beams, 1), config.bos_id)
    score = torch.full((B, beams), -torch.inf, device=device)
    score[:, 0] = 0.0  # the beams start alike: only one of them may be continued
    best = source.new_full((B, limit + 1), config.pad_id)
    best_score = torch.full((B,), -torch.inf, device=device)
    finished = torch.zeros(B, dtype=torch.long, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for n in range(1, limit + 1):
        logits = model.logits(model.decode(open_.flatten(0, 1), memory, seen)[:, -1])
        logits[:, config.pad_id] = -torch.inf
        V = logits.shape[-1]
        total = score[..., None] + logits.log_softmax(-1).unflatten(0, (B, beams))
        # 2·beams candidates: even if `beams` of them end, `beams` stay open.
        score, index = total.flatten(1).topk(2 * beams)  # (B, 2*beams)
        grown = torch.cat([open_[rows, index // V], (index % V)[..., None]], dim=2)
        ends = (index % V == config.eos_id) & score.isfinite()
        counts = ends & ~done[:, None]
        counts[:, beams:] = False
        top, which = (score / penalty(n)).masked_fill(~counts, -torch.inf).max(1)
        better = top > best_score
        best_score = torch.where(better, top, best_score)
        chosen = grown[rows[:, 0], which]  # (B, n+1)
        best[:, : n + 1] = torch.where(better[:, None], chosen, best[:, : n + 1])
        finished += counts.sum(1)
        score, kept = score.masked_fill(ends, -torch.inf).topk(beams)  # (B, beams)
        open_ = grown[rows, kept]
        # Beside a translation that the model is sure of, `beams` poor ones end early.
        done |= (finished >= beams) & (best_score >= score[:, 0] / penalty(n))
        done |= best_score >= score[:, 0] / penalty(limit)
        if done.all():
            break
    # A row that never ended gives its likeliest beginning.
    width = open_.shape[2]
    unfinished = best_score == -torch.inf
    best[:, :width] = torch.where(unfinished[:, None], open_[:, 0], best[:, :width])
    return best[:, :width]


# ======================================================================================
# Running the chapter: files, data, train, verify, demo, command line.
# ======================================================================================


def find_folder(source: str | Path) -> Path:
    """The local folder `source`, or a hub repository's files, fetched when needed."""
    if Path(source).is_dir():
        return Path(source)
    if (
        Path(source).exists()
        or str(source).count("/") > 1
        or Path(source).is_absolute()
    ):
        raise FileNotFoundError(f"{source} is no folder with a model")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.bin", "*.spm", "*.model", "*.tiktoken"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no folder {source}, and the hub did not give it: {reason}"
        ) from None


def read_json(path: Path) -> dict:
    """The JSON object in `path`; raises ValueError naming the file when it is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint folder, one in memory at a time.

    The largest come first, so that the file's copy of an embedding is in memory while
    the model is still empty. A file is mapped anew for each tensor, so that the pages
    of those already copied are given back.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} holds no weight_map")
        names = sorted(set(shards.values()))
        yield from read_safetensors([folder / name for name in names])
    elif (folder / "model.safetensors").exists():
        yield from read_safetensors([folder / "model.safetensors"])
    elif (folder / "pytorch_model.bin").exists():
        yield from read_bin(folder / "pytorch_model.bin")
    else:
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor pytorch_model.bin"
        )


def read_safetensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of these safetensors files, the largest first."""
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):
                    size = math.prod(file.get_slice(name).get_shape())
                    found.append((size, name, path))
        for _, name, path in sorted(found, reverse=True):
            with safe_open(path, "pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def read_bin(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a file of `torch.save`, the largest first.

    Only torch's zip format can be mapped; an older file is read whole.
    """
    mapped = zipfile.is_zipfile(path)
    state = read_torch(path, mapped)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name} is no tensor")
    sizes = {name: state[name].numel() for name in state}
    if mapped:
        state, tensor = {}, None  # or its pages would stay
    for name in sorted(sizes, key=lambda name: (sizes[name], name), reverse=True):
        yield name, (read_torch(path, mapped) if mapped else state).pop(name)


def read_torch(path: Path, mapped: bool = False) -> dict:
    """What `torch.save` wrote to `path`; nothing in it is executed.

    If `mapped`, a tensor is read from the file only where it is looked at.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and tensor errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is damaged or cut short: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no table of tensors")
    return found


def write_checkpoint(
    folder: Path, config: dict, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """`config.json` and the weights, each written aside and then moved into place."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in tensors}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    try:
        from safetensors.torch import save_file
    except ImportError:
        with replacing(folder / "pytorch_model.bin") as partial:
            torch.save(state, partial)
    else:
        with replacing(folder / "model.safetensors") as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # save_file leaves it readable to its owner alone
    with replacing(folder / "config.json") as partial:
        text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A neighbour to write to, moved over `path` only when it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


HERE = Path(__file__).resolve()
DATA = HERE.parent.parent / "data"
DEFAULT_DATA = DATA / "english_hindi.train.tsv"


@dataclass(frozen=True)
class Tokenizer:
    """Sentences to ids and back, and the files that travel with a model to do it again.

    `encode_source` ends in eos; `encode_target` begins with bos and ends in eos.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    encode_source: Callable[[str], list[int]]
    encode_target: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    files: dict[str, bytes] = field(default_factory=dict, repr=False)


def byte_tokenizer() -> Tokenizer:
    """The bytes of UTF-8 as ids 0 … 255, then pad, bos and eos."""
    pad, bos, eos = 256, 257, 258
    return Tokenizer(
        vocab_size=259,
        pad_id=pad,
        bos_id=bos,
        eos_id=eos,
        encode_source=lambda text: [*text.encode("utf-8"), eos],
        encode_target=lambda text: [bos, *text.encode("utf-8"), eos],
        decode=lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"),
    )


def marian_tokenizer(files: dict[str, bytes]) -> Tokenizer:
    """Marian's files: a SentencePiece model for each side, and a common vocabulary.

    SentencePiece cuts text into pieces; `vocab.json` gives every piece its id.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        vocabulary = json.loads(files["vocab.json"])
        source = SentencePieceProcessor(model_proto=files["source.spm"])
        target = SentencePieceProcessor(model_proto=files["target.spm"])
        eos, unk, pad = (vocabulary[piece] for piece in ("</s>", "<unk>", "<pad>"))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"source.spm, target.spm, vocab.json: {error!r}") from None
    bos = vocabulary.get("<s>", pad)  # Marian starts a target with its padding token
    pieces = {i: piece for piece, i in vocabulary.items()}

    def ids(processor: SentencePieceProcessor, text: str) -> list[int]:
        return [vocabulary.get(p, unk) for p in processor.encode(text, out_type=str)]

    def decode(tokens: Sequence[int]) -> str:
        shown = [pieces[i] for i in tokens if i in pieces and i not in (pad, bos, eos)]
        # A piece that only the source's model knows keeps its mark for a space.
        return target.decode_pieces(shown).replace("\u2581", " ").strip()

    return Tokenizer(
        vocab_size=len(vocabulary),
        pad_id=pad,
        bos_id=bos,
        eos_id=eos,
        encode_source=lambda text: [*ids(source, text), eos],
        encode_target=lambda text: [bos, *ids(target, text), eos],
        decode=decode,
        files=files,
    )


def train_tokenizer(pairs: Sequence[tuple[str, str]], vocab_size: int) -> Tokenizer:
    """One byte-pair vocabulary for both languages (§5.1), in Marian's three files.

    Text is normalised to NFKC and English to lower case; the trainer is deterministic.
    """
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError:
        say("The sentencepiece package is not here: training on bytes instead.")
        return byte_tokenizer()
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(sentence for pair in pairs for sentence in pair),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    from sentencepiece import SentencePieceProcessor

    model = written.getvalue()
    processor = SentencePieceProcessor(model_proto=model)
    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    about = {"tokenizer_class": "MarianTokenizer", "source_lang": "en"}
    about |= {"target_lang": "hi", "model_max_length": 512}
    return marian_tokenizer(
        {
            "source.spm": model,
            "target.spm": model,
            "vocab.json": json.dumps(pieces, ensure_ascii=False).encode("utf-8"),
            "tokenizer_config.json": json.dumps(about).encode("utf-8"),
        }
    )


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a model folder; a folder with none means bytes."""
    folder = Path(source)
    names = ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")
    files = {name: folder / name for name in names if (folder / name).exists()}
    if not files.keys() & {"source.spm", "target.spm"}:
        return byte_tokenizer()
    try:
        return marian_tokenizer({name: p.read_bytes() for name, p in files.items()})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_text(path: str | Path) -> str:
    """The UTF-8 text in `path`; raises when there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """The (source, target) sentences of a file with two tab-separated columns."""
    pairs = []
    lines = read_text(path).rstrip("\n").split("\n")  # splitlines cuts at U+2028 too
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t")
        if len(columns) != 2 or not (columns[0].strip() and columns[1].strip()):
            raise ValueError(
                f"{path}, line {number}: two tab-separated columns are needed, a "
                f"sentence in each; found {line[:60]!r}"
            )
        pairs.append((columns[0].strip(), columns[1].strip()))
    return pairs


def split_pairs(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and held-out pairs: X.train.tsv goes with X.test.tsv beside it.

    Of any other file the last 5 % are held out, at most 1,000.
    """
    pairs = read_pairs(path)
    beside = path.with_name(path.name.replace(".train.", ".test."))
    if beside != path and beside.exists():
        return pairs, read_pairs(beside)
    if len(pairs) < 2:
        raise ValueError(f"{path}: two or more pairs are needed, one to be held out")
    cut = len(pairs) - max(1, min(1000, len(pairs) // 20))
    return pairs[:cut], pairs[cut:]


class Batches:
    """Pairs bucketed by length; which batch comes when follows from the seed.

    In each epoch the pairs are shuffled, sorted by length, cut into batches of at most
    `batch_tokens` (source and target, padding included), and the batches shuffled. The
    shuffle before the stable sort mixes pairs of equal length.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        tokenizer: Tokenizer,
        longest: int,
        batch_tokens: int,
        seed: int,
    ) -> None:
        encoded = [
            (tokenizer.encode_source(source), tokenizer.encode_target(target))
            for source, target in pairs
        ]
        kept = [pair for pair in encoded if max(map(len, pair)) <= longest]
        if not kept:
            raise ValueError(f"no pair of sentences has at most {longest} tokens")
        if len(kept) < len(encoded):
            say(f"{len(encoded) - len(kept)} pairs are left out: over {longest} tokens")
        self.pairs = [tuple(torch.tensor(side) for side in pair) for pair in kept]
        self.lengths = [(len(target), len(source)) for source, target in kept]
        self.stream = torch.tensor([i for pair in kept for side in pair for i in side])
        self.batch_tokens, self.seed, self.pad_id = batch_tokens, seed, tokenizer.pad_id
        self.cuts = self.cut(sorted(self.lengths))
        self.plan = lru_cache(maxsize=2)(self._plan)

    def cut(self, lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where to cut pairs sorted by length: (first, last) of each batch."""
        cuts, first, widest = [], 0, 0
        for i, (target, source) in enumerate(lengths):
            widest_now = max(widest, source)
            if (
                i > first
                and (i + 1 - first) * (target + widest_now) > self.batch_tokens
            ):
                cuts.append((first, i))
                first, widest_now = i, source
            widest = widest_now
        return [*cuts, (first, len(lengths))]

    def _plan(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.pairs), generator=generator).tolist()
        by_length = torch.tensor(sorted(shuffled, key=lambda i: self.lengths[i]))
        order = torch.randperm(len(self.cuts), generator=generator).tolist()
        return [by_length[slice(*self.cuts[i])] for i in order]

    def collate(self, chosen: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The pairs numbered `chosen`, padded: (B, N) sources, (B, T + 1) targets."""
        sources, targets = zip(*(self.pairs[i] for i in chosen), strict=True)
        return (
            nn.utils.rnn.pad_sequence(sources, True, self.pad_id),
            nn.utils.rnn.pad_sequence(targets, True, self.pad_id),
        )

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index` of the endless training stream."""
        epoch, i = divmod(index, len(self.cuts))
        return self.collate(self.plan(epoch)[i].tolist())

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every pair once, in batches."""
        for chosen in self.plan(0):
            yield self.collate(chosen.tolist())


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam or AdamW, a warm-up, and a decay.

    The schedule "inverse_sqrt" is the paper's (§5.3), with `lr` its peak, which is
    (D · warmup)^-1/2; "cosine" falls to a tenth over the remaining steps.
    """

    steps: int = 6000
    batch_tokens: int = 800
    accumulate: int = 1
    lr: float = 3e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    clip: float = 1.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    eval_every: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "accumulate", "eval_every", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be positive"
                )
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**32)")
        if self.schedule not in ("cosine", "inverse_sqrt"):
            raise ValueError(f"schedule {self.schedule!r}: cosine or inverse_sqrt")


# The paper's own recipe: §5.3, §5.4, 25,000 tokens a side in a batch. The defaults
# above are the one that learns fastest on a laptop: small batches, a higher rate that
# falls off, and weight decay in place of dropout and smoothing.
PAPER = Recipe(
    steps=100_000,
    batch_tokens=50_000,
    lr=512**-0.5 * 4000**-0.5,
    warmup=4000,
    schedule="inverse_sqrt",
    weight_decay=0.0,
    clip=math.inf,
    dropout=0.1,
    label_smoothing=0.1,
    eval_every=1000,
)
RECIPES = {"paper": PAPER, "laptop": Recipe()}


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step 0, 1, …: up linearly to `lr` over `warmup` steps, then down."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "inverse_sqrt":
        return recipe.lr * math.sqrt(recipe.warmup / (step + 1))
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), its decay on matrices only: not on biases, nor norms.

    Without decay it is Adam.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.dim() >= 2],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(
        groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy: sources (B, N), targets (B, T + 1) from bos to eos.

    Each target token is predicted from those before it; padding does not count. In
    training, label smoothing (§5.4) gives every token its share of `label_smoothing`.
    """
    source, target = batch
    logits = model(source, target[:, :-1])  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1),
        target[:, 1:].flatten(),
        ignore_index=model.config.pad_id,
        label_smoothing=model.config.label_smoothing if model.training else 0.0,
    )


def count_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """How many predictions `loss` averages over."""
    return int((batch[1][:, 1:] != model.config.pad_id).sum())


class Training:
    """A run: the model and all else that a checkpoint holds to go on bit for bit.

    Model, optimizer, step (it gives the learning rate and the place in the data), the
    state of the random number generators, and the log.
    """

    def __init__(
        self,
        model: Transformer,
        data: Batches,
        held_out: Batches,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        source: str = "",
    ) -> None:
        self.model, self.data, self.held_out, self.recipe = (
            model,
            data,
            held_out,
            recipe,
        )
        self.source, self.saved = source, "none was written yet"
        self.run = torch.compile(model) if compile else model
        self.optimizer = make_optimizer(model, recipe)
        self.device = next(model.parameters()).device
        self.dtype, self.step, self.log = dtype, 0, []

    def precision(self) -> torch.autocast:
        """Autocast to the asked dtype; weights and optimizer stay in float32."""
        asked = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=asked)

    def take_step(self) -> dict:
        """One optimizer step; returns its row of the log.

        Micro-batches are weighted by their tokens, so that `accumulate` changes memory
        and not the gradient. Raises FloatingPointError instead of a step that is not
        finite.
        """
        self.model.train()
        started = time.perf_counter()
        lr = learning_rate(self.step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        first = self.step * self.recipe.accumulate
        batches = [self.data.batch(first + i) for i in range(self.recipe.accumulate)]
        tokens = sum(count_tokens(self.model, batch) for batch in batches)
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            with self.precision():
                mean = loss(self.run, to_device(batch, self.device))
            part = mean * (count_tokens(self.model, batch) / tokens)
            part.backward()
            total += part.item()
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.recipe.clip
        ).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {total}, the gradient norm {norm}; "
                f"last good checkpoint: {self.saved}; a lower --lr may help"
            )
        self.optimizer.step()
        self.step += 1
        row = {"step": self.step, "loss": total, "lr": lr, "grad_norm": norm}
        row |= {"held_out": None, "tokens": tokens}
        self.log.append(row | {"seconds": time.perf_counter() - started})
        return self.log[-1]

    def save(self, out: Path, tokenizer: Tokenizer) -> None:
        """The checkpoint, the log, the curves, and the model in published format.

        Raises FloatingPointError, and writes nothing, when a weight is not finite.
        """
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise FloatingPointError(
                f"step {self.step}: a weight is not finite; "
                f"last good checkpoint: {self.saved}; a lower --lr may help"
            )
        state = {
            "config": asdict(self.model.config),
            "recipe": asdict(self.recipe),
            "dtype": str(self.dtype).removeprefix("torch."),
            "step": self.step,
            "log": self.log,
            "source": self.source,
            "data": fingerprint(self.data),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }
        for name, content in tokenizer.files.items():
            with replacing(out / name) as partial:
                partial.write_bytes(content)
        self.model.save_pretrained(out)
        write_log(self.log, out / "log.csv")
        plot_log(self.log, out / "loss.png")
        with replacing(out / "checkpoint.pt") as partial:
            torch.save(state, partial)
        self.saved = f"{out / 'checkpoint.pt'}, step {self.step}"

    def restore(self, state: dict) -> None:
        """Go on from what `save` wrote; raises ValueError when the data is another."""
        if state["data"] != fingerprint(self.data):
            raise ValueError(
                "the data is not what this run was trained on; give it again"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], state["log"]
        self.saved = f"the resumed one, step {self.step}"
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """`batch` on `device`."""
    return tuple(side.to(device, non_blocking=True) for side in batch)


def fingerprint(data: Batches) -> str:
    """A hash of the training stream, by which a resumed run knows its data."""
    return hashlib.sha256(array("q", data.stream.tolist())).hexdigest()


@torch.no_grad()
def held_out_loss(training: Training) -> float:
    """The mean loss over all of the held-out data, in nats a token."""
    training.model.eval()
    total, tokens = 0.0, 0
    for batch in training.held_out.all():
        with training.precision():
            mean = loss(training.run, to_device(batch, training.device))
        total += mean.item() * count_tokens(training.model, batch)
        tokens += count_tokens(training.model, batch)
    return total / tokens


def write_log(log: Sequence[dict], path: Path) -> None:
    """The log as csv, a row a step."""
    with (
        replacing(path) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def plot_log(log: Sequence[dict], path: Path) -> None:
    """The loss curves, where matplotlib is installed."""
    with suppress(ImportError):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        steps = [row["step"] for row in log]
        axes.plot(
            steps, [row["loss"] for row in log], lw=0.8, alpha=0.5, label="training"
        )
        tested = [row for row in log if row["held_out"] is not None]
        axes.plot(
            [row["step"] for row in tested],
            [row["held_out"] for row in tested],
            "o-",
            label="held out",
        )
        axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=120)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising, so that no step is left half taken.

    Yields a function that says whether it was pressed; pressed twice, it raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = []

    def note(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


class Progress:
    """A bar with loss, speed and time left; off a terminal, a line now and then."""

    def __init__(self, done: int, steps: int) -> None:
        self.bar, self.steps, self.started = None, steps, time.perf_counter()
        self.first, self.tokens, self.shown = done, 0, self.started
        if sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(initial=done, total=steps, unit="step", leave=False)

    def update(self, row: dict) -> None:
        """Show one more step."""
        self.tokens += row["tokens"]
        now = time.perf_counter()
        rate = self.tokens / (now - self.started)
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s", False
            )
            self.bar.update()
        elif now - self.shown > 10:
            left = (now - self.started) / (row["step"] - self.first)
            left *= self.steps - row["step"]
            say(
                f"step {row['step']:5} of {self.steps}  loss {row['loss']:.3f}  "
                f"{rate:,.0f} tokens/s  {left:.0f} s left"
            )
            self.shown = now

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def say(text: str = "") -> None:
    """Print a line at once, above a progress bar if there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text)
        sys.stdout.flush()
    else:
        print(text, flush=True)


def train(
    training: Training,
    tokenizer: Tokenizer,
    out: Path | None = None,
    on_eval: Callable[[Transformer], str] | None = None,
) -> bool:
    """Run `training` to its last step; with `out`, save at every evaluation.

    `on_eval(model)` gives a text to show beside the held-out loss. Returns False when
    Ctrl-C ended it early (saved all the same).
    """
    recipe = training.recipe
    progress = Progress(training.step, recipe.steps)
    try:
        with deferred_interrupt() as interrupted:
            while training.step < recipe.steps and not interrupted():
                row = training.take_step()
                progress.update(row)
                if training.step % recipe.eval_every and training.step < recipe.steps:
                    continue
                row["held_out"] = held_out_loss(training)
                say(
                    f"step {training.step:5} of {recipe.steps}  "
                    f"loss {row['loss']:.3f}  held out {row['held_out']:.3f}"
                )
                if out is not None:
                    training.save(out, tokenizer)
                if on_eval is not None:
                    say(f"    {on_eval(training.model)}")
            stopped = training.step < recipe.steps
            if stopped and out is not None:
                training.save(out, tokenizer)
    finally:
        progress.close()
        training.model.eval()
    return not stopped


def small_config(activation: str = "relu") -> Config:
    """A shape for parity checks: small, and no two sizes alike."""
    return Config(
        vocab_size=97,
        max_seq_len=48,
        dim=30,
        n_encoder_layers=3,
        n_decoder_layers=2,
        n_heads=5,
        ffn_dim=52,
        activation=activation,
    )


def reference(
    source: Config | str | Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Hugging Face's MarianMTModel: random weights for a Config, or as published."""
    from transformers import MarianConfig, MarianMTModel

    if isinstance(source, Config):
        return MarianMTModel(MarianConfig(**source.to_hf())).eval().to(dtype)
    return MarianMTModel.from_pretrained(source, dtype=dtype).eval()


def reference_inputs(
    config: Config, source: Tensor, target: Tensor
) -> dict[str, Tensor]:
    """What the reference is called with where ours is called with source and target."""
    return {
        "input_ids": source,
        "attention_mask": (source != config.pad_id).long(),
        "decoder_input_ids": target,
    }


def verify_inputs(config: Config, tokenizer: Tokenizer | None) -> tuple[Tensor, ...]:
    """A padded batch: written pairs where there is a tokenizer, else random ids."""
    path = DATA / "english_hindi.by_hand.tsv"
    fits = tokenizer is not None and tokenizer.vocab_size <= config.vocab_size
    if fits and path.exists():
        written = Batches(read_pairs(path)[:16], tokenizer, config.max_seq_len, 1, 0)
        source, target = written.collate(range(len(written.pairs)))
        return source, target[:, :-1]
    generator = torch.Generator().manual_seed(1)
    sizes = (3, config.max_seq_len - 1), (3, config.max_seq_len)
    padded = []
    for size in sizes:
        tokens = torch.randint(3, config.vocab_size, size, generator=generator)
        for row in range(1, len(tokens)):
            tokens[row, -7 * row :] = config.pad_id
        padded.append(tokens)
    return tuple(padded)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, norms and biases too.

    A freshly initialised model hides mistakes: its norms and biases do nothing yet, and
    its activations are so small that every non-linearity looks linear.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + noise * (0.3 if centre else 0.1))


def expand_stages(model: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    """STAGES with the layers written out, as many as `model` has."""
    modules = {name for name, _ in model.named_modules()}
    for label, ours, theirs, which in STAGES:
        for i in range(len(modules) if "{i}" in ours else 1):
            names = [text.replace("{i}", str(i)) for text in (label, ours, theirs)]
            if names[1].removesuffix(":in") in modules:
                yield names[0], names[1], names[2], which


@torch.no_grad()
def watch(model: nn.Module, names: Sequence[str], **inputs: Tensor) -> list[Tensor]:
    """Call `model(**inputs)`; return what went through the named modules, on the CPU.

    "module" is what comes out of it, "module:in" what goes in, "" the model's result.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name.removesuffix(":in"))
        if name.endswith(":in"):

            def note(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                seen.setdefault(name, [*args, *kwargs.values()][0].cpu())

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        else:

            def keep(_: nn.Module, __: tuple, out: object, name: str = name) -> None:
                out = getattr(out, "logits", out)
                seen.setdefault(name, (out[0] if isinstance(out, tuple) else out).cpu())

            hooks.append(module.register_forward_hook(keep))
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[name] for name in names]


def distance(label: str, ours: Tensor, theirs: Tensor) -> dict:
    """How far apart two (n, width) results are, in four ways."""
    ours, theirs = ours.double(), theirs.double()
    gap = (ours - theirs).abs().max().item()
    return {
        "stage": label,
        "max_abs": gap,
        "relative": gap / theirs.abs().max().item(),
        "cosine": F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item(),
        "argmax": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }


# Largest difference allowed at any stage, over the reference's largest value there.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def verify(
    source: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """Compare with Hugging Face, stage by stage; returns a row of distances for each.

    Without `source`, on `small_config` with every parameter random; with it, on that
    checkpoint, one model after the other in memory.
    """
    if source is None:
        ours = Transformer(small_config()).eval()
        randomise(ours)
        ours.to(dtype)
        theirs, tokenizer = reference(ours.config, dtype), None
        copy_to_reference(ours, theirs)
    else:
        ours = Transformer.from_pretrained(source, dtype=dtype)
        theirs, tokenizer = None, load_tokenizer(find_folder(source))
    inputs = verify_inputs(ours.config, tokenizer)
    stages = list(expand_stages(ours))
    names = dict(zip(input_names(ours), inputs, strict=False))
    mine = watch(ours, [stage[1] for stage in stages], **names)
    config = ours.config
    del ours
    theirs = reference(source, dtype) if theirs is None else theirs
    asked = reference_inputs(config, *inputs)
    other = watch(theirs, [stage[2] for stage in stages], **asked)
    real = [torch.ones_like(t, dtype=torch.bool) for t in inputs]
    if config.pad_id is not None:
        real = [tokens != config.pad_id for tokens in inputs]
    return [
        distance(label, a[real[which]], b[real[which]])
        for (label, _, _, which), a, b in zip(stages, mine, other, strict=True)
    ]


def input_names(model: nn.Module) -> list[str]:
    """The names of the arguments of `model.forward`, in order."""
    code = type(model).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def copy_to_reference(ours: Transformer, theirs: nn.Module) -> None:
    """Give the Hugging Face model our weights; every trainable one must be given."""
    result = theirs.load_state_dict(dict(export_tensors(ours)), strict=False)
    trainable = {name for name, p in theirs.named_parameters() if p.requires_grad}
    wrong = [*result.unexpected_keys, *trainable.intersection(result.missing_keys)]
    assert not wrong, f"the name table does not fit the reference: {summary(wrong)}"


def show_distances(rows: Sequence[dict], dtype: torch.dtype) -> bool:
    """Print `verify`'s table; True when every stage is within the tolerance."""
    limit = TOLERANCE[dtype]
    say(
        f"{'stage':<18} {'max |a-b|':>10} {'/ max |b|':>10} "
        f"{'1 - cosine':>11} {'argmax':>8}"
    )
    for row in rows:
        mark = "" if row["relative"] <= limit else "  above the tolerance"
        say(
            f"{row['stage']:<18} {row['max_abs']:>10.1e} {row['relative']:>10.1e} "
            f"{abs(1 - row['cosine']):>11.1e} {row['argmax']:>8.2%}{mark}"
        )
    good = all(row["relative"] <= limit for row in rows)
    name = str(dtype).removeprefix("torch.")
    say(
        f"{'Equal' if good else 'NOT equal'} within {limit:.0e} "
        f"of the largest value ({name})."
    )
    return good


def run_verify(args: argparse.Namespace) -> int:
    """The command `verify`."""
    dtype = getattr(torch, args.dtype)
    return 0 if show_distances(verify(args.model, dtype), dtype) else 1


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    beams: int = 1,
    length_penalty: float = 0.6,
    batch_size: int = 64,
) -> list[str]:
    """Translations of `sentences`: greedy for `beams` 1, else by beam search.

    A sentence without a closing mark gets a full stop, as every training sentence has.
    """
    sources = []
    for sentence in sentences:
        sentence = " ".join(sentence.split())
        if not sentence:
            raise ValueError("an empty sentence cannot be translated")
        closed = sentence if sentence[-1] in ".?!…।\"'" else sentence + "."
        sources.append(torch.tensor(tokenizer.encode_source(closed)))
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    device, found = model.embed.weight.device, [""] * len(sources)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [sources[i] for i in chosen]
        source = nn.utils.rnn.pad_sequence(rows, True, model.config.pad_id).to(device)
        if beams == 1:
            target = greedy(model, source)
        else:
            target = beam_search(
                model, source, beams=beams, length_penalty=length_penalty
            )
        for i, row in zip(chosen, target.tolist(), strict=True):
            found[i] = tokenizer.decode(row)
    return found


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    beams: int = 1,
) -> dict:
    """Translate all `pairs`: exact matches (0 … 1), BLEU and chrF (0 … 100; sacrebleu).

    BLEU splits off every Unicode punctuation mark, the danda too (tokenisation "intl").
    """
    from sacrebleu.metrics import BLEU, CHRF

    found = translate(model, tokenizer, [pair[0] for pair in pairs], beams=beams)
    wanted = [pair[1] for pair in pairs]
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    return {
        "pairs": len(pairs),
        "exact": same / len(pairs),
        "bleu": BLEU(tokenize="intl").corpus_score(found, [wanted]).score,
        "chrf": CHRF().corpus_score(found, [wanted]).score,
    }


def evaluation_sets(path: Path) -> dict[str, list[tuple[str, str]]]:
    """What a model trained on `path` is tested on; none of it is training data."""
    training, held_out = split_pairs(path)
    sets = {
        "held out, up to 12 words": [p for p in held_out if len(p[0].split()) <= 12],
        "held out, longer": [p for p in held_out if len(p[0].split()) > 12],
    }
    by_hand = DATA / "english_hindi.by_hand.tsv"
    if path.resolve() == DEFAULT_DATA and by_hand.exists():
        sets["written by hand, outside the grammar"] = read_pairs(by_hand)
    known = {source.lower() for source, _ in training}
    for name, pairs in sets.items():
        sets[name] = [pair for pair in pairs if pair[0].lower() not in known]
    return {name: pairs for name, pairs in sets.items() if pairs}


def show_evaluation(results: dict[str, dict]) -> None:
    """Print `evaluate`'s figures for several sets."""
    say(f"{'':<38} {'pairs':>6} {'exact':>7} {'BLEU':>6} {'chrF':>6}")
    for name, row in results.items():
        say(
            f"{name:<38} {row['pairs']:>6} {row['exact']:>7.1%} {row['bleu']:>6.1f} "
            f"{row['chrf']:>6.1f}"
        )


def open_data(
    path: Path, tokenizer: Tokenizer, config: Config, recipe: Recipe
) -> tuple[Batches, Batches]:
    """The training and the held-out batches of a file of pairs."""
    longest, size, seed = config.max_seq_len, recipe.batch_tokens, recipe.seed
    train_part, held_out = split_pairs(path)
    try:
        return (
            Batches(train_part, tokenizer, longest, size, seed),
            Batches(held_out, tokenizer, longest, size, seed),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def presets() -> dict[str, Config]:
    """The named configurations of this file."""
    return {name: c for name, c in globals().items() if isinstance(c, Config)}


def choose(args: argparse.Namespace) -> tuple[Config, Recipe, Tokenizer]:
    """What a new run uses, from the flags."""
    preset = args.preset or "TINY"
    usual = "paper" if preset == "TRANSFORMER_BASE" else "laptop"
    recipe = replace(RECIPES[args.recipe or usual], **asked_settings(args))
    if args.init is not None:
        folder = find_folder(args.init)
        config = Config.from_hf(read_json(folder / "config.json"))
        tokenizer = load_tokenizer(folder)
    else:
        config = presets()[preset]
        pairs = split_pairs(Path(args.data or DEFAULT_DATA))[0]
        tokenizer = train_tokenizer(pairs, config.vocab_size)
        config = fit_vocabulary(config, tokenizer)
    smoothing = recipe.label_smoothing
    config = replace(config, dropout=recipe.dropout, label_smoothing=smoothing)
    return config, recipe, tokenizer


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with the tokenizer's vocabulary size and special ids."""
    return replace(
        config,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def asked_settings(args: argparse.Namespace) -> dict:
    """The settings of the recipe that were given as flags."""
    given = {setting.name: getattr(args, setting.name) for setting in fields(Recipe)}
    return {name: value for name, value in given.items() if value is not None}


def resume(args: argparse.Namespace) -> tuple[dict, Config, Recipe, Tokenizer]:
    """The checkpoint in `--out` and what its run used; only `--steps` may change."""
    checkpoint = Path(args.out) / "checkpoint.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(f"nothing to resume: no {checkpoint}")
    state, asked = read_torch(checkpoint), asked_settings(args)
    kinds = ("preset", "recipe", "tokenizer", "init")
    fixed = {kind for kind in kinds if getattr(args, kind, None) is not None}
    if extra := asked.keys() - {"steps"} | fixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(extra))
        raise ValueError(f"a resumed run keeps its settings; leave out {flags}")
    try:
        config, recipe = Config(**state["config"]), Recipe(**state["recipe"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is of another version: {error}") from None
    return state, config, replace(recipe, **asked), load_tokenizer(args.out)


def run_train(args: argparse.Namespace) -> int:
    """The command `train`."""
    out, state = Path(args.out), None
    if args.resume:
        state, config, recipe, tokenizer = resume(args)
    elif (out / "checkpoint.pt").exists():
        raise ValueError(
            f"{out} holds a run: --resume goes on with it; or another --out"
        )
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    else:
        config, recipe, tokenizer = choose(args)
    data = Path(args.data or (state or {}).get("source") or DEFAULT_DATA)
    batches, held_out = open_data(data, tokenizer, config, recipe)
    torch.manual_seed(recipe.seed)
    device = open_device(args.device)
    model = Transformer(config).to(device)
    if args.init is not None:
        load_tensors(model, read_tensors(find_folder(args.init)), device=device)
    check_vocabulary(model, tokenizer)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = args.dtype or (state or {}).get("dtype") or usual
    training = Training(
        model, batches, held_out, recipe, getattr(torch, dtype), args.compile, str(data)
    )
    if state is not None:
        training.restore(state)
    out.mkdir(parents=True, exist_ok=True)  # where it cannot be, say so before training
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{count:,} parameters, {recipe.steps} steps on {device.type}, data {data}")
    if training.step >= recipe.steps:
        say(f"Step {training.step} is reached already; --steps N goes on to N.")
        return 0
    if not train(training, tokenizer, out, lambda m: example(m, tokenizer)):
        again = f"python {sys.argv[0]} train --out {out} --resume"
        say(f"Stopped at step {training.step}, saved in {out}. To go on: {again}")
        return 130
    say(f"Saved in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    report(training, tokenizer, out)
    return 0


def report(training: Training, tokenizer: Tokenizer, out: Path) -> None:
    """What to say and to measure at the end of `train`."""
    results = {
        name: evaluate(training.model, tokenizer, pairs)
        for name, pairs in evaluation_sets(Path(training.source)).items()
    }
    show_evaluation(results)
    with replacing(out / "evaluation.json") as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(f'Next: python {sys.argv[0]} translate --model {out} "{EXAMPLE}"')


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the tokenizer has ids that the model has not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )


EXAMPLE = "The old farmer drinks cold water."


def example(model: Transformer, tokenizer: Tokenizer) -> str:
    """A sentence and its translation, on one line."""
    return f"{EXAMPLE} -> {translate(model, tokenizer, [EXAMPLE])[0]}"


def run_translate(args: argparse.Namespace) -> int:
    """The command `translate`: sentences from the command line, a pipe or a prompt."""
    model = Transformer.from_pretrained(args.model, device=open_device(args.device))
    tokenizer = load_tokenizer(find_folder(args.model))
    check_vocabulary(model, tokenizer)
    for sentence in sentences_from(args.text):
        found = translate(
            model,
            tokenizer,
            [sentence],
            beams=args.beams,
            length_penalty=args.length_penalty,
        )
        print(found[0], flush=True)
    return 0


def sentences_from(text: Sequence[str]) -> Iterator[str]:
    """The sentences given, or typed at a prompt, or the lines of standard input."""
    if text and list(text) != ["-"]:
        yield from text
    elif sys.stdin.isatty() and not text:
        print("English sentences, one a line; an empty line ends.")
        with suppress(EOFError):
            while line := input("> ").strip():
                yield line
    else:
        yield from (line.strip() for line in sys.stdin if line.strip())


def run_evaluate(args: argparse.Namespace) -> int:
    """The command `evaluate`: a model on the held-out pairs of a file."""
    model = Transformer.from_pretrained(args.model, device=open_device(args.device))
    tokenizer = load_tokenizer(find_folder(args.model))
    check_vocabulary(model, tokenizer)
    sets = evaluation_sets(Path(args.data))
    show_evaluation(
        {name: evaluate(model, tokenizer, p, args.beams) for name, p in sets.items()}
    )
    return 0


def demo(json_path: str | None = None) -> dict:
    """Check against Hugging Face, train TINY for under a minute, let it translate."""
    say("1. The same weights in Hugging Face's model and in ours: one function?\n")
    rows = verify()
    if not show_distances(rows, torch.float32):
        raise ValueError("the model differs from the reference; see the table above")
    say(f"\n2. A small transformer learns from the pairs in {DEFAULT_DATA.name}.\n")
    recipe = replace(RECIPES["laptop"], steps=1200, eval_every=600)
    pairs = split_pairs(DEFAULT_DATA)[0]
    tokenizer = train_tokenizer(pairs, TINY.vocab_size)
    config = fit_vocabulary(TINY, tokenizer)
    batches, held_out = open_data(DEFAULT_DATA, tokenizer, config, recipe)
    torch.manual_seed(recipe.seed)
    training = Training(Transformer(config), batches, held_out, recipe)
    out = Path("out") / HERE.parent.name / "demo"
    train(training, tokenizer, out)
    say("\n3. It translates sentences with combinations of words it has never seen.\n")
    name, tests = next(iter(evaluation_sets(DEFAULT_DATA).items()))
    result = evaluate(training.model, tokenizer, tests)
    show_evaluation({name: result})
    shown = tests[:: len(tests) // 6][:6]
    found = translate(training.model, tokenizer, [source for source, _ in shown])
    for (source, wanted), hindi in zip(shown, found, strict=True):
        say(
            f"\n  {source}\n  {hindi}"
            + ("" if hindi == wanted else f"\n  not: {wanted}")
        )
    say(f"\nThe model is in {out}. Try next:")
    say(f'  python {sys.argv[0]} translate --model {out} "{EXAMPLE}"')
    say(f"  python {sys.argv[0]} train    # a few minutes, and nearly all are right")
    row = {
        "chapter": HERE.parent.name,
        "did": f"trained {recipe.steps} steps, {result['exact']:.0%} of "
        f"{result['pairs']} unseen sentences exactly right",
        "distance": rows[-1]["max_abs"],
        "said": f"{shown[0][0]} -> {found[0]}",
    }
    if json_path is not None:
        with replacing(Path(json_path)) as partial:
            partial.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    return row


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = CommandLine(prog=HERE.name, description=(__doc__ or "").split("\n")[0])
    root.set_defaults(run=lambda args: demo(getattr(args, "json", None)) and 0)
    commands = root.add_subparsers(title="commands", metavar="")
    show = commands.add_parser("demo", help="what `python %(prog)s` alone does")
    show.add_argument("--json", metavar="PATH", help="write the result's row here")
    check = commands.add_parser(
        "verify", help="compare with Hugging Face, stage by stage"
    )
    check.add_argument("--model", metavar="SOURCE", help="a folder or a hub id")
    check.add_argument(
        "--dtype",
        default="float32",
        choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCE],
    )
    check.set_defaults(run=run_verify)
    add_train(
        commands.add_parser("train", help="train a model from pairs of sentences")
    )
    add_translate(commands.add_parser("translate", help="translate sentences"))
    test = commands.add_parser(
        "evaluate", help="BLEU, chrF and exact match on held-out pairs"
    )
    test.add_argument("--model", required=True, metavar="SOURCE")
    test.add_argument("--data", default=str(DEFAULT_DATA), metavar="FILE")
    test.add_argument("--beams", type=int, default=1, metavar="N")
    test.add_argument("--device", default=default_device())
    test.set_defaults(run=run_evaluate)
    return root


def add_train(command: argparse.ArgumentParser) -> None:
    """The flags of `train`; those of the recipe are taken from its fields."""
    command.add_argument("--data", metavar="FILE", help=f"default: {DEFAULT_DATA.name}")
    command.add_argument("--preset", choices=sorted(presets()), help="default: TINY")
    command.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="default: paper for TRANSFORMER_BASE, else laptop",
    )
    command.add_argument("--init", metavar="SOURCE", help="start from this checkpoint")
    command.add_argument(
        "--out", default=str(Path("out") / HERE.parent.name), metavar="DIR"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in --out"
    )
    for setting in fields(Recipe):
        command.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(setting.default),
            help=f"default: {setting.default}",
            metavar={int: "N", float: "X", str: "NAME"}[type(setting.default)],
        )
    command.add_argument("--device", default=default_device())
    command.add_argument("--dtype", choices=["float32", "bfloat16"])
    command.add_argument("--compile", action="store_true", help="use torch.compile")
    command.set_defaults(run=run_train)


def add_translate(command: argparse.ArgumentParser) -> None:
    """The flags of `translate`."""
    command.add_argument("text", nargs="*", help="sentences; - or none reads stdin")
    command.add_argument("--model", required=True, metavar="SOURCE")
    command.add_argument("--beams", type=int, default=4, metavar="N")
    command.add_argument("--length-penalty", type=float, default=0.6, metavar="X")
    command.add_argument("--device", default=default_device())
    command.set_defaults(run=run_translate)


def default_device() -> str:
    """A CUDA GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device of that name; raises ValueError where torch cannot use it."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # it asserts that CUDA was built in
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one line on stderr and exit code 2."""
    for stream_ in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a console of another encoding, or a notebook
            stream_.reconfigure(encoding="utf-8", errors="replace")
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except ModuleNotFoundError as error:
        reason = f"this needs a package that is not here: pip install {error.name}"
    except (ValueError, OSError, FloatingPointError) as error:
        reason = " ".join(str(error).split())
    except KeyboardInterrupt:
        print(f"{HERE.name}: interrupted", file=sys.stderr)
        return 130
    print(f"{HERE.name}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
