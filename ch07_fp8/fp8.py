# SPDX-License-Identifier: MIT
# From the companion code of the book, ch07_fp8/fp8.py; it runs alone, with torch.
"""DeepSeek-V3 in FP8: products of eight-bit numbers, scaled block by block.

DeepSeek-V3 (arXiv:2412.19437 §3.3); E4M3 is of arXiv:2209.05433 §3. The model is that
of DeepSeek-V2 (arXiv:2405.04434 §2) and V3 (§2), DeepSeekMoE (arXiv:2401.06066 §3).

    scale_b = max |x_b| / 448          of each block b; 448 is E4M3's largest number
    code_b  = E4M3(x_b / scale_b)      8 bits: 1 sign, 4 exponent, 3 mantissa
    x_b     ≈ code_b · scale_b
    (x Wᵀ)_mn ≈ Σ_b scale(x)_mb · scale(W)_nb · Σ_k∈b code(x)_mk · code(W)_nk

    blocks: 1 × 128 of x and of the gradient dy, 128 × 128 of W        §3.3.2, figure 7
    y = x Wᵀ, dx = dy W, dW = dyᵀ x: all three of E4M3 codes           §3.3.1, figure 6

Letters: B batch, T positions in this call, S positions so far, V vocabulary, D model
width, H heads, L layers, F feed-forward width (of an expert, in a mixture); C width of
the latent, Q of the queries' latent; of a head, K the plain and R the rotary width of
query and key, P the value's; E routed experts, A active ones of a token, N tokens in
all rows together, M prediction depths. In the products of FP8, M and N count rows, K
what is summed over.

Lineage: from ch06_deepseek_moe_mtp/deepseek_moe_mtp.py
    changed: Config Config.__post_init__ Config.from_hf Config.to_hf DEEPSEEK_V3
        DEEPSEEK_V2 TINY attend_naive Attention.__init__ Attention.forward
        FeedForward.__init__ Experts Experts.__init__ Experts.forward
        Transformer.reset_parameters Transformer.from_pretrained HF_NAMES export_tensors
        fill to_ours reorder_rotary read_safetensors read_bin verify run_verify
        start_from demo parser
    new: FP8 FP8_MAX BLOCK TILE SQUARE Quantized quantize dequantize fp8_path
        scaled_product block_scaled_mm FP8Product fp8_linear FP8Linear hold_codes
        apply_but_codes linear Experts.in_groups Experts.in_fp8 Experts._apply is_master
        HF_FP8 fp8_from_hf scale_from_file dequantized reading_order CODED SAFETENSORS
        convert to_fp8 out_of_fp8 write_safetensors FP8_TOLERANCE verify_fp8
        small_fp8_config show_fp8 run_convert
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
import re
import signal
import sys
import threading
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of a DeepSeek model, and how its experts and look-ahead are trained.

    Without `q_latent_dim` queries come from the stream by one matrix. `rope_factor`
    above 1 asks for YaRN (`rope_frequencies`); `rope_mscale` and `rope_mscale_all_dim`
    are its scale of the rotary part and of the softmax, 0 where the file names none.
    `rope_interleave` says how the checkpoint is written, `model_type` also which of the
    two generations its `Router` is of.

    After `n_dense_layers`, `n_shared` experts see every token, and `n_active` of
    `n_experts` are chosen for it, from `n_active_groups` of `n_groups`; their weights
    sum to 1 if `renormalise`, and are multiplied by `routed_scale`. `balance_rate` is γ
    of the biases, `balance_loss` α of the auxiliary loss, over each sequence or, if not
    `balance_per_sequence`, over the batch. `n_mtp` modules predict further ahead;
    `mtp_weight` is λ of their loss.

    With `fp8` the linear layers of attention and of the feed-forward layers compute in
    FP8, with scales that are powers of two if `fp8_power_of_two`. With `fp8_codes`
    their weights are the codes and scales of a published file, and cannot be trained.
    """

    vocab_size: int = 129280
    max_seq_len: int = 163840
    dim: int = 7168
    n_layers: int = 61
    n_heads: int = 128
    q_latent_dim: int | None = 1536
    latent_dim: int = 512
    head_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    ffn_dim: int = 18432
    n_dense_layers: int = 3
    n_experts: int = 256
    n_active: int = 8
    n_shared: int = 1
    expert_ffn_dim: int = 2048
    n_groups: int = 8
    n_active_groups: int = 4
    renormalise: bool = True
    routed_scale: float = 2.5
    balance_rate: float = 0.001
    balance_loss: float = 0.0001
    balance_per_sequence: bool = True
    n_mtp: int = 1
    mtp_weight: float = 0.3
    fp8: bool = False
    fp8_power_of_two: bool = False
    fp8_codes: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_original_len: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 0.0
    rope_mscale_all_dim: float = 0.0
    rope_interleave: bool = True
    model_type: str = "deepseek_v3"
    tie_embeddings: bool = False
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(CONFIG_SIZES, 1) | dict.fromkeys(CONFIG_COUNTS, 0)
        if self.q_latent_dim is None:
            del least["q_latent_dim"]
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                wanted = "positive integer" if bound else "integer, 0 or more"
                raise ValueError(f"{name} is {value!r}; it must be a {wanted}")
        for name, bound in CONFIG_NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= bound:
                wanted = f"at least {bound}" if bound in (0, 1) else "positive"
                raise ValueError(f"{name} is {value!r}; it must be {wanted}")
        if not self.rope_beta_slow < self.rope_beta_fast:
            raise ValueError(
                f"rope_beta_slow {self.rope_beta_slow} must be below "
                f"rope_beta_fast {self.rope_beta_fast}"
            )
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; rotary pairs need it even")
        if self.model_type not in (known := list(HF_CLASSES)):
            raise ValueError(f"model_type is {self.model_type!r}, none of {known}")
        if not self.rope_interleave and self.model_type == "deepseek_v2":
            raise ValueError("DeepSeek-V2 files have their rotary pairs interleaved")
        if self.n_mtp and self.model_type == "deepseek_v2":
            raise ValueError("DeepSeek-V2 has no multi-token prediction: n_mtp is 0")
        if self.n_experts:
            check_groups(self)
        if self.fp8_codes and not self.fp8:
            raise ValueError("fp8_codes are for a model that computes in fp8")

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by: (K + R)^-1/2, and YaRN's factor squared."""
        width = self.head_dim + self.rope_dim
        return yarn_scale(self.rope_factor, self.rope_mscale_all_dim) ** 2 * width**-0.5

    @classmethod
    def from_hf(cls, hf: dict) -> Config:
        """Read a published `config.json`; ValueError for another architecture.

        The rotary settings stand in one dict `rope_parameters` or, as older files have
        them, in `rope_theta` and `rope_scaling`.
        """
        kind = hf.get("model_type")
        if kind not in HF_CLASSES:
            raise ValueError(f"this chapter reads DeepSeek's V2 and V3, not {kind!r}")
        if (activation := hf.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"DeepSeek uses SiLU; this one uses {activation!r}")
        for name in ("attention_bias", "mlp_bias"):
            if hf.get(name):
                raise ValueError(f"{name} is true; DeepSeek has no biases")
        needed = [*HF_NEEDED, *HF_NEEDED_BY_EXPERTS]
        if hf.get("first_k_dense_replace", 0) >= hf.get("num_hidden_layers", 0):
            needed = HF_NEEDED
        if missing := [name for name in needed if hf.get(name) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name, usual in HF_ROUTERS[kind].items():
            if hf.get(name) not in (None, *usual):
                raise ValueError(f"{name} is {hf[name]!r}; {kind} has {usual}")
        known = {
            ours: hf[theirs]
            for ours, theirs in HF_CONFIG.items()
            if hf.get(theirs) is not None or theirs in hf and ours == "q_latent_dim"
        }
        if isinstance(known.get("eos_id"), list):
            known["eos_id"] = tuple(known["eos_id"])
        if kind == "deepseek_v2" and hf.get("topk_method") != "group_limited_greedy":
            known |= {"n_groups": 1, "n_active_groups": 1}
        if (asked := hf.get("quantization_config")) is not None:
            known |= fp8_from_hf(asked)
        return cls(**HF_USUAL[kind] | known | rope_from_hf(hf))

    def to_hf(self) -> dict:
        """The `config.json` of the Hugging Face class with the same shape.

        Raises ValueError for a V2 model with `renormalise`, which that class has not.
        """
        if self.renormalise and self.model_type == "deepseek_v2":
            raise ValueError("Hugging Face's DeepSeek-V2 does not renormalise weights")
        scaling = None
        if self.rope_factor != 1:
            scaling = {name: getattr(self, ours) for ours, name in HF_ROPE.items()}
            scaling["type"] = "yarn"
        stops = list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id
        hf = {theirs: getattr(self, ours) for ours, theirs in HF_CONFIG.items()} | {
            "architectures": [HF_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "num_key_value_heads": self.n_heads,
            "first_k_dense_replace": (
                self.n_dense_layers if self.n_experts else self.n_layers
            ),
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "eos_token_id": stops,
        }
        if self.model_type == "deepseek_v2":
            del hf["rope_interleave"], hf["num_nextn_predict_layers"]
            hf["topk_method"] = (
                "group_limited_greedy" if self.n_groups > 1 else "greedy"
            )
        if self.fp8:
            hf["quantization_config"] = {**HF_FP8}
            if self.fp8_power_of_two:
                hf["quantization_config"]["scale_fmt"] = "ue8m0"
        return hf


# The least that fields of the config may be: 1, 0, and of the numbers each its own.
CONFIG_SIZES = [
    *("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads", "q_latent_dim"),
    *("latent_dim", "head_dim", "rope_dim", "value_dim", "ffn_dim", "expert_ffn_dim"),
    *("n_active", "n_groups", "n_active_groups", "rope_original_len"),
]
CONFIG_COUNTS = ["n_dense_layers", "n_experts", "n_shared", "n_mtp"]
CONFIG_NUMBERS = {
    "norm_eps": 1e-300,
    "rope_theta": 1e-300,
    "rope_beta_slow": 1e-300,
    "routed_scale": 1e-300,
    "rope_factor": 1,
    "rope_mscale": 0,
    "rope_mscale_all_dim": 0,
    "balance_rate": 0,
    "balance_loss": 0,
    "mtp_weight": 0,
}


def check_groups(config: Config) -> None:
    """Raise ValueError unless experts fall into groups with enough to choose from."""
    E, groups, kept = config.n_experts, config.n_groups, config.n_active_groups
    if E % groups or kept > groups:
        raise ValueError(
            f"n_experts {E} must be a multiple of n_groups {groups}, of which "
            f"n_active_groups {kept} are at most all"
        )
    if groups > 1 and E // groups < 2 and config.model_type == "deepseek_v3":
        raise ValueError(f"n_groups {groups}: V3 ranks groups by two of their experts")
    if config.n_active > kept * (E // groups):
        raise ValueError(
            f"n_active {config.n_active} experts cannot be chosen from "
            f"{kept * (E // groups)}, {kept} of {groups} groups of {E // groups}"
        )


# The architectures that are read, by their model_type.
HF_CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Our config fields and Hugging Face's.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "q_latent_dim": "q_lora_rank",
    "latent_dim": "kv_lora_rank",
    "head_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "ffn_dim": "intermediate_size",
    "n_dense_layers": "first_k_dense_replace",
    "n_experts": "n_routed_experts",
    "n_active": "num_experts_per_tok",
    "n_shared": "n_shared_experts",
    "expert_ffn_dim": "moe_intermediate_size",
    "n_groups": "n_group",
    "n_active_groups": "topk_group",
    "renormalise": "norm_topk_prob",
    "routed_scale": "routed_scaling_factor",
    "balance_loss": "aux_loss_alpha",
    "balance_per_sequence": "seq_aux",
    "n_mtp": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
    "rope_interleave": "rope_interleave",
    "tie_embeddings": "tie_word_embeddings",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
DEEPSEEK_V3 = Config(
    fp8=True,
    rope_factor=40.0,
    rope_mscale=1.0,
    rope_mscale_all_dim=1.0,
    bos_id=0,
    eos_id=1,
)
DEEPSEEK_V2 = Config(
    vocab_size=102400,
    dim=5120,
    n_layers=60,
    ffn_dim=12288,
    n_dense_layers=1,
    n_experts=160,
    n_active=6,
    n_shared=2,
    expert_ffn_dim=1536,
    n_active_groups=3,
    renormalise=False,
    routed_scale=16.0,
    balance_loss=0.001,
    n_mtp=0,
    rope_factor=40.0,
    rope_mscale=0.707,
    rope_mscale_all_dim=0.707,
    model_type="deepseek_v2",
    fp8=False,
    bos_id=100000,
    eos_id=100001,
)
DEEPSEEK_V2_LITE = replace(
    DEEPSEEK_V2,
    dim=2048,
    n_layers=27,
    n_heads=16,
    q_latent_dim=None,
    ffn_dim=10944,
    n_experts=64,
    expert_ffn_dim=1408,
    n_groups=1,
    n_active_groups=1,
    routed_scale=1.0,
)
# Two blocks of 128 or more in each dimension of each product; of fewer, a scale for the
# whole matrix would do as well.
TINY = Config(
    vocab_size=1025,
    max_seq_len=256,
    dim=256,
    n_layers=2,
    n_heads=4,
    q_latent_dim=256,
    latent_dim=256,
    head_dim=48,
    rope_dim=16,
    value_dim=64,
    ffn_dim=512,
    n_dense_layers=1,
    n_experts=4,
    n_active=1,
    expert_ffn_dim=256,
    n_groups=1,
    n_active_groups=1,
    routed_scale=1.0,
    fp8=True,
    eos_id=1024,
)


# E4M3 without infinities: one sign, four bits of exponent, three of mantissa.
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
TILE = (1, BLOCK)  # of activations and gradients, along what is summed over
SQUARE = (BLOCK, BLOCK)  # of weights


class Quantized(NamedTuple):
    """A matrix (M, K) as `codes` of eight bits and a `scale` for each block of it.

    The blocks are `block` high and wide, cut off at the edges; `scale` has a row for
    each row of blocks.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def T(self) -> Quantized:
        """Transposed, as it is: the same codes, the same scales."""
        return Quantized(self.codes.T, self.scale.T, self.block[::-1])

    def per_row(self) -> Tensor:
        """The scale of each row in each column of blocks, (M, K/block)."""
        return self.scale.repeat_interleave(self.block[0], 0)[: len(self.codes)]


def quantize(
    x: Tensor, block: tuple[int, int], power_of_two: bool = False
) -> Quantized:
    """`x` (M, K) in E4M3, each block by its own scale: its largest number becomes 448.

    A block of zeros has the scale 1; one with a number that is not finite becomes NaN.
    If `power_of_two`, scales are rounded up to powers of two (ue8m0: eight bits of
    exponent), by which nothing is lost in multiplying. DeepSeek-V3 (arXiv:2412.19437
    §3.3.2).
    """
    (M, K), (m, k) = x.shape, block
    rows, columns = -(-M // m), -(-K // k)
    padded = F.pad(x.float(), (0, columns * k - K, 0, rows * m - M))
    blocks = padded.view(rows, m, columns, k)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    if power_of_two:
        mantissa, _ = torch.frexp(scale)  # scale = mantissa · a power of two, >= 1/2
        scale = torch.where(mantissa == 0.5, scale, scale / mantissa)
    codes = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    codes = codes.flatten(2, 3).flatten(0, 1)[:M, :K]
    return Quantized(codes, scale[:, 0, :, 0], block)


def dequantize(q: Quantized) -> Tensor:
    """code · scale, (M, K) in float32."""
    scale = q.per_row().repeat_interleave(q.block[1], 1)[:, : q.codes.shape[1]]
    return q.codes.float() * scale


def fp8_path(device: torch.device) -> str:
    """How `scaled_product` runs there: "scaled_mm" or "composed".

    On GPUs of compute capability 9.0, with CUDA 12.9 or newer, torch's block-wise
    product of FP8 matrices, whose tensor cores add with fewer bits than float32 has;
    elsewhere, float32 products of the codes, which are exact, and float32 sums of them.
    """
    if device.type == "cuda" and hasattr(F, "scaled_mm"):
        cuda = tuple(map(int, (torch.version.cuda or "0").split(".")))
        if cuda >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0):
            return "scaled_mm"
    return "composed"


def scaled_product(a: Quantized, b: Quantized) -> Tensor:
    """a bᵀ of (M, K) and (N, K), both cut into blocks of 128 along K: (M, N), float32.

    Each block of K is summed by itself and then scaled (arXiv:2412.19437 §3.3.2).
    """
    if fp8_path(a.codes.device) == "scaled_mm":
        return block_scaled_mm(a, b)
    of_a, of_b = a.per_row(), b.per_row()
    wide = a.codes.float().split(BLOCK, 1), b.codes.float().split(BLOCK, 1)
    out = of_a.new_zeros(len(a.codes), len(b.codes))  # (M, N)
    with torch.autocast(out.device.type, enabled=False):
        for i, (x, y) in enumerate(zip(*wide, strict=True)):
            out = out + (x @ y.T) * of_a[:, i, None] * of_b[:, i]
    return out


def block_scaled_mm(a: Quantized, b: Quantized) -> Tensor:
    """`scaled_product` by torch's block-wise kernel, in bfloat16 and then float32.

    The kernel takes whole blocks, so codes are padded with zeros, which add nothing.
    """
    kinds = {TILE: F.ScalingType.BlockWise1x128, SQUARE: F.ScalingType.BlockWise128x128}
    codes, scales = [], []
    for q in (a, b):
        rows, columns = (-size % BLOCK for size in q.codes.shape)
        as_bytes = F.pad(q.codes.view(torch.uint8), (0, columns, 0, rows))
        codes.append(as_bytes.contiguous().view(FP8))
        if q.block == TILE:  # scales (M, K/128), a column after the other
            scales.append(F.pad(q.scale, (0, 0, 0, rows)).T.contiguous().T)
        else:  # K/128 of them in a column, and zeros up to a multiple of four
            scales.append(F.pad(q.scale, (0, -q.scale.shape[1] % 4)).contiguous().T)
    out = F.scaled_mm(
        codes[0],
        codes[1].T,
        scales[0],
        kinds[a.block],
        scales[1],
        kinds[b.block],
        output_dtype=torch.bfloat16,
    )
    return out[: len(a.codes), : len(b.codes)].float()


class FP8Product(torch.autograd.Function):
    """x Wᵀ of (M, K) and (N, K), and its two gradients, each a product of E4M3 codes.

    W's gradient sums over the tokens, so there x and dy are cut into tiles along them.
    Here x is kept as it is for that; DeepSeek-V3 keeps its codes, and codes them again.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        power_of_two: bool,
    ) -> Tensor:
        q = quantize(weight, SQUARE, power_of_two)
        ctx.save_for_backward(x, q.codes, q.scale)
        ctx.power_of_two = power_of_two
        return scaled_product(quantize(x, TILE, power_of_two), q).type_as(x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dy: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, codes, scale = ctx.saved_tensors
        coded = [quantize(t, TILE, ctx.power_of_two) for t in (dy, dy.T, x.T)]
        dx = scaled_product(coded[0], Quantized(codes, scale, SQUARE).T)  # (M, K)
        return dx.type_as(x), scaled_product(coded[1], coded[2]), None  # dW (N, K)


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, power_of_two: bool
) -> Tensor:
    """x Wᵀ in FP8, (..., K) to (..., N); with a `scale`, `weight` (N, K) is codes."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if scale is None:
        out = FP8Product.apply(rows, weight, power_of_two)
    else:
        coded = quantize(rows, TILE, power_of_two)
        out = scaled_product(coded, Quantized(weight, scale, SQUARE)).type_as(x)
    return out.view(*x.shape[:-1], len(weight))


class FP8Linear(nn.Module):
    """A linear layer without bias that computes in FP8.

    While it is trained, `weight` (N, K) is the master copy, and is coded anew in every
    pass. With `config.fp8_codes` it is the codes, `scale` their scales, and both keep
    their dtypes whatever the model is cast to.
    """

    def __init__(self, config: Config, width: int, out: int) -> None:
        super().__init__()
        self.power_of_two = config.fp8_power_of_two
        self.weight = nn.Parameter(torch.empty(out, width))
        self.register_buffer("scale", None)
        if config.fp8_codes:
            hold_codes(self, "weight", "scale")

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.scale, self.power_of_two)

    def dense_weight(self) -> Tensor:
        """W as the products see it: what its codes stand for, (N, K)."""
        if self.scale is not None:
            return dequantize(Quantized(self.weight, self.scale, SQUARE))
        coded = dequantize(quantize(self.weight.detach(), SQUARE, self.power_of_two))
        # Its gradient passes through to the master copy.
        return self.weight + (coded - self.weight).detach()

    def _apply(self, fn: Callable, recurse: bool = True) -> FP8Linear:
        return apply_but_codes(self, super()._apply, fn, ["weight"], ["scale"])


def hold_codes(module: nn.Module, weight: str, scale: str) -> None:
    """Let `weight` (..., N, K) of `module` be codes, with a `scale` for each block."""
    old = getattr(module, weight)
    codes = torch.zeros_like(old, dtype=FP8)
    grid = [-(-size // BLOCK) for size in old.shape[-2:]]
    setattr(module, weight, nn.Parameter(codes, requires_grad=False))
    setattr(module, scale, torch.ones(*old.shape[:-2], *grid, device=old.device))


def apply_but_codes(
    module: nn.Module,
    apply: Callable,
    fn: Callable,
    weights: Sequence[str],
    scales: Sequence[str],
) -> nn.Module:
    """`module._apply(fn)`, which moves and casts, but casts no codes or scales."""
    if getattr(module, scales[0]) is None:
        return apply(fn)
    names = [*weights, *scales]
    kept = [getattr(module, name).data for name in names]  # `apply` changes parameters
    apply(fn)
    for name, old in zip(names, kept, strict=True):
        new = getattr(module, name)
        if new.dtype != old.dtype:
            new.data = old.to(new.device)
    return module


def linear(config: Config, width: int, out: int) -> nn.Module:
    """A linear layer without bias, (..., width) to (..., out), in FP8 if asked for."""
    if config.fp8:
        return FP8Linear(config, width, out)
    return nn.Linear(width, out, bias=False)


# Of the norms on the latents, whatever that of the others is.
LATENT_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · w over the last dimension (arXiv:1910.07467 eq. 4).

    Unlike LayerNorm it subtracts no mean and has no bias. The weight is applied after
    the cast back from float32, as Llama's is.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


def yarn_scale(factor: float, weight: float) -> float:
    """0.1 · weight · ln(factor) + 1: how much longer contexts sharpen the softmax.

    YaRN (arXiv:2309.00071 §3.4) multiplies queries and keys by it.
    """
    return 0.1 * weight * math.log(factor) + 1.0


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """The angle by which each pair of a head turns per position, (R/2,) radians.

    Pair i turns by theta^(-2i/R) (arXiv:2104.09864 §3.2.2). YaRN (arXiv:2309.00071
    §3.2) stretches this for long contexts: the pairs up to the one that makes
    `rope_beta_fast` turns within `rope_original_len` positions are left alone, those
    from the one with `rope_beta_slow` turns on are slowed down by `rope_factor`, and
    those between are blended, linearly in their number.
    """
    R = config.rope_dim
    i = torch.arange(0, R, 2, device=device).float() / R  # (R/2,)
    frequency = 1.0 / config.rope_theta**i  # (R/2,)
    if config.rope_factor == 1:
        return frequency

    def pair_with(turns: float) -> float:
        longest = config.rope_original_len / (2 * math.pi * turns)
        return R / 2 * math.log(longest) / math.log(config.rope_theta)

    first = max(math.floor(pair_with(config.rope_beta_fast)), 0)
    last = min(math.ceil(pair_with(config.rope_beta_slow)), R - 1)
    pair = torch.arange(R // 2, device=device)
    slowed = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)  # (R/2,)
    return (1 - slowed) * frequency + slowed * frequency / config.rope_factor


def rope_table(position: Tensor, config: Config) -> Tensor:
    """Cosine and sine of each pair's angle: (T,) to (2, T, R/2), in float32.

    Positions (B, T) give (2, B, 1, T, R/2), to broadcast over heads. YaRN's scale of
    the rotary part is in it; where the softmax has one too, only their ratio.
    """
    frequency = rope_frequencies(config, position.device)  # (R/2,)
    angle = position[..., None] * frequency  # (..., T, R/2)
    table = torch.stack([angle.cos(), angle.sin()])  # (..., T, R/2)
    of_pairs, of_all = config.rope_mscale, config.rope_mscale_all_dim
    if not (of_pairs and of_all):
        of_pairs, of_all = 1.0, 0.0
    scales = [yarn_scale(config.rope_factor, weight) for weight in (of_pairs, of_all)]
    table = table * (scales[0] / scales[1])
    return table if position.dim() == 1 else table[:, :, None]


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of `x` (B, H, T, K) by the angles in `rope`.

    This is the half-split order of Hugging Face's files. Meta's own pair neighbours,
    (2i, 2i + 1); `to_half_split` converts their weights.
    """
    # The tables are float32, as in Meta's code; Hugging Face rounds them to x's dtype.
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of W_q or W_k from Meta's order of a head, pairs (2i, 2i + 1), to ours."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """`to_half_split` undone: rows from the pairs (i, i + K/2) to Meta's order."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


class LayerCache:
    """What one layer remembers: a latent and a rotary key a token, for all heads.

    `kv` is (B, S, C + R) with room for S positions, taken once; the first `length` are
    filled.
    """

    def __init__(self, kv: Tensor) -> None:
        self.kv, self.length = kv, 0

    def append(self, kv: Tensor) -> Tensor:
        """Write T new positions behind the filled ones; return all of them so far.

        `length` stays as it is: the model moves it on when every layer has appended,
        so a pass that is interrupted leaves no trace. What is kept has no gradient.
        """
        end = self.length + kv.shape[1]
        self.kv[:, self.length : end] = kv.detach()
        return self.kv[:, :end]  # (B, S, C + R)


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
        """Bytes allocated: B·L·S·(C + R) times those of one number."""
        return sum(layer.kv.nbytes for layer in self.layers)

    def expect(self, tokens: Tensor) -> None:
        """Raise ValueError unless `tokens` (B, T) can be appended."""
        rows, (B, T) = self.layers[0].kv.shape[0], tokens.shape
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


def attend_naive(
    q: Tensor,
    kv: Tensor,
    w_up: Tensor,
    scale: float,
    seen: Tensor | None = None,
    expand: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention with every latent expanded to keys and values of all heads.

    The first of four forms of one function. `q` (B, H, T, K + R) and `kv`
    (B, S, C + R) end in their rotary parts, already turned. `w_up` (H, K + P, C) holds
    W_UK and W_UV of each head, `scale` multiplies the scores, and `seen`,
    (1 or B, 1, T, S) of bools, says which key each query may look at; without it, all
    up to its own. `expand` may be a layer that does what `w_up` does to the latents.
    Returns (B, H, T, P). arXiv:2405.04434 eqs. 10 and 16 to 18.
    """
    _, _, latent, k_rope, w_uk, w_uv = parts(q, kv, w_up)
    H, K, P = len(w_up), w_uk.shape[1], w_uv.shape[1]
    # SDPA's is_causal puts query t at position t.
    assert seen is not None or q.shape[2] in (1, kv.shape[1])
    expand = expand or partial(F.linear, weight=w_up.flatten(0, 1))
    up = expand(latent).unflatten(2, (H, -1))  # (B, S, H, K + P)
    k, v = up.transpose(1, 2).split([K, P], dim=3)  # (B, H, S, K), (B, H, S, P)
    k = torch.cat([k, k_rope[:, None].expand(-1, H, -1, -1)], dim=3)
    wider = max(k.shape[3] - P, 0)  # fused kernels want keys and values of one width
    out = F.scaled_dot_product_attention(
        q,
        k,
        F.pad(v, (0, wider)),
        attn_mask=seen,
        is_causal=seen is None and q.shape[2] > 1,
        scale=scale,
    )
    return out[..., :P]  # (B, H, T, P)


def attend_absorb_k(
    q: Tensor, kv: Tensor, w_up: Tensor, scale: float, seen: Tensor | None = None
) -> Tensor:
    """W_UK goes to the query, which then meets the latents; values are expanded."""
    q_plain, q_rope, latent, k_rope, w_uk, w_uv = parts(q, kv, w_up)
    q_latent = torch.einsum("bhtk,hkc->bhtc", q_plain, w_uk)
    scores = q_latent @ latent[:, None].mT + q_rope @ k_rope[:, None].mT  # (B, H, T, S)
    v = torch.einsum("bsc,hwc->bhsw", latent, w_uv)
    return masked_softmax(scores * scale, seen) @ v


def attend_absorb_kv(
    q: Tensor, kv: Tensor, w_up: Tensor, scale: float, seen: Tensor | None = None
) -> Tensor:
    """W_UV too waits: latents are mixed, and it is applied to the mixture."""
    q_plain, q_rope, latent, k_rope, w_uk, w_uv = parts(q, kv, w_up)
    q_latent = torch.einsum("bhtk,hkc->bhtc", q_plain, w_uk)
    scores = q_latent @ latent[:, None].mT + q_rope @ k_rope[:, None].mT  # (B, H, T, S)
    mixed = masked_softmax(scores * scale, seen) @ latent[:, None]  # (B, H, T, C)
    return torch.einsum("bhtc,hwc->bhtw", mixed, w_uv)


def attend_latent_cache(
    q: Tensor, kv: Tensor, w_up: Tensor, scale: float, seen: Tensor | None = None
) -> Tensor:
    """The same on the cache as it lies: rows are keys, their first C numbers values.

    This is multi-query attention (arXiv:1911.02150) with keys of width C + R and values
    of width C. As all heads read the same keys, they are rows of a single head.
    """
    q_plain, q_rope, latent, _, w_uk, w_uv = parts(q, kv, w_up)
    H, T, S = len(w_up), q.shape[2], kv.shape[1]
    q_latent = torch.einsum("bhtk,hkc->bhtc", q_plain, w_uk)
    rows = torch.cat([q_latent, q_rope], dim=3).flatten(1, 2)  # (B, H·T, C + R)
    if seen is None and T > 1:
        seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if seen is not None:
        seen = seen.expand(-1, H, -1, -1).flatten(1, 2)[:, None]  # (..., 1, H·T, S)
    mixed = F.scaled_dot_product_attention(
        rows[:, None], kv[:, None], latent[:, None], attn_mask=seen, scale=scale
    )  # (B, 1, H·T, C)
    mixed = mixed[:, 0].unflatten(1, (H, T))  # (B, H, T, C)
    return torch.einsum("bhtc,hwc->bhtw", mixed, w_uv)


def parts(q: Tensor, kv: Tensor, w_up: Tensor) -> list[Tensor]:
    """Plain and rotary query, latent and rotary key, W_UK and W_UV; all are views."""
    C, R = w_up.shape[2], kv.shape[2] - w_up.shape[2]
    K, P = q.shape[3] - R, w_up.shape[1] - q.shape[3] + R
    return [*q.split([K, R], 3), *kv.split([C, R], 2), *w_up.split([K, P], 1)]


def masked_softmax(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Weights (B, H, T, S) of the keys that each query may look at."""
    T, S = scores.shape[2:]
    if seen is None:
        seen = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def absorption_pays(T: int, S: int, config: Config) -> bool:
    """Whether T queries over S positions cost fewer operations absorbed than naive.

    Counted per head, in multiplications: naive expands S latents and compares in the
    width of a head; absorbed maps T queries and T results and compares in that of the
    latent. So the one form reads prompts, and the other decodes.
    """
    C, R = config.latent_dim, config.rope_dim
    K, P = config.head_dim, config.value_dim
    naive = S * C * (K + P) + T * S * (K + R + P)
    absorbed = T * C * (K + P) + T * S * (C + R + C)
    return absorbed < naive


class Attention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434 §2.1.2 and §2.1.3).

    `seen`, (1 or B, 1, T, S) of bools, says which key each query may look at. Without
    it the T queries are the first T tokens, each seeing those up to itself, or a single
    one that sees all. With a `cache`, latents and rotary keys are appended to it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, H, Q, C = config.dim, config.n_heads, config.q_latent_dim, config.latent_dim
        K, R, P = config.head_dim, config.rope_dim, config.value_dim
        if Q is None:
            self.wq = linear(config, D, H * (K + R))
        else:
            self.wq_down = linear(config, D, Q)
            self.q_norm = RMSNorm(Q, LATENT_EPS)
            self.wq_up = linear(config, Q, H * (K + R))
        self.wkv_down = linear(config, D, C + R)
        self.kv_norm = RMSNorm(C, LATENT_EPS)
        self.wkv_up = linear(config, C, H * (K + P))
        self.wo = linear(config, H * P, D)

    def queries(self, x: Tensor, rope: Tensor) -> Tensor:
        """Those of all heads, (B, T, D) to (B, H, T, K + R); rotary parts rotated."""
        c = self.config
        if c.q_latent_dim is None:
            q = self.wq(x)  # (B, T, H·(K + R))
        else:
            q = self.wq_up(self.q_norm(self.wq_down(x)))  # (B, T, H·(K + R))
        q = q.unflatten(2, (c.n_heads, -1)).transpose(1, 2)  # (B, H, T, K + R)
        plain, rotary = q.split([c.head_dim, c.rope_dim], dim=3)
        return torch.cat([plain, apply_rope(rotary, rope)], dim=3)

    def latents(self, x: Tensor, rope: Tensor) -> Tensor:
        """What is kept of each token, (B, T, C + R): normed latent, rotated key."""
        c = self.config
        latent, rotary = self.wkv_down(x).split([c.latent_dim, c.rope_dim], dim=2)
        rotary = apply_rope(rotary[:, None], rope)[:, 0]  # (B, T, R)
        return torch.cat([self.kv_norm(latent), rotary], dim=2)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        seen: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q, kv, T = self.queries(x, rope), self.latents(x, rope), x.shape[1]
        attend = attend_naive
        if cache is not None:
            kv = cache.append(kv)  # (B, S, C + R), S >= T
            if absorption_pays(T, kv.shape[1], self.config):
                attend = attend_latent_cache
        # Made at each call: whatever becomes of the weight, it is current.
        w_up = self.wkv_up.weight  # (H·(K + P), C)
        if self.config.fp8 and attend is attend_naive:
            attend = partial(attend_naive, expand=self.wkv_up)
        elif self.config.fp8:  # absorbed: no product with the latents is left to be FP8
            w_up = self.wkv_up.dense_weight().type_as(kv)
        w_up = w_up.unflatten(0, (self.config.n_heads, -1))
        out = attend(q, kv, w_up, self.config.softmax_scale, seen)  # (B, H, T, P)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202 eq. 6): one linear map gates another, entry by entry."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.w_gate = linear(config, config.dim, width)
        self.w_up = linear(config, config.dim, width)
        self.w_down = linear(config, width, config.dim)
        self.F = width

    def forward(self, x: Tensor, routed: list[Routing] | None = None) -> Tensor:
        up = F.silu(self.w_gate(x)) * self.w_up(x)  # (B, T, F)
        return self.w_down(up)  # (B, T, D)


class Routing(NamedTuple):
    """Where the tokens of one pass went in one layer, for the balance of the loads.

    `scores` (B, T, E) before any bias, `chosen` (B, T, A) expert numbers.
    """

    scores: Tensor
    chosen: Tensor


class Router(nn.Module):
    """Which experts a token goes to, and with what weights: x (B, T, D) to (B, T, A).

    DeepSeek-V3's (arXiv:2412.19437 eqs. 13 to 16): scores by a sigmoid, the choice by
    scores plus `bias`, within the groups whose two best sum highest. DeepSeek-V2's
    (arXiv:2405.04434 eqs. 21, 22 and §2.2.2): scores by a softmax, no bias, groups by
    their best. The weights are the scores, without the bias in either.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.load = config, 0
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        if config.model_type == "deepseek_v3":
            self.register_buffer("bias", torch.zeros(config.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        c, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))  # (B, T, E)
        is_v3 = c.model_type == "deepseek_v3"
        scores = logits.sigmoid() if is_v3 else logits.softmax(dim=-1)
        chosen = self.choose(scores.detach())  # (B, T, A)
        weights = scores.gather(2, chosen)  # (B, T, A)
        if c.renormalise:
            weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-20)
        return weights * c.routed_scale, Routing(scores, chosen)

    def choose(self, scores: Tensor) -> Tensor:
        """The numbers of the A experts for each token: (B, T, E) to (B, T, A)."""
        c, is_v3 = self.config, self.config.model_type == "deepseek_v3"
        if is_v3:
            scores = scores + self.bias
        if (groups := c.n_groups) > 1:
            grouped = scores.unflatten(2, (groups, -1))  # (B, T, groups, E/groups)
            best = grouped.topk(2 if is_v3 else 1).values.sum(dim=3)  # (B, T, groups)
            kept = best.topk(c.n_active_groups).indices
            left = torch.ones_like(best, dtype=torch.bool).scatter(2, kept, False)
            # Not 0, as in older code: a biased score can be less than that.
            scores = grouped.masked_fill(left[..., None], -torch.inf).flatten(2)
        return scores.topk(c.n_active).indices

    def balance_loss(self, routing: Routing) -> Tensor:
        """α · Σ_i f_i P_i: f_i the share of the choices that fall on expert i, times E,
        P_i its mean normalised score; over each sequence, or over the batch.

        DeepSeek-V3 counts the choices as the scores alone would make them, without bias
        and groups (arXiv:2412.19437 eqs. 17 to 20), DeepSeek-V2 as they were made
        (arXiv:2405.04434 eqs. 23 to 25).
        """
        c, (scores, chosen) = self.config, routing
        if c.model_type == "deepseek_v3":
            chosen = scores.topk(c.n_active).indices
        share = scores / scores.sum(dim=2, keepdim=True)  # (B, T, E)
        counts = torch.zeros_like(share).scatter(2, chosen, 1.0)  # (B, T, E)
        over = 1 if c.balance_per_sequence else (0, 1)
        f = counts.mean(dim=over) * (c.n_experts / c.n_active)  # (..., E)
        return c.balance_loss * (f * share.mean(dim=over)).sum(dim=-1).mean()

    def count(self, routing: Routing) -> None:
        """Add these choices to the `load` (E,) that the next `update` looks at."""
        E = self.config.n_experts
        self.load = self.load + routing.chosen.flatten().bincount(minlength=E)

    @torch.no_grad()
    def update(self) -> None:
        """Raise the bias of the experts with less load than the mean, lower the others.

        After every optimizer step, by γ (arXiv:2408.15664 algorithm 1); with several
        processes by the load on all of them, which must all call this.
        """
        load, self.load = self.load, 0
        if not isinstance(load, Tensor) or self.config.model_type != "deepseek_v3":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        load = load.float()
        self.bias += self.config.balance_rate * (load.mean() - load).sign()

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        """Moved and cast as any module, but for the bias, which stays in float32.

        In bfloat16 a step of γ would be lost in it.
        """
        kept = self._buffers.get("bias")
        super()._apply(fn, recurse)
        if kept is not None and self.bias.dtype != torch.float32:
            self.bias = kept.to(self.bias.device)
        return self


class Experts(nn.Module):
    """E feed-forward layers, each for the tokens that chose it.

    Their matrices lie together: `w_gate_up` (E, 2, F, D), gate before up, and `w_down`
    (E, D, F). In FP8 they are as the weight of `FP8Linear`, each matrix with scales of
    its own.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.E, self.F, D = config.n_experts, config.expert_ffn_dim, config.dim
        self.w_gate_up = nn.Parameter(torch.empty(self.E, 2, self.F, D))
        self.w_down = nn.Parameter(torch.empty(self.E, D, self.F))
        self.fp8, self.power_of_two = config.fp8, config.fp8_power_of_two
        self.register_buffer("gate_up_scale", None)
        self.register_buffer("down_scale", None)
        if config.fp8_codes:
            hold_codes(self, "w_gate_up", "gate_up_scale")
            hold_codes(self, "w_down", "down_scale")

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Σ_i weight_i · FFN_i(x) over the chosen: (N, D), (N, A), (N, A) to (N, D).

        Pairs of token and expert are sorted by expert, so that each expert's rows lie
        together and one grouped product serves all; none is dropped.
        """
        N, A = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # (N·A,)
        count = chosen.flatten().bincount(minlength=self.E)  # (E,)
        run = self.in_fp8 if self.fp8 else self.in_groups
        out = run(x[order // A], count)  # (N·A, D)
        back = torch.empty_like(order)
        back[order] = torch.arange(N * A, device=order.device)
        out = out[back].unflatten(0, (N, A))  # (N, A, D)
        return (out * weights[:, :, None]).sum(dim=1).type_as(x)  # (N, D)

    def in_groups(self, x: Tensor, count: Tensor) -> Tensor:
        """FFN_i of the rows of x (N, D) that are expert i's: count[0], and so on."""
        up = grouped_linear(x, self.w_gate_up.flatten(1, 2), count)  # (N, 2·F)
        gate, up = up.chunk(2, dim=1)  # (N, F)
        return grouped_linear(F.silu(gate) * up, self.w_down, count)

    def in_fp8(self, x: Tensor, count: Tensor) -> Tensor:
        """The same in FP8, an expert after the other, but for those without rows."""
        w_gate_up, w_down, parts = self.w_gate_up.unbind(), self.w_down.unbind(), []
        no_scales = [[None, None]] * self.E, [None] * self.E
        of_up, of_down = (
            no_scales
            if self.down_scale is None
            else (self.gate_up_scale, self.down_scale)
        )
        product = partial(fp8_linear, power_of_two=self.power_of_two)
        for i, rows in enumerate(x.split(count.tolist())):
            if len(rows):
                gate, up = map(product, [rows, rows], w_gate_up[i].unbind(), of_up[i])
                parts.append(product(F.silu(gate) * up, w_down[i], of_down[i]))
        return torch.cat(parts)

    def _apply(self, fn: Callable, recurse: bool = True) -> Experts:
        weights, scales = ["w_gate_up", "w_down"], ["gate_up_scale", "down_scale"]
        return apply_but_codes(self, super()._apply, fn, weights, scales)

    def one_by_one(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`forward` as its formula reads, an expert after the other."""
        out = torch.zeros_like(x, dtype=weights.dtype)
        for i, ((w_gate, w_up), w_down) in enumerate(
            zip(self.w_gate_up, self.w_down, strict=True)
        ):
            token, place = (chosen == i).nonzero(as_tuple=True)  # of those who chose i
            up = F.silu(x[token] @ w_gate.T) * (x[token] @ w_up.T)
            part = (up @ w_down.T) * weights[token, place, None]
            out = out.index_add(0, token, part.type_as(out))
        return out.type_as(x)


def grouped_linear(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Rows of `x` (N, D), the first count[0] by weight[0]ᵀ, and so on: (N, F).

    `weight` is (E, F, D). In one call of torch's grouped product where it runs.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which knows products of two matrices only
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if has_grouped_mm(x, weight):
        ends = count.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.mT, offs=ends)
    rows = x.split(count.tolist())
    parts = zip(rows, weight.unbind(), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in parts])


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: dtypes, and rows of 16·n bytes."""
    known = {torch.bfloat16}
    if x.device.type == "cpu":
        known |= {torch.float16, torch.float32}
    whole = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and x.dtype == weight.dtype in known and whole


class Mixture(nn.Module):
    """DeepSeekMoE (arXiv:2401.06066 §3): shared experts, and chosen ones beside them.

    The shared ones see every token: together they are one feed-forward layer.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        shared = config.n_shared * config.expert_ffn_dim
        self.shared = FeedForward(config, shared) if shared else None

    def forward(self, x: Tensor, routed: list[Routing] | None = None) -> Tensor:
        weights, routing = self.router(x)
        if routed is not None:
            routed.append(routing)
        flat = (part.flatten(0, 1) for part in (x, weights, routing.chosen))
        out = self.experts(*flat).view_as(x)
        return out if self.shared is None else out + self.shared(x)


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normed copy and adds to the stream.

    The feed-forward of the first `n_dense_layers` is dense, that of others a mixture.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        dense = not config.n_experts or layer < config.n_dense_layers
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config, config.ffn_dim) if dense else Mixture(config)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        seen: Tensor | None = None,
        cache: LayerCache | None = None,
        routed: list[Routing] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, seen, cache)
        return x + self.ffn(self.ffn_norm(x), routed)


class MTPModule(nn.Module):
    """One prediction depth (arXiv:2412.19437 §2.2): what is known, and a token more.

    `hidden` (B, T, D) is the depth's before, or the model's after its final norm;
    `embedded` (B, T, D) the tokens that follow those that it has seen. The embedding
    and the head are the model's. The paper writes the hidden state first; the published
    weight has the embedding first. DeepSeek-V3 publishes one module; further ones go on
    from the one before, as in Hugging Face's MtpModel.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        D, eps = config.dim, config.norm_eps
        self.embed_norm, self.hidden_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.proj = nn.Linear(2 * D, D, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(D, eps)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        rope: Tensor,
        seen: Tensor | None = None,
        cache: LayerCache | None = None,
        routed: list[Routing] | None = None,
    ) -> Tensor:
        both = torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=2)
        return self.norm(self.block(self.proj(both), rope, seen, cache, routed))


class Outputs(NamedTuple):
    """What training looks at: `logits` (B, T, V) of the model; `ahead`, those of each
    prediction depth k, (B, T - 1 - k, V); `routed`, a Routing for each mixture."""

    logits: Tensor
    ahead: list[Tensor]
    routed: list[Routing]


class Transformer(nn.Module):
    """DeepSeek: `model(tokens) -> logits`, (B, T) ids to (B, T, V).

    `model(tokens, cache=cache)` goes on from what the cache has seen, and appends.
    `model.predict_ahead(tokens)` gives the logits of the MTP modules. To train it,
    `loss(model, batch)`, and `model.balance()` after each optimizer step.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, V, L = config.dim, config.vocab_size, config.n_layers
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, V, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config, L + k) for k in range(config.n_mtp))
        self.finalise()
        self.reset_parameters()

    def finalise(self) -> None:
        """Let the head use the embedding's matrix itself, and give λ its first value.

        λ is a buffer, so that a training run that is resumed goes on with its own.
        """
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight
        weight = torch.tensor(self.config.mtp_weight, device=self.embed.weight.device)
        self.register_buffer("mtp_weight", weight)

    def reset_parameters(self) -> None:
        """GPT-2's initialisation (Radford et al. 2019 §2.3): N(0, 0.02²); biases 0.

        The two projections of a block that add to the stream are scaled by 1/√(2L), so
        that the sum of the 2L branches starts out with the variance of one.
        """
        for name, parameter in self.named_parameters():
            if parameter.dtype == FP8:
                continue  # codes, which are read from a file
            if name.endswith(("wo.weight", "w_down.weight", "w_down")):
                std = 0.02 / math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(parameter, std=std)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_cache(
        self,
        batch_size: int,
        max_seq_len: int,
        pad: Tensor | None = None,
        n_layers: int | None = None,
    ) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_seq_len` tokens.

        `pad` (B,) counts left padding per row. The cache is for all blocks or, of a
        prediction depth, for 1 layer. Raises ValueError for more tokens than the
        context has, or padding that leaves no room for a token.
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
        width = self.config.latent_dim + self.config.rope_dim
        shape = (batch_size, max_seq_len, width)
        with torch.inference_mode(False):  # so that it may be used outside of it too
            new = self.embed.weight.new_zeros
            layers = [
                LayerCache(new(shape)) for _ in range(n_layers or self.config.n_layers)
            ]
        return KVCache(layers, max_seq_len, pad)

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        routed: list[Routing] | None = None,
    ) -> Tensor:
        """The final norm's output, (B, T, D); `forward` multiplies it by the head."""
        if cache is not None:
            cache.expect(tokens)
        T = tokens.shape[1]
        S = T if cache is None else cache.length + T
        longest = self.config.max_seq_len
        if longest < S:
            raise ValueError(f"{S} tokens are longer than the context of {longest}")
        position, seen = positions_and_mask(tokens, cache)
        rope = rope_table(position, self.config)  # (..., T, R/2)
        x = self.embed(tokens)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, seen, None if cache is None else cache.layers[i], routed)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def hidden_ahead(
        self,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        cache: KVCache | None = None,
        routed: list[Routing] | None = None,
    ) -> Tensor:
        """What MTP module `depth` (0, 1, …) makes of `hidden` (B, T, D), and as wide.

        `hidden` is the result of the depth before, at first of `self.hidden`, at T
        positions; `tokens` (B, T) are those `depth` + 1 places further on.
        """
        # Positions count from the first hidden state; rotary keys see differences only.
        position, seen = positions_and_mask(tokens, cache)
        rope = rope_table(position, self.config)  # (..., T, R/2)
        layer = None if cache is None else cache.layers[0]
        embedded = self.embed(tokens)  # (B, T, D)
        hidden = self.mtp[depth](hidden, embedded, rope, seen, layer, routed)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return hidden

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, *, detail: bool = False
    ) -> Tensor | Outputs:
        """Logits (B, T, V) for the token after each of `tokens` (B, T).

        With a `cache`, `tokens` follow those that it holds, and are appended to it.
        With `detail`, all that training looks at, and no cache. Raises ValueError when
        the tokens do not fit `config.max_seq_len` or the cache, or with `detail` are
        too few for the last prediction depth.
        """
        if not detail:
            return self.head(self.hidden(tokens, cache))
        if (T := tokens.shape[1]) <= (M := self.config.n_mtp):
            raise ValueError(f"{T} tokens are too few to predict {M + 1} ahead")
        routed = []
        hidden = self.hidden(tokens, None, routed)
        logits, ahead = self.head(hidden), []
        for k in range(self.config.n_mtp):
            hidden = self.hidden_ahead(
                k, hidden[:, :-1], tokens[:, k + 1 :], None, routed
            )
            ahead.append(self.head(hidden))
        return Outputs(logits, ahead, routed)

    def predict_ahead(self, tokens: Tensor) -> list[Tensor]:
        """For each depth k, logits (B, T - 1 - k, V); row t is for token t + 2 + k.

        Raises ValueError when `tokens` (B, T) are too few for the last depth.
        """
        return self(tokens, detail=True).ahead

    def routers(self) -> list[Router]:
        """Those of all mixtures, in the order in which a pass meets them."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def balance(self) -> None:
        """Move the routers' biases by the loads since the last call: after a step."""
        for router in self.routers():
            router.update()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        dequantize: bool = False,
    ) -> Transformer:
        """Load a published checkpoint from a local folder (it wins) or a hub id.

        Reads `config.json` and safetensors (single or sharded) or `pytorch_model.bin`.
        The model is built without memory and filled tensor by tensor, in eval mode. An
        FP8 checkpoint stays in FP8, and is computed in it, unless `dequantize` expands
        it to `dtype`. Raises ValueError naming any tensor that is missing, unexpected
        or misshapen.
        """
        folder = find_folder(source)
        try:
            config, tensors = read_config(folder), read_tensors(folder)
            if config.fp8 and dequantize:
                config, tensors = replace(config, fp8=False), dequantized(tensors)
            config = replace(config, fp8_codes=config.fp8)
            with torch.device("meta"):
                model = cls(config)
            load_tensors(model, tensors, dtype, device)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, as the Hugging Face class reads.

        Where the safetensors package is missing, `pytorch_model.bin` instead.
        """
        tensors = itertools.chain(export_tensors(self), mtp_copies(self))
        write_checkpoint(Path(directory), self.config.to_hf(), tensors)


# Checkpoint names as data: Hugging Face's modules on the left, ours on the right. Layer
# {i} is our {block}: blocks.{i}, or behind the last of them the block of an {mtp}
# module. Expert {e} has its place in ours by its number, and 0 is gate, 1 is up.
HF_MODULES = {
    "model.embed_tokens": "embed",
    "model.layers.{i}.input_layernorm": "{block}.attention_norm",
    "model.layers.{i}.self_attn.q_proj": "{block}.attention.wq",
    "model.layers.{i}.self_attn.q_a_proj": "{block}.attention.wq_down",
    "model.layers.{i}.self_attn.q_a_layernorm": "{block}.attention.q_norm",
    "model.layers.{i}.self_attn.q_b_proj": "{block}.attention.wq_up",
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa": "{block}.attention.wkv_down",
    "model.layers.{i}.self_attn.kv_a_layernorm": "{block}.attention.kv_norm",
    "model.layers.{i}.self_attn.kv_b_proj": "{block}.attention.wkv_up",
    "model.layers.{i}.self_attn.o_proj": "{block}.attention.wo",
    "model.layers.{i}.post_attention_layernorm": "{block}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "{block}.ffn.w_gate",
    "model.layers.{i}.mlp.up_proj": "{block}.ffn.w_up",
    "model.layers.{i}.mlp.down_proj": "{block}.ffn.w_down",
    "model.layers.{i}.mlp.gate": "{block}.ffn.router",
    "model.layers.{i}.mlp.shared_experts.gate_proj": "{block}.ffn.shared.w_gate",
    "model.layers.{i}.mlp.shared_experts.up_proj": "{block}.ffn.shared.w_up",
    "model.layers.{i}.mlp.shared_experts.down_proj": "{block}.ffn.shared.w_down",
    "model.layers.{i}.enorm": "{mtp}.embed_norm",
    "model.layers.{i}.hnorm": "{mtp}.hidden_norm",
    "model.layers.{i}.eh_proj": "{mtp}.proj",
    "model.layers.{i}.shared_head.norm": "{mtp}.norm",
    "model.norm": "norm",
    "lm_head": "head",
}
MOE = "model.layers.{i}.mlp."
HF_NAMES = (
    {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in HF_MODULES.items()}
    | {
        f"{theirs}.weight_scale_inv": f"{ours}.scale"
        for theirs, ours in HF_MODULES.items()
    }
    | {
        MOE + "gate.e_score_correction_bias": "{block}.ffn.router.bias",
        MOE + "experts.{e}.gate_proj.weight": "{block}.ffn.experts.w_gate_up.{e}.0",
        MOE + "experts.{e}.up_proj.weight": "{block}.ffn.experts.w_gate_up.{e}.1",
        MOE + "experts.{e}.down_proj.weight": "{block}.ffn.experts.w_down.{e}",
        **{
            MOE + f"experts.{{e}}.{theirs}.weight_scale_inv": "{block}.ffn.experts."
            + ours
            for theirs, ours in [
                ("gate_proj", "gate_up_scale.{e}.0"),
                ("up_proj", "gate_up_scale.{e}.1"),
                ("down_proj", "down_scale.{e}"),
            ]
        },
    }
)
# Tensors that a file may hold although another says it already.
REDUNDANT = {
    "lm_head.weight": "embed.weight",
    "model.layers.{mtp}.embed_tokens.weight": "embed.weight",
    "model.layers.{mtp}.shared_head.head.weight": "head.weight",
}
# What `verify` compares: label, our module, theirs, and which input's padding counts.
# "module:in" is what goes into the module; "" is the whole model.
STAGES = [
    ("embedding", "blocks.0:in", "model.layers.0:in", 0),
    ("block {i}", "blocks.{i}", "model.layers.{i}", 0),
    ("final norm", "norm", "model.norm", 0),
    ("logits", "", "", 0),
]


def canonical(name: str) -> str | None:
    """The name as in the tables; None for those that old files hold needlessly."""
    if name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
        return None
    copied = r"layers\.\d+\.(embed_tokens|shared_head\.head)\."
    return re.sub(copied, r"layers.{mtp}.\1.", name)


def hf_names(model: Transformer) -> dict[str, str]:
    """Hugging Face's tensor names for this model, each with ours, layer by layer."""
    L, M, E = model.config.n_layers, model.config.n_mtp, model.config.n_experts
    ours = {name for name, _ in model.named_parameters()}  # a tied head is none
    ours |= {name for name, _ in model.named_buffers()}
    names = {}
    for theirs, pattern in HF_NAMES.items():
        for i in range(L + M) if "{i}" in theirs else [0]:
            mtp = f"mtp.{i - L}"
            block = f"blocks.{i}" if i < L else f"{mtp}.block"
            for e in range(E) if "{e}" in theirs else [0]:
                name = pattern.format(block=block, mtp=mtp, e=e)
                if place(name)[0] in ours:
                    names[theirs.format(i=i, e=e)] = name
    return names


