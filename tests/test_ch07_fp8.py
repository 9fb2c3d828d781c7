# SPDX-License-Identifier: MIT
"""Chapter 7, FP8: codes and products by hand, checkpoints, the finished file."""

import copy
import json
import math
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from functools import cache as remember
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chapters import ROOT, find, load

CHAPTER = find("ch07")
fp8 = load(CHAPTER)
STORIES = ROOT / "data" / "stories.txt"
BLOCK, TILE, SQUARE = 128, (1, 128), (128, 128)
E4M3 = torch.float8_e4m3fn

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads /proc, as Linux has it"
)


def equal(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def near(a, b, relative: float = 1e-5) -> None:
    """Equal within a part of the largest value."""
    equal(a, b, relative * b.abs().max().item())


def same(a, b) -> None:
    """The same bits: a code's NaN is itself, and -0 is not 0."""
    assert a.shape == b.shape and a.dtype == b.dtype
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = whole[a.dtype.itemsize]
    assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def random(*shape: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(scope="module")
def hf():
    """The transformers package, imported once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# --- eight bits -----------------------------------------------------------------------


def decoded(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """What eight bits stand for (arXiv:2209.05433 table 1): E4M3 has no infinity."""
    bias, top = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    sign = -1.0 if code >> 7 else 1.0
    exponent = code >> mantissa_bits & top
    mantissa = code & 2**mantissa_bits - 1
    if exponent == top and exponent_bits == 5:
        return math.nan if mantissa else sign * math.inf
    if exponent == top and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(E4M3, (4, 3)), (torch.float8_e5m2, (5, 2))], ids=str
)
def test_all_256_codes_are_what_their_bits_say(dtype, bits):
    by_hand = torch.tensor([decoded(code, *bits) for code in range(256)])
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    found, is_nan = codes.float(), by_hand.isnan()
    assert torch.equal(found.isnan(), is_nan)
    same(found[~is_nan], by_hand[~is_nan])  # signs of zeros too
    same(by_hand.to(dtype)[~is_nan], codes[~is_nan])
    finite = by_hand[by_hand.isfinite()]
    assert finite.max() == (fp8.FP8_MAX if dtype == fp8.FP8 else 57344)
    if dtype == fp8.FP8:
        q = fp8.Quantized(codes.view(2, 128), torch.ones(2, 1), TILE)
        same(fp8.dequantize(q).flatten()[~is_nan], by_hand[~is_nan])


# The numbers of E4M3 that are not negative, by their codes 0 to 126: they rise.
NUMBERS = torch.tensor([decoded(c, 4, 3) for c in range(127)], dtype=torch.float64)


def nearest(x):
    """The codes of the nearest numbers of E4M3, of two the even one, in float64."""
    size = x.double().abs()
    below = (torch.searchsorted(NUMBERS, size, right=True) - 1).clamp(0, 126)
    above = (below + 1).clamp(max=126)
    to_below, to_above = size - NUMBERS[below], NUMBERS[above] - size
    up = (to_above < to_below) | (to_above == to_below) & (below % 2 == 1)
    code = torch.where(up, above, below) + 128 * x.signbit()
    return code.to(torch.uint8).view(E4M3)


def by_loops(x, block, power_of_two: bool = False):
    """Codes and scales, a block after the other."""
    (M, K), (m, k) = x.shape, block
    codes = torch.empty(M, K, dtype=torch.uint8).view(E4M3)
    scale = torch.empty(-(-M // m), -(-K // k))
    for i in range(0, M, m):
        for j in range(0, K, k):
            part = x[i : i + m, j : j + k].float()
            largest = float(part.abs().max())
            s = torch.tensor(largest / 448) if largest else torch.tensor(1.0)
            if power_of_two:
                exponent = math.floor(math.log2(s)) - 1
                while 2.0**exponent < s:
                    exponent += 1
                s = torch.tensor(2.0**exponent)
            scale[i // m, j // k] = s
            codes[i : i + m, j : j + k] = nearest(part / s)
    return fp8.Quantized(codes, scale, block)


def spread(M: int, K: int, seed: int = 0):
    """Numbers of many sizes: rows and columns each with one of their own."""
    rows, columns = random(M, 1, seed=seed + 1), random(1, K, seed=seed + 2)
    return random(M, K, seed=seed) * (4 * rows).exp() * (2 * columns).exp()


def with_zeros(M: int, K: int):
    """The first block of any kind is all zeros, and so is the last column."""
    x = random(M, K)
    x[:128, :128] = 0
    x[:, -1] = 0
    return x


VALUES = {
    "gaussian": random,
    "of many sizes": spread,
    "zeros": with_zeros,
    "huge": lambda M, K: random(M, K).clamp(-3, 3) * 1e38,
    "tiny": lambda M, K: random(M, K) * 1e-34,
    "bfloat16": lambda M, K: random(M, K, dtype=torch.bfloat16),
    "float64": lambda M, K: random(M, K).double(),
}
# Block (0 is the whole side), and sizes: no multiples, rows of kv_a_proj_with_mqa, one.
CUTS = {
    "tiles": (TILE, 5, 300),
    "whole tiles": (TILE, 4, 256),
    "squares": (SQUARE, 130, 257),
    "squares of 576 rows": (SQUARE, 576, 128),
    "whole squares": (SQUARE, 256, 128),
    "columns": ((128, 1), 300, 5),
    "rows": ((1, 0), 6, 201),
    "all": ((0, 0), 37, 53),
    "one number": (TILE, 1, 1),
    "one number, square": (SQUARE, 1, 1),
}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("cut", CUTS)
def test_quantize_by_loops_over_blocks(cut, values, power_of_two):
    (m, k), M, K = CUTS[cut]
    block = (m or M, k or K)
    x = VALUES[values](M, K)
    q, by_hand = fp8.quantize(x, block, power_of_two), by_loops(x, block, power_of_two)
    same(q.scale, by_hand.scale)
    same(q.codes, by_hand.codes)
    assert q.block == block
    largest = padded_max(x.float(), block)
    if power_of_two:
        mantissa, _ = q.scale.frexp()
        assert (mantissa == 0.5).all()
        least = torch.where(largest > 0, largest / 448, 1.0)
        assert (q.scale >= least).all() and (q.scale < 2 * least).all()
    else:
        tops = padded_max(q.codes.float(), block)
        assert torch.equal(tops, torch.where(largest > 0, 448.0, 0.0))
    # Half a step of three bits of mantissa or, below 2^-6, of 2^-9; and the division.
    x, back = x.double(), fp8.dequantize(q).double()
    wide = q.per_row().repeat_interleave(k or K, 1)[:, :K].double()
    bound = torch.maximum(x.abs() * 2.0**-4, wide * 2.0**-10)
    assert ((back - x).abs() <= bound * (1 + 1e-5)).all()


def padded_max(x, block):
    """The largest size in each block."""
    return torch.stack(
        [
            torch.stack([part.abs().max() for part in rows.split(block[1], 1)])
            for rows in x.split(block[0], 0)
        ]
    )


@pytest.mark.parametrize("power_of_two", [False, True])
def test_of_two_nearest_codes_the_even_one_is_taken(power_of_two):
    """All midpoints of E4M3 and their neighbours, the block's scale being 1."""
    middle = ((NUMBERS[1:] + NUMBERS[:-1]) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(s * 1e3)) for s in (-1.0, 1.0)]
    x = torch.cat([middle, *beside, -middle, NUMBERS.float()])[None]
    q = fp8.quantize(x, (1, x.shape[1]), power_of_two)
    assert q.scale.item() == 1
    same(q.codes, nearest(x))
    assert torch.equal(fp8.dequantize(q)[:, -127:], NUMBERS[None].float())


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_codes_and_scales_are_those_of_hugging_faces_converter(hf, scale_fmt):
    """Its scale is 1 / (448 / max), so it may be off by a rounding or two."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    asked = hf.FineGrainedFP8Config(scale_fmt=scale_fmt)
    converter = Fp8Quantize(types.SimpleNamespace(quantization_config=asked))
    weight = spread(384, 256)
    theirs = converter.convert({"a.weight": weight.clone()})
    q = fp8.quantize(weight, SQUARE, scale_fmt == "ue8m0")
    scale = theirs["a.weight_scale_inv"].float()
    same(q.codes, theirs["a.weight"])
    torch.testing.assert_close(q.scale, scale, rtol=2**-22, atol=0)
    if scale_fmt == "ue8m0":
        same(q.scale, scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(bad, power_of_two):
    """Nothing of it comes out as a number, in a product too."""
    x, weight = random(5, 300), random(130, 300, seed=1)
    x[2, 200] = bad
    back = fp8.dequantize(fp8.quantize(x, TILE, power_of_two))
    spoilt = torch.zeros(5, 300, dtype=torch.bool)
    spoilt[2, 128:256] = True
    assert torch.equal(back.isnan(), spoilt) and back[~spoilt].isfinite().all()
    y = fp8.fp8_linear(x, weight, None, power_of_two)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
    weight[3, 10] = bad
    y = fp8.fp8_linear(random(5, 300), weight, None, power_of_two)
    assert y[:, :128].isnan().all() and y[:, 128:].isfinite().all()


def test_transposed_it_is_the_same_matrix():
    q = fp8.quantize(spread(200, 300), SQUARE)
    same(fp8.dequantize(q.T), fp8.dequantize(q).T)
    q = fp8.quantize(spread(3, 300), TILE)
    assert q.T.block == (128, 1) and q.T.scale.shape == (3, 3)
    same(fp8.dequantize(q.T), fp8.dequantize(q).T)


# --- products -------------------------------------------------------------------------


def exact(q):
    """code · scale in float64, which rounds neither."""
    (M, K), (m, k) = q.codes.shape, q.block
    scale = q.scale.double().repeat_interleave(m, 0).repeat_interleave(k, 1)
    return q.codes.double() * scale[:M, :K]


def product_bound(a, b):
    """How far float32 may be off: 128 additions, two scales, an addition a block.

    To first order, in units of 2^-24 of the sum of sizes (Higham 2002 §3.1).
    """
    n = BLOCK + 2 + a.scale.shape[1]
    return n * 2.0**-24 * (exact(a).abs() @ exact(b).abs().T)


def is_product(out, a, b) -> None:
    """`out` is a bᵀ within the bound of float32, and no further off."""
    expected = exact(a) @ exact(b).T
    assert out.dtype == torch.float32 and out.shape == expected.shape
    assert ((out.double() - expected).abs() <= product_bound(a, b)).all()


PAIRS = {"forward": (TILE, SQUARE), "weight's gradient": (TILE, TILE)}


@pytest.mark.parametrize(
    ("M", "N", "K"), [(7, 130, 300), (64, 128, 256), (1, 1, 1), (129, 5, 128)]
)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("blocks", PAIRS)
def test_a_product_is_that_of_the_dequantised_factors(blocks, power_of_two, M, N, K):
    a, b = (
        fp8.quantize(spread(n, K, seed), block, power_of_two)
        for n, block, seed in zip((M, N), PAIRS[blocks], (0, 7), strict=True)
    )
    is_product(fp8.scaled_product(a, b), a, b)


def test_a_product_with_a_transposed_weight():
    """As in the gradient of the input: the squares are those of the forward pass."""
    a, w = fp8.quantize(spread(9, 130), TILE), fp8.quantize(spread(130, 300, 5), SQUARE)
    is_product(fp8.scaled_product(a, w.T), a, w.T)


def test_autocast_does_not_lower_a_product():
    a, b = (
        fp8.quantize(random(4, 256), TILE),
        fp8.quantize(random(8, 256, seed=1), TILE),
    )
    with torch.autocast("cpu", torch.bfloat16):
        same(fp8.scaled_product(a, b), fp8.scaled_product(a.T.T, b))
        is_product(fp8.scaled_product(a, b), a, b)


def test_one_product_of_gaussian_numbers_is_off_by_four_percent():
    x, w = random(200, 512), random(300, 512, seed=1)
    y = fp8.scaled_product(fp8.quantize(x, TILE), fp8.quantize(w, SQUARE))
    off = (y - x @ w.T).norm() / (x @ w.T).norm()
    assert 0.03 < off < 0.045


@pytest.mark.parametrize(
    ("device", "capability", "path"),
    [
        ("cpu", None, "composed"),
        ("meta", None, "composed"),
        ("cuda", (8, 9), "composed"),
        ("cuda", (9, 0), "scaled_mm"),
        ("cuda", (10, 0), "composed"),
    ],
)
def test_the_path_of_each_device(monkeypatch, device, capability, path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert fp8.fp8_path(torch.device(device)) == path


@pytest.mark.parametrize(
    ("cuda", "path"),
    [("12.8", "composed"), ("12.9", "scaled_mm"), (None, "composed")],
)
def test_the_path_asks_for_the_cuda_that_has_the_kernel(monkeypatch, cuda, path):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert fp8.fp8_path(torch.device("cuda")) == path


def fake_scaled_mm(calls: list):
    """As torch's own: its checks, which it makes on meta tensors; then in float64."""
    real, tiles = F.scaled_mm, F.ScalingType.BlockWise1x128

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype):
        asked = [t.to("meta") for t in (a, b, scale_a, scale_b)]
        for mine, given in zip(asked, (a, b, scale_a, scale_b), strict=True):
            assert mine.stride() == given.stride()
        shape = real(
            *(asked[0], asked[1], asked[2], recipe_a, asked[3], recipe_b),
            output_dtype=output_dtype,
        ).shape
        wide = [a.double(), b.double().T]
        recipes = [(scale_a, recipe_a), (scale_b, recipe_b)]
        for i, (scale, recipe) in enumerate(recipes):
            rows, blocks = len(wide[i]), wide[i].shape[1] // 128
            if recipe != tiles:  # (K/128 and up to a multiple of 4, rows/128)
                assert not scale[blocks:].any()
                scale = scale[:blocks].T.repeat_interleave(128, 0)
            assert scale.shape == (rows, blocks)
            wide[i] = wide[i] * scale.double().repeat_interleave(128, 1)
        calls.append((recipe_a, recipe_b))
        out = (wide[0] @ wide[1].T).to(output_dtype)
        assert out.shape == shape
        return out

    return scaled_mm


