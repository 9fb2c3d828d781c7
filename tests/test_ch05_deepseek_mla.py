# SPDX-License-Identifier: MIT
"""Chapter 5, latent attention: four forms of one function; equal to Hugging Face's."""

import copy
import json
import math
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from functools import cache as remember
from itertools import pairwise
from pathlib import Path

import lineage
import pytest
import torch
import torch.nn.functional as F
from chapters import ROOT, find, load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CHAPTER = find("ch05")
mla = load(CHAPTER)
STORIES = ROOT / "data" / "stories.txt"

# The sizes of the small model, by the letters of the chapter.
D, H, Q, C, K, R, P, L, V = 30, 6, 22, 18, 10, 14, 8, 3, 97
FORMS = {
    "absorb k": mla.attend_absorb_k,
    "absorb kv": mla.attend_absorb_kv,
    "latent cache": mla.attend_latent_cache,
}
KINDS = ["deepseek_v3", "deepseek_v2"]


def equal(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def near(a, b, relative: float = 1e-5) -> None:
    """Equal within a part of the largest value."""
    equal(a, b, relative * b.abs().max().item())


# --- models of both sides -------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    """The transformers package, imported once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# Sizes pairwise distinct; all three bands of YaRN matter within the 80 positions.
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 52}
SIZES |= {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": H}
SIZES |= {"q_lora_rank": Q, "kv_lora_rank": C, "qk_nope_head_dim": K}
SIZES |= {"qk_rope_head_dim": R, "v_head_dim": P, "max_position_embeddings": 80}
SIZES |= {"rms_norm_eps": 1e-6, "first_k_dense_replace": L}
SIZES |= {"bos_token_id": 95, "eos_token_id": 96, "tie_word_embeddings": False}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
SCALING = {"factor": 4.0, "original_max_position_embeddings": 20}
SCALING |= {"beta_fast": 2.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5}
YARN = SCALING | {"rope_type": "yarn", "rope_theta": 100.0}


def theirs_random(hf, kind: str = "deepseek_v3", seed: int = 0, **changes):
    """A small model of Hugging Face's, every parameter random, norms too."""
    rope = {"rope_parameters": dict(YARN)}
    config = hf.AutoConfig.for_model(kind, **{**SIZES, **rope, **changes})
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = float("norm" in name)
            parameter.copy_(centre + noise * (0.3 if centre else 0.1))
    return model


def small(**changes):
    return replace(mla.small_config(), **changes)


def ours_random(dtype: torch.dtype = torch.float32, **changes):
    """Our small model, every parameter random, in eval mode."""
    model = mla.Transformer(small(**changes)).eval()
    mla.randomise(model)
    return model.to(dtype)


@remember
def shared(q_latent_dim: int | None = Q, dtype: torch.dtype = torch.float64):
    """A random model for tests that leave it as it is; attention far from uniform."""
    model = ours_random(dtype, q_latent_dim=q_latent_dim)
    with torch.no_grad():
        for block in model.blocks:
            a = block.attention
            (a.wq if q_latent_dim is None else a.wq_up).weight.mul_(4)
    return model


@remember
def their_shared(q_latent_dim: int | None = Q, dtype: torch.dtype = torch.float64):
    """The same weights in Hugging Face's class."""
    ours = shared(q_latent_dim, dtype)
    theirs = mla.reference(ours.config, dtype)
    mla.copy_to_reference(ours, theirs)
    return theirs


def some_tokens(B: int, T: int, vocab: int = V, seed: int = 1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(ours, theirs, relative: float = 1e-5) -> None:
    """At least 80 tokens: past every threshold of the small YaRN."""
    T = min(ours.config.max_seq_len, 80)
    tokens = some_tokens(2, T, ours.config.vocab_size)
    logits = theirs(input_ids=tokens).logits
    assert logits.abs().max() > 0.2, "the comparison would be blind"
    near(ours(tokens), logits, relative)


@torch.no_grad()
def in_chunks(model, tokens, bounds, pad=None):
    """The logits of `tokens` read in pieces, and the cache that was filled."""
    assert bounds[0] == 0 and bounds[-1] == tokens.shape[1]
    cache = model.new_cache(*tokens.shape, pad)
    parts = []
    for start, end in pairwise(bounds):
        parts.append(model(tokens[:, start:end], cache=cache))
        assert cache.length == end
    return torch.cat(parts, 1), cache


# --- four forms of one function -------------------------------------------------------


def operands(sizes: dict, dtype=torch.float64, seed: int = 0):
    """Random q, kv, w_up of the asked sizes, and a scale that spreads the softmax."""
    B, H, T, S, K, R, C, P = (sizes[letter] for letter in "BHTSKRCP")
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    w_up = random(H, K + P, C) / math.sqrt(C)
    return random(B, H, T, K + R), random(B, S, C + R), w_up, 2 / math.sqrt(K + R)


def random_mask(rows: int, T: int, S: int, seed: int = 0):
    """Any keys, none in order, but at least one for each query."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(rows, 1, T, S, generator=generator) < 0.5
    seen[..., 0] |= ~seen.any(-1)
    return seen


def causal(T: int, S: int):
    """Query t stands at S - T + t, and sees what is not behind it."""
    return torch.tensor([[[[s <= S - T + t for s in range(S)] for t in range(T)]]])


def one_by_one(q, kv, w_up, scale, seen):
    """Row by row, head by head, query by query: sums over the keys that it sees."""
    (B, H, T, _), C = q.shape, w_up.shape[2]
    R = kv.shape[2] - C
    K = q.shape[3] - R
    out = q.new_zeros(B, H, T, w_up.shape[1] - K)
    for b in range(B):
        latent, rotary = kv[b, :, :C], kv[b, :, C:]
        for h in range(H):
            w_uk, w_uv = w_up[h, :K], w_up[h, K:]
            for t in range(T):
                mask = seen[min(b, len(seen) - 1), 0, t]
                rows = zip(latent, rotary, strict=True)
                keys = [torch.cat([w_uk @ c, r]) for c, r in rows]
                values = [w_uv @ c for c in latent]
                at = [s for s in range(len(keys)) if mask[s]]
                power = torch.stack([(q[b, h, t] @ keys[s]) * scale for s in at])
                weights = (power - power.max()).exp()
                for weight, s in zip(weights / weights.sum(), at, strict=True):
                    out[b, h, t] += weight * values[s]
    return out


SMALL = {"B": 2, "H": 3, "T": 4, "S": 7, "K": 5, "R": 6, "C": 8, "P": 9}
CASES = {
    "a prompt": {"S": 4},
    "a step": {"T": 1},
    "the first step": {"T": 1, "S": 1},
    "a chunk": {},
    "one head, one row": {"B": 1, "H": 1},
    "values wider than keys": {"P": 13},
    # A matrix that is used the wrong way round has the right shape here.
    "K = C = P": {"K": 8, "P": 8},
    "K = R = C = P = H": {"H": 6, "K": 6, "R": 6, "C": 6, "P": 6, "S": 6},
}
MASKS = ["none", "causal", "any", "a row each"]


def sizes_of(case: str) -> dict:
    return SMALL | CASES[case]


def with_masks():
    """Every case under every mask; a chunk in the middle is told what it sees."""
    for case in CASES:
        alone = sizes_of(case)["T"] in (1, sizes_of(case)["S"])
        yield from ((case, mask) for mask in MASKS if alone or mask != "none")


def mask_of(kind: str, sizes: dict):
    B, T, S = (sizes[letter] for letter in "BTS")
    return {
        "none": None,
        "causal": causal(T, S),
        "any": random_mask(1, T, S),
        "a row each": random_mask(B, T, S, seed=1),
    }[kind]


@pytest.mark.parametrize(("case", "mask"), list(with_masks()))
def test_each_form_equals_a_loop_over_heads_and_queries(case, mask):
    sizes = sizes_of(case)
    asked, seen = operands(sizes), mask_of(mask, sizes)
    said = causal(sizes["T"], sizes["S"]) if seen is None else seen
    expected = one_by_one(*asked, said)
    assert expected.abs().max() > 0.5
    for form in (mla.attend_naive, *FORMS.values()):
        equal(form(*asked, seen), expected, 1e-10)
        if seen is None:
            equal(form(*asked), expected, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 7)] * 7), st.integers(0, 6), st.sampled_from(MASKS[1:])
)
def test_the_forms_agree_at_any_size(form, found, before, mask):
    sizes = dict(zip("BHTKRCP", found, strict=True))
    sizes["S"] = sizes["T"] + before
    asked, seen = operands(sizes), mask_of(mask, sizes)
    equal(FORMS[form](*asked, seen), mla.attend_naive(*asked, seen), 1e-10)


# At the widths of DeepSeek-V3's heads.
FULL = {"B": 2, "H": 4, "T": 3, "S": 90, "K": 128, "R": 64, "C": 512, "P": 128}


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3, 90])
def test_the_forms_agree_at_full_width(form, dtype, atol, T):
    """In float32 to 1e-5, where results are about 1; so do their gradients."""
    asked = operands(FULL | {"T": T}, dtype)
    seen = causal(T, 90)
    expected = mla.attend_naive(*asked, seen)
    got = FORMS[form](*asked, seen)
    assert got.dtype == dtype and 0.5 < expected.abs().max() < 10
    equal(got, expected, atol)
    exact = mla.attend_naive(*operands(FULL | {"T": T}), seen)
    equal(got.double(), exact, atol)
    if T in (1, 90):
        equal(FORMS[form](*asked), expected, atol)


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_the_forms_agree(form, case, dtype, relative):
    """Of queries, latents, rotary keys and the matrix that is absorbed."""
    sizes = sizes_of(case)
    *tensors, scale = operands(sizes, dtype)
    seen, found = causal(sizes["T"], sizes["S"]), []
    weight = torch.randn(mla.attend_naive(*tensors, scale, seen).shape, dtype=dtype)
    for attend in (mla.attend_naive, FORMS[form]):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        (attend(*leaves, scale, seen) * weight).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for mine, naive in zip(found[1], found[0], strict=True):
        if sizes["S"] > 1:  # over one key, neither it nor the query matters
            assert naive.abs().max() > 1e-2
        equal(mine, naive, relative * max(1.0, naive.abs().max().item()))


def test_the_naive_form_does_not_guess_where_a_chunk_stands():
    """The fused kernel would put its queries at the start."""
    with pytest.raises(AssertionError):
        mla.attend_naive(*operands(SMALL))
    for form in FORMS.values():  # these count from the end
        equal(form(*operands(SMALL)), form(*operands(SMALL), causal(4, 7)), 1e-12)


def test_absorbed_it_is_multi_query_attention():
    """One head of keys, C + R wide, and of values, C wide, for all H queries."""
    q, kv, w_up, scale = operands(SMALL)
    K, C, H, B = SMALL["K"], SMALL["C"], SMALL["H"], SMALL["B"]
    wide = torch.stack([q[:, h, :, :K] @ w_up[h, :K] for h in range(H)], 1)
    key = kv[:, None].expand(B, H, -1, -1)
    mixed = F.scaled_dot_product_attention(
        torch.cat([wide, q[..., K:]], 3), key, key[..., :C], causal(4, 7), scale=scale
    )
    out = torch.stack([mixed[:, h] @ w_up[h, K:].T for h in range(H)], 1)
    equal(mla.attend_latent_cache(q, kv, w_up, scale, causal(4, 7)), out, 1e-12)


def test_no_form_forgets_the_rotary_part_or_the_scale():
    for attend in (mla.attend_naive, *FORMS.values()):
        q, kv, w_up, scale = operands(SMALL)
        out = attend(q, kv, w_up, scale, causal(4, 7))
        for part in (q[..., 5:], kv[..., 8:]):
            kept = part.clone()
            part.zero_()
            assert (attend(q, kv, w_up, scale, causal(4, 7)) - out).abs().max() > 0.1
            part.copy_(kept)
        doubled = attend(q, kv, w_up, 2 * scale, causal(4, 7))
        equal(attend(2 * q, kv, w_up, scale, causal(4, 7)), doubled, 1e-10)
        assert (doubled - out).abs().max() > 0.1


def test_compare_forms_shows_what_differs(monkeypatch):
    """What the demonstration prints: nothing but rounding, unless one is wrong."""
    gaps = mla.compare_forms()
    assert list(gaps) == [form.__name__ for form in FORMS.values()]
    assert all(0 < gap < 1e-10 for gap in gaps.values())
    real = mla.attend_absorb_kv

    def without_transpose(q, kv, w_up, scale, seen=None):
        turned = w_up.clone()
        turned[:, :K, :K] = w_up[:, :K, :K].mT
        return real(q, kv, turned, scale, seen)

    without_transpose.__name__ = "attend_absorb_kv"
    monkeypatch.setattr(mla, "attend_absorb_kv", without_transpose)
    gaps = mla.compare_forms()
    assert gaps["attend_absorb_kv"] > 0.1 and gaps["attend_absorb_k"] < 1e-10


# --- which form is taken --------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls of each form, with how many queries and keys."""
    calls = Counter()
    for real in (mla.attend_naive, *FORMS.values()):

        def count(q, kv, *rest, real=real):
            name = real.__name__.removeprefix("attend_")
            calls[name, q.shape[2], kv.shape[1]] += 1
            return real(q, kv, *rest)

        monkeypatch.setattr(mla, real.__name__, count)
    return calls


def test_prompts_are_read_naive_and_tokens_decoded_absorbed(taken):
    model, tokens = shared(), some_tokens(2, 30)
    mla.generate(model, tokens, 4)
    steps = {("latent_cache", 1, 30 + n): L for n in (1, 2, 3)}
    assert taken == {("naive", 30, 30): L} | steps
    taken.clear()
    mla.loss(ours_random().train(), tokens).backward()
    with torch.no_grad():
        model(tokens)
    assert taken == {("naive", 29, 29): L, ("naive", 30, 30): L}
    taken.clear()
    in_chunks(model, tokens, [0, 14, 28, 30])
    chunks = {("naive", 14, 14): L, ("naive", 14, 28): L, ("latent_cache", 2, 30): L}
    assert taken == chunks
    for name, T, S in chunks:
        assert (name != "naive") == mla.absorption_pays(T, S, model.config)


@pytest.mark.parametrize("preset", ["MLA_V3", "MLA_V2_LITE", "TINY"])
def test_when_absorption_pays(preset):
    """A single token always, but for the first few; a prompt of its own never."""
    config = mla.presets()[preset]
    for S in (2, 10, 1000, 100_000):
        assert mla.absorption_pays(1, S, config)
        assert not mla.absorption_pays(S, S, config)
    pays = [mla.absorption_pays(T, 4096, config) for T in range(1, 4097)]
    assert pays == sorted(pays, reverse=True), "once it is too many, it stays so"


def counted(attend, sizes: dict) -> int:
    """The products that torch counts in one form, over plain matrix products."""
    asked = operands(sizes, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(*asked, causal(sizes["T"], sizes["S"]))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "widths",
    [
        {"K": 10, "R": 14, "C": 18, "P": 24},
        {"K": 16, "R": 8, "C": 64, "P": 32},
        {"K": 3, "R": 2, "C": 5, "P": 6},
        {"K": 40, "R": 4, "C": 7, "P": 50},
    ],
    ids=str,
)
def test_absorption_pays_where_torch_counts_fewer_operations(widths):
    """Values at least as wide as keys, so that the naive form pads none."""
    config = small(
        head_dim=widths["K"], rope_dim=widths["R"],
        latent_dim=widths["C"], value_dim=widths["P"],
    )  # fmt: skip
    seen = set()
    for T in (1, 2, 3, 5, 9, 17, 40):
        for S in (T, T + 1, T + 4, T + 30, T + 200):
            sizes = {"B": 2, "H": 3, "T": T, "S": S} | widths
            naive, absorbed = (
                counted(form, sizes)
                for form in (mla.attend_naive, mla.attend_latent_cache)
            )
            assert mla.absorption_pays(T, S, config) == (absorbed < naive), (T, S)
            seen.add(absorbed < naive)
    narrow = 2 * widths["C"] < widths["K"] + widths["P"]
    assert seen == ({True} if narrow else {True, False})


@pytest.mark.parametrize("q_latent_dim", [Q, None])
def test_the_flops_of_a_step_are_the_formula(q_latent_dim):
    """The cache is read, never expanded: 2·B·L·H·(2C + R) more for each position."""
    model, B = shared(q_latent_dim, torch.float32), 2
    tokens, cache = some_tokens(B, 80), model.new_cache(B, 80)
    into_q = D * H * (K + R) if q_latent_dim is None else D * Q + Q * H * (K + R)
    weights = into_q + D * (C + R) + C * H * (K + P) + H * P * D + 3 * D * 52
    with torch.no_grad():
        model(tokens[:, :9], cache)
    for S in range(10, 81):
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(tokens[:, S - 1 : S], cache)
        expected = L * (weights + H * S * (2 * C + R)) + D * V
        assert counter.get_total_flops() == 2 * B * expected, S


# --- nothing goes stale ---------------------------------------------------------------


def optimizer_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mla.loss(model, some_tokens(2, 40, seed=5)).backward()
    optimizer.step()
    return model.eval()


def other_weights(model):
    other = mla.Transformer(model.config)
    mla.randomise(other, seed=7)
    model.load_state_dict(other.state_dict())
    return model


def assigned(model):
    other = mla.Transformer(model.config).double()
    mla.randomise(other, seed=8)
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def in_place(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attention.wkv_up.weight.mul_(-1.5)
    return model


def another_parameter(model):
    for block in model.blocks:
        weight = block.attention.wkv_up.weight.detach().flip(0)
        block.attention.wkv_up.weight = torch.nn.Parameter(weight)
    return model


CHANGES = {
    "load_state_dict": other_weights,
    "load_state_dict, assigned": assigned,
    "an optimizer step": optimizer_step,
    "in place": in_place,
    "another parameter": another_parameter,
    "to float64 and back": lambda model: model.double().float().double(),
    "to float32": lambda model: model.float(),
    "a copy": lambda model: in_place(copy.deepcopy(model)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_stale_after(change):
    """Decoding, before and after, is the full pass without a cache."""
    model, tokens, each = ours_random(torch.float64), some_tokens(2, 24), range(25)
    names = list(model.state_dict())
    before = in_chunks(model, tokens, each)[0]
    changed = CHANGES[change](model)
    with torch.no_grad():
        expected = changed(tokens)
    dtype = changed.embed.weight.dtype
    after = in_chunks(changed, tokens, each)[0]
    assert after.dtype == dtype and list(changed.state_dict()) == names
    equal(after, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    if change not in ("to float64 and back", "to float32"):
        assert (after - before).abs().max() > 0.1, "the change must matter"
    assert not list(changed.buffers())


@torch.no_grad()
def test_nothing_is_stale_after_loading(tmp_path):
    """Also where the model was built without memory, and in each dtype."""
    ours, tokens, each = ours_random(), some_tokens(2, 24), range(25)
    ours.save_pretrained(tmp_path)
    expected = ours(tokens)
    loaded = mla.Transformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens), expected)
    near(in_chunks(loaded, tokens, each)[0], expected)
    wide = mla.Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    equal(in_chunks(wide, tokens, each)[0], wide(tokens), 1e-10)
    low = mla.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(ours).bfloat16()(tokens), low(tokens))
    with torch.device("meta"):
        empty = mla.Transformer(ours.config)
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(ours.state_dict())
    assert torch.equal(filled(tokens), expected)
    near(in_chunks(filled, tokens, each)[0], expected)


# --- parity ---------------------------------------------------------------------------

SHAPES = {
    "V3": {},
    "V2": {"model_type": "deepseek_v2"},
    "V3, queries uncompressed": {"q_latent_dim": None},
    "V2, queries uncompressed": {"q_latent_dim": None, "model_type": "deepseek_v2"},
    "V3, half-split": {"rope_interleave": False},
    "no YaRN": {"rope_factor": 1.0},
    "another eps": {"norm_eps": 1e-3},
    "tied": {"tie_embeddings": True},
    "one block of one head": {"n_layers": 1, "n_heads": 1},
    "values wider than keys": {"value_dim": 28, "latent_dim": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_equals_hugging_face(hf, monkeypatch, shape, dtype):
    config = small(**SHAPES[shape])
    monkeypatch.setattr(mla, "small_config", lambda: config)
    rows = mla.verify(dtype=dtype)
    blocks = [f"block {i}" for i in range(config.n_layers)]
    stages = ["embedding", *blocks, "final norm", "logits"]
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        assert row["relative"] <= 1e-5 == mla.TOLERANCE[dtype], row
        assert row["argmax"] == 1.0 or row["stage"] != "logits"


VARIANTS = {
    "no scaling": {"rope_factor": 1.0, "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0},
    "no mscale": {"rope_mscale": 0.0, "rope_mscale_all_dim": 0.0},
    "of the rotary part": {"rope_mscale": 1.0, "rope_mscale_all_dim": 0.0},
    "of the softmax": {"rope_mscale": 0.0, "rope_mscale_all_dim": 0.7},
    "of both": {"rope_mscale": 1.0, "rope_mscale_all_dim": 0.5},
    "V2-Lite's": {"rope_mscale": 0.707, "rope_mscale_all_dim": 0.707},
    "V3's": {"rope_mscale": 1.0, "rope_mscale_all_dim": 1.0},
}
CLASSES = [("deepseek_v3", True), ("deepseek_v3", False), ("deepseek_v2", True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("q_latent_dim", [Q, None])
@pytest.mark.parametrize(("kind", "interleave"), CLASSES)
@torch.no_grad()
def test_yarn_queries_and_orders_in_every_combination(
    hf, tmp_path, kind, interleave, q_latent_dim, variant
):
    """The whole pass, in ragged chunks, and through a file."""
    ours = ours_random(
        q_latent_dim=q_latent_dim,
        model_type=kind,
        rope_interleave=interleave,
        **VARIANTS[variant],
    )
    theirs = mla.reference(ours.config)
    mla.copy_to_reference(ours, theirs)
    tokens = some_tokens(2, 80)
    logits = theirs(tokens).logits
    near(ours(tokens), logits)
    near(in_chunks(ours, tokens, [0, 27, 28, 29, 49, 52, 80])[0], logits)
    ours.save_pretrained(tmp_path)
    near(mla.reference(tmp_path)(tokens).logits, logits, 1e-6)
    back = mla.Transformer.from_pretrained(tmp_path)
    equal(back.state_dict(), ours.state_dict(), 0)
    plain = {"rope_original_len": 4096, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
    assert back.config == replace(
        ours.config, **(plain if ours.config.rope_factor == 1 else {})
    )
    assert torch.equal(back(tokens), ours(tokens))


@pytest.mark.parametrize("shape", ["V3", "V2", "no YaRN"])
@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_hugging_faces(hf, shape):
    exact = ours_random(torch.float64, **SHAPES[shape])
    low = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(low.state_dict())  # the weights as they are rounded
    theirs = mla.reference(exact.config, torch.bfloat16)
    mla.copy_to_reference(low, theirs)
    tokens = some_tokens(4, 80)
    truth, top = exact(tokens), exact(tokens).abs().max()
    other = (theirs(input_ids=tokens).logits.double() - truth).abs()
    for logits in (low(tokens), in_chunks(low, tokens, [0, 40, *range(41, 81)])[0]):
        mine = (logits.double() - truth).abs()
        assert mine.max() <= 1.3 * other.max() and mine.mean() <= 1.1 * other.mean()
        assert mine.max() <= mla.TOLERANCE[torch.bfloat16] * top


def test_verify_in_bfloat16(hf):
    for row in mla.verify(dtype=torch.bfloat16):
        assert row["relative"] <= mla.TOLERANCE[torch.bfloat16], row


@pytest.mark.parametrize("kind", KINDS)
def test_verify_compares_a_saved_model(hf, tmp_path, kind):
    ours_random(vocab_size=300, eos_id=None, model_type=kind).save_pretrained(tmp_path)
    rows = mla.verify(tmp_path)
    assert len(rows) == 6 and max(row["relative"] for row in rows) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_factor": 3.5},
        {"rope_factor": 1.0},
        {"rope_original_len": 28},
        {"rope_beta_fast": 1.0},
        {"rope_beta_slow": 0.2},
        {"rope_mscale": 0.8},
        {"rope_mscale": 0.0},
        {"rope_mscale_all_dim": 0.4},
        {"rope_mscale_all_dim": 0.0},
        {"rope_theta": 110.0},
        {"norm_eps": 1e-5},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_comparison_is_not_blind_to(changes):
    """Each setting moves the logits by far more than the tolerance of parity."""
    ours, tokens = ours_random(torch.float64), some_tokens(2, 80)
    other = mla.Transformer(small(**changes)).eval().double()
    other.load_state_dict(ours.state_dict())
    moved = (other(tokens) - ours(tokens)).abs().max() / ours(tokens).abs().max()
    assert moved > 3e-5


@torch.no_grad()
def test_the_latents_norms_keep_their_eps(hf):
    """1e-6, whatever that of the other norms; latents of that size show it."""
    for eps in (1e-6, 1e-2):
        ours = ours_random(norm_eps=eps)
        for block in ours.blocks:
            a = block.attention
            assert a.kv_norm.eps == a.q_norm.eps == 1e-6 == mla.LATENT_EPS
            assert block.attention_norm.eps == block.ffn_norm.eps == eps
            a.wkv_down.weight[:C] *= 1e-3
            a.wq_down.weight *= 1e-3
        assert ours.norm.eps == eps
        theirs = mla.reference(ours.config)
        mla.copy_to_reference(ours, theirs)
        same_logits(ours, theirs)
        tokens = some_tokens(2, 80)
        logits = ours(tokens)
        for block in ours.blocks:
            block.attention.kv_norm.eps = block.attention.q_norm.eps = 1e-5
        assert (ours(tokens) - logits).abs().max() > 1e-2 * logits.abs().max()


# --- YaRN -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"), [("MLA_V3", 0.135234), ("MLA_V2_LITE", 0.114721)]
)
def test_yarn_at_full_size_is_hugging_faces(hf, name, scale):
    """Which pairs are left alone, blended, and slowed; both scales."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = mla.presets()[name]
    theirs_config = hf.AutoConfig.for_model(**config.to_hf())
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs_config, torch.device("cpu"))
    scaled = mla.rope_frequencies(config, torch.device("cpu"))
    torch.testing.assert_close(scaled, theirs, rtol=1e-6, atol=0)
    exact = [10000.0 ** (-2 * i / 64) for i in range(32)]
    plain = mla.rope_frequencies(replace(config, rope_factor=1.0), torch.device("cpu"))
    assert plain.tolist() == pytest.approx(exact, rel=1e-6)
    ramp = [min(1.0, max(0.0, (i - 10) / (23 - 10))) for i in range(32)]
    closed = [f * (1 - r + r / 40) for f, r in zip(exact, ramp, strict=True)]
    assert scaled.tolist() == pytest.approx(closed, rel=1e-6)
    untouched = int((scaled == plain).sum())
    slowed = int((scaled - plain / 40).abs().le(1e-6 * scaled).sum())
    assert (untouched, slowed) == (11, 9)
    # Pair 10 is the last that makes 32 turns in 4,096 positions, 23 the first of one.
    turns = [4096 * f / (2 * math.pi) for f in exact]
    assert turns[10] > 32 > turns[11] and turns[22] > 1 > turns[23]
    table = mla.rope_table(torch.tensor([0]), config)
    assert factor == pytest.approx(1.0) and table[0].max() == pytest.approx(1.0)
    assert config.softmax_scale == pytest.approx(scale, rel=1e-5)


def test_the_softmax_scale_by_hand():
    """(0.1·m·ln 40 + 1)² / √192: 1.873854 times as large for V3."""
    grown = (0.1 * math.log(40) + 1) ** 2
    assert grown == pytest.approx(1.873854, rel=1e-6)
    assert mla.MLA_V3.softmax_scale == pytest.approx(grown / math.sqrt(192))
    lite = (0.0707 * math.log(40) + 1) ** 2
    assert lite == pytest.approx(1.589626, rel=1e-6)
    assert mla.MLA_V2_LITE.softmax_scale == pytest.approx(lite / math.sqrt(192))
    for changes in ({"rope_factor": 1.0}, {"rope_mscale_all_dim": 0.0}):
        assert small(**changes).softmax_scale == pytest.approx(24**-0.5)
    # The rotary part's scale alone leaves that of the softmax as it is.
    assert small(rope_mscale=7.0).softmax_scale == small().softmax_scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_scales_are_hugging_faces(hf, kind, variant):
    config = small(model_type=kind, **VARIANTS[variant])
    theirs = mla.reference(config)
    rotary = theirs.model.rotary_emb
    assert config.softmax_scale == pytest.approx(
        theirs.model.layers[1].self_attn.scaling, rel=1e-9
    )
    table = mla.rope_table(torch.arange(80), config)
    if kind == "deepseek_v2":
        turned = rotary(torch.zeros(1), torch.arange(80)[None])[0]  # complex numbers
        cos, sin = turned.real, turned.imag
    else:
        cos, sin = (x[0, :, :7] for x in rotary(torch.zeros(1), torch.arange(80)[None]))
    equal(table, torch.stack([cos, sin]), 2e-6)
    assert table[0, 0].tolist() == pytest.approx([rotary.attention_scaling] * 7)


# --- rotary positions -----------------------------------------------------------------


def rope_config(**changes):
    """Plain frequencies unless asked."""
    return small(**{"rope_factor": 1.0, **changes})


def test_rope_by_hand():
    """Widths 2 and 4: unit vectors become the cosine and the sine of their angle."""
    two = mla.rope_table(torch.tensor([0, 3]), rope_config(rope_dim=2))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    equal(mla.apply_rope(x, two)[0, 0, 0], torch.tensor([1.0, 0.0]), 0)
    turned = torch.tensor([math.cos(3), math.sin(3)])
    equal(mla.apply_rope(x, two)[0, 0, 1], turned, 1e-6)
    # theta 100: the pair (0, 2) turns by 1 a position, the pair (1, 3) by 1/10.
    four = mla.rope_table(torch.tensor([5]), rope_config(rope_dim=4))
    got = mla.apply_rope(torch.tensor([[[[1.0, 2.0, 0.0, 0.0]]]]), four)[0, 0, 0]
    c, s = [math.cos(5), math.cos(0.5)], [math.sin(5), math.sin(0.5)]
    equal(got, torch.tensor([c[0], 2 * c[1], s[0], 2 * s[1]]), 1e-6)


def test_positions_of_each_row_broadcast_over_heads():
    config, position = small(), torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    table = mla.rope_table(position, config)
    assert table.shape == (2, 2, 1, 4, 7) and table.dtype == torch.float32
    x = torch.randn(2, H, 4, R)
    for row in range(2):
        alone = mla.rope_table(position[row], config)
        assert alone.shape == (2, 4, 7)
        expected = mla.apply_rope(x[row : row + 1], alone)
        assert torch.equal(mla.apply_rope(x, table)[row : row + 1], expected)


def turned(x, m: int, config):
    table = mla.rope_table(torch.tensor([m]), config)
    return mla.apply_rope(x.view(1, 1, 1, -1), table).flatten()


@pytest.mark.parametrize("factor", [1.0, 4.0])
@settings(max_examples=40, deadline=None)
@given(m=st.integers(0, 60), n=st.integers(0, 60), shift=st.integers(1, 60))
def test_scores_depend_on_the_distance_alone(factor, m, n, shift):
    config = rope_config(rope_factor=factor)
    longer = (0.1 * math.log(factor) + 1) / (0.05 * math.log(factor) + 1)
    q, k = torch.randn(2, R, generator=torch.Generator().manual_seed(3)).double()
    score = turned(q, m, config) @ turned(k, n, config)
    moved = turned(q, m + shift, config) @ turned(k, n + shift, config)
    equal(moved, score, 3e-5)  # the table is in float32
    equal(turned(q, m, config).norm(), longer * q.norm(), 1e-5)
    assert (turned(q, m + 1, config) - turned(q, m, config)).abs().max() > 0.1


@torch.no_grad()
def test_the_whole_model_sees_distances_alone(monkeypatch):
    """Also where the keys in the cache were rotated at other places."""
    model, tokens, real = shared(), some_tokens(2, 40), mla.positions_and_mask
    logits = model(tokens)

    def shifted(tokens, cache):
        position, seen = real(tokens, cache)
        return position + 37, seen

    monkeypatch.setattr(mla, "positions_and_mask", shifted)
    equal(model(tokens), logits, 1e-4)
    equal(in_chunks(model, tokens, [0, 30, *range(31, 41)])[0], logits, 1e-4)
    still = torch.stack([torch.ones(40, 7), torch.zeros(40, 7)])
    monkeypatch.setattr(mla, "rope_table", lambda p, c: still)
    assert (model(tokens) - logits).abs().max() > 0.1, "the positions matter"


def test_the_two_orders_by_hand():
    """Rows 0 … 5 are one head of width 6, rows 6 … 11 the next."""
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    order = mla.to_half_split(rows, 6)[:, 0].tolist()
    assert order == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    back = mla.to_interleaved(rows, 6)[:, 0].tolist()
    assert back == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_only_the_rotary_rows_are_reordered():
    """Two heads of 3 plain rows and 4 rotary ones; a latent of 5 before 4."""
    config = small(n_heads=2, head_dim=3, rope_dim=4, latent_dim=5)

    def order(name: str, rows: int, config=config, back=False):
        tensor = torch.arange(float(rows))[:, None].expand(rows, 2)
        move = mla.to_theirs if back else mla.to_ours
        return move(f"model.layers.0.self_attn.{name}.weight", tensor, config)[
            :, 0
        ].tolist()

    heads = [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]
    for name in ("q_proj", "q_b_proj"):
        assert order(name, 14) == heads
    assert order("kv_a_proj_with_mqa", 9) == [0, 1, 2, 3, 4, 5, 7, 6, 8]
    for name in ("q_a_proj", "kv_b_proj", "o_proj"):
        assert order(name, 14) == list(range(14))
    wider = replace(config, rope_dim=6)
    assert order("kv_a_proj_with_mqa", 11, wider)[5:] == [5, 7, 9, 6, 8, 10]
    assert order("kv_a_proj_with_mqa", 11, wider, True)[5:] == [5, 8, 6, 9, 7, 10]
    half = replace(config, rope_interleave=False)
    assert order("q_b_proj", 14, half) == list(range(14))


@torch.no_grad()
def test_rotary_tables_are_never_rounded(monkeypatch):
    """A bfloat16 angle of position 80,000 would be wrong by turns."""
    seen, real = set(), mla.apply_rope
    monkeypatch.setattr(
        mla,
        "apply_rope",
        lambda x, rope: seen.add((x.dtype, rope.dtype)) or real(x, rope),
    )
    ours_random(torch.bfloat16)(some_tokens(1, 20))
    assert seen == {(torch.bfloat16, torch.float32)}
    config = rope_config(rope_theta=500000.0)
    table = mla.rope_table(torch.tensor([80_000]), config).double()
    angle = 80_000 * 500000.0 ** (-torch.arange(7, dtype=torch.float64) / 7)
    exact = torch.stack([angle.cos(), angle.sin()])[:, None]
    equal(table, exact, 1e-2)  # what float32 leaves of an angle of 80,000


@st.composite
def bounds_of(draw, T: int = 60):
    """0, some places in between, T: every way to cut T tokens into pieces."""
    return [0, *sorted(draw(st.sets(st.integers(1, T - 1), max_size=12))), T]


# --- the cache ------------------------------------------------------------------------


def rms_normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("q_latent_dim", [Q, None])
@torch.no_grad()
def test_it_holds_the_normed_latent_and_the_rotated_key(q_latent_dim):
    """Computed here from what goes into each block; rotated as complex numbers."""
    model, tokens = shared(q_latent_dim), some_tokens(2, 40)
    _, cache = in_chunks(model, tokens, [0, 17, 18, 40])
    into = mla.watch(model, [f"blocks.{i}:in" for i in range(L)], tokens=tokens)
    angle = torch.arange(40.0)[:, None] * mla.rope_frequencies(model.config, "cpu")
    longer = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    turn = torch.polar(torch.full_like(angle, longer), angle)  # (T, R/2)
    for x, block, layer in zip(into, model.blocks, cache.layers, strict=True):
        normed = rms_normed(x, block.attention_norm.weight)
        a = block.attention
        down = normed @ a.wkv_down.weight.T
        latent = rms_normed(down[..., :C], a.kv_norm.weight)
        rotary = torch.complex(*down[..., C:].chunk(2, -1)) * turn
        assert layer.kv.shape == (2, 40, C + R)
        equal(layer.kv[..., :C], latent, 1e-9)
        equal(layer.kv[..., C:], torch.cat([rotary.real, rotary.imag], -1), 1e-5)


@pytest.mark.parametrize("cache_kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("q_latent_dim", [Q, None])
@pytest.mark.parametrize(("kind", "interleave"), CLASSES)
@torch.no_grad()
def test_the_cache_equals_hugging_faces(hf, kind, interleave, q_latent_dim, cache_kind):
    """Theirs too holds the latent and the key; V2's has its pairs side by side."""
    changes = {"model_type": kind, "rope_interleave": interleave}
    ours = ours_random(q_latent_dim=q_latent_dim, **changes)
    theirs = mla.reference(ours.config)
    mla.copy_to_reference(ours, theirs)
    tokens = some_tokens(2, 60)
    room = {"max_cache_len": 60} if cache_kind == "StaticCache" else {}
    other, mine = (
        getattr(hf, cache_kind)(config=theirs.config, **room),
        ours.new_cache(2, 60),
    )
    for start, end in pairwise([0, 9, 10, 11, 35, 60]):
        chunk, at = tokens[:, start:end], torch.arange(start, end)[None]
        asked = {"past_key_values": other, "position_ids": at}
        near(ours(chunk, mine), theirs(input_ids=chunk, **asked).logits)
    for layer, reference in zip(mine.layers, other.layers, strict=True):
        latent, rotary = layer.kv.split([C, R], 2)
        if kind == "deepseek_v2":
            rotary = rotary.unflatten(2, (2, R // 2)).mT.flatten(2)
        near(latent, reference.keys[:, 0])
        near(rotary, reference.values[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_bytes_are_the_formula_and_the_storage(dtype):
    model, B, S = ours_random(dtype), 4, 17
    cache = model.new_cache(B, S)
    expected = B * L * S * (C + R) * dtype.itemsize
    assert cache.nbytes == expected
    storages = [layer.kv.untyped_storage() for layer in cache.layers]
    assert len({s.data_ptr() for s in storages}) == L
    assert sum(s.nbytes() for s in storages) == expected
    with torch.no_grad():
        model(some_tokens(B, 9), cache)
    assert cache.length == 9 and cache.nbytes == expected
    assert [layer.kv.untyped_storage() for layer in cache.layers] == storages


@pytest.mark.parametrize(
    ("name", "numbers"), [("MLA_V3", 61 * 576), ("MLA_V2_LITE", 27 * 576)]
)
def test_its_bytes_at_full_size(name, numbers):
    """512 + 64 numbers a token and layer, for however many heads."""
    with torch.device("meta"):
        model = mla.Transformer(mla.presets()[name]).bfloat16()
        assert model.new_cache(2, 1000).nbytes == 2 * 1000 * numbers * 2


@settings(max_examples=25, deadline=None)
@given(bounds_of(), st.sampled_from([Q, None]))
@example(list(range(61)), Q)  # one by one
@example([0, 59, 60], None)
@example([0, 1, 60], Q)
def test_any_chunks_give_the_full_pass(bounds, q_latent_dim):
    model, tokens = shared(q_latent_dim), some_tokens(2, 60)
    with torch.no_grad():
        equal(in_chunks(model, tokens, bounds)[0], model(tokens), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    bounds_of(),
    st.sampled_from([Q, None]),
    st.lists(st.integers(0, 59), min_size=3, max_size=3),
)
@example([0, 4, 60], Q, [6, 0, 3])  # a whole chunk of nothing but padding
@example([0, 60], None, [59, 0, 1])
@example(list(range(61)), Q, [3, 0, 7])
def test_any_chunks_of_padded_rows_give_each_row_alone(bounds, q_latent_dim, pads):
    model, tokens = shared(q_latent_dim), some_tokens(3, 60)
    logits, _ = in_chunks(model, tokens, bounds, torch.tensor(pads))
    assert logits.isfinite().all()
    with torch.no_grad():
        for row, padded, pad in zip(tokens, logits, pads, strict=True):
            equal(padded[pad:], model(row[None, pad:])[0], 1e-10)


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 3])])
def test_no_position_sees_a_later_one(pad):
    """Also over chunks: what is read later changes nothing that was said before."""
    model, T, tokens = shared(), 11, some_tokens(2, 11)
    for bounds in ([0, 11], [0, 5, 6, 9, 11], list(range(12))):
        before, _ = in_chunks(model, tokens, bounds, pad)
        for t in range(T):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % V
            after, _ = in_chunks(model, changed, bounds, pad)
            moved = (after - before).abs().amax(-1)  # (2, 11)
            assert (moved[:, :t] < 1e-12).all(), t
            first = 0 if pad is None else int(pad[1])
            assert (moved[0, t:] > 1e-6).all(), t
            assert (moved[1, max(t, first) :] > 1e-6).all() or t < first, t
            if t < first:  # a padding token is seen by no real one
                assert (moved[1, first:] < 1e-12).all(), t
    if pad is None:
        with torch.no_grad():
            equal(before, model(tokens), 1e-10)


@torch.no_grad()
def test_without_a_cache_too_no_position_sees_a_later_one():
    model, tokens = shared(), some_tokens(2, 11)
    before = model(tokens)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        moved = (model(changed) - before).abs().amax(-1)
        assert (moved[:, :t] < 1e-12).all() and (moved[:, t:] > 1e-6).all(), t


def test_what_a_layer_returns_is_its_own_memory():
    kv = torch.zeros(2, 9, 5)
    layer, new = mla.LayerCache(kv), torch.randn(2, 4, 5)
    held = layer.append(new)
    assert held.data_ptr() == kv.data_ptr() and torch.equal(held, new)
    assert layer.length == 0, "the model moves it on"
    assert not kv[:, 4:].any()
    layer.length = 4
    held = layer.append(new[:, :2])
    assert held.shape == (2, 6, 5) and torch.equal(kv[:, 4:6], new[:, :2])
    assert torch.equal(kv[:, :4], new)


def test_it_keeps_no_gradient():
    model, tokens = ours_random(), some_tokens(2, 20)
    cache = model.new_cache(2, 20)
    for start, end in pairwise([0, 9, 10, 20]):
        logits = model(tokens[:, start:end], cache)
        for layer in cache.layers:
            assert not layer.kv.requires_grad and layer.kv.grad_fn is None
    with torch.no_grad():
        equal(logits, model(tokens)[:, 10:])


def test_it_may_be_made_in_inference_mode_and_used_outside():
    model, tokens = shared(), some_tokens(1, 12)
    with torch.inference_mode():
        cache = model.new_cache(1, 12)
        parts = [model(tokens[:, :5], cache)]
    with torch.no_grad():
        parts.append(model(tokens[:, 5:6], cache))
        whole = model(tokens)
    with torch.inference_mode():
        parts.append(model(tokens[:, 6:], cache))
    equal(torch.cat(parts, 1), whole, 1e-12)


def filled(n: int = 10, S: int = 30, pad=None):
    """A model, and a cache that has read the first n of some tokens."""
    model, tokens = shared(), some_tokens(2, 48)
    cache = model.new_cache(2, S, pad)
    with torch.no_grad():
        model(tokens[:, :n], cache)
    return model, tokens, cache


def contents(cache):
    """All that a later pass can see of it."""
    kept = [layer.kv.clone() for layer in cache.layers]
    return [layer.length for layer in cache.layers], kept, cache.pad


@torch.no_grad()
def go_on(model, cache, tokens, *bounds: int):
    """The logits of the rest, which must not depend on what is past the length."""
    for layer in cache.layers:
        layer.kv[:, layer.length :] = math.nan
    chunks = [model(tokens[:, a:b], cache) for a, b in pairwise(bounds)]
    return torch.cat(chunks, 1)


@pytest.mark.parametrize("pad", [None, torch.tensor([2, 0])])
def test_truncating_is_never_having_gone_further(pad):
    model, tokens, cache = filled(pad=pad)
    expected = go_on(model, cache, tokens, 10, 13, 14, 20)
    for length in (10, 6, 0):
        with torch.no_grad():
            model(some_tokens(2, 7, seed=9), cache)  # another continuation
        cache.truncate(length)
        assert cache.length == length
        assert {layer.length for layer in cache.layers} == {length}
        with torch.no_grad():
            model(tokens[:, length:10], cache) if length < 10 else None
        equal(go_on(model, cache, tokens, 10, 13, 14, 20), expected, 1e-12)
        cache.truncate(10)


@pytest.mark.parametrize("length", [-1, 11, 30])
def test_truncating_to_more_than_there_is_is_refused(length):
    _, _, cache = filled()
    before = contents(cache)
    with pytest.raises(ValueError, match=f"{length}.*10"):
        cache.truncate(length)
    equal(contents(cache), before, 0)
    cache.truncate(10)
    assert cache.length == 10


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((2, 21), "10 of at most 30.*21"),
        ((2, 48), "10 of at most 30.*48"),
        ((3, 1), "2 rows.*3"),
        ((1, 1), "2 rows.*1"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(shape, named):
    model, tokens, cache = filled()
    expected = go_on(model, copy.deepcopy(cache), tokens, 10, 30)
    before = contents(cache)
    with pytest.raises(ValueError, match=named):
        model(some_tokens(*shape), cache)
    equal(contents(cache), before, 0)
    equal(go_on(model, cache, tokens, 10, 30), expected, 0)  # up to the last place
    with pytest.raises(ValueError, match="30 of at most 30"):
        model(tokens[:, :1], cache)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ((1, 81), "81.*80"),
        ((1, 0), "0 tokens"),
        ((0, 5), "0 rows"),
        ((2, 9, torch.tensor([1])), r"\[1\]"),
        ((2, 9, torch.tensor(1)), "pad is 1"),
        ((2, 9, torch.tensor([0.0, 1.5])), "1.5.*integers"),
        ((2, 9, torch.tensor([-1, 2])), "-1"),
        ((2, 9, torch.tensor([0, 9])), "9.*8"),
    ],
    ids=str,
)
def test_impossible_caches_are_refused(asked, named):
    with pytest.raises(ValueError, match=named):
        shared().new_cache(*asked)
    shared().new_cache(2, 9, torch.tensor([0, 8]))
    shared().new_cache(1, 80)


def test_a_context_too_long_is_refused():
    model = shared()
    assert model(some_tokens(1, 80)).shape == (1, 80, V)
    with pytest.raises(ValueError, match="81.*80"):
        model(some_tokens(1, 81))
    # A cache that someone made by hand may be larger than the context.
    layers = [mla.LayerCache(torch.zeros(1, 90, C + R).double()) for _ in range(L)]
    cache = mla.KVCache(layers, 90)
    with torch.no_grad():
        model(some_tokens(1, 80), cache)
    with pytest.raises(ValueError, match="81.*80"):
        model(some_tokens(1, 1), cache)
    assert cache.length == 80


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("chunk", [(10, 11), (10, 15)])
def test_an_interrupted_pass_leaves_no_trace(error, chunk):
    """It ends in the last block, when the others have written already."""
    model, tokens, cache = filled()
    expected = go_on(model, copy.deepcopy(cache), tokens, 10, 12, 20)
    for block in model.blocks[1:]:

        def stop(*_) -> None:
            raise error

        hook = block.register_forward_pre_hook(stop)
        with pytest.raises(error), torch.no_grad():
            model(some_tokens(2, 48, seed=9)[:, slice(*chunk)], cache)
        hook.remove()
        assert [layer.length for layer in cache.layers] == [10] * L
    equal(go_on(model, cache, tokens, 10, 12, 20), expected, 0)


# --- the config -----------------------------------------------------------------------


def published_v3(**changes) -> dict:
    """What stands in the config.json of DeepSeek-V3, as published in December 2024."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280,
    } | changes


def published_v2_lite(**changes) -> dict:
    """That of DeepSeek-V2-Lite."""
    config = published_v3(
        architectures=["DeepseekV2ForCausalLM"],
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        bos_token_id=100000,
        eos_token_id=100001,
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=10944,
        model_type="deepseek_v2",
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_group=1,
        topk_method="greedy",
        vocab_size=102400,
    )
    scaling = config["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
    config = without(config, "num_nextn_predict_layers", "ep_size")
    return config | {"rope_scaling": scaling} | changes


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


PUBLISHED = {"MLA_V3": published_v3, "MLA_V2_LITE": published_v2_lite}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_experts_and_is_for_chapter_6(name, tmp_path):
    """Made dense, it is the preset."""
    published, preset = PUBLISHED[name], mla.presets()[name]
    with pytest.raises(ValueError, match=r"experts.*chapter 6"):
        mla.Config.from_hf(published())
    for few in (0, 1, preset.n_layers - 1):
        with pytest.raises(ValueError, match=r"experts.*chapter 6"):
            mla.Config.from_hf(published(first_k_dense_replace=few))
    with pytest.raises(ValueError, match=r"experts.*chapter 6"):
        mla.Config.from_hf(without(published(), "first_k_dense_replace"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published()), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*experts.*chapter 6"):
        mla.Transformer.from_pretrained(tmp_path)
    for many in (preset.n_layers, preset.n_layers + 1):
        assert mla.Config.from_hf(published(first_k_dense_replace=many)) == preset


def whole(c) -> int:
    """The parameters of a model, counted matrix by matrix."""
    d, q, h = c.dim, c.q_latent_dim, c.n_heads
    head = c.head_dim + c.rope_dim
    into_q = d * h * head if q is None else d * q + q + q * h * head
    latent = d * (c.latent_dim + c.rope_dim) + c.latent_dim
    expanded = c.latent_dim * h * (c.head_dim + c.value_dim)
    attention = into_q + latent + expanded + h * c.value_dim * d
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * d
    return tables + d + c.n_layers * (attention + 3 * d * c.ffn_dim + 2 * d)


@pytest.mark.parametrize(
    ("name", "attention", "layer", "count"),
    [
        ("MLA_V3", 187_107_328, 583_483_392, 37_445_852_160),
        ("MLA_V2_LITE", 13_763_072, 81_007_104, 2_606_624_256),
    ],
)
def test_presets_have_these_parameters(hf, name, attention, layer, count):
    config = mla.presets()[name]
    assert mla.Config.from_hf(config.to_hf()) == config
    with torch.device("meta"):
        ours = mla.Transformer(config)
        their_config = hf.AutoConfig.for_model(**config.to_hf())
        theirs = hf.AutoModelForCausalLM.from_config(their_config)

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    for block in ours.blocks:
        assert (size(block.attention), size(block)) == (attention, layer)
    assert size(ours) == size(theirs) == count == whole(config)
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert list(mla.hf_names(ours)) and set(mla.hf_names(ours)) == set(shapes)
    for theirs_name, parts in mla.hf_names(ours).items():
        [part] = parts
        assert tuple(ours.get_parameter(part).shape) == shapes[theirs_name]


@pytest.mark.parametrize("changes", [{}, {"q_latent_dim": None}, {"n_heads": 2}])
def test_the_count_of_a_small_model(changes):
    model = ours_random(**changes)
    assert sum(p.numel() for p in model.parameters()) == whole(model.config)


def spellings() -> dict[str, tuple[dict, float]]:
    """Configs of one model, in every way that they are found; its rotary factor."""
    old = SIZES | {"model_type": "deepseek_v3"}
    typed = SCALING | {"type": "yarn"}
    numbers = typed | {"factor": 4, "beta_fast": 2, "mscale": 1}
    theta = {"rope_theta": 100.0}
    return {
        "new": (old | {"rope_parameters": YARN}, 4.0),
        "new, plain": (old | {"rope_parameters": PLAIN}, 1.0),
        "new, both keys": (old | {"rope_parameters": YARN | {"type": "yarn"}}, 4.0),
        "old": (old | theta | {"rope_scaling": SCALING | {"rope_type": "yarn"}}, 4.0),
        "old, type": (old | theta | {"rope_scaling": typed}, 4.0),
        "old, null": (old | theta | {"rope_scaling": None}, 1.0),
        "old, none": (old | theta, 1.0),
        "old, whole numbers": (
            old | {"rope_theta": 100, "rope_scaling": numbers},
            4.0,
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", spellings())
def test_every_spelling_of_a_config_is_read(hf, tmp_path, spelling, kind):
    config, factor = spellings()[spelling]
    config = config | {"model_type": kind}
    found = mla.Config.from_hf(config)
    expected = small(bos_id=95, model_type=kind)
    if factor == 1:
        plain = {"rope_factor": 1.0, "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0}
        plain |= {"rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
        expected = replace(expected, rope_original_len=4096, **plain)
    assert found == expected
    rope = YARN if factor > 1 else PLAIN
    theirs = theirs_random(hf, kind, rope_parameters=dict(rope))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    same_logits(mla.Transformer.from_pretrained(tmp_path), theirs)
    again, tokens = mla.reference(tmp_path), some_tokens(2, 80)
    with torch.no_grad():  # what the test takes for one model is one to them
        equal(again(tokens).logits, theirs(tokens).logits, 0)


def test_what_a_scaling_leaves_out_is_yarns_default(hf):
    """Turns of 32 and 1, no scale, and the context as the original one."""
    config = published_v3(
        first_k_dense_replace=61, rope_scaling={"type": "yarn", "factor": 7}
    )
    found = mla.Config.from_hf(config)
    assert (found.rope_beta_fast, found.rope_beta_slow) == (32.0, 1.0)
    assert (found.rope_mscale, found.rope_mscale_all_dim) == (0.0, 0.0)
    assert found.rope_original_len == 163840 and found.rope_factor == 7.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = hf.DeepseekV3Config(**config)
    frequency, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    mine = mla.rope_frequencies(found, torch.device("cpu"))
    torch.testing.assert_close(mine, frequency, rtol=1e-6, atol=0)
    assert mla.rope_table(torch.tensor([0]), found)[0, 0, 0] == pytest.approx(factor)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "deepseek_v2", "q_latent_dim": None},
        {"rope_interleave": False},
        {"rope_factor": 1.0, "rope_original_len": 4096, "rope_mscale": 0.0}
        | {"rope_mscale_all_dim": 0.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0},
        {"eos_id": (94, 96), "bos_id": 95, "pad_id": 93},
        {"eos_id": None, "tie_embeddings": True, "norm_eps": 1e-5},
    ],
    ids=str,
)
def test_a_config_goes_through_hugging_faces_and_back(hf, tmp_path, changes):
    """Also through their own file, which spells the rotary settings anew."""
    config = small(**changes)
    text = json.dumps(config.to_hf())
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    theirs = hf.AutoConfig.from_pretrained(tmp_path)
    kind = type(theirs).__name__.removesuffix("Config")
    assert config.to_hf()["architectures"] == [f"{kind}ForCausalLM"]
    stops = list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id
    assert theirs.eos_token_id == stops
    theirs.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in again and "rope_theta" not in again
    assert mla.Config.from_hf(again) == config


def yarn_but(**changes) -> dict:
    return {"rope_scaling": {**SCALING, "type": "yarn", **changes}}


REFUSED = {
    "another architecture": ({"model_type": "gpt2"}, "DeepSeek.*gpt2"),
    "a near relative": ({"model_type": "deepseek_v32"}, "deepseek_v32"),
    "no architecture": ({"model_type": ...}, "model_type|None"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "attention biases": ({"attention_bias": True}, "attention_bias"),
    "mlp biases": ({"mlp_bias": True}, "mlp_bias"),
    "experts": ({"first_k_dense_replace": 1}, "experts.*chapter 6"),
    "llama3's scaling": (yarn_but(type="llama3"), "llama3"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
    "yarn without a factor": (yarn_but(factor=None), "lacks factor"),
    "yarn with a factor below 1": (yarn_but(factor=0.5), "rope_factor is 0.5"),
    "yarn with another scale": (yarn_but(attention_factor=1.5), "attention_factor"),
    "yarn not truncated": (yarn_but(truncate=False), "truncate"),
    "slow above fast": (yarn_but(beta_slow=9.0), "rope_beta_slow 9.0.*2.0"),
    "a negative mscale": (yarn_but(mscale=-1.0), "rope_mscale is -1.0"),
    "an mscale of text": (yarn_but(mscale_all_dim="x"), "x"),
    "half-split V2": (
        {"model_type": "deepseek_v2", "rope_interleave": False},
        "V2.*interleaved",
    ),
    "no width": ({"hidden_size": ...}, "lacks hidden_size"),
    "no latent": ({"kv_lora_rank": ...}, "lacks kv_lora_rank"),
    "no rotary width": ({"qk_rope_head_dim": None}, "lacks qk_rope_head_dim"),
    "several": (
        {"v_head_dim": ..., "qk_nope_head_dim": ...},
        "lacks v_head_dim, qk_nope_head_dim",
    ),
    "odd rotary width": ({"qk_rope_head_dim": 13}, "rope_dim is 13"),
    "a latent of 0": ({"kv_lora_rank": 0}, "latent_dim is 0"),
    "queries' latent of 0": ({"q_lora_rank": 0}, "q_latent_dim is 0"),
    "heads of text": ({"num_attention_heads": "six"}, "six"),
    "layers of text": ({"num_hidden_layers": "three"}, ""),
    "dense layers of text": ({"first_k_dense_replace": "all"}, ""),
    "width of text": ({"hidden_size": "thirty"}, "thirty"),
    "theta of text": ({"rope_theta": "high"}, "high"),
    "scaling of text": ({"rope_scaling": "yarn"}, ""),
    "scaling of a list": ({"rope_scaling": [8]}, ""),
    "eps of text": ({"rms_norm_eps": "small"}, "norm_eps"),
    "negative eps": ({"rms_norm_eps": -1.0}, "norm_eps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_not_deepseeks_is_refused(tmp_path, case):
    changes, named = REFUSED[case]
    ours_random().save_pretrained(tmp_path)
    amend(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"(?s){tmp_path.name}.*{named}"):
        mla.Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_dim": 13}, "rope_dim is 13"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"value_dim": -1}, "value_dim is -1"),
        ({"latent_dim": 1.5}, "latent_dim is 1.5"),
        ({"q_latent_dim": 0}, "q_latent_dim is 0"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"rope_factor": 0.9}, "0.9"),
        ({"rope_factor": math.nan}, "nan"),
        ({"rope_beta_slow": 2.0}, "rope_beta_slow 2.0.*2.0"),
        ({"rope_beta_slow": 0.0}, "rope_beta_slow is 0.0"),
        ({"rope_mscale": -0.1}, "rope_mscale is -0.1"),
        ({"rope_mscale_all_dim": math.nan}, "rope_mscale_all_dim is nan"),
        ({"rope_original_len": 0}, "rope_original_len is 0"),
        ({"model_type": "deepseek"}, "'deepseek'.*deepseek_v2.*deepseek_v3"),
        ({"model_type": "deepseek_v2", "rope_interleave": False}, "interleaved"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        small(**changes)


# --- Hugging Face's files -------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a saved folder."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def amend(folder: Path, name: str = "config.json", **changes) -> None:
    """Change entries of a saved JSON file; `...` takes one out."""
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / name).write_text(json.dumps(config), encoding="utf-8")


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": PLAIN},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 60},
        {"eos_token_id": [94, 96], "pad_token_id": 93},
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "interleave"), CLASSES)
def test_checkpoints_go_from_them_to_us_and_back(
    hf, tmp_path, kind, interleave, changes
):
    order = {} if interleave else {"rope_interleave": False}
    theirs = theirs_random(hf, kind, **order, **changes)
    theirs.save_pretrained(tmp_path)
    ours = mla.Transformer.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    assert not ours.training and ours.config.rope_interleave == interleave
    tied = changes.get("tie_word_embeddings", False)
    assert (ours.head.weight is ours.embed.weight) == tied
    ours.save_pretrained(tmp_path / "again")
    again, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert type(again) is type(theirs) and again.dtype == torch.float32
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    same_logits(ours, again.eval())
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    for name, value in theirs.config.rope_parameters.items():
        assert again.config.rope_parameters[name] == value, name


def test_shards_bins_and_old_tables_load(hf, tmp_path):
    """Old files hold the frequencies of every layer; they are not needed."""
    theirs = theirs_random(hf)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same_logits(mla.Transformer.from_pretrained(tmp_path / "shards"), theirs)
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    for i in range(L):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        state[name] = torch.full((7,), math.nan)
    torch.save(state, tmp_path / "pytorch_model.bin")
    same_logits(mla.Transformer.from_pretrained(tmp_path), theirs)


def test_weights_load_in_the_asked_dtype(tmp_path):
    ours = ours_random()
    ours.save_pretrained(tmp_path)
    low = mla.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in ours.state_dict().items():
        assert torch.equal(low.state_dict()[name], value.bfloat16()), name
    low.save_pretrained(tmp_path / "low")
    assert json.loads((tmp_path / "low/config.json").read_text())["dtype"] == "bfloat16"
    back = mla.Transformer.from_pretrained(tmp_path / "low")
    for name, value in low.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.float()), name


DOWN = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
QB = "model.layers.1.self_attn.q_b_proj.weight"
UP = "model.layers.1.self_attn.kv_b_proj.weight"
SPOILT = {
    "missing": (lambda s: s.pop(UP), f"missing.*{UP}"),
    "no rotary key": (lambda s: s.pop(DOWN), f"missing.*{DOWN}"),
    "no norm": (
        lambda s: s.pop("model.layers.0.self_attn.kv_a_layernorm.weight"),
        "missing.*kv_a_layernorm",
    ),
    "unexpected": (lambda s: s.update(extra=torch.zeros(2)), "unexpected.*extra"),
    "queries in one matrix": (
        lambda s: s.update({QB.replace("q_b_proj", "q_proj"): torch.zeros(144, 30)}),
        r"unexpected.*self_attn\.q_proj",
    ),
    "a bias": (
        lambda s: s.update({DOWN.replace("weight", "bias"): torch.zeros(32)}),
        "unexpected.*kv_a_proj_with_mqa.bias",
    ),
    "a scale of eight bits": (
        lambda s: s.update({UP.replace("weight", "weight_scale_inv"): torch.ones(1)}),
        "unexpected.*weight_scale_inv",
    ),
    "an expert": (
        lambda s: s.update({"model.layers.1.mlp.gate.weight": torch.ones(4, 30)}),
        r"unexpected.*mlp\.gate\.weight",
    ),
    "a fourth block": (
        lambda s: s.update({UP.replace("1", "3"): torch.zeros(108, 18)}),
        r"unexpected.*layers\.3\.",
    ),
    "transposed": (lambda s: s.update({UP: s[UP].T}), rf"{UP}.*18, 108.*108, 18"),
    "no rotary rows": (lambda s: s.update({DOWN: s[DOWN][:18]}), rf"{DOWN}.*18, 30"),
    "a head more": (lambda s: s.update({QB: torch.zeros(168, 22)}), rf"{QB}.*168, 22"),
    "a row more": (lambda s: s.update({QB: torch.zeros(145, 22)}), rf"{QB}.*145, 22"),
    "flat": (lambda s: s.update({QB: torch.zeros(144)}), rf"{QB}.*144,"),
    "deep": (lambda s: s.update({QB: torch.zeros(144, 22, 1)}), rf"{QB}.*22, 1"),
    "a number": (lambda s: s.update({UP: torch.tensor(1.0)}), UP),
    "a number for queries": (lambda s: s.update({QB: torch.tensor(1.0)}), QB),
    "a number for latents": (lambda s: s.update({DOWN: torch.tensor(1.0)}), DOWN),
}


@pytest.mark.parametrize("case", SPOILT)
def test_loading_is_strict(tmp_path, case):
    change, named = SPOILT[case]
    ours_random().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"(?s){tmp_path.name}.*{named}"):
        mla.Transformer.from_pretrained(tmp_path)


def test_a_repeated_head_is_the_embedding(tmp_path):
    ours = ours_random(tie_embeddings=True)
    ours.save_pretrained(tmp_path)
    repeated = ours.embed.weight.detach().clone()
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated}))
    again = mla.Transformer.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated + 1}))
    with pytest.raises(ValueError, match="lm_head.weight should repeat"):
        mla.Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: cut(f / "model.safetensors", 0.6), "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
        (lambda f: cut(f / "config.json", 0.5), "config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, damage, named):
    ours_random().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=named):
        mla.Transformer.from_pretrained(tmp_path)


# --- the model ------------------------------------------------------------------------


def test_initialisation():
    torch.manual_seed(0)
    layers = 6
    config = small(n_layers=layers, dim=60, ffn_dim=240)
    drawn = {"scaled": [], "plain": []}
    for name, parameter in mla.Transformer(config).named_parameters():
        assert name.endswith("weight"), "no biases"
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            scaled = name.endswith(("attention.wo.weight", "ffn.w_down.weight"))
            drawn["scaled" if scaled else "plain"].append(parameter.detach().flatten())
    for kind, std in (("plain", 0.02), ("scaled", 0.02 / math.sqrt(2 * layers))):
        values = torch.cat(drawn[kind])
        # Five standard errors of a standard deviation, and of a mean.
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * len(values)), kind
        assert abs(values.mean()) < 5 * std / math.sqrt(len(values)), kind
    assert len(drawn["scaled"]) == 2 * layers
    assert len(drawn["plain"]) == 2 + 6 * layers


@pytest.mark.parametrize("q_latent_dim", [Q, None])
def test_gradients_reach_every_parameter(q_latent_dim):
    model = ours_random(q_latent_dim=q_latent_dim).train()
    mla.loss(model, some_tokens(2, 80)).backward()
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().amax(-1)
        if name != "embed.weight":  # not every id is among the tokens
            assert (size > 1e-7).all(), name
    used = some_tokens(2, 80)[:, :-1].unique()
    assert (model.embed.weight.grad[used].abs().amax(-1) > 1e-7).all()


@pytest.mark.parametrize("q_latent_dim", [Q, None])
@pytest.mark.parametrize(("kind", "interleave"), CLASSES)
def test_gradients_equal_hugging_faces(hf, kind, interleave, q_latent_dim):
    """Every one, in training mode, in the order of their rows."""
    changes = {"model_type": kind, "rope_interleave": interleave}
    ours = ours_random(q_latent_dim=q_latent_dim, **changes).train()
    theirs, tokens = mla.reference(ours.config).train(), some_tokens(2, 60)
    mla.copy_to_reference(ours, theirs)
    mla.loss(ours, tokens).backward()
    logits = theirs(input_ids=tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, [part] in mla.hf_names(ours).items():
        mine = mla.to_theirs(name, ours.get_parameter(part).grad, ours.config)
        near(mine, gradients.pop(name), 1e-4)
    assert not gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_the_dtype_that_goes_in_comes_out(dtype):
    model, tokens = ours_random(torch.float64), some_tokens(2, 80)
    exact = model(tokens)
    model.to(dtype)
    watched = ["blocks.0:in", "blocks.0.attention", "blocks.1", "norm", ""]
    seen = mla.watch(model, watched, tokens=tokens)
    parts, cache = in_chunks(model, tokens, [0, 20, 21, 40, 80])
    held = [layer.kv for layer in cache.layers]
    assert {tensor.dtype for tensor in [*seen, *held, parts]} == {dtype}
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-14}[dtype]
    for logits in (seen[-1], parts):
        assert (logits.double() - exact).abs().max() <= bound * exact.abs().max()


# --- generation -----------------------------------------------------------------------


def their_greedy(theirs, tokens, n, mask=None, stop=None):
    mask = torch.ones_like(tokens) if mask is None else mask
    theirs.generation_config.eos_token_id = None
    return theirs.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0 if stop is None else stop,
    )


@pytest.mark.parametrize("q_latent_dim", [Q, None])
@torch.no_grad()
def test_greedy_generation_equals_hugging_faces(hf, q_latent_dim):
    ours, tokens = shared(q_latent_dim), some_tokens(3, 8)
    mine = mla.generate(ours, tokens, 72)  # to the last place of the context
    assert mine.shape == (3, 80)
    assert torch.equal(mine, their_greedy(their_shared(q_latent_dim), tokens, 72))
    assert len(set(mine[:, 8:].flatten().tolist())) > 5, "a dull continuation"
    assert torch.equal(ours(mine)[:, 7:-1].argmax(-1), mine[:, 8:])  # without a cache


@torch.no_grad()
def test_greedy_generation_of_a_v2_model_equals_hugging_faces(hf):
    ours = copy.deepcopy(shared())
    ours.config = small(model_type="deepseek_v2")
    theirs = mla.reference(ours.config, torch.float64)
    mla.copy_to_reference(ours, theirs)
    tokens = some_tokens(3, 8)
    assert torch.equal(mla.generate(ours, tokens, 72), their_greedy(theirs, tokens, 72))


@pytest.mark.parametrize("q_latent_dim", [Q, None])
def test_prompts_of_different_lengths_are_continued_as_each_alone(hf, q_latent_dim):
    ours, theirs = shared(q_latent_dim), their_shared(q_latent_dim)
    rows = [some_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 7, 1)]
    pad = torch.tensor([9 - len(row) for row in rows])
    tokens = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    batch = mla.generate(ours, tokens, 50, pad=pad)
    for row, padded, skip in zip(rows, batch, pad.tolist(), strict=True):
        alone = mla.generate(ours, torch.tensor([row]), 50)
        assert torch.equal(padded[skip:], alone[0])
    mask = (torch.arange(9) >= pad[:, None]).long()
    assert torch.equal(batch, their_greedy(theirs, tokens, 50, mask))
    careless = mla.generate(ours, tokens, 50)
    assert not torch.equal(careless[[0, 2, 3]], batch[[0, 2, 3]])


def test_rows_stop_as_in_hugging_face(hf):
    ours, theirs, tokens = shared(), their_shared(), some_tokens(3, 8)
    new = mla.generate(ours, tokens, 30)[:, 8:]
    stop = int(new[0, 4])
    mine = mla.generate(ours, tokens, 30, stop=[stop])
    assert torch.equal(mine, their_greedy(theirs, tokens, 30, stop=stop))
    two = [stop, int(new[1, 2])]
    for row in mla.generate(ours, tokens, 30, stop=two)[:, 8:].tolist():
        at = next((i for i, token in enumerate(row) if token in two), len(row))
        assert len(set(row[at:])) <= 1
    with pytest.raises(ValueError, match="40 tokens and 41 new"):
        mla.generate(ours, some_tokens(1, 40), 41)


# --- the swap -------------------------------------------------------------------------


def differing(first: str, second: str) -> dict[str, str]:
    """The units in which two chapters differ, and the diff of each."""
    found = {}
    for part in re.split(r"\n(?=--- )", "\n" + lineage.diff(first, second)):
        if part.strip():
            name = part.splitlines()[0].rpartition(": ")[2]
            found[name] = "\n".join(part.splitlines()[2:])
    return found


def test_attention_and_its_cache_are_swapped_and_little_else():
    units = differing("ch04", "ch05")
    for swap in (
        *["Attention", "Attention.__init__", "Attention.forward", "LayerCache"],
        *["Attention.latents", "LayerCache.append", "KVCache.nbytes"],
        *["attend_naive", "attend_latent_cache", "rope_frequencies", "LATENT_EPS"],
    ):
        assert swap in units, swap
    kept = {"RMSNorm", "apply_rope", "FeedForward", "Block", "positions_and_mask"}
    kept |= {"sample", "stream", "generate", "Training", "train", "loss", "main"}
    kept |= {"Tokenizer", "load_tensors", "Batches", "Recipe", "verify"}
    assert not {unit.split(".")[0] for unit in units} & kept


# --- training and the command line ----------------------------------------------------

BYTES = mla.byte_tokenizer()
SENTENCE = "the cat sat on the mat and the dog ran to the red barn with a bone"
WORDS = SENTENCE.split()
MINI = mla.Config(
    vocab_size=257,
    max_seq_len=64,
    dim=16,
    n_layers=2,
    n_heads=4,
    q_latent_dim=12,
    latent_dim=10,
    head_dim=6,
    rope_dim=4,
    value_dim=5,
    ffn_dim=32,
    rope_theta=100.0,
    eos_id=256,
)
RECIPE = mla.Recipe(steps=6, batch_size=4, warmup=2, eval_every=3, seq_len=16)


def tiny_text(n: int = 60, seed: int = 0) -> str:
    """Documents of a few predictable sentences."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        first = int(torch.randint(len(WORDS), (), generator=generator))
        documents.append(" ".join((WORDS * 3)[first : first + 12]))
    return f"\n{mla.END_OF_TEXT}\n".join(documents)


def new_training(recipe=RECIPE, seed: int = 0, dtype=torch.float32):
    """A fresh run on the tiny text."""
    data, tested = (
        mla.Batches(part, BYTES, recipe.seq_len, recipe.batch_size, recipe.seed)
        for part in mla.split_documents(tiny_text())
    )
    torch.manual_seed(seed)
    model = mla.Transformer(MINI)
    return mla.Training(model, data, tested, recipe, dtype, source="t")


def test_training_learns_a_tiny_text(hf, tmp_path):
    recipe = replace(RECIPE, steps=150, warmup=10, eval_every=75, lr=1e-2)
    training = new_training(recipe)
    assert mla.train(training, BYTES, tmp_path)
    first, last = training.log[0], training.log[-1]
    assert 5.3 < first["loss"] < 5.8  # ln 257 is 5.55
    assert last["loss"] < 2.6 and last["held_out"] < 2.6
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same_logits(mla.Transformer.from_pretrained(tmp_path), theirs, 5e-5)


def test_training_in_bfloat16_takes_the_same_way():
    """Weights stay in float32; the latents' norms and the rotation are mixed in."""
    recipe = replace(RECIPE, steps=12, eval_every=12)
    exact, low = new_training(recipe), new_training(recipe, dtype=torch.bfloat16)
    for training in (exact, low):
        assert mla.train(training, BYTES)
    for a, b in zip(exact.log, low.log, strict=True):
        assert a["loss"] != b["loss"] and abs(a["loss"] - b["loss"]) < 0.05
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Weights, optimizer, log and random state, to the bit."""

    def bits(training) -> dict:
        log = [{k: v for k, v in r.items() if k != "seconds"} for r in training.log]
        return {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "log": log,
            "random": torch.get_rng_state(),
        }

    through = new_training()
    assert mla.train(through, BYTES)
    expected = copy.deepcopy(bits(through))
    half = new_training()
    while half.step < 3:
        half.take_step()
    half.log[-1]["held_out"] = mla.held_out_loss(half)
    half.save(tmp_path, BYTES)
    torch.rand(77)  # whatever happens in between
    again = new_training(seed=99)
    again.restore(mla.read_torch(tmp_path / "checkpoint.pt"))
    assert mla.train(again, BYTES, tmp_path)
    equal(bits(again), expected, 0)


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """The exit code of `main` and what it wrote to stdout and stderr."""
    capsys.readouterr()
    try:
        code = mla.main([str(part) for part in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tiny corpus, and MINI as a preset."""
    monkeypatch.setattr(mla, "MINI", MINI, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.txt"
    path.write_text(tiny_text(), encoding="utf-8", newline="\n")
    return path


TRAIN = ["train", "--tokenizer", "bytes", "--preset", "MINI", "--batch-size", 4]
TRAIN += ["--warmup", 2, "--eval-every", 2, "--steps", 4, "--seq-len", 16]


def trained(capsys, corpus, out: Path, *more: object) -> str:
    code, said, err = run(capsys, *TRAIN, "--data", corpus, "--out", out, *more)
    assert (code, err) == (0, ""), err
    return said


def test_train_resume_generate_and_verify(hf, capsys, corpus, tmp_path):
    out = tmp_path / "run"
    said = trained(capsys, corpus, out)
    assert "held out" in said and "step     2 of 4" in said
    code, said, err = run(capsys, "train", "--out", out, "--resume", "--steps", 6)
    assert (code, err) == (0, "") and "step     6 of 6" in said
    assert mla.Transformer.from_pretrained(out).config == MINI
    asked = ["generate", "--model", out, "--prompt", "the", "--max-new-tokens", 13]
    first, again, other = (
        run(capsys, *asked, "--seed", seed, "--top-k", 50) for seed in (1, 1, 2)
    )
    assert first == again != other and first[0] == 0 and first[1].startswith("the")
    code, said, err = run(capsys, *asked, "--dtype", "bfloat16")
    assert (code, err) == (0, "") and said.startswith("the")
    code, said, err = run(capsys, "verify", "--model", out)
    assert (code, err) == (0, "") and "Equal within" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_trained_further(hf, capsys, corpus, tmp_path, kind):
    """It starts where the file ends, whoever wrote it, and stays of its kind."""
    theirs = theirs_random(hf, kind, vocab_size=257, q_lora_rank=None)
    theirs.save_pretrained(tmp_path / "first")
    asked = ["train", "--init", tmp_path / "first", "--data", corpus, "--lr", 1e-12]
    asked += ["--out", tmp_path / "second", "--steps", 1, "--weight-decay", 0]
    code, _, err = run(capsys, *asked, "--warmup", 0, "--seq-len", 16)
    assert (code, err) == (0, "")
    first, second = (
        mla.Transformer.from_pretrained(tmp_path / name) for name in ("first", "second")
    )
    assert first.config == second.config and first.config.model_type == kind
    equal(second.state_dict(), first.state_dict(), 1e-9)
    same_logits(second, mla.reference(tmp_path / "second"))


@pytest.mark.skipif(not STORIES.exists(), reason="no data/stories.txt")
def test_the_demonstration(hf, capsys, monkeypatch, tmp_path):
    """All of it, on two steps of training."""
    monkeypatch.chdir(tmp_path)
    real, few = mla.Recipe, {"steps": 2, "eval_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(mla, "Recipe", lambda **asked: real(**asked | few))
        patch.setattr(mla, "held_out_loss", lambda training: 6.5)
        said = mla.demo("row.json")
    out = capsys.readouterr().out
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert row == said and row["chapter"] == CHAPTER.name
    assert row["distance"] < 1e-4 and row["said"]
    # Three layers of 32 + 16 numbers; expanded, 4 heads of 32 + 16 and 32.
    assert "takes 576 bytes a token" in out and "take 3,840." in out
    assert "2 steps" in row["did"] and "576 bytes" in row["did"]
    for name in ("attend_absorb_k ", "attend_absorb_kv ", "attend_latent_cache "):
        assert re.search(rf"{name}.*differs by \de-1[3-9]", out), out
    folder = tmp_path / "out" / CHAPTER.name / "demo"
    code, _, err = run(capsys, "generate", "--model", folder, "--prompt", "The old dog")
    assert (code, err) == (0, "")


def test_the_demonstration_stops_where_the_model_differs(hf, monkeypatch, capsys):
    real = mla.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.model.layers[1].self_attn.kv_a_layernorm.weight[-1] += 1e-2

    monkeypatch.setattr(mla, "copy_to_reference", perturb)
    code, out, err = run(capsys, "demo")
    assert code == 2 and "differs from the reference" in err
    assert "NOT equal" in out and "\n3. " not in out


def bytes_json(path: Path, *control: str, opens: str | None = None) -> Path:
    """A tokenizer.json of the 256 bytes and some control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(c, special=True) for c in control])
    if opens:
        ids = [(opens, made.token_to_id(opens))]
        made.post_processor = TemplateProcessing(
            single=f"{opens} $A", special_tokens=ids
        )
    made.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


CHAT = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>")
CHAT += ("<|end_header_id|>", "<|eot_id|>")


def test_what_generate_feeds_the_model_and_prints(capsys, tmp_path, monkeypatch):
    """The opening before a prompt; a conversation's ids; stops, and what is shown."""
    ours_random(vocab_size=261, max_seq_len=160, eos_id=257).save_pretrained(tmp_path)
    bytes_json(tmp_path, *CHAT, opens="<|begin_of_text|>")
    tokenizer = mla.load_tokenizer(tmp_path)
    calls, dtypes = [], []

    def fake(model, tokens, max_new_tokens, **asked):
        calls.append((tokens[0].tolist(), max_new_tokens, asked["stop"]))
        dtypes.append(model.embed.weight.dtype)
        for i in [*tokenizer.encode("Gut é!"), 260]:
            yield torch.tensor([i])

    monkeypatch.setattr(mla, "stream", fake)
    asked = ["generate", "--model", tmp_path, "--prompt", "Hi"]
    assert run(capsys, *asked) == (0, "HiGut é!\n", "")
    assert run(capsys, *asked, "--chat", "--system", "Be brief.") == (
        0,
        "Gut é!\n",
        "",
    )
    assert run(capsys, *asked, "--dtype", "bfloat16") == (0, "HiGut é!\n", "")
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    talk = [("system", "Be brief."), ("user", "Hi")]
    assert calls[0][0] == [256, *tokenizer.encode("Hi")]
    assert calls[1][0] == mla.encode_chat(tokenizer, talk)
    for ids, n, stop in calls:
        assert n == min(200, 160 - len(ids)) and stop == [257, 260]


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder that `train` left, to be copied and spoilt."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert mla.train(new_training(), BYTES, out)
    return out


def amended(folder: Path, **changes) -> Path:
    amend(folder / "run", **changes)
    return folder / "run"


def spoilt(folder: Path, damage) -> Path:
    damage(folder / "run")
    return folder / "run"


def of_chapter_four(folder: Path) -> None:
    """Its config has key/value heads, and no latent."""
    state = torch.load(folder / "checkpoint.pt")
    del state["config"]["latent_dim"]
    state["config"]["n_kv_heads"] = 2
    torch.save(state, folder / "checkpoint.pt")


GENERATE = ["generate", "--prompt", "the", "--max-new-tokens", 3, "--model"]
# What a user may get wrong: the command, given a folder with `run` in it, and what the
# one line on stderr must name.
MISTAKES = {
    "--system without --chat": (
        lambda d: [*GENERATE, d / "run", "--system", "Be brief."],
        "--system.*--chat",
    ),
    "--chat without control tokens": (
        lambda d: [*GENERATE, d / "run", "--chat"],
        "no tokens for a conversation",
    ),
    "--rope-factor, of chapter 4": (
        lambda d: [*GENERATE, d / "run", "--rope-factor", 8],
        "--rope-factor",
    ),
    "a Llama": (lambda d: [*GENERATE, amended(d, model_type="llama")], "Deep.*llama"),
    "experts": (
        lambda d: [*GENERATE, amended(d, first_k_dense_replace=1)],
        "experts.*chapter 6",
    ),
    "linear scaling": (
        lambda d: [*GENERATE, amended(d, rope_scaling={"rope_type": "linear"})],
        "linear",
    ),
    "no latent": (lambda d: [*GENERATE, amended(d, kv_lora_rank=0)], "latent_dim"),
    "another latent": (
        lambda d: [*GENERATE, amended(d, kv_lora_rank=9)],
        "kv_a.*14, 16.*13, 16|kv_b.*44, 10.*44, 9",
    ),
    "width of text": (lambda d: [*GENERATE, amended(d, hidden_size="x")], "run"),
    "a tokenizer.json cut": (
        lambda d: [
            *GENERATE,
            spoilt(d, lambda f: (f / "tokenizer.json").write_text('{"model":')),
        ],
        r"tokenizer\.json",
    ),
    "weights cut": (
        lambda d: [*GENERATE, spoilt(d, lambda f: cut(f / "model.safetensors", 0.5))],
        "model.safetensors",
    ),
    "a tensor that is a number": (
        lambda d: [
            *GENERATE,
            spoilt(
                d, lambda f: rewrite(f, lambda s: s.update({DOWN: torch.tensor(1.0)}))
            ),
        ],
        DOWN,
    ),
    "vocabulary too large": (
        lambda d: [*GENERATE, spoilt(d, lambda f: bytes_json(f, "<|a|>", "<|b|>"))],
        "258.*257",
    ),
    "no such model": (lambda d: [*GENERATE, d / "nowhere"], "nowhere"),
    "empty prompt": (lambda d: [*GENERATE, d / "run", "--prompt", " "], "empty"),
    "prompt too long": (
        lambda d: [*GENERATE, d / "run", "--prompt", "the cat " * 20],
        "160 tokens.*64",
    ),
    "prompt and more too long": (
        lambda d: [*GENERATE, d / "run", "--max-new-tokens", 62],
        "62.*64",
    ),
    "no window": (lambda d: [*TRAIN, "--seq-len", 0], "seq_len is 0"),
    "no key/value heads here": (lambda d: [*TRAIN, "--n-kv-heads", 2], "--n-kv-heads"),
    "no such preset": (
        lambda d: ["train", "--preset", "LLAMA_3_2_1B"],
        "MLA_V2_LITE.*MLA_V3",
    ),
    "init from a Llama": (
        lambda d: ["train", "--init", amended(d, model_type="llama")],
        "llama",
    ),
    "init from experts": (
        lambda d: ["train", "--init", amended(d, first_k_dense_replace=0)],
        "experts.*chapter 6",
    ),
    "resume with a window": (
        lambda d: ["train", "--resume", "--out", d / "run", "--seq-len", 8],
        "leave out --seq-len",
    ),
    "resume chapter 4's": (
        lambda d: ["train", "--resume", "--out", spoilt(d, of_chapter_four)],
        "checkpoint.pt.*n_kv_heads",
    ),
    "verify a Llama": (
        lambda d: ["verify", "--model", amended(d, model_type="llama")],
        "llama",
    ),
    "verify experts": (
        lambda d: ["verify", "--model", amended(d, first_k_dense_replace=1)],
        "experts.*chapter 6",
    ),
    "no data": (lambda d: [*TRAIN, "--data", d / "nowhere.txt"], "nowhere.txt"),
}


def files(folder: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_clear_line(
    capsys, corpus, trained_folder, tmp_path, case
):
    make, named = MISTAKES[case]
    shutil.copytree(trained_folder, tmp_path / "run")
    argv = make(tmp_path)
    if argv[0] == "train" and "--resume" not in argv:
        argv += [] if "--out" in argv else ["--out", tmp_path / "new"]
    if argv[0] == "train" and "--data" not in argv:
        argv += ["--data", corpus]
    before = files(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2, (out, err)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("deepseek_mla.py") and re.search(named, err), err
    assert out == "", "nothing is said before the mistake is found"
    assert files(tmp_path) == before, "nothing is half-written"
    assert not (tmp_path / "new").exists()


def test_verify_says_when_it_disagrees(hf, capsys, monkeypatch):
    code, out, err = run(capsys, "verify")
    assert (code, err) == (0, "") and "Equal within" in out and "block 2" in out
    real = mla.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.model.layers[1].self_attn.kv_b_proj.weight[-1, -1] += 1e-1

    monkeypatch.setattr(mla, "copy_to_reference", perturb)
    code, out, err = run(capsys, "verify")
    assert (code, err) == (1, "") and "NOT equal" in out
    marked = [line.split("  ")[0] for line in out.splitlines() if "above" in line]
    assert marked[0] == "block 1", out  # the first stage that is wrong is shown


def test_help_reads_well(capsys):
    for argv in (["--help"], ["train", "--help"], ["generate", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "") and "usage: deepseek_mla.py" in out
        assert "%(" not in out and max(map(len, out.splitlines())) < 100


# --- speed ----------------------------------------------------------------------------


def best_of(n: int, *steps) -> list[float]:
    """The shortest time of each, tried in turn."""
    best = [math.inf] * len(steps)
    for _ in range(n):
        for side, step in enumerate(steps):
            started = time.perf_counter()
            step()
            best[side] = min(best[side], time.perf_counter() - started)
    return best


@pytest.fixture
def speed_pair(hf):
    """Both sides at a size where the matrices count."""
    config = mla.Config(
        vocab_size=1025, max_seq_len=1024, dim=256, n_layers=4, n_heads=8,
        q_latent_dim=96, latent_dim=64, head_dim=32, rope_dim=16,
        value_dim=32, ffn_dim=704,
    )  # fmt: skip
    return mla.Transformer(config), mla.reference(config)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training step"])
def test_no_slower_than_hugging_face(speed_pair, training):
    """A lenient bound, best of several; `make bench` measures properly."""
    batch, steps = some_tokens(4, 129, 1025), []
    for model in speed_pair:
        model.train(training)
        optimizer = mla.make_optimizer(model, mla.Recipe())

        def step(model=model, optimizer=optimizer):
            if not training:
                with torch.inference_mode():
                    return model(batch[:, :-1])
            optimizer.zero_grad()
            logits = model(batch[:, :-1])
            logits = getattr(logits, "logits", logits)
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()

        steps.append(step)
    ours, theirs = best_of(9, *steps)
    assert ours <= 1.15 * theirs, f"{ours / theirs:.2f} times Hugging Face's"


@pytest.mark.slow
@torch.inference_mode()
def test_a_step_is_cheaper_than_hugging_faces(hf, speed_pair):
    """Which expands the whole cache to keys and values at each step."""
    ours, theirs = (model.eval() for model in speed_pair)
    tokens, n = some_tokens(1, 1000, 1025), 900
    mine, other = ours.new_cache(1, 1024), hf.DynamicCache(config=theirs.config)
    ours(tokens[:, :n], mine)
    theirs(input_ids=tokens[:, :n], past_key_values=other)
    cached, reference = best_of(
        60,
        lambda: ours(tokens[:, n : n + 1], mine),
        lambda: theirs(input_ids=tokens[:, n : n + 1], past_key_values=other),
    )
    uncached = best_of(3, lambda: ours(tokens[:, : n + 1]))[0]
    assert cached <= 0.8 * reference, f"{cached / reference:.2f} times Hugging Face's"
    assert 10 * cached <= uncached, f"only {uncached / cached:.1f} times cheaper"