def place(name: str) -> tuple[str, tuple[int, ...]]:
    """Our tensor of a name in HF_NAMES, and the numbers behind it: a place in it."""
    tensor = name.rstrip(".0123456789")
    return tensor, tuple(int(number) for number in name[len(tensor) :].split(".")[1:])


def find(model: Transformer, name: str) -> tuple[nn.Module, str, Tensor]:
    """Our tensor of that name, and before it its module and its name there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module, leaf, getattr(module, leaf)


def export_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Our weights under Hugging Face's names and in its layout.

    Of a model that was trained in FP8, the codes that it computes with.
    """
    for theirs, name in hf_names(model).items():
        tensor, index = place(name)
        module, leaf, whole = find(model, tensor)
        part = to_theirs(theirs, whole.detach()[index], model.config)
        if is_master(module, leaf, whole):
            coded = quantize(part, SQUARE, model.config.fp8_power_of_two)
            yield f"{theirs}_scale_inv", coded.scale
            yield theirs, coded.codes
        else:
            yield theirs, part


def is_master(module: nn.Module, leaf: str, tensor: Tensor) -> bool:
    """Whether a tensor is the master copy of weights whose products are in FP8."""
    fp8 = isinstance(module, FP8Linear) or getattr(module, "fp8", False)
    return fp8 and "scale" not in leaf and tensor.dtype != FP8