@pytest.mark.parametrize("M,N,K", [(12, 272, 384), (11, 270, 300), (1, 640, 640)])
@pytest.mark.parametrize("blocks", PAIRS)
def test_the_kernel_is_given_what_it_wants(monkeypatch, blocks, M, N, K):
    """A stand-in with torch's conditions; the result in bfloat16, then float32."""
    calls = []
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm(calls))
    a = fp8.quantize(spread(M, K), PAIRS[blocks][0])
    b = fp8.quantize(spread(N, K, 3), PAIRS[blocks][1])
    composed = fp8.scaled_product(a, b)
    assert not calls
    monkeypatch.setattr(fp8, "fp8_path", lambda _: "scaled_mm")
    out = fp8.scaled_product(a, b)
    assert len(calls) == 1 and out.dtype == torch.float32 and out.shape == (M, N)
    assert ((out - composed).abs() <= 2.0**-8 * composed.abs() + 1e-5).all()
    assert torch.equal(out, out.bfloat16().float())
    # The gradient of the input: a weight that is read transposed.
    w = fp8.quantize(spread(K, N, 3), SQUARE)
    near(fp8.scaled_product(a, w.T), (exact(a) @ exact(w)).float(), 2**-8)
    assert len(calls) == 2


def test_torch_refuses_scales_that_lie_otherwise():
    """The checks that the stand-in makes are torch's: they fail where they should."""
    a, b = fp8.quantize(random(128, 256), TILE), fp8.quantize(random(256, 256), SQUARE)
    kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    codes = a.codes.to("meta"), b.codes.to("meta").T
    for scales in [(a.scale, b.scale.T), (a.scale.T.contiguous().T, b.scale.T)]:
        scales = [scale.to("meta") for scale in scales]
        with pytest.raises(RuntimeError, match="1x128 x 128x128 blockwise"):
            F.scaled_mm(*codes, scales[0], kinds[0], scales[1], kinds[1])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("blocks", PAIRS)
def test_the_real_kernel_gives_the_product(blocks):
    """Its sums have about 14 bits, its result 8: within 1 % of the largest."""
    a = fp8.quantize(random(64, 384).cuda(), PAIRS[blocks][0])
    b = fp8.quantize(random(272, 384, seed=3).cuda(), PAIRS[blocks][1])
    assert fp8.fp8_path(a.codes.device) == "scaled_mm"
    near(fp8.scaled_product(a, b), (exact(a) @ exact(b).T).float(), 1e-2)


# --- the linear layer -----------------------------------------------------------------


def config(**changes):
    """Blocks of each matrix, the last ones cut; the rotary rows of a head in one."""
    sizes = {"n_layers": 2, "n_heads": 3, "n_mtp": 1, "vocab_size": 97}
    sizes |= {"n_shared": 1, "expert_ffn_dim": 192, "ffn_dim": 260}
    return replace(fp8.small_fp8_config(), **sizes | changes)


