# SPDX-License-Identifier: MIT
# From the companion code of the book, ch03_kv_cache/kv_cache.py; it runs alone, with
# torch.
"""GPT-2 with a key/value cache, and with query heads that share keys and values.

What a token leaves behind for the later ones is its key and its value. They are kept:

    k_t = W_k h_t,  v_t = W_v h_t          computed once, when token t is read
    o_t = softmax(q_t [k_1 … k_t]ᵀ / √K) [v_1 … v_t]        arXiv:1706.03762 eq. 1

    query head h reads key/value head ⌊h · G / H⌋           arXiv:2305.13245 §2.2
        G = H   multi-head attention (MHA)                  arXiv:1706.03762 §3.2.2
        G = 1   multi-query attention (MQA)                 arXiv:1911.02150 §3
        else    grouped-query attention (GQA)

    bytes of the cache = 2 · B · L · S · G · K · bytes of a number

The model is otherwise GPT-2 (Radford et al. 2019).

Letters: B batch, T positions in this call, S positions so far, V vocabulary, D model
width, H query heads, G key/value heads, K head width (H·K = D), F feed-forward width,
L layers.

Lineage: from ch02_gpt2/gpt2.py
    changed: Config Config.__post_init__ Config.from_hf Config.to_hf GPT2_355M GPT2_774M
        GPT2_1558M TINY Attention Attention.__init__ Attention.forward Block.forward
        Transformer Transformer.hidden Transformer.forward to_ours to_theirs
        export_tensors load_tensors stream small_config reference choose resume
        run_train demo add_train
    new: Config.head_dim Config.multi_query DISTINCT_KV LayerCache KVCache
        positions_and_mask Transformer.new_cache CONV1D pool_heads start_from
        generate_uncached compare_with_uncached
    dropped: split_words train_bpe merge encode_bpe write_ranks
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import itertools
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
    """The shape of a GPT-2 (Radford et al. 2019, table 2) with G key/value heads."""

    vocab_size: int = 50257
    max_seq_len: int = 1024
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 12
    ffn_dim: int = 3072
    norm_eps: float = 1e-5
    dropout: float = 0.1
    tie_embeddings: bool = True
    pad_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads", "ffn_dim")
        for name in (*sizes, "n_kv_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of n_heads {self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads "
                f"{self.n_kv_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.dim // self.n_heads

    @property
    def multi_query(self) -> bool:
        """Whether several query heads share a single key/value head."""
        return self.n_kv_heads == 1 < self.n_heads

    @classmethod
    def from_hf(cls, hf: dict) -> Config:
        """Read a published `config.json`; ValueError for another architecture.

        GPT-2's own have G = H, GPTBigCode's (arXiv:2301.03988) G = 1.
        """
        kind = hf.get("model_type")
        if kind not in ("gpt2", "gpt_bigcode"):
            raise ValueError(
                f"this chapter reads GPT-2 and GPTBigCode checkpoints (model_type "
                f"'gpt2' or 'gpt_bigcode'); this one is {kind!r}"
            )
        activation = hf.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"GPT-2 uses the tanh GELU; this one uses {activation!r}")
        if hf.get("scale_attn_by_inverse_layer_idx"):
            raise ValueError("scale_attn_by_inverse_layer_idx is not GPT-2's attention")
        if not hf.get("scale_attn_weights", True):
            raise ValueError("scale_attn_weights false is not GPT-2's attention")
        if not hf.get("multi_query", True):
            raise ValueError("GPTBigCode is read with multi_query true, not false")
        needed = ("vocab_size", "n_embd", "n_layer", "n_head")
        if missing := [name for name in needed if hf.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        hf = {"n_positions": hf.get("n_ctx", 1024)} | hf  # as old files spell it
        known = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items() if theirs in hf}
        G = 1 if kind == "gpt_bigcode" else hf.get(DISTINCT_KV) or hf["n_head"]
        ffn = hf.get("n_inner") or 4 * hf["n_embd"]
        config = cls(**known | {"n_kv_heads": G, "ffn_dim": ffn})
        if config.multi_query != (kind == "gpt_bigcode"):
            raise ValueError(
                f"{kind} with {config.n_heads} heads and {G} for keys and values: "
                f"GPTBigCode is for several that share one, GPT-2 for all others"
            )
        return config

    def to_hf(self) -> dict:
        """The `config.json` of the Hugging Face class that computes the same.

        GPTBigCode where G = 1; else GPT-2, whose file repeats each key/value head for
        its H/G query heads, and says beside it how many are distinct.
        """
        common = {theirs: getattr(self, ours) for ours, theirs in HF_CONFIG.items()} | {
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "bos_token_id": self.eos_id,
        }
        if self.multi_query:
            return common | {
                "architectures": ["GPTBigCodeForCausalLM"],
                "model_type": "gpt_bigcode",
                "activation_function": "gelu_pytorch_tanh",
                "multi_query": True,
            }
        shared = (
            {DISTINCT_KV: self.n_kv_heads} if self.n_kv_heads < self.n_heads else {}
        )
        return (
            common
            | shared
            | {
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "activation_function": "gelu_new",
            }
        )


# Our config fields and Hugging Face's.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "ffn_dim": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
    "tie_embeddings": "tie_word_embeddings",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
}
# Our own entry in GPT-2's config.json. Not "num_key_value_heads": other programs would
# take that for the number of heads in the file, where they stand repeated.
DISTINCT_KV = "distinct_key_value_heads"

GPT2_124M = Config(eos_id=50256)
GPT2_355M = Config(
    dim=1024, n_layers=24, n_heads=16, n_kv_heads=16, ffn_dim=4096, eos_id=50256
)
GPT2_774M = Config(
    dim=1280, n_layers=36, n_heads=20, n_kv_heads=20, ffn_dim=5120, eos_id=50256
)
GPT2_1558M = Config(
    dim=1600, n_layers=48, n_heads=25, n_kv_heads=25, ffn_dim=6400, eos_id=50256
)
TINY = Config(
    vocab_size=1025,
    max_seq_len=256,
    dim=128,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=512,
    dropout=0.0,
    eos_id=1024,
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


class LayerCache:
    """The keys and values of one layer, in memory that is taken once.

    `k` and `v` are (B, G, S, K) with room for S positions; the first `length` are
    filled.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.length = k, v, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new positions behind the filled ones; return all of them so far.

        `length` stays as it is: the model moves it on when every layer has appended,
        so a pass that is interrupted leaves no trace. What is kept has no gradient.
        """
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k.detach()
        self.v[:, :, self.length : end] = v.detach()
        return self.k[:, :, :end], self.v[:, :, :end]  # (B, G, S, K)


class KVCache:
    """What every layer remembers of B rows of at most S tokens; for inference.

    `pad` (B,) counts the padding tokens at the left of each row: positions start after
    them, and no real token looks at them.
    """

    def __init__(
        self, layers: Sequence[LayerCache], max_seq_len: int, pad: Tensor | None = None
    ) -> None:
        self.layers, self.max_seq_len, self.pad = list(layers), max_seq_len, pad

    @property
    def length(self) -> int:
        """How many positions are filled."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated: 2·B·L·S·G·K times those of one number."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def expect(self, tokens: Tensor) -> None:
        """Raise ValueError unless `tokens` (B, T) can be appended."""
        rows, (B, T) = self.layers[0].k.shape[0], tokens.shape
        if rows != B:
            raise ValueError(f"the cache is for {rows} rows; the tokens have {B}")
        if self.length + T > self.max_seq_len:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.max_seq_len} tokens; "
                f"{T} more do not fit: make it larger, or truncate it"
            )

    def advance(self, T: int) -> None:
        """Count the T positions that every layer has appended."""
        for layer in self.layers:
            layer.length += T

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions; ValueError if fewer are held."""
        if not 0 <= length <= self.length:
            raise ValueError(
                f"cannot truncate to {length} positions: {self.length} are filled"
            )
        self.advance(length - self.length)


def positions_and_mask(
    tokens: Tensor, cache: KVCache | None
) -> tuple[Tensor, Tensor | None]:
    """Where T new tokens stand, (T,) or (B, T), and the keys that each may look at.

    The mask is (1, 1, T, S) or, with padding, (B, 1, T, S). It is None where attention
    needs none: T tokens at the start are causal as they are, and a single token looks
    at all that came before.
    """
    T = tokens.shape[1]
    start, pad = (0, None) if cache is None else (cache.length, cache.pad)
    query = torch.arange(start, start + T, device=tokens.device)
    if pad is None and (start == 0 or T == 1):
        return query, None
    key = torch.arange(start + T, device=tokens.device)
    if pad is None:
        # Query t stands at start + t. SDPA's is_causal would put it at t.
        return query, (query[:, None] >= key)[None, None]
    # A padding query sees itself: over no key at all, softmax would be NaN.
    itself = query[:, None] == key  # (T, S)
    real = key >= pad[:, None, None]  # (B, 1, S)
    seen = (query[:, None] >= key) & (real | itself)  # (B, T, S)
    return (query - pad[:, None]).clamp(min=0), seen[:, None]


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245 §2.2): H query heads share G key heads.

    `seen`, (1 or B, 1, T, S) of bools, says which key each query may look at. Without
    it the T queries are the first T tokens, each seeing those up to itself, or a single
    one that sees all. With a `cache` the keys and values are appended to it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, H, G, K = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = nn.Linear(D, H * K)
        self.wk = nn.Linear(D, G * K)
        self.wv = nn.Linear(D, G * K)
        self.wo = nn.Linear(H * K, D)
        self.H, self.G, self.dropout = H, G, config.dropout

    def forward(
        self,
        x: Tensor,
        seen: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q = self.wq(x).unflatten(2, (self.H, -1)).transpose(1, 2)  # (B, H, T, K)
        k = self.wk(x).unflatten(2, (self.G, -1)).transpose(1, 2)  # (B, G, T, K)
        v = self.wv(x).unflatten(2, (self.G, -1)).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K), S >= T
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=seen is None and q.shape[2] > 1,
            enable_gqa=True,  # query head h reads key/value head h // (H/G)
        )  # (B, H, T, K)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """Two linear maps around a GELU, applied to each position alone.

    GPT-2 uses the tanh form of the GELU (arXiv:1606.08415 §2).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, ffn = config.dim, config.ffn_dim
        self.w_up = nn.Linear(D, ffn)
        self.w_down = nn.Linear(ffn, D)

    def forward(self, x: Tensor) -> Tensor:
        up = F.gelu(self.w_up(x), approximate="tanh")  # (B, T, F)
        return self.w_down(up)  # (B, T, D)


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normed copy and adds to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = LayerNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        seen: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), seen, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """GPT-2: `model(tokens) -> logits`, (B, T) ids to (B, T, V).

    `model(tokens, cache=cache)` goes on from what the cache has seen, and appends.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, V = config.dim, config.vocab_size
        self.embed = nn.Embedding(V, D)
        self.positions = nn.Embedding(config.max_seq_len, D)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = LayerNorm(D, config.norm_eps)
        self.head = nn.Linear(D, V, bias=False)
        self.finalise()
        self.reset_parameters()

    def finalise(self) -> None:
        """Make the head use the embedding's matrix itself, not a copy of it."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """GPT-2's initialisation (Radford et al. 2019 §2.3): N(0, 0.02²); biases 0.

        The two projections of a block that add to the stream are scaled by 1/√(2L), so
        that the sum of the 2L branches starts out with the variance of one.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "w_down.weight")):
                std = 0.02 / math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(parameter, std=std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_cache(
        self, batch_size: int, max_seq_len: int, pad: Tensor | None = None
    ) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_seq_len` tokens.

        `pad` (B,) counts left padding per row. Raises ValueError for more tokens than
        the context has, or padding that leaves no room for a token.
        """
        longest = self.config.max_seq_len
        if batch_size < 1 or not 1 <= max_seq_len <= longest:
            raise ValueError(
                f"no cache of {batch_size} rows and {max_seq_len} tokens: at least one "
                f"of each, and at most the context of {longest} tokens"
            )
        if pad is not None:
            whole = pad.dtype in (torch.int32, torch.int64)
            fits = whole and pad.shape == (batch_size,)
            if not fits or not 0 <= pad.min() <= pad.max() < max_seq_len:
                raise ValueError(
                    f"pad is {pad.tolist()}; {batch_size} integers from 0 to "
                    f"{max_seq_len - 1} are needed, the left padding of each row"
                )
        G, K = self.config.n_kv_heads, self.config.head_dim
        shape = (2, batch_size, G, max_seq_len, K)
        with torch.inference_mode(False):  # so that it may be used outside of it too
            new = self.embed.weight.new_zeros
            layers = [LayerCache(*new(shape)) for _ in range(self.config.n_layers)]
        return KVCache(layers, max_seq_len, pad)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final norm's output, (B, T, D); `forward` multiplies it by the head."""
        if cache is not None:
            cache.expect(tokens)
        T = tokens.shape[1]
        S = T if cache is None else cache.length + T
        longest = self.config.max_seq_len
        if longest < S:
            raise ValueError(f"{S} tokens are longer than the context of {longest}")
        position, seen = positions_and_mask(tokens, cache)
        x = self.dropout(self.embed(tokens) + self.positions(position))  # (B, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, seen, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of `tokens` (B, T).

        With a `cache`, `tokens` follow those that it holds, and are appended to it.
        Raises ValueError when they do not fit `config.max_seq_len` or the cache.
        """
        return self.head(self.hidden(tokens, cache))

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


# Checkpoint names as data: Hugging Face's modules on the left, ours on the right. Where
# one of theirs holds several of ours, its rows are theirs one after the other.
HF_MODULES = {
    "transformer.h.{i}.ln_1": ["blocks.{i}.attention_norm"],
    "transformer.h.{i}.attn.c_attn": [
        "blocks.{i}.attention.wq",
        "blocks.{i}.attention.wk",
        "blocks.{i}.attention.wv",
    ],
    "transformer.h.{i}.attn.c_proj": ["blocks.{i}.attention.wo"],
    "transformer.h.{i}.ln_2": ["blocks.{i}.ffn_norm"],
    "transformer.h.{i}.mlp.c_fc": ["blocks.{i}.ffn.w_up"],
    "transformer.h.{i}.mlp.c_proj": ["blocks.{i}.ffn.w_down"],
    "transformer.ln_f": ["norm"],
}
HF_NAMES = {
    f"{theirs}.{leaf}": [f"{part}.{leaf}" for part in parts]
    for theirs, parts in HF_MODULES.items()
    for leaf in ("weight", "bias")
} | {
    "transformer.wte.weight": ["embed.weight"],
    "transformer.wpe.weight": ["positions.weight"],
    "lm_head.weight": ["head.weight"],
}
# Tensors that a file may hold although another says it already.
REDUNDANT = {"lm_head.weight": "embed.weight"}
# What `verify` compares: label, our module, theirs, and which input's padding counts.
# "module:in" is what goes into the module; "" is the whole model.
STAGES = [
    ("embedding", "blocks.0:in", "transformer.h.0:in", 0),
    ("block {i}", "blocks.{i}", "transformer.h.{i}", 0),
    ("final norm", "norm", "transformer.ln_f", 0),
    ("logits", "", "", 0),
]


def canonical(name: str) -> str | None:
    """The name as in HF_NAMES; None for what an old file holds needlessly.

    OpenAI's own upload lacks the "transformer." in front and holds causal masks.
    """
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    known = name.startswith(("transformer.", "lm_head."))
    return name if known else f"transformer.{name}"


# OpenAI's code computes x @ W with W stored (in, out), as a convolution of width 1;
# nn.Linear computes x @ W.T with W stored (out, in). So these four are transposed.
# attn.c_proj is square: there a forgotten transpose raises no error.
CONV1D = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "c_proj.weight")


def to_ours(name: str, tensor: Tensor, config: Config) -> Tensor:
    """A tensor of a Hugging Face file in our layout.

    GPTBigCode's is ours already. GPT-2's is transposed, and has H key/value heads: of
    a file with G distinct ones each is kept once.
    """
    D, H, G = config.dim, config.n_heads, config.n_kv_heads
    if config.multi_query:
        return tensor
    if name.endswith(CONV1D) and tensor.dim() == 2:
        tensor = tensor.T
    if G == H or ".c_attn." not in name or tensor.shape[:1] != (3 * D,):
        return tensor
    q, *kv = tensor.chunk(3)
    heads = [part.unflatten(0, (G, H // G, -1)) for part in kv]
    if not all(torch.equal(part, part[:, :1].expand_as(part)) for part in heads):
        raise ValueError(
            f"{name}: the key/value heads of a group differ; without {DISTINCT_KV} in "
            f"config.json the file is read with {H} of them"
        )
    return torch.cat([q, *(part[:, 0].flatten(0, 1) for part in heads)])


def to_theirs(name: str, tensor: Tensor, config: Config) -> Tensor:
    """`to_ours` undone: each key/value head repeated for its query heads, for GPT-2."""
    D, H, G = config.dim, config.n_heads, config.n_kv_heads
    if config.multi_query:
        return tensor
    if G < H and ".c_attn." in name:
        q, *kv = tensor.split([D, D * G // H, D * G // H])
        heads = [part.unflatten(0, (G, -1)) for part in kv]
        kv = [part.repeat_interleave(H // G, dim=0).flatten(0, 1) for part in heads]
        tensor = torch.cat([q, *kv])
    return tensor.T if name.endswith(CONV1D) else tensor


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
        yield theirs, to_theirs(theirs, tensor, model.config)


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
            parts, tensor = waiting.pop(theirs), to_ours(theirs, tensor, model.config)
            fill(model, parts, name, tensor, dtype, device)
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


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One next token a row: (B, V) logits to (B,) ids.

    Temperature 0 takes the likeliest. `top_k` keeps exactly k tokens, also under ties;
    `top_p` keeps the fewest whose probabilities reach p (arXiv:1904.09751 §3.1).
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature} and top_k {top_k}: need >= 0, >= 1"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The subtraction keeps a tiny temperature from overflowing to inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)).float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    V = logits.shape[-1]
    ranked, ids = logits.topk(min(top_k or V, V))  # exactly k, whatever the ties
    weights = ranked.softmax(dim=-1)  # (B, min(top_k, V)), likeliest first
    if top_p is not None:
        before = weights.cumsum(dim=-1) - weights  # mass of all likelier tokens
        weights = weights.masked_fill(before >= top_p, 0.0)
    rank = torch.multinomial(weights, 1, generator=generator)  # (B, 1)
    return ids.gather(1, rank)[:, 0]


@torch.inference_mode()
def stream(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    pad: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next tokens, (B,) at a time; see `generate`."""
    B, T = tokens.shape
    if T == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it cannot be negative")
    if T + max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"a prompt of {T} tokens and {max_new_tokens} new ones do not fit the "
            f"context of {model.config.max_seq_len}: shorten it or ask for fewer"
        )
    cache = model.new_cache(B, T + max_new_tokens, pad)
    if pad is not None and pad.max() >= T:
        raise ValueError(
            f"pad is {pad.tolist()} for prompts of {T} tokens; each row needs at least "
            f"one token of its own"
        )
    stops = torch.tensor(list(stop), device=tokens.device)
    stopped = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    last = tokens[:, -1]
    for _ in range(max_new_tokens):
        logits = model.head(model.hidden(tokens, cache)[:, -1])  # (B, V)
        chosen = sample(logits, temperature, top_k, top_p, generator)
        last = torch.where(stopped, last, chosen)  # a stopped row repeats its stop
        yield last
        if len(stop):
            stopped = stopped | torch.isin(last, stops)
            if stopped.all():
                return
        tokens = last[:, None]  # all before it is in the cache


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    pad: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `tokens` (B, T): returns (B, T + n), n <= max_new_tokens.

    Ends early when every row has met a token of `stop`; a row that has stopped repeats
    it. `pad` (B,) counts left padding per row. Raises ValueError when prompt and new
    tokens exceed the context, or a row is nothing but padding.
    """
    new = stream(
        model,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        pad=pad,
        generator=generator,
    )
    return torch.cat([tokens, *(step[:, None] for step in new)], dim=1)


@torch.no_grad()
def pool_heads(model: Transformer, n_kv_heads: int) -> Transformer:
    """A copy with fewer key/value heads, each the mean of those that it replaces.

    This turns a multi-head checkpoint into a grouped-query one (arXiv:2305.13245 §2.1).
    The copy is another function, and wants some more training. Raises ValueError unless
    `n_kv_heads` divides the model's.
    """
    G = model.config.n_kv_heads
    if n_kv_heads < 1 or G % n_kv_heads:
        raise ValueError(f"{G} key/value heads cannot be pooled into {n_kv_heads}")
    state = model.state_dict()
    for name, parameter in state.items():
        if ".wk." in name or ".wv." in name:
            heads = parameter.unflatten(0, (n_kv_heads, G // n_kv_heads, -1))
            state[name] = heads.mean(dim=1).flatten(0, 1)
    with torch.device("meta"):
        pooled = Transformer(replace(model.config, n_kv_heads=n_kv_heads))
    pooled.to(model.embed.weight.dtype).to_empty(device=model.embed.weight.device)
    pooled.finalise()
    pooled.load_state_dict(state)
    return pooled.train(model.training)


# ======================================================================================
# Running the chapter: tokenizers, files, data, train, verify, demo, commands.
# ======================================================================================

# GPT-2's pre-tokenizer (Radford et al. 2019 §2.2): contractions, then runs of letters,
# of digits or of other signs, each with the one space before it, then white space.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token ranks from a `.tiktoken` file ("base64 rank" a line) or a `vocab.bpe`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.name == "vocab.bpe":
            return ranks_from_merges(lines)
        pairs = (line.split() for line in lines if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        complete = all(bytes([byte]) in ranks for byte in range(256))
        if not complete or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("a byte or a rank is missing, or stands there twice")
        return ranks
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of token ranks: {error}") from None


def ranks_from_merges(lines: Sequence[str]) -> dict[bytes, int]:
    """OpenAI's `vocab.bpe`: a header, then one merge "left right" a line, best first.

    The file must be printable, so bytes that are not (controls, blanks, and 173) stand
    as the characters from U+0100 on. Printable bytes come first, in the ranks too.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*shown, *hidden])}
    for line in lines[1:]:
        ranks[bytes(byte_of[char] for char in line if char != " ")] = len(ranks)
    return ranks


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


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, and the files that travel with a model to do it again."""

    vocab_size: int
    eos_id: int | None
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    files: dict[str, bytes] = field(default_factory=dict, repr=False)


def byte_tokenizer() -> Tokenizer:
    """The bytes of UTF-8 as ids 0 … 255, and 256 for the end of a text."""
    return Tokenizer(
        vocab_size=257,
        eos_id=256,
        encode=lambda text: [
            token
            for i, part in enumerate(text.split(END_OF_TEXT))
            for token in [256] * (i > 0) + list(part.encode("utf-8"))
        ],
        decode=lambda ids: b"".join(
            bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids
        ).decode("utf-8", errors="replace"),
    )


def bpe_tokenizer(ranks: dict[bytes, int], files: dict[str, bytes]) -> Tokenizer:
    """A fast encoder (tiktoken's) over `ranks`; the next id ends a text."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "ranks",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )
    return Tokenizer(
        vocab_size=encoding.n_vocab,
        eos_id=len(ranks),
        encode=lambda text: encoding.encode(text, allowed_special="all"),
        decode=lambda ids: encoding.decode(list(ids)),
        files=files,
    )


def json_tokenizer(path: Path) -> Tokenizer:
    """A Hugging Face `tokenizer.json`."""
    from tokenizers import Tokenizer as Reader

    try:
        reader = Reader.from_file(str(path))
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    return Tokenizer(
        vocab_size=reader.get_vocab_size(),
        eos_id=reader.token_to_id(END_OF_TEXT),
        encode=lambda text: reader.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: reader.decode(list(ids), skip_special_tokens=False),
        files={"tokenizer.json": path.read_bytes()},
    )


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a file or a folder; "bytes", or a folder with none, means bytes.

    A folder is searched for `tokenizer.json`, then `*.tiktoken`, then `vocab.bpe`.
    """
    path = Path(source)
    if str(source) == "bytes":
        return byte_tokenizer()
    if path.is_dir():
        found = [
            *path.glob("tokenizer.json"),
            *sorted(path.glob("*.tiktoken")),
            *path.glob("vocab.bpe"),
        ]
        if not found:
            return byte_tokenizer()
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}")
    if path.suffix == ".json":
        return json_tokenizer(path)
    name = path.name if path.name == "vocab.bpe" else f"{path.stem}.tiktoken"
    return bpe_tokenizer(read_ranks(path), {name: path.read_bytes()})


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


def split_documents(text: str, held_out: float = 0.05) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the last `held_out` of them is held out.

    Documents end at a line `<|endoftext|>`. A text without one is cut by length.
    """
    documents = [part.strip() for part in text.split(END_OF_TEXT) if part.strip()]
    if len(documents) > 1:
        cut = min(len(documents) - 1, round(len(documents) * (1 - held_out)))
        return documents[:cut], documents[cut:]
    cut = round(len(text) * (1 - held_out))
    return [text[:cut]], [text[cut:]]


class Batches:
    """Windows of T + 1 tokens in batches; which ones come when follows from the seed.

    Each document opens a window, and so does every T-th token of a long one; a window
    runs on into the next documents, with an end-of-text token in between. An epoch
    visits every window once, in an order of its own.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        T: int,
        batch_size: int,
        seed: int,
    ) -> None:
        ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        pieces = [tokenizer.encode(document) + ends for document in documents]
        self.stream = torch.tensor([token for piece in pieces for token in piece])
        if len(self.stream) < 2:
            raise ValueError("the text is too short: nothing is left to be predicted")
        T = min(T, len(self.stream) - 1)
        last = len(self.stream) - T - 1
        starts, start = [], 0
        for piece in pieces:
            starts += range(start, start + len(piece), T)
            start += len(piece)
        self.starts = torch.tensor(sorted({min(start, last) for start in starts}))
        self.span, self.batch_size, self.seed = torch.arange(T + 1), batch_size, seed
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return self.starts[torch.randperm(len(self.starts), generator=generator)]

    def batch(self, index: int) -> Tensor:
        """Batch number `index` of the endless training stream, (batch_size, T + 1)."""
        first, n = index * self.batch_size, len(self.starts)
        flat = range(first, first + self.batch_size)
        starts = torch.stack([self.order(i // n)[i % n] for i in flat])
        return self.stream[starts[:, None] + self.span]

    def all(self) -> Iterator[Tensor]:
        """Every window once, in order, in batches."""
        for starts in self.starts.split(self.batch_size):
            yield self.stream[starts[:, None] + self.span]


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW (arXiv:1711.05101), warm-up, cosine decay to a tenth."""

    steps: int = 5000
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 5e-3
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0
    dropout: float = 0.0
    eval_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be positive"
                )
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**32)")


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step 0, 1, …: up linearly over `warmup` steps, then half a cosine."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
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


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each token of `batch`, (B, T + 1), given those before."""
    logits = model(batch[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def count_tokens(model: nn.Module, batch: Tensor) -> int:
    """How many predictions `loss` averages over."""
    return batch[:, 1:].numel()


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


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """`batch` on `device`."""
    return batch.to(device, non_blocking=True)


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


def small_config() -> Config:
    """A shape for parity checks: small, and no two sizes alike."""
    return Config(
        vocab_size=97,
        max_seq_len=48,
        dim=30,
        n_layers=3,
        n_heads=6,
        n_kv_heads=3,
        ffn_dim=52,
        eos_id=96,
    )


def reference(
    source: Config | str | Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Hugging Face's GPT-2 or GPTBigCode: random weights for a Config, or published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(source, Config):
        config = AutoConfig.for_model(**source.to_hf())
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


def reference_inputs(config: Config, tokens: Tensor) -> dict[str, Tensor]:
    """What the reference is called with where ours is called with `tokens`."""
    return {"input_ids": tokens}


def verify_inputs(config: Config, tokenizer: Tokenizer | None) -> tuple[Tensor, ...]:
    """The tokens of a comparison: real text where there is a tokenizer, else random."""
    T = min(config.max_seq_len, 1024)
    path = DATA / "stories.txt"
    fits = tokenizer is not None and tokenizer.vocab_size <= config.vocab_size
    if fits and path.exists():
        held_out = split_documents(read_text(path))[1]
        return (torch.tensor([tokenizer.encode("\n".join(held_out[:20]))[:T]]),)
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(config.vocab_size, (2, T), generator=generator),)


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


def open_data(
    path: Path, tokenizer: Tokenizer, config: Config, recipe: Recipe
) -> tuple[Batches, Batches]:
    """The training and the held-out batches of a text file."""
    train_part, held_out = split_documents(read_text(path))
    T, size, seed = config.max_seq_len, recipe.batch_size, recipe.seed
    try:
        return (
            Batches(train_part, tokenizer, T, size, seed),
            Batches(held_out, tokenizer, T, size, seed),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def default_tokenizer() -> str | Path:
    """Where the stories' vocabulary stands beside the book; elsewhere, bytes."""
    path = DATA / "stories.tiktoken"
    return path if path.exists() else "bytes"


def presets() -> dict[str, Config]:
    """The named configurations of this file."""
    return {name: c for name, c in globals().items() if isinstance(c, Config)}


def choose(args: argparse.Namespace) -> tuple[Config, Recipe, Tokenizer]:
    """What a new run uses, from the flags."""
    recipe = replace(Recipe(), **asked_settings(args))
    if args.init is not None:
        folder = find_folder(args.init)
        config = Config.from_hf(read_json(folder / "config.json"))
        tokenizer = load_tokenizer(args.tokenizer or folder)
    else:
        tokenizer = load_tokenizer(args.tokenizer or default_tokenizer())
        config = presets()[args.preset or "TINY"]
        config = replace(config, vocab_size=tokenizer.vocab_size)
        config = replace(config, eos_id=tokenizer.eos_id)
    if args.n_kv_heads is not None:
        config = replace(config, n_kv_heads=args.n_kv_heads)
    return replace(config, dropout=recipe.dropout), recipe, tokenizer


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
    kinds = ("preset", "recipe", "tokenizer", "init", "n_kv_heads", "n_mtp")
    fixed = {kind for kind in kinds if getattr(args, kind, None) is not None}
    if extra := asked.keys() - {"steps"} | fixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(extra))
        raise ValueError(f"a resumed run keeps its settings; leave out {flags}")
    try:
        config, recipe = Config(**state["config"]), Recipe(**state["recipe"])
    except (KeyError, TypeError, ValueError) as error:
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
        start_from(model, args.init)
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


def start_from(model: Transformer, source: str) -> None:
    """Load a checkpoint, its key/value heads pooled where `model` has fewer of them."""
    found = Transformer.from_pretrained(source, device=model.embed.weight.device)
    model.load_state_dict(pool_heads(found, model.config.n_kv_heads).state_dict())


def report(training: Training, tokenizer: Tokenizer, out: Path) -> None:
    """What to say and to measure at the end of `train`."""
    say(f"Next: python {sys.argv[0]} generate --model {out} --prompt 'One day'")


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the tokenizer has ids that the model has not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{model.config.vocab_size}: they do not belong together"
        )


def example(model: Transformer, tokenizer: Tokenizer, prompt: str = "One day") -> str:
    """A short text that the model writes after `prompt`, on one line."""
    ids = tokenizer.encode(prompt)[-model.config.max_seq_len // 2 :]
    tokens = torch.tensor([ids], device=model.embed.weight.device)
    n = min(60, model.config.max_seq_len - len(ids))
    generator = torch.Generator(tokens.device).manual_seed(0)
    out = generate(model, tokens, n, temperature=0.8, generator=generator)
    return " ".join(tokenizer.decode(out[0].tolist()).split())


def stream_text(
    tokenizer: Tokenizer, steps: Iterable[Tensor], behind: Sequence[int] = ()
) -> Iterator[str]:
    """The text of a stream of (1,) ids, held back while a character is not whole.

    Each piece is decoded together with the ids `behind` it: alone, some decoders would
    drop its first blank.
    """
    behind, pending = list(behind), []
    for step in steps:
        pending.append(int(step[0]))
        text = tokenizer.decode(behind + pending)[len(tokenizer.decode(behind)) :]
        if not text.endswith("\ufffd") or len(pending) > 8:
            yield text
            behind, pending = pending, []
    if pending:
        yield tokenizer.decode(behind + pending)[len(tokenizer.decode(behind)) :]


def run_generate(args: argparse.Namespace) -> int:
    """The command `generate`: continue a prompt, shown as it is written."""
    device = open_device(args.device)
    dtype = getattr(torch, args.dtype)
    model = Transformer.from_pretrained(args.model, dtype=dtype, device=device)
    tokenizer = load_tokenizer(find_folder(args.model))
    check_vocabulary(model, tokenizer)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; with at least one more it exceeds the "
            f"context of {model.config.max_seq_len}: shorten it"
        )
    steps = stream(
        model,
        torch.tensor([ids], device=device),
        min(room, 200) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=[] if tokenizer.eos_id is None else [tokenizer.eos_id],
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    texts = stream_text(tokenizer, steps)
    first = next(texts, "")  # a mistake shows here, before anything is printed
    print(prompt, end="")
    for text in itertools.chain([first], texts):
        print(text.removesuffix(END_OF_TEXT), end="", flush=True)
    print()
    return 0


DEFAULT_DATA = DATA / "stories.txt"


@torch.inference_mode()
def generate_uncached(
    model: Transformer, tokens: Tensor, max_new_tokens: int
) -> Tensor:
    """`generate`, greedily, reading the whole text again for every token."""
    for _ in range(max_new_tokens):
        logits = model.head(model.hidden(tokens)[:, -1])  # (B, V)
        tokens = torch.cat([tokens, logits.argmax(dim=-1)[:, None]], dim=1)
    return tokens


def compare_with_uncached(model: Transformer, tokens: Tensor) -> float:
    """Fill the context with and without a cache; how many times faster it is with."""
    n = model.config.max_seq_len - tokens.shape[1]
    seconds, written = [], []
    for write in (generate_uncached, generate):
        write(model, tokens, 2)  # so that nothing is set up while the clock runs
        started = time.perf_counter()
        written.append(write(model, tokens, n))
        seconds.append(time.perf_counter() - started)
    same = "the same text" if torch.equal(*written) else "ANOTHER text"
    say(f"{n} tokens after a prompt of {tokens.shape[1]}, {same} both times:")
    for what, took in zip(("without a cache", "with it"), seconds, strict=True):
        say(f"  {what:<16} {took:6.2f} s  {1e3 * took / n:6.2f} ms a token")
    size = model.new_cache(len(tokens), model.config.max_seq_len).nbytes
    config = model.config
    say(
        f"The cache takes {size:,} bytes for {config.n_kv_heads} key/value heads; "
        f"with one for each of the {config.n_heads} query heads it would take "
        f"{size * config.n_heads // config.n_kv_heads:,}."
    )
    return seconds[0] / seconds[1]


def demo(json_path: str | None = None) -> dict:
    """Check against Hugging Face, train TINY for half a minute, let it write."""
    say("1. The same weights in Hugging Face's model and in ours: one function?\n")
    rows = verify()
    if not show_distances(rows, torch.float32):
        raise ValueError("the model differs from the reference; see the table above")
    say(f"\n2. A small GPT-2 learns from the stories in {DEFAULT_DATA.name}.\n")
    tokenizer = load_tokenizer(default_tokenizer())
    recipe = Recipe(steps=700, warmup=50, eval_every=350)
    batches, held_out = open_data(DEFAULT_DATA, tokenizer, TINY, recipe)
    torch.manual_seed(recipe.seed)
    training = Training(Transformer(TINY), batches, held_out, recipe)
    out = Path("out") / HERE.parent.name / "demo"
    train(training, tokenizer, out)
    say("\n3. It writes until its context is full, with and without a cache.\n")
    prompt = torch.tensor([tokenizer.encode("One day")])
    faster = compare_with_uncached(training.model, prompt)
    say("\n4. It continues the opening of a story that it has not seen.\n")
    unseen = split_documents(read_text(DEFAULT_DATA))[1][0]
    said = example(training.model, tokenizer, unseen.partition(". ")[0] + ".")
    say(said)
    say(f"\nThe model is in {out}. Try next:")
    say(f"  python {sys.argv[0]} generate --model {out} --prompt 'The old dog'")
    say(f"  python {sys.argv[0]} train --n-kv-heads 1 --out out/multi_query")
    row = {
        "chapter": HERE.parent.name,
        "did": f"trained {recipe.steps} steps, held-out loss "
        f"{training.log[-1]['held_out']:.2f} nats a token; wrote a full context "
        f"{faster:.1f} times as fast with the cache",
        "distance": rows[-1]["max_abs"],
        "said": said,
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
    add_train(commands.add_parser("train", help="train a model from a text file"))
    add_generate(commands.add_parser("generate", help="continue a prompt"))
    return root


def add_train(command: argparse.ArgumentParser) -> None:
    """The flags of `train`; those of the recipe are taken from its fields."""
    command.add_argument("--data", metavar="FILE", help=f"default: {DEFAULT_DATA.name}")
    command.add_argument("--preset", choices=sorted(presets()), help="default: TINY")
    command.add_argument("--init", metavar="SOURCE", help="start from this checkpoint")
    command.add_argument(
        "--n-kv-heads",
        type=int,
        metavar="G",
        help="key/value heads; with --init, those of the checkpoint are pooled",
    )
    command.add_argument(
        "--tokenizer", metavar="FILE", help="a file, a folder or 'bytes'"
    )
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
            metavar="N" if isinstance(setting.default, int) else "X",
        )
    command.add_argument("--device", default=default_device())
    command.add_argument("--dtype", choices=["float32", "bfloat16"])
    command.add_argument("--compile", action="store_true", help="use torch.compile")
    command.set_defaults(run=run_train)


def add_generate(command: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    command.add_argument("--model", required=True, metavar="SOURCE")
    command.add_argument(
        "--prompt", required=True, metavar="TEXT", help="- reads stdin"
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N")
    command.add_argument("--temperature", type=float, default=0.8, metavar="X")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.add_argument("--device", default=default_device())
    command.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the weights: bfloat16 takes half the memory, and is slow on many CPUs",
    )
    command.set_defaults(run=run_generate)


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