def mtp_copies(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The embedding and the head, which published files repeat for each MTP module."""
    for k in range(model.config.n_mtp):
        where = f"model.layers.{model.config.n_layers + k}"
        yield f"{where}.embed_tokens.weight", model.embed.weight.detach().clone()
        yield f"{where}.shared_head.head.weight", model.head.weight.detach().clone()


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
            ours, tensor = waiting.pop(theirs), to_ours(theirs, tensor, model.config)
            fill(model, ours, name, tensor, dtype, device)
            filled.add(ours)
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
    kept = find(model, ours)[2]
    if tensor.shape != kept.shape or not all(
        torch.allclose(a.to(b), b, rtol=1e-3, atol=1e-3)
        for a, b in zip(tensor.split(1024), kept.split(1024), strict=True)
    ):
        raise ValueError(f"{name} should repeat our {ours}, and differs from it")


def fill(
    model: Transformer,
    ours: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Copy `tensor`, cast and moved, into our tensor `ours`, or into its place there.

    Room for all experts is made when the first of them comes.
    """
    whole, index = place(ours)
    module, leaf, old = find(model, whole)
    if tensor.shape != old[index].shape:
        raise ValueError(
            f"{name} has, in our layout, the shape {tuple(tensor.shape)}; "
            f"the config asks for {tuple(old[index].shape)}"
        )
    is_buffer = leaf in dict(module.named_buffers(recurse=False))
    if (old.dtype == FP8) != (tensor.dtype == FP8):
        raise ValueError(f"{name} is {tensor.dtype}, where {old.dtype} is needed")
    dtype = old.dtype if is_buffer or old.dtype == FP8 else dtype
    where = torch.device(device).type
    if not index or old.dtype != dtype or old.device.type != where:
        new = torch.empty(old.shape, dtype=dtype, device=device)
        new = new if is_buffer else nn.Parameter(new, old.requires_grad)
        setattr(module, leaf, new)
    getattr(module, leaf)[index].copy_(tensor)


def summary(names: Sequence[str], most: int = 4) -> str:
    """A few of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_draw(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless tokens can be drawn so."""
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature {temperature} and top_k {top_k}: need >= 0, >= 1"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")