def fp8_layer(K: int = 300, N: int = 200, power_of_two: bool = False, seed: int = 3):
    layer = fp8.FP8Linear(replace(fp8.TINY, fp8_power_of_two=power_of_two), K, N)
    with torch.no_grad():
        layer.weight.copy_(spread(N, K, seed))
    return layer


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_layer_is_the_product_of_these_codes(power_of_two):
    layer, x = fp8_layer(power_of_two=power_of_two), spread(35, 300).view(5, 7, 300)
    a = by_loops(x.flatten(0, 1), TILE, power_of_two)
    w = by_loops(layer.weight.detach(), SQUARE, power_of_two)
    y = layer(x)
    assert y.shape == (5, 7, 200)
    is_product(y.detach().flatten(0, 1), a, w)
    same(y.detach().flatten(0, 1), fp8.scaled_product(a, w))
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    near(low.float(), y, 0.05)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("B", "T"), [(2, 75), (1, 128), (3, 1)])
def test_both_gradients_are_products_in_fp8(B, T, power_of_two):
    """dx of dy in tiles along the outputs; dW of dy and x in tiles along tokens."""
    layer = fp8_layer(power_of_two=power_of_two)
    x = spread(B * T, 300).view(B, T, 300).requires_grad_()
    dy = spread(B * T, 200, 9).view(B, T, 200)
    layer(x).backward(dy)
    rows, dy = x.detach().flatten(0, 1), dy.flatten(0, 1)
    w = by_loops(layer.weight.detach(), SQUARE, power_of_two)
    w = fp8.Quantized(w.codes.T, w.scale.T, SQUARE)
    of_dy = by_loops(dy, TILE, power_of_two)
    is_product(x.grad.flatten(0, 1), of_dy, w)
    along = [by_loops(t.T.contiguous(), TILE, power_of_two) for t in (dy, rows)]
    assert along[0].scale.shape == (200, -(-B * T // 128))
    is_product(layer.weight.grad, *along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_near_those_of_exact_products(dtype):
    """Each is a product of two rounded matrices: off by 4 %, root mean square."""
    layer, x = fp8_layer(384, 256), random(300, 384, dtype=dtype).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(random(256, 384, seed=2))
    dy = random(300, 256, seed=1, dtype=dtype)
    layer(x).backward(dy)
    wide, w = x.detach().double(), layer.weight.detach().double()
    for found, expected in [
        (x.grad, dy.double() @ w),
        (layer.weight.grad, dy.double().T @ wide),
    ]:
        off = (found - expected).norm() / expected.norm()
        assert 0.025 < off < 0.045, off
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == dtype


def test_under_autocast_the_weights_gradient_stays_in_float32():
    layer, x = fp8_layer(), random(9, 300).requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    same(y.detach(), expected.detach())
    y.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_the_dense_weight_is_what_the_codes_stand_for():
    """To the bit, although the gradient passes through to the master copy."""
    layer = fp8_layer()
    dense, coded = layer.dense_weight(), by_loops(layer.weight.detach(), SQUARE)
    assert torch.equal(dense, fp8.dequantize(coded))  # but for the signs of zeros
    dense.backward(random(200, 300))
    assert torch.equal(layer.weight.grad, random(200, 300))


# --- experts --------------------------------------------------------------------------


def expert_operands(F_: int = 192, power_of_two: bool = False):
    c = config(expert_ffn_dim=F_, n_active=2, fp8_power_of_two=power_of_two)
    experts = fp8.Experts(c)
    with torch.no_grad():
        for i, p in enumerate(experts.parameters()):
            p.copy_(random(*p.shape, seed=i) * 0.1)
        experts.w_gate_up[:, 1] *= 30  # as one matrix they would share a scale
    generator = torch.Generator().manual_seed(5)
    x = random(21, c.dim, seed=6)
    chosen = torch.rand(21, c.n_experts, generator=generator).topk(2).indices
    chosen[chosen == 3] = 0  # expert 3 has no token
    return experts, x, random(21, 2, seed=7).abs(), chosen


@pytest.mark.parametrize("power_of_two", [False, True])
def test_experts_by_a_loop_with_gate_and_up_coded_apart(power_of_two):
    experts, x, weights, chosen = expert_operands(power_of_two=power_of_two)

    def product(rows, matrix):
        return fp8.scaled_product(
            by_loops(rows, TILE, power_of_two), by_loops(matrix, SQUARE, power_of_two)
        )

    expected = torch.zeros_like(x)
    with torch.no_grad():
        for e in range(3):
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = (product(x[token], w) for w in experts.w_gate_up[e])
            out = product(F.silu(gate) * up, experts.w_down[e])
            expected.index_add_(0, token, out * weights[token, place, None])
        near(experts(x, weights, chosen), expected, 1e-6)
        experts.fp8 = False
        plain = experts(x, weights, chosen)
    assert 0.01 < (expected - plain).norm() / plain.norm() < 0.1


def test_the_gradients_of_experts_are_those_of_layers_of_their_own():
    experts, x, weights, chosen = expert_operands()
    x.requires_grad_()
    dy = random(21, x.shape[1], seed=8)
    experts(x, weights, chosen).backward(dy)
    found = [x.grad, experts.w_gate_up.grad, experts.w_down.grad]
    again = x.detach().clone().requires_grad_()
    layers = []
    total = torch.zeros_like(x)
    for e in range(4):
        matrices = (*experts.w_gate_up[e], experts.w_down[e])
        row = []
        for matrix in matrices:
            layer = fp8.FP8Linear(fp8.TINY, *matrix.shape[::-1])
            layer.weight = torch.nn.Parameter(matrix.detach().clone())
            row.append(layer)
        layers.append(row)
        token, place = (chosen == e).nonzero(as_tuple=True)
        if len(token):
            # Their rows in the order of the pairs: tiles of dW run along them.
            up = F.silu(row[0](again[token])) * row[1](again[token])
            out = row[2](up) * weights[token, place, None]
            total = total.index_add(0, token, out)
    total.backward(dy)
    near(found[0], again.grad, 1e-6)
    for e, row in enumerate(layers):
        for i, layer in enumerate(row):
            grad = found[1][e, i] if i < 2 else found[2][e]
            if e == 3:
                assert layer.weight.grad is None and not grad.any()
            else:
                near(grad, layer.weight.grad, 1e-6)


# --- what is in FP8, and what is not --------------------------------------------------


def coded_names(c) -> list[str]:
    """The FP8 matrices of a published file, by plain loops."""
    found = []
    for i in range(c.n_layers + c.n_mtp):
        layer = f"model.layers.{i}"
        first = ["q_proj"] if c.q_latent_dim is None else ["q_a_proj", "q_b_proj"]
        for name in [*first, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]:
            found.append(f"{layer}.self_attn.{name}")
        places = ["mlp"]
        if i >= c.n_dense_layers:
            places = [f"mlp.experts.{e}" for e in range(c.n_experts)]
            places += ["mlp.shared_experts"] if c.n_shared else []
        for place in places:
            for name in ("gate_proj", "up_proj", "down_proj"):
                found.append(f"{layer}.{place}.{name}")
    return found


@remember
def trained(dtype=torch.float32, **changes):
    """Our model with master copies, every parameter random, for tests that keep it."""
    model = fp8.Transformer(config(**changes)).eval()
    fp8.randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    return model.to(dtype)


def some_tokens(B: int, T: int, vocab: int = 97, seed: int = 1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_latent_dim": None, "n_shared": 0}, {"tie_embeddings": True, "n_mtp": 2}],
    ids=str,
)
def test_these_matrices_are_exported_as_codes_and_nothing_else(changes):
    model = fp8.Transformer(config(**changes))
    state = dict(fp8.export_tensors(model))
    coded = coded_names(model.config)
    assert {n for n, t in state.items() if t.dtype == E4M3} == {
        f"{name}.weight" for name in coded
    }
    assert {n for n in state if n.endswith("scale_inv")} == {
        f"{name}.weight_scale_inv" for name in coded
    }
    assert {t.dtype for n, t in state.items() if t.dtype != E4M3} == {torch.float32}
    for part in ("embed_tokens", "norm", "mlp.gate.weight", "e_score_correction_bias"):
        assert any(part in name for name in state), part
    assert any("eh_proj" in name for name in state)
    assert ("lm_head.weight" in state) != model.config.tie_embeddings


def test_a_pass_has_these_products_in_fp8_and_no_other(monkeypatch):
    """The operator of attention, the router, the head and the MTP's proj have none."""
    real, shapes = fp8.scaled_product, []

    def watched(a, b):
        shapes.append(tuple(b.codes.shape))
        assert a.block == TILE and b.block == SQUARE
        return real(a, b)

    monkeypatch.setattr(fp8, "scaled_product", watched)
    model, c = trained(), trained().config
    with torch.no_grad():
        model.predict_ahead(some_tokens(2, 9))
    attention = [(c.q_latent_dim, c.dim), (3 * 80, c.q_latent_dim)]
    attention += [(c.latent_dim + 20, c.dim), (3 * 116, c.latent_dim), (c.dim, 3 * 56)]

    def three(width):
        return [(width, c.dim)] * 2 + [(c.dim, width)]

    mixture = three(192) * 5  # four experts, all of them active, and a shared one
    layers = [three(260), mixture, mixture]
    assert shapes == [s for layer in layers for s in [*attention, *layer]]


def test_the_small_preset_has_two_blocks_of_everything():
    grids = {
        name: tuple(tensor.shape)
        for name, tensor in fp8.export_tensors(fp8.Transformer(fp8.TINY))
        if name.endswith("_scale_inv")
    }
    assert len(grids) == len(coded_names(fp8.TINY))
    for name, grid in grids.items():
        assert min(grid) >= 2, name


@remember
def saved_folder() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="ch07-"))
    trained().save_pretrained(folder)
    return folder


def read(folder=None, **asked):
    return fp8.Transformer.from_pretrained(folder or saved_folder(), **asked)


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "float": lambda m: m.bfloat16().float(),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_reaches_codes_or_scales(cast):
    model, before = read(), copy.deepcopy(read().state_dict())
    kinds = {name: type(p) for name, p in model.named_parameters()}
    CASTS[cast](model)
    wanted = {"float": "float32", "half": "float16", "double": "float64"}
    wanted = getattr(torch, wanted.get(cast, "bfloat16"))
    after = model.state_dict()
    assert list(after) == list(before)
    coded = 0
    for name, old in before.items():
        kept = old.dtype == E4M3 or name.endswith(("scale", "router.bias"))
        if kept:
            same(after[name], old)
            coded += old.dtype == E4M3
        else:
            assert after[name].dtype == wanted, name
    assert coded == 3 * 5 + 3 + 2 * 3 + 2 * 2  # attention, dense, shared, experts
    for name, parameter in model.named_parameters():
        assert type(parameter) is kinds[name]
        assert parameter.requires_grad == (parameter.dtype != E4M3)
    logits = model(some_tokens(1, 7))
    assert logits.dtype == wanted and logits.isfinite().all()
    moved = model.to("meta").state_dict()
    assert {n: t.dtype for n, t in moved.items()} == {
        n: t.dtype for n, t in after.items()
    }


def test_master_copies_are_cast_as_any_weight():
    model = copy.deepcopy(trained()).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(some_tokens(1, 5)).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(tmp_path):
    ours = trained(tie_embeddings=True)
    assert ours.head.weight is ours.embed.weight
    ours.save_pretrained(tmp_path)
    for asked in ({}, {"dequantize": True}, {"dtype": torch.bfloat16}):
        again = read(tmp_path, **asked)
        assert again.head.weight is again.embed.weight
        again.double()
        assert again.head.weight is again.embed.weight
        assert again.embed.weight.dtype == torch.float64
    same(read(tmp_path)(some_tokens(1, 9)), ours(some_tokens(1, 9)))


# --- attention, naive and absorbed ----------------------------------------------------

FORMS = [fp8.attend_absorb_k, fp8.attend_absorb_kv, fp8.attend_latent_cache]


def met(model, tokens):
    """Queries and latents (normed, rotated) of the first layer, and its module."""
    block, position = model.blocks[0], torch.arange(tokens.shape[1])
    rope = fp8.rope_table(position, model.config)
    x = block.attention_norm(model.embed(tokens))
    return block.attention.queries(x, rope), block.attention.latents(x, rope), block


@torch.no_grad()
def test_dequantised_the_four_forms_agree():
    model = read(dtype=torch.float64, dequantize=True)
    q, kv, block = met(model, some_tokens(2, 40))
    w_up = block.attention.wkv_up.weight.unflatten(0, (3, -1))
    naive = fp8.attend_naive(q, kv, w_up, model.config.softmax_scale)
    assert naive.abs().max() > 0.5 and naive.dtype == torch.float64
    for form in FORMS:
        equal(form(q, kv, w_up, model.config.softmax_scale), naive, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["trained", "read"])
def test_in_fp8_the_absorbed_forms_are_off_by_the_latents_codes(kind):
    """They read the latents as they are, naive attention reads their codes: 3 %.

    Without that one rounding of the latents the forms agree as they do in float32.
    """
    model = trained() if kind == "trained" else read()
    q, kv, block = met(model, some_tokens(2, 40))
    layer, scale = block.attention.wkv_up, model.config.softmax_scale
    w_up = layer.dense_weight().unflatten(0, (3, -1))
    naive = fp8.attend_naive(q, kv, w_up, scale, expand=layer)
    C = model.config.latent_dim
    coded = fp8.dequantize(fp8.quantize(kv[..., :C].flatten(0, 1), TILE))
    coded = torch.cat([coded.view_as(kv[..., :C]), kv[..., C:]], dim=2)
    for form in FORMS:
        absorbed = form(q, kv, w_up, scale)
        off = (absorbed - naive).norm() / naive.norm()
        assert 0.01 < off < 0.04, off
        near(form(q, coded, w_up, scale), naive, 1e-5)


# --- the cache ------------------------------------------------------------------------


def in_chunks(model, tokens, bounds):
    """The logits of `tokens` read in pieces."""
    cache, parts = model.new_cache(*tokens.shape), []
    for start, end in pairwise(bounds):
        parts.append(model(tokens[:, start:end], cache=cache))
    return torch.cat(parts, 1)


def rms(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_each_token_has_codes_of_its_own():
    """So a chunk has, to the bit, the codes and scales that it has in a full pass."""
    x = spread(40, 300)
    q = fp8.quantize(x, TILE)
    for start, end in pairwise([0, 1, 2, 17, 40]):
        part = fp8.quantize(x[start:end], TILE)
        same(part.codes, q.codes[start:end])
        same(part.scale, q.scale[start:end])


@pytest.mark.parametrize(
    "bounds", [[0, 1, 2, 3, 30], [0, 17, 30], [0, 29, 30]], ids=str
)
@torch.no_grad()
def test_a_cache_read_naively_is_the_full_pass(monkeypatch, bounds):
    """Codes are of single tokens, so only sums in another order differ.

    A difference that moves a number over the middle between two codes grows to a step
    of theirs, in few places: so the mean square is bounded, and not the largest.
    """
    monkeypatch.setattr(fp8, "absorption_pays", lambda *_: False)
    for model in (trained(), read()):
        tokens = some_tokens(2, 30)
        full = model(tokens)
        assert rms(in_chunks(model, tokens, bounds), full) < 5e-3


@torch.no_grad()
def test_a_cache_read_absorbed_is_within_the_tolerance_of_fp8():
    tokens = some_tokens(2, 30)
    stepwise = in_chunks(read(), tokens, range(31))
    off = rms(stepwise, read()(tokens))
    assert 1e-3 < off < fp8.FP8_TOLERANCE, off
    same(in_chunks(trained(), tokens, range(31)), stepwise)
    # Dequantised there is no such difference.
    plain = read(dequantize=True)
    near(in_chunks(plain, tokens, range(31)), plain(tokens), 2e-5)


@torch.no_grad()
def test_no_position_sees_a_later_one():
    """To the bit: neither tiles nor experts mix tokens."""
    tokens = some_tokens(1, 24)
    for model in (trained(), read()):
        logits, ahead = model(tokens), model.predict_ahead(tokens)[0]
        for t in (0, 9, 23):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % 97
            moved = model(other)
            same(moved[:, :t], logits[:, :t])
            assert (moved[:, t] != logits[:, t]).any()
            if 0 < t < 23:
                moved = model.predict_ahead(other)[0]
                same(moved[:, : t - 1], ahead[:, : t - 1])
                assert (moved[:, t - 1] != ahead[:, t - 1]).any()


# --- checkpoints ----------------------------------------------------------------------


def tensors_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder."""
    from safetensors.torch import save_file

    state = tensors_of(folder)
    change(state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def amend(folder: Path, **changes) -> None:
    """Change the config of a folder."""
    path = folder / "config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")


def copied(tmp_path: Path) -> Path:
    """A copy of the saved model, to be changed."""
    for path in saved_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def same_states(a, b) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        same(a[name], b[name])


V2 = {"model_type": "deepseek_v2", "renormalise": False, "n_mtp": 0}


@pytest.mark.parametrize(
    "changes",
    [{}, V2 | {"q_latent_dim": None}, {"fp8_power_of_two": True, "n_mtp": 2}],
    ids=str,
)
@torch.no_grad()
def test_what_is_saved_is_read_back_to_the_bit(tmp_path, changes):
    """Codes and scales are those that the master copies are computed with."""
    ours, tokens = trained(**changes), some_tokens(2, 40)
    ours.save_pretrained(tmp_path)
    again = read(tmp_path)
    assert again.config == replace(ours.config, fp8_codes=True) and not again.training
    same(again(tokens), ours(tokens))
    for mine, other in zip(
        again.predict_ahead(tokens), ours.predict_ahead(tokens), strict=True
    ):
        same(mine, other)
    for name, module in again.named_modules():
        if isinstance(module, fp8.FP8Linear):
            master = ours.get_submodule(name).weight
            q = by_loops(master, SQUARE, ours.config.fp8_power_of_two)
            same(module.weight, q.codes)
            same(module.scale, q.scale)
    again.save_pretrained(tmp_path / "again")
    first, second = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    for name in first:
        same(first[name], second[name])
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    expected = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    expected |= {"weight_block_size": [128, 128]}
    if ours.config.fp8_power_of_two:
        expected["scale_fmt"] = "ue8m0"
    assert written["quantization_config"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dequantised_it_is_code_times_scale(dtype):
    """Every block by itself, rounded once more to the asked dtype."""
    found, plain = tensors_of(saved_folder()), read(dtype=dtype, dequantize=True)
    assert not plain.config.fp8 and not plain.config.fp8_codes
    state = dict(fp8.export_tensors(plain))
    assert {t.dtype for n, t in state.items() if "correction" not in n} == {dtype}
    for name in coded_names(plain.config):
        codes = found[f"{name}.weight"]
        q = fp8.Quantized(codes, found[f"{name}.weight_scale_inv"], SQUARE)
        same(state[f"{name}.weight"], exact(q).float().to(dtype))
    assert not any(name.endswith("scale_inv") for name in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_fp8_the_asked_dtype_is_that_of_all_the_rest(dtype):
    """Codes and scales are read as they stand in the file, biases in float32."""
    model, found = read(dtype=dtype), tensors_of(saved_folder())
    for name, tensor in fp8.export_tensors(model):
        if tensor.dtype == E4M3 or name.endswith(("_scale_inv", "correction_bias")):
            same(tensor, found[name])
        else:
            same(tensor, found[name].to(dtype))


# Every side is 128 or less, or a multiple of it: what Hugging Face reads on a CPU.
SUITS = {"dim": 256, "n_heads": 4, "q_latent_dim": 128, "latent_dim": 96}
SUITS |= {"head_dim": 32, "rope_dim": 32, "value_dim": 32, "ffn_dim": 384}
SUITS |= {"expert_ffn_dim": 128}


def theirs_read(hf, folder: Path):
    asked = {"quantization_config": hf.FineGrainedFP8Config(dequantize=True)}
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **asked
    )
    return theirs.float().eval()


@pytest.mark.parametrize("changes", [{}, {"fp8_power_of_two": True}, V2], ids=str)
@torch.no_grad()
def test_hugging_face_reads_our_file(hf, tmp_path, changes):
    """The same weights to the bit; the logits as in float32."""
    ours, tokens = trained(**SUITS | changes), some_tokens(2, 60)
    ours.save_pretrained(tmp_path)
    plain, theirs = read(tmp_path, dequantize=True), theirs_read(hf, tmp_path)
    found = theirs.state_dict()
    for name, tensor in fp8.stack_experts(dict(fp8.export_tensors(plain))).items():
        if f".layers.{plain.config.n_layers}." not in name:  # of an MTP module
            same(found[name].float(), tensor)
    logits = theirs(input_ids=tokens).logits
    assert logits.abs().max() > 0.2
    near(plain(tokens), logits)
    assert rms(read(tmp_path)(tokens), logits) < fp8.FP8_TOLERANCE


@torch.no_grad()
def test_576_rows_are_read_here(hf, tmp_path):
    """As of DeepSeek-V3's kv_a_proj_with_mqa; Hugging Face refuses them on a CPU."""
    wide = SUITS | {"latent_dim": 512, "rope_dim": 64, "head_dim": 64}
    ours, tokens = trained(**wide), some_tokens(1, 20)
    ours.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors_of(tmp_path)[f"{name}_scale_inv"].shape == (5, 2)
    assert tensors_of(tmp_path)[name].shape == (576, 256)
    same(read(tmp_path)(tokens), ours(tokens))
    q = fp8.quantize(ours.blocks[0].attention.wkv_down.weight, SQUARE)
    same(
        read(tmp_path, dequantize=True).blocks[0].attention.wkv_down.weight.data,
        exact(q).float(),
    )
    with pytest.raises((RuntimeError, ValueError)):
        theirs_read(hf, tmp_path)


def in_shards(first: str):
    """Scales in one file and weights in another; `first` says which is read first."""

    def form(folder: Path) -> None:
        from safetensors.torch import save_file

        state = tensors_of(folder)
        (folder / "model.safetensors").unlink()
        where = {}
        for name in state:
            is_first = name.endswith("_scale_inv") == (first == "scales")
            where[name] = f"part-{1 if is_first else 2}.safetensors"
        for file in set(where.values()):
            save_file({n: state[n] for n in state if where[n] == file}, folder / file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")

    return form


def as_bin(first: str):
    """One file of torch.save; `first` says what stands at its head."""

    def form(folder: Path) -> None:
        state = tensors_of(folder)
        (folder / "model.safetensors").unlink()
        names = sorted(
            state, key=lambda n: n.endswith("_scale_inv") == (first == "scales")
        )
        state = {name: state[name] for name in names[::-1]}
        torch.save(state, folder / "pytorch_model.bin")

    return form


FEW = {"n_layers": 1, "n_dense_layers": 0, "n_mtp": 0, "n_experts": 2, "n_active": 2}


@pytest.mark.parametrize("first", ["scales", "weights"])
@pytest.mark.parametrize("form", [in_shards, as_bin])
def test_scales_may_stand_anywhere(tmp_path, form, first):
    trained(**FEW).save_pretrained(tmp_path)
    kinds = [{}, {"dequantize": True}]
    expected = [read(tmp_path, **asked) for asked in kinds]
    form(first)(tmp_path)
    for asked, model in zip(kinds, expected, strict=True):
        same_states(read(tmp_path, **asked), model)


def test_our_own_tensors_load_in_any_order():
    """`load_tensors` in FP8 wants no order, only `dequantized` does."""
    state = list(tensors_of(saved_folder()).items())
    for order in (state, state[::-1]):
        model = fp8.Transformer(read().config)
        fp8.load_tensors(model, order)
        same_states(model, read())


EXPONENTS = {
    "float8_e8m0fnu": lambda s: s.to(torch.float8_e8m0fnu),
    "uint8": lambda s: (s.log2() + 127).to(torch.uint8),
}


@pytest.mark.parametrize("kind", EXPONENTS)
@torch.no_grad()
def test_scales_of_one_byte_are_read(hf, tmp_path, kind):
    """The exponent of two plus 127; Hugging Face reads the same."""
    ours, tokens = trained(**SUITS | {"fp8_power_of_two": True}), some_tokens(1, 30)
    ours.save_pretrained(tmp_path)
    plain = read(tmp_path, dequantize=True)

    def change(state: dict) -> None:
        for name in [n for n in state if n.endswith("_scale_inv")]:
            state[name] = EXPONENTS[kind](state[name])
            assert state[name].dtype.itemsize == 1

    rewrite(tmp_path, change)
    same(read(tmp_path)(tokens), ours(tokens))
    again = read(tmp_path, dequantize=True)
    same_states(again, plain)
    near(again(tokens), theirs_read(hf, tmp_path)(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", ["uint8", "float8_e8m0fnu"])
def test_every_exponent_is_its_power_of_two(kind):
    """255 is no number in this format."""
    codes = torch.arange(255, dtype=torch.uint8)
    stored = codes if kind == "uint8" else codes.view(torch.float8_e8m0fnu)
    by_hand = torch.tensor([2.0 ** (code - 127) for code in range(255)])
    same(fp8.scale_from_file(stored), by_hand)


UP = "model.layers.1.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
GRID = (3, 3)  # of kv_b_proj: 3 * 116 rows, 264 columns


def drop(name: str):
    return lambda state: state.pop(name)


def put(name: str, make):
    return lambda state: state.update({name: make(state.get(name))})


# A change, and what is said of it in FP8 and of it dequantised (None: it is read).
SPOILT = {
    "no scale": (drop(f"{UP}_scale_inv"), f"missing.*{UP}_scale_inv", rf"{UP} is FP8"),
    "no scale of an expert": (
        drop(f"{EXPERT}_scale_inv"),
        f"missing.*{EXPERT}_scale_inv",
        rf"{EXPERT} is FP8.*without scales \(2, 3\)",
    ),
    "no weight": (drop(UP), f"missing.*{UP}$", rf"scales without FP8 weights: {UP}$"),
    "neither": (
        lambda s: [s.pop(UP), s.pop(f"{UP}_scale_inv")],
        f"missing.*{UP}",
        f"missing.*{UP}$",
    ),
    "a row of scales more": (
        put(f"{UP}_scale_inv", lambda s: torch.cat([s, s[:1]])),
        rf"{UP}_scale_inv.*\(4, 3\).*\(3, 3\)",
        rf"{UP} is FP8, without scales \(3, 3\)",
    ),
    "one scale": (
        put(f"{UP}_scale_inv", lambda s: s[:1, :1]),
        rf"{UP}_scale_inv.*\(1, 1\).*\(3, 3\)",
        rf"{UP} is FP8, without scales \(3, 3\)",
    ),
    "flat scales": (
        put(f"{UP}_scale_inv", lambda s: s.flatten()),
        rf"{UP}_scale_inv.*\(9,\)",
        rf"{UP} is FP8, without scales",
    ),
    "a weight in bfloat16": (
        put(UP, lambda w: w.bfloat16()),
        rf"{UP} is torch.bfloat16, where torch.float8_e4m3fn is needed",
        rf"scales without FP8 weights: {UP}$",
    ),
    "a weight in bfloat16 without scales": (
        lambda s: [s.pop(f"{UP}_scale_inv"), s.update({UP: s[UP].bfloat16()})],
        rf"{UP} is torch.bfloat16, where torch.float8_e4m3fn is needed|missing",
        None,
    ),
    "codes of another kind": (
        put(UP, lambda w: w.float().to(torch.float8_e5m2)),
        rf"{UP} is torch.float8_e5m2",
        rf"scales without FP8 weights: {UP}$",
    ),
    "a head in FP8": (
        lambda s: s.update(
            {
                "lm_head.weight": s["lm_head.weight"].to(E4M3),
                "lm_head.weight_scale_inv": torch.ones(1, 3),
            }
        ),
        "lm_head",
        r"layers\.2\.shared_head\.head\.weight should repeat",
    ),
    "a router in FP8 without scales": (
        put("model.layers.1.mlp.gate.weight", lambda w: w.to(E4M3)),
        "mlp.gate.weight is torch.float8_e4m3fn, where torch.float32 is needed",
        "mlp.gate.weight is FP8, without scales",
    ),
    "a scale of no weight": (
        put("model.norm.weight_scale_inv", lambda _: torch.ones(1, 1)),
        "unexpected.*model.norm.weight_scale_inv",
        "scales without FP8 weights: model.norm.weight$",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_loading_is_strict(tmp_path, case):
    change, in_fp8, dequantised = SPOILT[case]
    rewrite(copied(tmp_path), change)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*?{in_fp8}"):
        read(tmp_path)
    if dequantised is None:
        read(tmp_path, dequantize=True)
        return
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*?{dequantised}"):
        read(tmp_path, dequantize=True)


PUBLISHED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
PUBLISHED |= {"weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"scale_fmt": "ue4m3"}, "scale_fmt is 'ue4m3'"),
    ],
    ids=str,
)
def test_another_quantisation_is_refused(tmp_path, changes, named):
    amend(copied(tmp_path), quantization_config=PUBLISHED | changes)
    for asked in ({}, {"dequantize": True}):
        with pytest.raises(
            ValueError, match=f"{tmp_path.name}.*quantization's {named}"
        ):
            read(tmp_path, **asked)


def test_what_a_config_says_of_fp8():
    """Also what it leaves out, and what is said beside it."""
    base = replace(config(), fp8=False).to_hf()
    assert "quantization_config" not in base and not fp8.Config.from_hf(base).fp8
    for asked, power_of_two in [
        (PUBLISHED, False),
        ({"quant_method": "fp8"}, False),
        (PUBLISHED | {"scale_fmt": "ue8m0"}, True),
        (PUBLISHED | {"scale_fmt": None, "modules_to_not_convert": None}, False),
    ]:
        c = fp8.Config.from_hf(base | {"quantization_config": asked})
        assert c == config(fp8_power_of_two=power_of_two)
    with pytest.raises(ValueError, match="fp8_codes are for a model that computes"):
        config(fp8=False, fp8_codes=True)


def test_a_file_of_codes_whose_config_does_not_say_so_is_refused(tmp_path):
    amend(copied(tmp_path), quantization_config=None)
    with pytest.raises(ValueError, match=r"unexpected tensor .*_scale_inv"):
        read(tmp_path)


@torch.no_grad()
def test_rotary_rows_in_two_blocks_are_read_dequantised_alone(tmp_path):
    """Five heads of 60 + 20 rows: those of the last, 380 to 399, lie in two blocks."""
    trained(n_heads=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert re.search(r"q_b_proj\.weight: the rotary rows .* two blocks of 128", message)
    assert "read it with dequantize=True" in message and "\n" not in message
    plain, found = read(tmp_path, dequantize=True), tensors_of(tmp_path)
    name = "model.layers.0.self_attn.q_b_proj.weight"
    q = fp8.Quantized(found[name], found[f"{name}_scale_inv"], SQUARE)
    rows = exact(q).float().unflatten(0, (5, 80))
    mine = plain.blocks[0].attention.wq_up.weight.unflatten(0, (5, 80))
    same(mine[:, :60].contiguous(), rows[:, :60].contiguous())
    order = [*range(60, 80, 2), *range(61, 80, 2)]  # first of each pair, then second
    same(mine[:, 60:].contiguous(), rows[:, order].contiguous())


def test_rotary_rows_of_codes_are_put_in_our_order():
    """Within a block, so that scales stay."""
    found, model = tensors_of(saved_folder()), read()
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    layer = model.blocks[1].attention.wkv_down
    order = [*range(264), *range(264, 284, 2), *range(265, 284, 2)]
    same(layer.weight.data, found[name].view(torch.uint8)[order].view(E4M3))
    same(layer.scale, found[f"{name}_scale_inv"])


# Of matrices alone, almost: no embedding to speak of.
HEAVY = {"vocab_size": 8, "n_mtp": 0, "n_layers": 1, "n_dense_layers": 0}
HEAVY |= {"dim": 512, "expert_ffn_dim": 512, "n_experts": 8, "n_active": 2}


def nbytes(model) -> int:
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensor.nbytes for tensor in held.values())


def test_its_bytes_are_a_half_and_a_quarter(tmp_path):
    """In the file and in memory, but for scales, norms and routers: below 2 %."""
    ours = fp8.Transformer(config(**HEAVY))
    ours.save_pretrained(tmp_path)
    numbers = sum(p.numel() for p in ours.parameters())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert numbers < size < 1.02 * numbers
    sizes = {"codes": nbytes(read(tmp_path))}
    for dtype, ratio in [(torch.bfloat16, 0.5), (torch.float32, 0.25)]:
        plain = read(tmp_path, dtype=dtype, dequantize=True)
        plain.save_pretrained(tmp_path / "plain")
        wide = (tmp_path / "plain" / "model.safetensors").stat().st_size
        assert size / wide == pytest.approx(ratio, rel=0.02)
        assert sizes["codes"] / nbytes(plain) == pytest.approx(ratio, rel=0.02)


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from safetensors import safe_open
from chapters import find, load
fp8 = load(find("ch07"))

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

"""


def measured(code: str, *argv: object) -> list[int]:
    """The numbers that a process of its own prints; what it frees, it gives back."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code, ROOT / "tests", *map(str, argv)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},  # of glibc
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@needs_proc
def test_loading_needs_the_codes_and_one_tensor_more(tmp_path):
    """Not the expanded weights: those would take four times as much."""
    c = config(**HEAVY | {"dim": 1024, "expert_ffn_dim": 1024, "n_experts": 48})
    with torch.device("meta"):
        empty = fp8.Transformer(replace(c, fp8_codes=True))
    state = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in fp8.export_tensors(empty)
    }
    fp8.write_checkpoint(tmp_path, c.to_hf(), state.items())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 2**27
    code = """
fp8.Transformer.from_pretrained(sys.argv[3])  # imports what is imported on the way
before = status("VmRSS")
model = fp8.Transformer.from_pretrained(sys.argv[2])
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""
    peak, held = measured(code, tmp_path, saved_folder())
    assert held == pytest.approx(size, rel=0.02)
    assert held < peak + 2**22 and peak < held + 40 * 2**20, (peak, held)


# --- decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("n_mtp", [1, 2])
def test_greedy_speculation_is_greedy_generation(tmp_path, n_mtp):
    trained(n_mtp=n_mtp).save_pretrained(tmp_path)
    model, tokens = read(tmp_path), some_tokens(1, 7)
    with torch.no_grad():
        model.embed.weight.mul_(10)  # so that it does not say the same again and again
    expected = fp8.generate(model, tokens, 25, temperature=0)
    found, stats = fp8.speculate(model, tokens, 25)
    assert torch.equal(found, expected) and found.shape == (1, 32)
    assert len(set(found[0, 7:].tolist())) > 10
    assert stats.drafted > 10 and stats.passes + stats.accepted == 25
    ahead = model.predict_ahead(tokens)
    assert [a.shape for a in ahead] == [(1, 6 - k, 97) for k in range(n_mtp)]


def test_drafts_are_taken_where_modules_say_what_the_model_says():
    """All of them; the first pass has none, nor has the last, for a single token."""
    model = read()
    with torch.no_grad():
        model.head.weight.zero_()
    found, stats = fp8.speculate(model, some_tokens(1, 5), 12)
    assert (found[0, 5:] == 0).all()
    assert (stats.accepted, stats.drafted, stats.passes) == (5, 5, 7)


# --- the finished file ----------------------------------------------------------------


def published_names() -> dict[str, set[str]]:
    """The tensors of DeepSeek-V3's published files, by plain loops from its numbers."""
    D, F_, E_ = 7168, 2048, 256
    shapes = {"model.embed_tokens.weight": (129280, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (129280, D)
    coded: dict[str, tuple] = {}
    for i in range(62):  # 61 layers, and the MTP module behind them
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (D,)
        shapes[f"{layer}.self_attn.q_a_layernorm.weight"] = (1536,)
        shapes[f"{layer}.self_attn.kv_a_layernorm.weight"] = (512,)
        coded[f"{layer}.self_attn.q_a_proj"] = (1536, D)
        coded[f"{layer}.self_attn.q_b_proj"] = (128 * 192, 1536)
        coded[f"{layer}.self_attn.kv_a_proj_with_mqa"] = (576, D)
        coded[f"{layer}.self_attn.kv_b_proj"] = (128 * 256, 512)
        coded[f"{layer}.self_attn.o_proj"] = (D, 128 * 128)
        widths = {"mlp": 18432}
        if i >= 3:
            widths = {f"mlp.experts.{e}": F_ for e in range(E_)}
            widths["mlp.shared_experts"] = F_
            shapes[f"{layer}.mlp.gate.weight"] = (E_, D)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (E_,)
        for part, width in widths.items():
            coded[f"{layer}.{part}.gate_proj"] = (width, D)
            coded[f"{layer}.{part}.up_proj"] = (width, D)
            coded[f"{layer}.{part}.down_proj"] = (D, width)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"model.layers.61.{norm}.weight"] = (D,)
    shapes["model.layers.61.eh_proj.weight"] = (D, 2 * D)
    for name, (rows, columns) in coded.items():
        shapes[f"{name}.weight"] = (rows, columns)
        grid = (math.ceil(rows / 128), math.ceil(columns / 128))
        shapes[f"{name}.weight_scale_inv"] = grid
    return shapes


def test_this_file_names_every_tensor_of_the_published_model():
    """None missing, none left over, each of its shape and in codes or not."""
    with torch.device("meta"):
        model = fp8.Transformer(replace(fp8.DEEPSEEK_V3, fp8_codes=True))
    ours, published = fp8.hf_names(model), published_names()
    assert set(ours) == set(published)
    main = {name for name in ours if not name.startswith("model.layers.61.")}
    scales = {name for name in ours if name.endswith("_scale_inv")}
    assert len(main - scales) == 45_395 and len(main & scales) == 45_032
    biases = {name for name in main if name.endswith("e_score_correction_bias")}
    assert len(biases) == 58
    assert len(set(ours) - main - scales) == 5 + 257 * 3 + 4 + 2 + 4
    assert len(scales - main) == 5 + 257 * 3
    assert len(set(ours.values())) == len(ours)  # each has a place of its own
    numbers = 0
    for theirs, name in ours.items():
        whole, index = fp8.place(name)
        tensor = fp8.find(model, whole)[2]
        assert tuple(tensor.shape[len(index) :]) == published[theirs], theirs
        is_code = f"{theirs}_scale_inv" in ours
        assert tensor.dtype == (E4M3 if is_code else torch.float32), theirs
        numbers += math.prod(published[theirs]) * (is_code and theirs in main)
    assert numbers == 669_065_609_216
    # Only what is repeated for the MTP module is not among them.
    copies = {name for name, _ in fp8.mtp_copies(model)}
    assert copies == {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }


def test_the_preset_is_the_published_config():
    c = fp8.DEEPSEEK_V3
    assert c.fp8 and not c.fp8_power_of_two and not c.fp8_codes
    assert c.to_hf()["quantization_config"] == PUBLISHED
    assert fp8.Config.from_hf(c.to_hf()) == c
    for preset in (fp8.DEEPSEEK_V2, fp8.DEEPSEEK_V2_LITE):
        assert not preset.fp8 and "quantization_config" not in preset.to_hf()


# --- converting -----------------------------------------------------------------------


def llama_state(dtype=torch.bfloat16) -> dict:
    """Llama's names, with sides that are no multiples of 128."""
    state = {"model.embed_tokens.weight": random(50, 130), "lm_head.weight": None}
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, rows, columns in [
            *[(f"self_attn.{part}_proj", 130, 130) for part in "qko"],
            ("self_attn.v_proj", 65, 130),
            *[("mlp.gate_proj", 301, 130), ("mlp.up_proj", 301, 130)],
            ("mlp.down_proj", 130, 301),
        ]:
            state[f"{layer}.{name}.weight"] = spread(rows, columns, seed=i)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{norm}.weight"] = random(130)
        state[f"{layer}.self_attn.q_proj.bias"] = random(130)
    state["model.norm.weight"] = random(130)
    state["lm_head.weight"] = random(50, 130, seed=9)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_folder(folder: Path, state: dict, hf: dict, **more: str) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    for name, text in more.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def deepseek_folder(folder: Path) -> Path:
    """Our model in bfloat16, the biases of its routers in float32, as published."""
    plain = read(dtype=torch.bfloat16, dequantize=True)
    for router in plain.routers():
        router.bias += 1e-4 * random(len(router.bias))
    state = dict(fp8.export_tensors(plain)) | dict(fp8.mtp_copies(plain))
    hf = plain.config.to_hf() | {"torch_dtype": "bfloat16"}
    return write_folder(folder, {n: t.contiguous() for n, t in state.items()}, hf)


def llama_folder(folder: Path) -> Path:
    hf = {"model_type": "llama", "hidden_size": 130, "dtype": "bfloat16"}
    return write_folder(
        folder, llama_state(), hf, tokenizer__json="{}", vocab__tiktoken="YQ== 0"
    )


@pytest.mark.parametrize("kind", [deepseek_folder, llama_folder])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32])
def test_converted_there_and_back(tmp_path, kind, to):
    """Codes by loops, and what they stand for; the rest as it was."""
    source = kind(tmp_path / "source")
    before, config_before = tensors_of(source), (source / "config.json").read_text()
    fp8.convert(source, tmp_path / "eight", E4M3)
    found, back = tensors_of(tmp_path / "eight"), {}
    fp8.convert(tmp_path / "eight", tmp_path / "back", to)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == before.keys()
    if kind is deepseek_folder:
        coded = {f"{name}.weight" for name in coded_names(read().config)}
    else:
        coded = {n for n in before if re.search(r"_proj\.weight$", n)}
        assert len(coded) == 14
    assert found.keys() == before.keys() | {f"{name}_scale_inv" for name in coded}
    for name, tensor in before.items():
        if name in coded:
            q = by_loops(tensor, SQUARE)
            same(found[name], q.codes)
            same(found[f"{name}_scale_inv"], q.scale)
            same(back[name], exact(q).float().to(to))
        else:
            same(found[name], tensor)
            is_bias = "correction_bias" in name
            same(back[name], tensor if is_bias else tensor.to(to))
    assert before == {} or (source / "config.json").read_text() == config_before
    at_first = json.loads(config_before)
    written = json.loads((tmp_path / "eight/config.json").read_text())
    assert written == at_first | {"quantization_config": PUBLISHED}
    at_last = json.loads((tmp_path / "back/config.json").read_text())
    at_first.pop("torch_dtype", None)
    assert at_last == at_first | {"dtype": str(to).removeprefix("torch.")}
    others = {"model.safetensors", "config.json"}
    for folder in ("eight", "back"):
        files = {p.name for p in (tmp_path / folder).iterdir()} - others
        assert files == {p.name for p in source.iterdir()} - others
        for name in files:
            assert (tmp_path / folder / name).read_text() == (source / name).read_text()


@torch.no_grad()
def test_a_converted_model_is_one_that_computes_in_fp8(tmp_path):
    source, tokens = deepseek_folder(tmp_path / "source"), some_tokens(1, 20)
    fp8.convert(source, tmp_path / "eight", E4M3)
    model, plain = read(tmp_path / "eight"), read(source)
    assert model.config == replace(plain.config, fp8=True, fp8_codes=True)
    assert rms(model(tokens), plain(tokens)) < fp8.FP8_TOLERANCE
    fp8.convert(tmp_path / "eight", tmp_path / "back", torch.float32)
    same(
        read(tmp_path / "eight", dequantize=True)(tokens),
        read(tmp_path / "back")(tokens),
    )


def test_a_sharded_source_is_converted_to_one_file(tmp_path):
    source = llama_folder(tmp_path / "source")
    fp8.convert(source, tmp_path / "one", E4M3)
    in_shards("scales")(source)
    stale = tmp_path / "two" / "model.safetensors.index.json"
    stale.parent.mkdir()
    stale.write_text('{"weight_map": {"a": "gone.safetensors"}}', encoding="utf-8")
    fp8.convert(source, tmp_path / "two", E4M3)
    names = [{p.name for p in (tmp_path / f).iterdir()} for f in ("one", "two")]
    assert names[0] == names[1] and "model.safetensors.index.json" not in names[0]
    first, second = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert first.keys() == second.keys()
    for name in first:
        same(first[name], second[name])


def test_a_conversion_that_makes_no_sense_is_refused(tmp_path):
    source = llama_folder(tmp_path / "source")
    fp8.convert(source, tmp_path / "eight", E4M3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = llama_folder(tmp_path / "other")
    amend(other, quantization_config={"quant_method": "gptq"})
    for folder, out, dtype, named in [
        (source, source, E4M3, "--out .*source is the checkpoint itself"),
        (source, source / ".." / "source", E4M3, "is the checkpoint itself"),
        (tmp_path / "eight", tmp_path / "new", E4M3, "eight is in FP8 already"),
        (source, tmp_path / "new", torch.bfloat16, "source is not in FP8 already"),
        (other, tmp_path / "new", torch.bfloat16, "quant_method is 'gptq'"),
    ]:
        with pytest.raises(ValueError, match=named):
            fp8.convert(folder, out, dtype)
    with pytest.raises(FileNotFoundError, match="nothing is no folder"):
        fp8.convert(tmp_path / "nothing", tmp_path / "new", E4M3)
    assert not (tmp_path / "new").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("after", [3, 14, 15, 20])
def test_an_interrupted_conversion_leaves_nothing_half_written(
    monkeypatch, tmp_path, after
):
    """In the first look at 14 matrices, or while the file is written."""
    source, real, calls = llama_folder(tmp_path / "source"), fp8.quantize, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fp8, "quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fp8.convert(source, tmp_path / "out", E4M3)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != source]
    fp8.convert(source, tmp_path / "out", E4M3)
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fp8.convert(source, tmp_path / "out", E4M3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@needs_proc
def test_converting_needs_the_memory_of_a_tensor_however_many_there_are(tmp_path):
    """Of the largest, in float32, a few times over; four more of them change nothing.

    Kept, what they become would take 4 or, expanded, 8 MiB each.
    """
    large = spread(2048, 2048).bfloat16()
    hf = {"model_type": "llama"}
    for folder, n in (("two", 2), ("six", 6)):
        state = llama_state()
        for i in range(n):
            state[f"model.layers.{i + 5}.mlp.up_proj.weight"] = large.clone()
        write_folder(tmp_path / folder, state, hf)
    code = """
root, largest = sys.argv[2], 2048 * 2048 * 4
for name in ("two", "six"):
    before = status("VmRSS")
    fp8.convert(f"{root}/{name}", f"{root}/{name}-8", fp8.FP8)
    fp8.convert(f"{root}/{name}-8", f"{root}/{name}-16", torch.bfloat16)
    print((status("VmHWM") - before) * 100 // largest)
"""
    two, six = measured(code, tmp_path)  # in hundredths of a tensor
    assert 100 < two < 600 and six < two + 50, (two, six)


# --- what chapter 6 had ---------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, V2, V2 | {"q_latent_dim": None, "n_groups": 1, "n_active_groups": 1}],
)
def test_without_fp8_every_stage_equals_hugging_face(hf, monkeypatch, capsys, changes):
    c = replace(fp8.small_config(), **changes)
    monkeypatch.setattr(fp8, "small_config", lambda: c)
    rows = fp8.verify()
    assert len(rows) == 3 + c.n_layers + c.n_mtp
    assert (
        fp8.show_distances(rows, torch.float32) and "Equal" in capsys.readouterr().out
    )
    assert not any(isinstance(m, fp8.FP8Linear) for m in fp8.Transformer(c).modules())


def test_verify_fp8_shows_what_rounding_activations_costs(monkeypatch, capsys):
    rows = fp8.verify_fp8()
    assert [row["stage"] for row in rows][-3:] == ["logits", "2 ahead", "3 ahead"]
    assert rows[0]["rms"] == 0  # the embedding
    assert all(0.005 < row["rms"] < fp8.FP8_TOLERANCE for row in rows[1:])
    assert fp8.show_fp8(rows) and "Within 10%" in capsys.readouterr().out
    assert not fp8.show_fp8([*rows[:-1], rows[-1] | {"rms": 0.11}])
    assert "NOT within" in capsys.readouterr().out
    monkeypatch.setattr(fp8, "FP8_MAX", 4.48)  # then codes have seven bits fewer range
    assert max(row["rms"] for row in fp8.verify_fp8()) > rows[-1]["rms"]


BYTES = fp8.byte_tokenizer()
SENTENCE = "the cat sat on the mat and the dog ran to the red barn with a bone"
WORDS = SENTENCE.split()
MINI = replace(
    fp8.TINY,
    vocab_size=257,
    max_seq_len=64,
    dim=136,
    n_heads=2,
    q_latent_dim=132,
    latent_dim=140,
    ffn_dim=150,
    expert_ffn_dim=130,
    n_active=2,
    eos_id=256,
)
RECIPE = fp8.Recipe(steps=6, batch_size=4, warmup=2, eval_every=3, seq_len=16)


def tiny_text(n: int = 60, seed: int = 0) -> str:
    """Documents of a few predictable sentences."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        first = int(torch.randint(len(WORDS), (), generator=generator))
        documents.append(" ".join((WORDS * 3)[first : first + 12]))
    return f"\n{fp8.END_OF_TEXT}\n".join(documents)


def new_training(recipe=RECIPE, seed: int = 0, dtype=torch.float32, c=MINI):
    """A fresh run on the tiny text."""
    data, tested = (
        fp8.Batches(part, BYTES, recipe.seq_len, recipe.batch_size, recipe.seed)
        for part in fp8.split_documents(tiny_text())
    )
    torch.manual_seed(seed)
    model = fp8.Transformer(c)
    return fp8.Training(model, data, tested, recipe, dtype, source="t")


def test_training_in_fp8_learns_a_tiny_text(tmp_path):
    recipe = replace(RECIPE, steps=40, warmup=5, eval_every=40)
    training = new_training(recipe)
    assert fp8.train(training, BYTES, tmp_path)
    first, last = training.log[0], training.log[-1]
    # ln 257 is 5.55; of λ, 0.3, come 15/16 on top.
    assert 6.8 < first["loss"] < 7.4 and last["held_out"] < 3.0, last
    # The loss of what is read back is that of what was trained.
    training.model.eval()
    rows = next(iter(training.held_out.all()))
    with torch.no_grad():
        same(read(tmp_path)(rows[:, :-1]), training.model(rows[:, :-1]))


def test_gradients_reach_every_parameter():
    model = fp8.Transformer(config())
    fp8.randomise(model)
    fp8.loss(model.train(), some_tokens(2, 20)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
        assert parameter.grad.dtype == torch.float32


def test_training_in_bfloat16_takes_the_same_way():
    recipe = replace(RECIPE, steps=8, eval_every=8, lr=5e-4)
    exact_, low = new_training(recipe), new_training(recipe, dtype=torch.bfloat16)
    for training in (exact_, low):
        assert fp8.train(training, BYTES)
    for a, b in zip(exact_.log, low.log, strict=True):
        assert a["loss"] != b["loss"] and abs(a["loss"] - b["loss"]) < 0.2
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Master copies, biases, λ, optimizer and log, to the bit."""

    def bits(training) -> dict:
        log = [{k: v for k, v in r.items() if k != "seconds"} for r in training.log]
        parts = {"model": training.model, "optimizer": training.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        return copy.deepcopy(state | {"log": log, "random": torch.get_rng_state()})

    through = new_training()
    assert fp8.train(through, BYTES)
    expected = bits(through)
    half = new_training()
    while half.step < 3:
        row = half.take_step()
    row["held_out"] = fp8.held_out_loss(half)
    half.save(tmp_path, BYTES)
    torch.rand(77)  # whatever happens in between
    again = new_training(seed=99)
    again.restore(fp8.read_torch(tmp_path / "checkpoint.pt"))
    assert fp8.train(again, BYTES, tmp_path)
    equal(bits(again), expected, 0)


def test_what_is_read_in_codes_is_not_trained():
    """Codes take no gradient; what was not coded does."""
    model = read().train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(model.get_parameter(name).dtype == E4M3 for name in names)
    assert {"embed.weight", "head.weight", "mtp.0.proj.weight"} <= names
    assert {"blocks.1.ffn.router.weight", "norm.weight"} <= names


# --- the command line -----------------------------------------------------------------


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """The exit code of `main` and what it wrote to stdout and stderr."""
    capsys.readouterr()
    try:
        code = fp8.main([str(part) for part in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tiny corpus, and MINI as a preset."""
    monkeypatch.setattr(fp8, "MINI", MINI, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.txt"
    path.write_text(tiny_text(), encoding="utf-8", newline="\n")
    return path


TRAIN = ["train", "--tokenizer", "bytes", "--preset", "MINI", "--batch-size", 4]
TRAIN += ["--warmup", 2, "--eval-every", 2, "--steps", 4, "--seq-len", 16]


def test_the_commands_in_a_row(hf, capsys, corpus, tmp_path):
    """Train, resume, verify, generate, convert to bfloat16 and back, train further."""
    out = tmp_path / "run"
    code, said, err = run(capsys, *TRAIN, "--data", corpus, "--out", out)
    assert (code, err) == (0, "") and "step     4 of 4" in said
    code, said, err = run(capsys, "train", "--out", out, "--resume", "--steps", 6)
    assert (code, err) == (0, "") and "step     6 of 6" in said
    assert read(out).config == replace(MINI, fp8_codes=True)
    code, said, err = run(capsys, "verify", "--model", out)
    assert (code, err) == (0, "")
    assert "Equal within" in said and "Within 10%" in said and "(composed)" in said
    asked = ["generate", "--prompt", "the", "--max-new-tokens", 9, "--temperature", 0]
    code, first, err = run(capsys, *asked, "--model", out)
    assert (code, err) == (0, "") and first.startswith("the")
    code, said, err = run(capsys, *asked, "--model", out, "--speculate")
    assert code == 0 and said == first and "drafts accepted" in err
    code, said, err = run(capsys, *asked, "--model", out, "--dtype", "bfloat16")
    assert (code, err) == (0, "") and said.startswith("the")
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    convert = ["convert", "--model", out, "--out", wide, "--to", "float32"]
    code, said, err = run(capsys, *convert)
    size = (wide / "model.safetensors").stat().st_size
    assert (code, err) == (0, "") and f"{size:,} bytes of weights in float32" in said
    assert not read(wide).config.fp8
    code, said, err = run(capsys, "verify", "--model", wide)
    assert (code, err) == (0, "") and "Within" not in said
    code, said, err = run(capsys, "convert", "--model", wide, "--out", narrow)
    assert (code, err) == (0, "") and "bytes of weights in fp8" in said
    code, _, err = run(capsys, *asked, "--model", narrow)
    assert (code, err) == (0, "")
    for argv in (convert, ["convert", "--model", out, "--out", out, "--to", "float32"]):
        argv = [*argv[:2], narrow, *argv[3:]] if argv is convert else argv
        if argv[2] is narrow:
            argv[-1] = "fp8"
        code, said, err = run(capsys, *argv)
        assert code == 2 and err.count("\n") == 1 and said == ""
    further = ["train", "--init", out, "--data", corpus, "--lr", 1e-12, "--out"]
    further += [tmp_path / "second", "--steps", 1, "--weight-decay", 0, "--warmup", 0]
    code, _, err = run(capsys, *further, "--seq-len", 16)
    assert (code, err) == (0, "")
    # What codes stand for has these codes again; scales may be a rounding off.
    mine, other = read(tmp_path / "second"), read(out)
    assert mine.config == other.config
    for name, tensor in other.state_dict().items():
        found = mine.state_dict()[name].float()
        if "router.bias" not in name and name != "mtp_weight":
            torch.testing.assert_close(found, tensor.float(), rtol=1e-6, atol=1e-9)


def test_verify_alone_shows_both_tables(hf, capsys):
    code, said, err = run(capsys, "verify")
    assert (code, err) == (0, "") and "Equal within" in said and "Within 10%" in said
    assert said.index("Equal within") < said.index("Computing in FP8")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["verify", "--model", "nowhere/at/all"], "no folder with a model"),
        (["convert", "--model", "FOLDER"], "--out"),
        (["convert", "--model", "FOLDER", "--out", "x", "--to", "int4"], "invalid"),
        (["convert", "--model", "FOLDER", "--out", "FOLDER"], "itself"),
        (["convert", "--model", "FOLDER", "--out", "x"], "in FP8 already"),
        (["generate", "--model", "FOLDER", "--prompt", ""], "tokenizer|empty"),
        (["train", "--preset", "TINY", "--seq-len", "1"], "seq_len is 1"),
        (["train", "--steps", "0"], "steps is 0"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(capsys, monkeypatch, tmp_path, argv, named):
    monkeypatch.chdir(tmp_path)
    argv = [str(saved_folder()) if part == "FOLDER" else part for part in argv]
    code, out, err = run(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and out == ""
    assert re.search(named, err) and "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not STORIES.exists(), reason="no data/stories.txt")
def test_the_demonstration(hf, capsys, monkeypatch, tmp_path):
    """All of it, on two steps of training."""
    monkeypatch.chdir(tmp_path)
    real, few = fp8.Recipe, {"steps": 2, "eval_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "Recipe", lambda **asked: real(**asked | few))
        patch.setattr(fp8, "held_out_loss", lambda training: 6.5)
        said = fp8.demo("row.json")
    out = capsys.readouterr().out
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert row == said and row["chapter"] == CHAPTER.name
    assert row["distance"] < 1e-4 and row["said"]
    assert "Equal within" in out and "Within 10%" in out and "(composed)" in out
    folder = tmp_path / "out" / CHAPTER.name / "demo"
    size = (folder / "model.safetensors").stat().st_size
    wide = 4 * sum(p.numel() for p in fp8.Transformer(fp8.TINY).parameters())
    assert f"takes {size:,} bytes; in float32 it would take {wide:,}" in out
    assert f"{size / wide:.0%} of the bytes of float32" in row["did"]
    assert read(folder).config == replace(fp8.TINY, fp8_codes=True)
    code, _, err = run(capsys, "generate", "--model", folder, "--prompt", "The old dog")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("which", ["the reference", "fp8"])
def test_the_demonstration_stops_where_the_model_differs(
    hf, monkeypatch, capsys, tmp_path, which
):
    monkeypatch.chdir(tmp_path)
    if which == "fp8":
        monkeypatch.setattr(fp8, "FP8_TOLERANCE", 1e-3)
    else:
        monkeypatch.setitem(fp8.TOLERANCE, torch.float32, 1e-9)
    code, out, err = run(capsys, "demo")
    named = "FP8 is further off" if which == "fp8" else "differs from the reference"
    assert code == 2 and named in err and "\n3. " not in out


def test_a_demonstration_takes_less_than_two_minutes_of_steps():
    """One of its 40 steps takes less than 3 seconds of a core."""
    import time

    recipe = fp8.Recipe(steps=2, batch_size=2, warmup=1, eval_every=2, seq_len=128)
    stream = fp8.Batches(["a story of no words " * 99] * 3, BYTES, 128, 2, 0)
    torch.manual_seed(0)
    training = fp8.Training(fp8.Transformer(fp8.TINY), stream, stream, recipe)
    started = time.process_time()
    training.take_step()
    training.take_step()
    assert time.process_time() - started < 6