def distribution(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The probabilities that `sample` draws from: (B, V) logits to (B, V).

    Temperature 0 takes the likeliest. `top_k` keeps exactly k tokens, also under ties;
    `top_p` keeps the fewest whose probabilities reach p (arXiv:1904.09751 §3.1).
    """
    check_draw(temperature, top_k, top_p)
    V = logits.shape[-1]
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), V).float()  # (B, V)
    # The subtraction keeps a tiny temperature from overflowing to inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)).float() / temperature
    if top_k is None and top_p is None:
        return logits.softmax(dim=-1)
    ranked, ids = logits.topk(min(top_k or V, V))  # exactly k, whatever the ties
    weights = ranked.softmax(dim=-1)  # (B, min(top_k, V)), likeliest first
    if top_p is not None:
        before = weights.cumsum(dim=-1) - weights  # mass of all likelier tokens
        weights = weights.masked_fill(before >= top_p, 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, ids, weights)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One next token a row: (B, V) logits to (B,) ids, drawn from `distribution`."""
    check_draw(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = distribution(logits, temperature, top_k, top_p)  # (B, V)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def check_request(model: Transformer, T: int, max_new_tokens: int) -> None:
    """Raise ValueError unless T tokens can be continued by so many."""
    if T == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it cannot be negative")
    if T + max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"a prompt of {T} tokens and {max_new_tokens} new ones do not fit the "
            f"context of {model.config.max_seq_len}: shorten it or ask for fewer"
        )


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
    check_request(model, T, max_new_tokens)
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


@dataclass
class Speculation:
    """How many tokens were drafted, how many of them accepted, in how many passes."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def rate(self) -> float:
        """The share of the drafts that were accepted; 0 where none was drafted."""
        return self.accepted / max(1, self.drafted)


def check_speculation(model: Transformer, B: int) -> None:
    """Raise ValueError unless the model can draft, for B rows."""
    if B != 1 or not model.config.n_mtp:
        raise ValueError(
            f"{B} rows, {model.config.n_mtp} MTP modules: speculation is for one row, "
            "and needs at least one module"
        )


@torch.inference_mode()
def speculate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Speculation]:
    """`generate` for one row, with drafts of the MTP modules: (1, T) to (1, T + n).

    In each round the modules draft a token a depth, and the model looks at all of them
    in one pass and keeps those that it would have chosen itself. Greedy tokens are
    those of `generate`, sampled ones have its distribution (arXiv:2211.17192). Raises
    ValueError for several rows, which would not advance together, for a model without
    MTP modules, and where `generate` does.
    """
    check_request(model, tokens.shape[1], max_new_tokens)
    check_speculation(model, len(tokens))
    end, stats = tokens.shape[1] + max_new_tokens, Speculation()
    chances = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
    cache, drafter = model.new_cache(1, end), Drafter(model, end)
    fed, q, known = tokens, [], tokens
    while known.shape[1] < end:
        hidden = model.hidden(fed, cache)
        p = chances(model.head(hidden[0, -1 - len(q) :]))
        new = accept(p, q, fed[0, fed.shape[1] - len(q) :], generator)
        stats.passes += 1
        stats.drafted += len(q)
        stats.accepted += len(new) - 1
        if ends := [i for i, token in enumerate(new) if token in stop]:
            new = new[: ends[0] + 1]
        known = torch.cat([known, tokens.new_tensor([new])], dim=1)
        if ends:
            break
        cache.truncate(known.shape[1] - 1)  # drafts that were not accepted
        hidden = hidden[:, : hidden.shape[1] - len(q) + len(new) - 1]
        room = end - known.shape[1]
        drafts, q = drafter.draft(known, hidden, room - 1, chances, generator)
        fed = torch.cat([known[:, -1:], drafts], dim=1)
    return known, stats


def accept(
    p: Tensor,
    q: Sequence[Tensor],
    drafts: Tensor,
    generator: torch.Generator | None = None,
) -> list[int]:
    """The drafts that are kept, and one token more (arXiv:2211.17192 algorithm 1).

    `drafts` (n,) were drawn from `q`, n times (1, V); the model gives `p` (n + 1, V).
    A draft is kept with probability p/q at its place; at the first that is not, a token
    is drawn from what p has above q. So each token has the distribution p.
    """
    kept = 0
    for draft, p_here, q_here in zip(drafts.tolist(), p, q, strict=False):
        chance = torch.rand((), device=p.device, generator=generator)
        if chance * q_here[0, draft] >= p_here[draft]:
            above = (p_here - q_here[0]).clamp(min=0)  # (V,)
            left = above if above.any() else p_here  # all 0 only by rounding
            break
        kept += 1
    else:
        left = p[kept]
    last = torch.multinomial(left, 1, generator=generator)
    return [*drafts[:kept].tolist(), int(last)]


class Drafter:
    """The MTP modules of a model in `speculate`, and what each keeps between rounds.

    Module k has a cache of its own. Only what was made of tokens that are settled stays
    in it. The last such place of module k is one behind that of module k - 1, whose
    result there is carried over to the next round.
    """

    def __init__(self, model: Transformer, room: int) -> None:
        self.model = model
        depths = range(model.config.n_mtp)
        self.caches = [model.new_cache(1, room, n_layers=1) for _ in depths]
        self.carried: dict[int, Tensor] = {}

    def draft(
        self,
        known: Tensor,
        hidden: Tensor,
        most: int,
        chances: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """At most `most` tokens (1, n) to follow `known`, and the chances they had.

        `hidden` (1, T, D) is the model's at the places since the last round, up to the
        one before the last of `known`; `chances` turns logits into probabilities.
        """
        n, tokens, q = known.shape[1] - 1, known, []
        for k, cache in enumerate(self.caches[: max(0, most)]):
            if k in self.carried:
                hidden = torch.cat([self.carried[k], hidden], dim=1)
            start = cache.length  # the place of hidden[:, 0]; the last is n - 1
            further_on = tokens[:, start + k + 1 : n + k + 1]
            deeper = self.model.hidden_ahead(k, hidden, further_on, cache)
            cache.truncate(max(0, n - k))
            if k:
                settled = slice(cache.length - start, self.caches[k - 1].length - start)
                self.carried[k] = hidden[:, settled]
            p = chances(self.model.head(deeper[:, -1]))  # (1, V)
            token = torch.multinomial(p, 1, generator=generator)  # (1, 1)
            tokens, hidden = torch.cat([tokens, token], dim=1), deeper
            q.append(p)
        return tokens[:, n + 1 :], q


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


# Those without which there is no model.
HF_NEEDED = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "kv_lora_rank", "v_head_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim"),
]
# And those without which it has no experts.
HF_NEEDED_BY_EXPERTS = ["num_experts_per_tok", "moe_intermediate_size"]
# What the fields are where config.json says nothing, as in Hugging Face's classes.
HF_USUAL = {
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "max_seq_len": 2048,
        "n_dense_layers": 0,
        "n_experts": 64,
        "n_shared": 2,
        "n_groups": 1,
        "n_active_groups": 1,
        "renormalise": False,
        "routed_scale": 1.0,
        "n_mtp": 0,
    },
    "deepseek_v3": {"model_type": "deepseek_v3", "max_seq_len": 4096},
}
# How each generation routes; files that ask for anything else are of another model.
HF_ROUTERS = {
    "deepseek_v2": {
        "scoring_func": ["softmax"],
        "topk_method": ["greedy", "group_limited_greedy"],
        "norm_topk_prob": [False],
        "moe_layer_freq": [1],
    },
    "deepseek_v3": {
        "scoring_func": ["sigmoid"],
        "topk_method": ["noaux_tc"],
        "moe_layer_freq": [1],
    },
}
# Those within Hugging Face's dict of the rotary scaling.
HF_ROPE = {
    "rope_factor": "factor",
    "rope_original_len": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_mscale": "mscale",
    "rope_mscale_all_dim": "mscale_all_dim",
}


# How published FP8 checkpoints say what they are.
HF_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def fp8_from_hf(asked: dict) -> dict:
    """Our fields from a `quantization_config`; ValueError where it is of others."""
    for name, known in HF_FP8.items():
        if (found := asked.get(name, known)) != known:
            raise ValueError(f"quantization's {name} is {found!r}; {known!r} is read")
    if asked.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise ValueError(f"quantization's scale_fmt is {asked['scale_fmt']!r}")
    return {"fp8": True, "fp8_power_of_two": asked.get("scale_fmt") == "ue8m0"}


def read_config(folder: Path) -> Config:
    """The config of a checkpoint, without MTP modules if the files have none of them.

    Hugging Face's class for the model leaves them out, and its config names them.
    """
    found = read_json(folder / "config.json")
    try:
        config = Config.from_hf(found)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"config.json holds a value of a wrong kind: {error}"
        ) from None
    first = f"model.layers.{config.n_layers}."
    if any(str(name).startswith(first) for name in tensor_names(folder)):
        return config
    return replace(config, n_mtp=0)


def rope_from_hf(hf: dict) -> dict:
    """Our rotary fields from a published config; ValueError for another scaling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "yarn":
        raise ValueError(
            f"rotary scaling {kind!r} is not DeepSeek's; 'default' and 'yarn' are read"
        )
    if rope.get("factor") is None:
        raise ValueError("the rotary scaling lacks factor")
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise ValueError("attention_factor and truncate of YaRN are not DeepSeek's")
    original = HF_ROPE["rope_original_len"]
    rope = {original: hf.get("max_position_embeddings", 2048)} | rope
    found = {ours: float(rope.get(name) or 0) for ours, name in HF_ROPE.items()}
    found["rope_original_len"] = int(found["rope_original_len"])
    found["rope_beta_fast"] = found["rope_beta_fast"] or 32.0
    found["rope_beta_slow"] = found["rope_beta_slow"] or 1.0
    return found | {"rope_theta": float(theta)}


def to_ours(name: str, tensor: Tensor, config: Config) -> Tensor:
    """A tensor of a Hugging Face file in our layout: rotary pairs half-split.

    Scales that are stored as an exponent become float32.
    """
    if name.endswith("_scale_inv"):
        return scale_from_file(tensor)
    return reorder_rotary(name, tensor, config, to_half_split)


def to_theirs(name: str, tensor: Tensor, config: Config) -> Tensor:
    """`to_ours` undone."""
    return reorder_rotary(name, tensor, config, to_interleaved)


def reorder_rotary(
    name: str, tensor: Tensor, config: Config, order: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Put the rows that make rotary parts in another order, where the file has one.

    These are the last R of each head's query, and the last R of `kv_a_proj_with_mqa`.
    """
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        heads, plain = config.n_heads, config.head_dim
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        heads, plain = 1, config.latent_dim
    else:
        return tensor
    R = config.rope_dim
    if not config.rope_interleave or tensor.shape[:1] != (heads * (plain + R),):
        return tensor  # `fill` refuses a wrong shape
    if tensor.dtype == FP8:
        starts = [head * (plain + R) + plain for head in range(heads)]
        if any(start // BLOCK != (start + R - 1) // BLOCK for start in starts):
            raise ValueError(
                f"{name}: the rotary rows of a head lie in two blocks of {BLOCK} with "
                "different scales; read it with dequantize=True"
            )
        as_bytes = tensor.view(torch.uint8)
        return reorder_rotary(name, as_bytes, config, order).view(FP8)
    kept, rotary = tensor.unflatten(0, (heads, -1)).split([plain, R], dim=1)
    rotary = order(rotary.flatten(0, 1), R).unflatten(0, (heads, R))
    return torch.cat([kept, rotary], dim=1).flatten(0, 1)


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


def scale_from_file(tensor: Tensor) -> Tensor:
    """Scales in float32; of one byte (ue8m0), it is the exponent of two, plus 127."""
    if tensor.dtype == torch.uint8:
        return torch.exp2(tensor.float() - 127)
    return tensor.float()


def dequantized(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same with FP8 weights in float32; their scales have to come before them."""
    scales = {}
    for name, tensor in tensors:
        if name.endswith("_scale_inv"):
            scales[name.removesuffix("_scale_inv")] = scale_from_file(tensor)
        elif tensor.dtype == FP8:
            grid = tuple(-(-size // BLOCK) for size in tensor.shape)
            if name not in scales or scales[name].shape != grid:
                raise ValueError(f"{name} is FP8, without scales {grid} for its blocks")
            yield name, dequantize(Quantized(tensor, scales.pop(name), SQUARE))
        else:
            yield name, tensor
    if scales:
        raise ValueError(f"scales without FP8 weights: {summary(list(scales))}")


def reading_order(sizes: dict[str, int]) -> list[str]:
    """The largest first, and the scales of a weight right before it."""

    def key(name: str) -> tuple:
        weight = name.removesuffix("_scale_inv")
        return sizes.get(weight, sizes[name]), weight, name != weight

    return sorted(sizes, key=key, reverse=True)


def tensor_names(folder: Path) -> list[str]:
    """The names of all tensors of a checkpoint folder; none where no file is."""
    from_index = folder / "model.safetensors.index.json"
    if from_index.exists():
        shards = read_json(from_index).get("weight_map")
        return list(shards) if isinstance(shards, dict) else []
    if (folder / "model.safetensors").exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / "model.safetensors", "pt") as file:
                return list(file.keys())
        except SafetensorError:
            return []  # `read_tensors` says what is wrong with it
    path = folder / "pytorch_model.bin"
    return list(read_torch(path, zipfile.is_zipfile(path))) if path.exists() else []


def read_safetensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of these safetensors files, the largest first."""
    from safetensors import SafetensorError, safe_open

    sizes, places = {}, {}
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):
                    sizes[name] = math.prod(file.get_slice(name).get_shape())
                    places[name] = path
        for name in reading_order(sizes):
            path = places[name]
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
    for name in reading_order(sizes):
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


# What a published FP8 checkpoint codes, by name: the linear layers of attention, of
# feed-forward layers and of experts.
CODED = re.compile(r"(?<!eh)_proj(_with_mqa)?\.weight$")
SAFETENSORS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    FP8: "F8_E4M3",
}


def convert(source: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """Write the checkpoint in `source` to the folder `out`, in FP8 or out of it.

    To FP8 what `CODED` names is quantised in blocks, and the rest keeps its dtype; to
    another dtype FP8 weights are expanded, and all but the routers' biases is cast. One
    tensor is in memory at a time, so any model with DeepSeek's or Llama's names of
    layers can be converted.
    Raises ValueError where there is nothing to do or `out` is `source`.
    """
    folder, out = find_folder(source), Path(out)
    config = read_json(folder / "config.json")
    is_fp8 = config.get("quantization_config") is not None
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the checkpoint itself; name another folder")
    if is_fp8 == (dtype == FP8):
        raise ValueError(f"{folder} is {'in' if is_fp8 else 'not in'} FP8 already")
    if is_fp8:
        fp8_from_hf(config.pop("quantization_config"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    else:
        config["quantization_config"] = HF_FP8

    recoded = to_fp8 if dtype == FP8 else partial(out_of_fp8, dtype=dtype)
    tensors = recoded(read_tensors(folder))
    plan = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors}
    with replacing(out / "model.safetensors") as unfinished:
        write_safetensors(unfinished, plan, recoded(read_tensors(folder)))
    index = "model.safetensors.index.json"
    (out / index).unlink(missing_ok=True)  # of what was there before
    for path in sorted(folder.iterdir()):  # tokenizer and such
        kinds = (".json", ".model", ".tiktoken", ".bpe")
        if path.suffix in kinds and path.name not in ("config.json", index):
            (out / path.name).write_bytes(path.read_bytes())
    with replacing(out / "config.json") as unfinished:
        unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def to_fp8(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same with what `CODED` names as scales and codes."""
    for name, tensor in tensors:
        if CODED.search(name):
            coded = quantize(tensor, SQUARE)
            yield f"{name}_scale_inv", coded.scale
            yield name, coded.codes
        else:
            yield name, tensor


def out_of_fp8(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The same, dequantised, in `dtype`."""
    for name, tensor in dequantized(tensors):
        # A router's bias moves by steps too fine for bfloat16.
        is_bias = name.endswith("e_score_correction_bias")
        yield name, tensor if is_bias else tensor.to(dtype)


def write_safetensors(
    path: Path,
    plan: dict[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """A safetensors file of `tensors` as they come; `plan` has their dtypes and shapes.

    The format: eight bytes with the length of a JSON header, the header, the numbers.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, (dtype, shape) in sorted(plan.items()):
        places[name], size = end, math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + places[name])
            flat = tensor.contiguous().flatten().view(torch.uint8)
            file.write(flat.numpy())


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


# Llama 3's: contractions of either case, at most three digits together, line ends kept
# with the signs before them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The control tokens that follow its ranks; reserved ones fill them up to 256.
LLAMA3_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(244)),
]
# How a turn of a conversation is written, up to the end of its text and after it, by
# the control token that opens it: Llama 3's format, and ChatML, which SmolLM2 uses.
CHAT_FORMATS = {
    "<|start_header_id|>": (
        ["<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{trimmed}"],
        ["<|eot_id|>"],
    ),
    "<|im_start|>": (["<|im_start|>", "{role}\n{text}"], ["<|im_end|>", "\n"]),
}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, and the files that travel with a model to do it again.

    `encode` takes the names of `control` tokens in a text for these tokens,
    `encode_plain` for the text that they are. `opening` ids come before every prompt.
    """

    vocab_size: int
    eos_id: int | None
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    control: dict[str, int] = field(default_factory=dict, repr=False)
    encode_plain: Callable[[str], list[int]] | None = None
    opening: tuple[int, ...] = ()


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
    added = reader.get_added_tokens_decoder()
    control = {token.content: i for i, token in added.items() if token.special}

    def encode(text: str, plain: bool = False) -> list[int]:
        reader.encode_special_tokens = plain
        return reader.encode(text, add_special_tokens=False).ids

    ends = ("<|end_of_text|>", END_OF_TEXT, "</s>")  # Llama 3's, GPT-2's, Llama 2's
    return Tokenizer(
        vocab_size=reader.get_vocab_size(),
        eos_id=next((control[name] for name in ends if name in control), None),
        encode=encode,
        decode=lambda ids: reader.decode(list(ids), skip_special_tokens=False),
        files={"tokenizer.json": path.read_bytes()},
        control=control,
        encode_plain=lambda text: encode(text, plain=True),
        opening=tuple(reader.encode("").ids),
    )


def llama3_tokenizer(path: Path) -> Tokenizer:
    """Meta's own `tokenizer.model` for Llama 3: ranks, in tiktoken's file format."""
    import tiktoken

    ranks = read_ranks(path)
    if len(ranks) != 128000:  # the control tokens count on from there
        raise ValueError(f"{path} holds {len(ranks)} ranks; Llama 3's are 128000")
    control = {name: len(ranks) + i for i, name in enumerate(LLAMA3_CONTROL)}
    encoding = tiktoken.Encoding(
        "llama3",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=control,
    )
    return Tokenizer(
        vocab_size=encoding.n_vocab,
        eos_id=control["<|end_of_text|>"],
        encode=lambda text: encoding.encode(text, allowed_special="all"),
        decode=lambda ids: encoding.decode(list(ids)),
        files={"tokenizer.model": path.read_bytes()},
        control=control,
        encode_plain=encoding.encode_ordinary,
        opening=(control["<|begin_of_text|>"],),
    )


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a file or a folder; "bytes", or a folder with none, means bytes.

    A folder is searched for `tokenizer.json`, then `tokenizer.model`, `*.tiktoken` and
    `vocab.bpe`.
    """
    path = Path(source)
    if str(source) == "bytes":
        return byte_tokenizer()
    if path.is_dir():
        found = [
            *path.glob("tokenizer.json"),
            *path.glob("tokenizer.model"),
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
    if path.suffix == ".model":
        return llama3_tokenizer(path)
    name = path.name if path.name == "vocab.bpe" else f"{path.stem}.tiktoken"
    return bpe_tokenizer(read_ranks(path), {name: path.read_bytes()})


def encode_chat(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[int]:
    """The ids of a conversation, (role, text) a turn, up to where the answer begins.

    In the format that the tokenizer's control tokens are for. The texts themselves are
    encoded without control tokens, so no message can end its own turn. Raises
    ValueError when the tokenizer has none for a conversation.
    """
    opens = next((name for name in CHAT_FORMATS if name in tokenizer.control), None)
    if opens is None:
        raise ValueError("the model's tokenizer has no tokens for a conversation")
    until, after = CHAT_FORMATS[opens]
    turns = [(until + after, role, text) for role, text in messages]
    ids = [i for i in tokenizer.opening if i != tokenizer.control[opens]]
    for parts, role, text in [*turns, (until, "assistant", "")]:
        words = {"role": role, "text": text, "trimmed": text.strip()}
        for part in parts:
            if part in tokenizer.control:
                ids.append(tokenizer.control[part])
            else:
                ids += tokenizer.encode_plain(part.format(**words))
    return ids


def stop_ids(config: Config, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: the config's, the tokenizer's, and the end of a turn."""
    listed = config.eos_id if isinstance(config.eos_id, tuple) else (config.eos_id,)
    turns = (tokenizer.control.get(name) for name in ("<|eot_id|>", "<|im_end|>"))
    found = {*listed, tokenizer.eos_id, *turns}
    return sorted(i for i in found if i is not None)


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
    seq_len: int = 256
    eval_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "seq_len", "eval_every"):
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

    Without decay it is Adam. After each of its steps, `after_step` follows.
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
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True
    )
    optimizer.register_step_post_hook(lambda *_: after_step(model, optimizer, recipe))
    return optimizer


# DeepSeek-V3 lowers λ to a third after so much of its tokens (arXiv:2412.19437 §4.2).
MTP_EARLY = 10 / 14.8


def after_step(
    model: Transformer, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> None:
    """Balance the experts' loads, and set λ for the next step."""
    model.balance()
    step = int(next(iter(optimizer.state.values()))["step"])
    early = step < MTP_EARLY * recipe.steps
    model.mtp_weight.fill_(model.config.mtp_weight / (1 if early else 3))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each token of `batch`, (B, T + 1), given those before.

    In training mode also λ/M times the sum of the depths' losses and the routers'
    balance losses; and the routers count where the tokens went. A depth's loss is
    divided by T too, although its terms are fewer (arXiv:2412.19437 eq. 24).
    """
    tokens, M = batch[:, :-1], model.config.n_mtp
    if not model.training:
        logits = model(tokens)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    out = model(tokens, detail=True)
    total = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
    for k, logits in enumerate(out.ahead):
        targets = batch[:, 2 + k :].flatten()
        depth = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        total = total + model.mtp_weight / M * depth / tokens.numel()
    for router, routing in zip(model.routers(), out.routed, strict=True):
        router.count(routing)
        total = total + router.balance_loss(routing)
    return total


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
    """A shape for parity checks: small, and no two sizes alike.

    Its context is long enough for YaRN's three bands to matter.
    """
    return Config(
        vocab_size=97,
        max_seq_len=80,
        dim=36,
        n_layers=3,
        n_heads=6,
        q_latent_dim=22,
        latent_dim=18,
        head_dim=10,
        rope_dim=14,
        value_dim=8,
        ffn_dim=52,
        n_dense_layers=1,
        n_experts=12,
        n_active=3,
        n_shared=2,
        expert_ffn_dim=20,
        n_groups=4,
        n_active_groups=2,
        n_mtp=2,
        rope_theta=100.0,
        rope_factor=4.0,
        rope_original_len=20,
        rope_beta_fast=2.0,
        rope_beta_slow=0.5,
        rope_mscale=1.0,
        rope_mscale_all_dim=0.5,
        eos_id=96,
    )


def reference(
    source: Config | str | Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Hugging Face's model: random weights for a Config, or a published checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(source, Config):
        config = AutoConfig.for_model(**source.to_hf())
        theirs = AutoModelForCausalLM.from_config(config).to(dtype)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    loop_over_experts(theirs)
    return theirs.eval()


def loop_over_experts(theirs: nn.Module) -> None:
    """Have Hugging Face's model do so where its grouped product does not take it."""
    c, size = theirs.config, theirs.dtype.itemsize
    whole = all(n * size % 16 == 0 for n in (c.hidden_size, c.moe_intermediate_size))
    if theirs.dtype == torch.float64 or not whole:
        theirs.set_experts_implementation("eager")


def reference_ahead(
    theirs: nn.Module, tokens: Tensor, weights: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Hugging Face's logits of each prediction depth, as `predict_ahead` gives ours.

    `theirs` is the main model. Its MTP modules take `weights`, in the names of a
    published file, or are read from the folder that it was read from.
    """
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    config = theirs.config
    L, M = config.num_hidden_layers, config.num_nextn_predict_layers
    if weights is None:
        # Hugging Face takes MTP modules to stand behind layer 60, as in DeepSeek-V3.
        layers = "|".join(str(L + k) for k in range(M))
        theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers})\."]
        modules = MtpModel.from_pretrained(theirs).eval()
    else:
        modules = MtpModel(theirs, M).eval().to(theirs.dtype)
        given = {
            rename_mtp(name, L): tensor
            for name, tensor in stack_experts(weights).items()
        }
        wrong = modules.load_state_dict(given, strict=False)
        shared = ("embed_tokens.", "shared_head.")
        missing = [n for n in wrong.missing_keys if not n.startswith(shared)]
        assert not missing and not wrong.unexpected_keys, f"{wrong}"
    loop_over_experts(modules)
    hidden = theirs.model(tokens).last_hidden_state
    logits, T = [], tokens.shape[1]
    for k in range(M):
        cache = MtpCache(config=config.get_mtp_config())
        position = torch.arange(k + 1, T)[None]
        hidden = modules.forward_layer(
            k, hidden[:, :-1], position, cache, input_ids=tokens[:, k + 1 :]
        )
        logits.append(modules._project_to_logits(hidden))
    return logits


def rename_mtp(name: str, n_layers: int) -> str:
    """A published name of an MTP module's tensor in Hugging Face's MtpModel."""
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    own = ("enorm.", "hnorm.", "eh_proj.")
    if rest.startswith("shared_head.norm."):
        rest = rest.replace("shared_head.norm.", "post_norm.")
    elif not rest.startswith(own):
        rest = f"mtp_block.{rest}"
    return f"layers.{int(number) - n_layers}.{rest}"


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of Hugging Face's memory: experts lie in one tensor."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        layer, is_expert, rest = name.partition(".experts.")
        number, _, leaf = rest.partition(".")
        if is_expert:
            experts.setdefault(layer, {})[int(number), leaf.split(".")[0]] = tensor
        else:
            found[name] = tensor
    for layer, parts in experts.items():
        E = 1 + max(number for number, _ in parts)
        up = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(E)]
        down = [parts[e, "down_proj"] for e in range(E)]
        found[f"{layer}.experts.gate_up_proj"] = torch.stack(up)
        found[f"{layer}.experts.down_proj"] = torch.stack(down)
    return found


def reference_inputs(config: Config, tokens: Tensor) -> dict[str, Tensor]:
    """What the reference is called with where ours is called with `tokens`."""
    return {"input_ids": tokens}


def real_text() -> str:
    """English that comes with every Python: its help texts on the language."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def verify_inputs(config: Config, tokenizer: Tokenizer | None) -> tuple[Tensor, ...]:
    """The tokens of a comparison: real text where there is a tokenizer, else random."""
    T = min(config.max_seq_len, 2000)
    if tokenizer is not None and tokenizer.vocab_size <= config.vocab_size:
        return (torch.tensor([tokenizer.encode(real_text()[: 20 * T])[:T]]),)
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(config.vocab_size, (2, T), generator=generator),)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, norms and biases too, and those of routers.

    A freshly initialised model hides mistakes: its norms and biases do nothing yet, and
    its activations are so small that every non-linearity looks linear.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + noise * (0.3 if centre else 0.1))
    for router in model.routers():
        if router.config.model_type == "deepseek_v3":
            noise = torch.randn(router.bias.shape, generator=generator)
            router.bias.copy_(0.1 * noise)


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
    """How far apart two (n, width) results are, in five ways."""
    ours, theirs = ours.double(), theirs.double()
    gap, top = (ours - theirs).abs().amax(dim=-1), theirs.abs().max().item()
    return {
        "stage": label,
        "max_abs": gap.max().item(),
        "relative": gap.max().item() / top,
        "typical": gap.median().item() / top,
        "cosine": F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item(),
        "argmax": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }


# Largest difference allowed at any stage, over the reference's largest value there. In
# float64 too the reference computes its norms and rotary tables in float32. In bfloat16
# half of the tokens must keep to it: rounding sends some of them to other experts.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def verify(
    source: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> list[dict]:
    """Compare with Hugging Face, stage by stage; returns a row of distances for each.

    Without `source`, on `small_config` with every parameter random; with it, on that
    checkpoint, one model after the other in memory, and FP8 weights dequantised. The
    last rows are the logits of the MTP modules, where there are any.
    """
    tokenizer, copied = None, True
    if source is None:
        ours = Transformer(small_config()).eval()
        randomise(ours)
        ours.to(dtype)
    else:
        folder = find_folder(source)
        ours = Transformer.from_pretrained(folder, dtype=dtype, dequantize=True)
        tokenizer = load_tokenizer(folder)
        # Hugging Face 5.23 on a CPU misreads matrices that are not of whole blocks.
        copied = read_config(folder).fp8
    theirs, weights, config = None, None, ours.config
    if copied:
        theirs = reference(config, dtype)
        copy_to_reference(ours, theirs)
        weights = mtp_tensors(ours)
    inputs = verify_inputs(config, tokenizer)
    stages = list(expand_stages(ours))
    names = dict(zip(input_names(ours), inputs, strict=False))
    mine = watch(ours, [stage[1] for stage in stages], **names)
    ahead = ours.predict_ahead(*inputs) if config.n_mtp else []
    del ours
    theirs = reference(source, dtype) if theirs is None else theirs
    asked = reference_inputs(config, *inputs)
    other = watch(theirs, [stage[2] for stage in stages], **asked)
    theirs_ahead = reference_ahead(theirs, *inputs, weights) if ahead else []
    real = [torch.ones_like(t, dtype=torch.bool) for t in inputs]
    if config.pad_id is not None:
        real = [tokens != config.pad_id for tokens in inputs]
    return [
        distance(label, a[real[which]], b[real[which]])
        for (label, _, _, which), a, b in zip(stages, mine, other, strict=True)
    ] + [
        distance(f"{k + 2} ahead", a.flatten(0, 1), b.flatten(0, 1))
        for k, (a, b) in enumerate(zip(ahead, theirs_ahead, strict=True))
    ]


# Of the FP8 computation: how far off it may be, root mean square over that of the
# values. One product of Gaussian numbers is off by 4 %; some follow one another.
FP8_TOLERANCE = 0.1


@torch.no_grad()
def verify_fp8(source: str | Path | None = None) -> list[dict]:
    """The model computing in FP8 beside the same weights computing in float32.

    The weights are what the codes stand for, so the difference is that of rounding the
    activations. Rows as of `verify`, and "rms".
    """
    if source is None:
        ours, tokenizer = Transformer(small_fp8_config()).eval(), None
        randomise(ours)
        for parameter in ours.parameters():
            if parameter.dim() > 1:  # else each layer would enlarge the difference
                parameter.mul_(0.3)
        plain = Transformer(replace(ours.config, fp8=False)).eval()
        load_tensors(plain, dequantized(export_tensors(ours)))
    else:
        ours = Transformer.from_pretrained(source)
        plain = Transformer.from_pretrained(source, dequantize=True)
        tokenizer = load_tokenizer(find_folder(source))
    (tokens,) = verify_inputs(ours.config, tokenizer)
    stages = list(expand_stages(ours))
    names = [stage[1] for stage in stages]
    both = [watch(model, names, tokens=tokens) for model in (ours, plain)]
    if ours.config.n_mtp:
        for seen, model in zip(both, (ours, plain), strict=True):
            seen += model.predict_ahead(tokens)
    labels = [stage[0] for stage in stages]
    labels += [f"{k + 2} ahead" for k in range(ours.config.n_mtp)]
    rows = []
    for label, a, b in zip(labels, *both, strict=True):
        rms = ((a - b).norm() / b.norm()).item()
        rows.append(distance(label, a.flatten(0, 1), b.flatten(0, 1)) | {"rms": rms})
    return rows


def small_fp8_config() -> Config:
    """A shape for the FP8 check: two blocks or more of each matrix, the last ones cut.

    One group of experts and all of them active: rounding does not change the choice.
    """
    return replace(
        small_config(),
        dim=276,
        n_heads=5,
        q_latent_dim=260,
        latent_dim=264,
        head_dim=60,
        rope_dim=20,
        value_dim=56,
        ffn_dim=300,
        expert_ffn_dim=268,
        n_experts=4,
        n_active=4,
        n_groups=1,
        n_active_groups=1,
        fp8=True,
    )


def show_fp8(rows: Sequence[dict]) -> bool:
    """Print `verify_fp8`'s table; True when every stage is within the tolerance."""
    say(f"{'stage':<18} {'rms / rms of b':>15} {'1 - cosine':>11} {'argmax':>8}")
    for row in rows:
        mark = "" if row["rms"] <= FP8_TOLERANCE else "  above the tolerance"
        say(
            f"{row['stage']:<18} {row['rms']:>15.1e} {abs(1 - row['cosine']):>11.1e} "
            f"{row['argmax']:>8.2%}{mark}"
        )
    good = all(row["rms"] <= FP8_TOLERANCE for row in rows)
    say(f"{'Within' if good else 'NOT within'} {FP8_TOLERANCE:.0%}, root mean square.")
    return good


def input_names(model: nn.Module) -> list[str]:
    """The names of the arguments of `model.forward`, in order."""
    code = type(model).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def mtp_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights of the MTP modules, in the names of a published file."""
    names = hf_names(model)
    return {
        theirs: tensor
        for theirs, tensor in export_tensors(model)
        if names[theirs].startswith("mtp.")
    }


def copy_to_reference(ours: Transformer, theirs: nn.Module) -> None:
    """Give the Hugging Face model our weights; every trainable one must be given.

    All but the MTP modules, for which it has no place.
    """
    ahead = mtp_tensors(ours)
    main = {n: tensor for n, tensor in export_tensors(ours) if n not in ahead}
    result = theirs.load_state_dict(stack_experts(main), strict=False)
    trainable = {name for name, p in theirs.named_parameters() if p.requires_grad}
    wrong = [*result.unexpected_keys, *trainable.intersection(result.missing_keys)]
    assert not wrong, f"the name table does not fit the reference: {summary(wrong)}"


def show_distances(rows: Sequence[dict], dtype: torch.dtype) -> bool:
    """Print `verify`'s table; True when every stage is within the tolerance."""
    limit, half = TOLERANCE[dtype], dtype == torch.bfloat16
    judged = "typical" if half else "relative"
    say(
        f"{'stage':<18} {'max |a-b|':>10} {'/ max |b|':>10} "
        f"{'1 - cosine':>11} {'argmax':>8}"
    )
    for row in rows:
        mark = "" if row[judged] <= limit else "  above the tolerance"
        say(
            f"{row['stage']:<18} {row['max_abs']:>10.1e} {row['relative']:>10.1e} "
            f"{abs(1 - row['cosine']):>11.1e} {row['argmax']:>8.2%}{mark}"
        )
    good = all(row[judged] <= limit for row in rows)
    name = str(dtype).removeprefix("torch.")
    say(
        f"{'Equal' if good else 'NOT equal'} within {limit:.0e} "
        f"of the largest value{' in half of the tokens' if half else ''} ({name})."
    )
    return good


def run_verify(args: argparse.Namespace) -> int:
    """The command `verify`: dequantised beside Hugging Face's, then FP8 beside that."""
    dtype = getattr(torch, args.dtype)
    rows = verify(args.model, dtype)
    say("Weights dequantised, beside Hugging Face's model:\n")
    good = show_distances(rows, dtype)
    if args.model is None or read_config(find_folder(args.model)).fp8:
        path = fp8_path(torch.device("cpu"))
        say(f"\nComputing in FP8 ({path}), beside the weights dequantised:\n")
        good = show_fp8(verify_fp8(args.model)) and good
    return 0 if good else 1


def open_data(
    path: Path, tokenizer: Tokenizer, config: Config, recipe: Recipe
) -> tuple[Batches, Batches]:
    """The training and the held-out batches of a text file."""
    train_part, held_out = split_documents(read_text(path))
    T = min(config.max_seq_len, recipe.seq_len)
    if config.n_mtp >= T:
        raise ValueError(
            f"seq_len is {T}: to train {config.n_mtp} prediction depths, it must be "
            f"{config.n_mtp + 1} or more"
        )
    size, seed = recipe.batch_size, recipe.seed
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
        config = read_config(folder)
        tokenizer = load_tokenizer(args.tokenizer or folder)
    else:
        tokenizer = load_tokenizer(args.tokenizer or default_tokenizer())
        config = presets()[args.preset or "TINY"]
        config = replace(config, vocab_size=tokenizer.vocab_size)
        config = replace(config, bos_id=None, eos_id=tokenizer.eos_id)
    if args.n_mtp is not None:
        if args.init is not None:
            raise ValueError("--n-mtp is for a new model; --init has what it has")
        config = replace(config, n_mtp=args.n_mtp)
    return config, recipe, tokenizer


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
        if lacking := asdict(Config()).keys() - state["config"].keys():
            raise ValueError(f"its config lacks {', '.join(sorted(lacking))}")
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
    """Load the weights of a checkpoint."""
    found = Transformer.from_pretrained(
        source, device=model.embed.weight.device, dequantize=True
    )
    model.load_state_dict(found.state_dict())


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


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, chat: bool, system: str | None
) -> list[int]:
    """The ids of a text to continue or, in a chat, of a message to answer."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if chat:
        first = [] if system is None else [("system", system)]
        return encode_chat(tokenizer, [*first, ("user", prompt)])
    if system is not None:
        raise ValueError("--system is for a conversation: add --chat")
    return [*tokenizer.opening, *tokenizer.encode(prompt)]


def run_generate(args: argparse.Namespace) -> int:
    """The command `generate`: continue a prompt, or answer it, as it is written."""
    device = open_device(args.device)
    dtype = getattr(torch, args.dtype)
    model = Transformer.from_pretrained(args.model, dtype=dtype, device=device)
    tokenizer = load_tokenizer(find_folder(args.model))
    check_vocabulary(model, tokenizer)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = prompt_ids(tokenizer, prompt, args.chat, args.system)
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; with at least one more it exceeds the "
            f"context of {model.config.max_seq_len}: shorten it"
        )
    stops = stop_ids(model.config, tokenizer)
    if args.speculate:
        return run_speculate(args, model, tokenizer, ids, prompt)
    steps = stream(
        model,
        torch.tensor([ids], device=device),
        min(room, 200) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=stops,
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    shown = (step for step in steps if int(step) not in stops)
    texts = stream_text(tokenizer, shown, behind=ids[-1:])
    first = next(texts, "")  # a mistake shows here, before anything is printed
    print("" if args.chat else prompt, end="")
    for text in itertools.chain([first], texts):
        print(text, end="", flush=True)
    print()
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """The command `convert`."""
    convert(args.model, args.out, FP8 if args.to == "fp8" else getattr(torch, args.to))
    size = (Path(args.out) / "model.safetensors").stat().st_size
    say(f"Written to {args.out}: {size:,} bytes of weights in {args.to}.")
    return 0


def run_speculate(
    args: argparse.Namespace,
    model: Transformer,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    prompt: str,
) -> int:
    """`generate --speculate`: the text at once, and on stderr what was accepted."""
    stops, room = stop_ids(model.config, tokenizer), model.config.max_seq_len - len(ids)
    tokens, stats = speculate(
        model,
        torch.tensor([ids], device=model.embed.weight.device),
        min(room, 200) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=stops,
        generator=torch.Generator(model.embed.weight.device).manual_seed(args.seed),
    )
    new = iter(tokens[:, len(ids) :].T)  # (1,) at a time
    shown = (step for step in new if int(step) not in stops)
    said = "".join(stream_text(tokenizer, shown, behind=ids[-1:]))
    print(said if args.chat else prompt + said)
    print(
        f"{stats.accepted} of {stats.drafted} drafts accepted ({stats.rate:.0%}), "
        f"{stats.passes} passes",
        file=sys.stderr,
    )
    return 0


DEFAULT_DATA = DATA / "stories.txt"


def demo(json_path: str | None = None) -> dict:
    """Check against Hugging Face, train TINY in FP8, read it back from eight bits."""
    say("1. The same weights in Hugging Face's model and in ours: one function?\n")
    rows = verify()
    if not show_distances(rows, torch.float32):
        raise ValueError("the model differs from the reference; see the table above")
    say(f"\n2. The same weights, computing in FP8 ({fp8_path(torch.device('cpu'))}):\n")
    if not show_fp8(verify_fp8()):
        raise ValueError("FP8 is further off than it may be; see the table above")
    say(f"\n3. A small model learns from the stories in {DEFAULT_DATA.name}, in FP8.\n")
    tokenizer = load_tokenizer(default_tokenizer())
    recipe = Recipe(steps=40, batch_size=2, warmup=10, eval_every=40, seq_len=128)
    data, held_out = open_data(DEFAULT_DATA, tokenizer, TINY, recipe)
    torch.manual_seed(recipe.seed)
    few = replace(recipe, batch_size=16)
    _, held_out = open_data(DEFAULT_DATA, tokenizer, TINY, few)
    held_out.starts = held_out.starts[:64]
    training = Training(Transformer(TINY), data, held_out, recipe)
    out = Path("out") / HERE.parent.name / "demo"
    train(training, tokenizer, out)
    say("\n4. Its weights in eight bits, read back, go on with a story.\n")
    model = Transformer.from_pretrained(out)
    unseen = split_documents(read_text(DEFAULT_DATA))[1][0]
    said = example(model, tokenizer, unseen.partition(". ")[0] + ".")
    say(said)
    size = (out / "model.safetensors").stat().st_size
    wide = 4 * sum(p.numel() for p in training.model.parameters())
    say(f"\nIts file takes {size:,} bytes; in float32 it would take {wide:,}.")
    say(f"\nThe model is in {out}. Try next:")
    say(f"  python {sys.argv[0]} generate --model {out} --prompt 'The old dog'")
    say(f"  python {sys.argv[0]} train --out out/fp8")
    row = {
        "chapter": HERE.parent.name,
        "did": f"trained {recipe.steps} steps in FP8, held-out loss "
        f"{training.log[-1]['held_out']:.2f} nats a token; {size / wide:.0%} of the "
        "bytes of float32",
        "distance": next(r["max_abs"] for r in rows if r["stage"] == "logits"),
        "said": said,
    }
    if json_path is not None:
        with replacing(Path(json_path)) as partial_:
            partial_.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    return row


def drafted_example(
    model: Transformer, tokenizer: Tokenizer
) -> tuple[str, Speculation]:
    """A held-out story's opening, continued with drafts, and what became of them."""
    unseen = split_documents(read_text(DEFAULT_DATA))[1][0]
    opening = tokenizer.encode(unseen.partition(". ")[0] + ".")
    told, stats = speculate(
        model,
        torch.tensor([opening]),
        60,
        temperature=0.8,
        generator=torch.Generator().manual_seed(0),
    )
    return " ".join(tokenizer.decode(told[0].tolist()).split()), stats


def show_loads(model: Transformer, tokens: Tensor) -> None:
    """Print the share of the choices that the experts of each mixture get."""
    for i, load in enumerate(loads(model, tokens).tolist()):
        shares = " ".join(f"{share:.0%}" for share in sorted(load, reverse=True))
        say(f"  mixture {i + 1}: {shares}")


@torch.no_grad()
def loads(model: Transformer, tokens: Tensor) -> Tensor:
    """The share of the choices that each expert gets, a row a mixture: (n, E)."""
    routed = model(tokens, detail=True).routed
    E = model.config.n_experts
    counts = [routing.chosen.flatten().bincount(minlength=E) for routing in routed]
    return torch.stack([count / count.sum() for count in counts])


def parameter_counts(model: Transformer) -> dict[str, int]:
    """How many numbers the model has: `total`, `active` for a token, and in `mtp`.

    The first two are those of the model alone, which is complete without its MTP
    modules. All of its parameters count, the embedding too; of the routed experts, only
    those that one token goes to are active. Works on the meta device.
    """
    c = model.config
    main = [(n, p) for n, p in model.named_parameters() if not n.startswith("mtp.")]
    total = sum(p.numel() for _, p in main)
    routed = sum(p.numel() for n, p in main if ".experts." in n)
    idle = routed // c.n_experts * (c.n_experts - c.n_active) if routed else 0
    ahead = sum(p.numel() for p in model.mtp.parameters())
    return {"total": total, "active": total - idle, "mtp": ahead}


@torch.no_grad()
def compare_forms() -> dict[str, float]:
    """Largest difference of each absorbed form from the naive one, in float64."""
    c = small_config()
    K, R, P = c.head_dim, c.rope_dim, c.value_dim
    random = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    q = torch.randn(2, c.n_heads, 5, K + R, **random)
    kv = torch.randn(2, 9, c.latent_dim + R, **random)
    w_up = torch.randn(c.n_heads, K + P, c.latent_dim, **random)
    seen = torch.ones(1, 1, 5, 9, dtype=torch.bool).tril(9 - 5)
    forms = (attend_naive, attend_absorb_k, attend_absorb_kv, attend_latent_cache)
    naive, *others = (form(q, kv, w_up, c.softmax_scale, seen) for form in forms)
    return {
        form.__name__: (other - naive).abs().max().item()
        for form, other in zip(forms[1:], others, strict=True)
    }


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
    change = commands.add_parser("convert", help="a checkpoint to FP8, or out of it")
    change.add_argument("--model", required=True, metavar="SOURCE")
    change.add_argument("--out", required=True, metavar="DIR")
    change.add_argument(
        "--to", default="fp8", choices=["fp8", "bfloat16", "float32"], help="to what"
    )
    change.set_defaults(run=run_convert)
    add_train(commands.add_parser("train", help="train a model from a text file"))
    add_generate(commands.add_parser("generate", help="continue a prompt"))
    return root


def add_train(command: argparse.ArgumentParser) -> None:
    """The flags of `train`; those of the recipe are taken from its fields."""
    command.add_argument("--data", metavar="FILE", help=f"default: {DEFAULT_DATA.name}")
    command.add_argument("--preset", choices=sorted(presets()), help="default: TINY")
    command.add_argument("--init", metavar="SOURCE", help="start from this checkpoint")
    command.add_argument(
        "--n-mtp", type=int, metavar="N", help="MTP modules; default: the preset's"
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
    command.add_argument(
        "--chat", action="store_true", help="the prompt is a message to be answered"
    )
    command.add_argument(
        "--system", metavar="TEXT", help="with --chat: what the model is told first"
    )
    command.add_argument(
        "--speculate", action="store_true", help="let the MTP modules draft tokens"
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
