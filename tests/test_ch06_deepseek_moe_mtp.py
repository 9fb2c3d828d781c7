# SPDX-License-Identifier: MIT
"""Chapter 6, experts and prediction depths: all that the chapter before had, kept."""

import copy
import json
import math
import re
import shutil
import time
import weakref
from collections import Counter
from dataclasses import fields, replace
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

CHAPTER = find("ch06")
moe = load(CHAPTER)
STORIES = ROOT / "data" / "stories.txt"

# The sizes of the small model, by the letters of the chapter.
D, H, Q, C, K, R, P, L, V, M = 36, 6, 22, 18, 10, 14, 8, 3, 97, 2
E, A, F_DENSE, F_EXPERT = 12, 3, 52, 20
FORMS = {
    "absorb k": moe.attend_absorb_k,
    "absorb kv": moe.attend_absorb_kv,
    "latent cache": moe.attend_latent_cache,
}
# What makes a config one of DeepSeek-V2: groups by their best expert, or none.
V2 = {"model_type": "deepseek_v2", "renormalise": False, "n_mtp": 0}
GREEDY = V2 | {"n_groups": 1, "n_active_groups": 1}
KINDS = {"V3": {}, "V2": V2, "V2, greedy": GREEDY}


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
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": F_DENSE}
SIZES |= {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": H}
SIZES |= {"q_lora_rank": Q, "kv_lora_rank": C, "qk_nope_head_dim": K}
SIZES |= {"qk_rope_head_dim": R, "v_head_dim": P, "max_position_embeddings": 80}
SIZES |= {"rms_norm_eps": 1e-6, "first_k_dense_replace": 1}
SIZES |= {"n_routed_experts": E, "num_experts_per_tok": A, "n_shared_experts": 2}
SIZES |= {"moe_intermediate_size": F_EXPERT, "n_group": 4, "topk_group": 2}
SIZES |= {"bos_token_id": 95, "eos_token_id": 96, "tie_word_embeddings": False}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
SCALING = {"factor": 4.0, "original_max_position_embeddings": 20}
SCALING |= {"beta_fast": 2.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5}
YARN = SCALING | {"rope_type": "yarn", "rope_theta": 100.0}
# What makes a config of Hugging Face's one of the kinds.
THEIR_KINDS = {
    "V3": {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2},
    "V3, half-split": {"model_type": "deepseek_v3", "rope_interleave": False},
    "V2": {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
    "V2, greedy": {"model_type": "deepseek_v2", "topk_method": "greedy"},
}


def theirs_random(hf, kind: str = "V3", seed: int = 0, **changes):
    """A small model of Hugging Face's, every parameter random, norms and biases too."""
    rope = {"rope_parameters": dict(YARN)}
    asked = {**SIZES, **rope, **THEIR_KINDS[kind], **changes}
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**asked)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = float("norm" in name)
            parameter.copy_(centre + noise * (0.3 if centre else 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def small(**changes):
    return replace(moe.small_config(), **changes)


def ours_random(dtype: torch.dtype = torch.float32, **changes):
    """Our small model, every parameter random, in eval mode."""
    model = moe.Transformer(small(**changes)).eval()
    moe.randomise(model)
    return model.to(dtype)


@remember
def shared(q_latent_dim: int | None = Q, kind: str = "V3", dtype=torch.float64):
    """A random model for tests that leave it as it is; attention far from uniform."""
    model = ours_random(dtype, q_latent_dim=q_latent_dim, **KINDS[kind])
    with torch.no_grad():
        for block in model.blocks:
            a = block.attention
            (a.wq if q_latent_dim is None else a.wq_up).weight.mul_(4)
    return model


def their_copy(ours):
    """The same weights in Hugging Face's class."""
    theirs = moe.reference(ours.config, ours.embed.weight.dtype)
    moe.copy_to_reference(ours, theirs)
    return theirs


@remember
def their_shared(q_latent_dim: int | None = Q, kind: str = "V3", dtype=torch.float64):
    return their_copy(shared(q_latent_dim, kind, dtype))


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
    for form in (moe.attend_naive, *FORMS.values()):
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
    equal(FORMS[form](*asked, seen), moe.attend_naive(*asked, seen), 1e-10)


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
    expected = moe.attend_naive(*asked, seen)
    got = FORMS[form](*asked, seen)
    assert got.dtype == dtype and 0.5 < expected.abs().max() < 10
    equal(got, expected, atol)
    exact = moe.attend_naive(*operands(FULL | {"T": T}), seen)
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
    weight = torch.randn(moe.attend_naive(*tensors, scale, seen).shape, dtype=dtype)
    for attend in (moe.attend_naive, FORMS[form]):
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
        moe.attend_naive(*operands(SMALL))
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
    equal(moe.attend_latent_cache(q, kv, w_up, scale, causal(4, 7)), out, 1e-12)


def test_no_form_forgets_the_rotary_part_or_the_scale():
    for attend in (moe.attend_naive, *FORMS.values()):
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
    gaps = moe.compare_forms()
    assert list(gaps) == [form.__name__ for form in FORMS.values()]
    assert all(0 < gap < 1e-10 for gap in gaps.values())
    real = moe.attend_absorb_kv

    def without_transpose(q, kv, w_up, scale, seen=None):
        turned = w_up.clone()
        turned[:, :K, :K] = w_up[:, :K, :K].mT
        return real(q, kv, turned, scale, seen)

    without_transpose.__name__ = "attend_absorb_kv"
    monkeypatch.setattr(moe, "attend_absorb_kv", without_transpose)
    gaps = moe.compare_forms()
    assert gaps["attend_absorb_kv"] > 0.1 and gaps["attend_absorb_k"] < 1e-10


# --- which form is taken --------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls of each form, with how many queries and keys."""
    calls = Counter()
    for real in (moe.attend_naive, *FORMS.values()):

        def count(q, kv, *rest, real=real):
            name = real.__name__.removeprefix("attend_")
            calls[name, q.shape[2], kv.shape[1]] += 1
            return real(q, kv, *rest)

        monkeypatch.setattr(moe, real.__name__, count)
    return calls


def test_prompts_are_read_naive_and_tokens_decoded_absorbed(taken):
    model, tokens = shared(), some_tokens(2, 30)
    moe.generate(model, tokens, 4)
    steps = {("latent_cache", 1, 30 + n): L for n in (1, 2, 3)}
    assert taken == {("naive", 30, 30): L} | steps
    taken.clear()
    moe.loss(ours_random().train(), tokens).backward()
    depths = {("naive", 28, 28): 1, ("naive", 27, 27): 1}
    assert taken == {("naive", 29, 29): L} | depths
    taken.clear()
    in_chunks(model, tokens, [0, 14, 28, 30])
    chunks = {("naive", 14, 14): L, ("naive", 14, 28): L, ("latent_cache", 2, 30): L}
    assert taken == chunks
    for name, T, S in chunks:
        assert (name != "naive") == moe.absorption_pays(T, S, model.config)


@pytest.mark.parametrize(
    "preset", ["DEEPSEEK_V3", "DEEPSEEK_V2", "DEEPSEEK_V2_LITE", "TINY"]
)
def test_when_absorption_pays(preset):
    """A single token always, but for the first few; a prompt of its own never."""
    config = moe.presets()[preset]
    for S in (2, 10, 1000, 100_000):
        assert moe.absorption_pays(1, S, config)
        assert not moe.absorption_pays(S, S, config)
    pays = [moe.absorption_pays(T, 4096, config) for T in range(1, 4097)]
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
                for form in (moe.attend_naive, moe.attend_latent_cache)
            )
            assert moe.absorption_pays(T, S, config) == (absorbed < naive), (T, S)
            seen.add(absorbed < naive)
    narrow = 2 * widths["C"] < widths["K"] + widths["P"]
    assert seen == ({True} if narrow else {True, False})


@pytest.mark.parametrize("q_latent_dim", [Q, None])
def test_the_flops_of_a_step_are_the_formula(q_latent_dim):
    """The cache is read, never expanded, and no expert works that was not chosen."""
    # In float64 the experts' products are plain ones, which torch counts.
    model, B = shared(q_latent_dim), 2
    tokens, cache = some_tokens(B, 80), model.new_cache(B, 80)
    into_q = D * H * (K + R) if q_latent_dim is None else D * Q + Q * H * (K + R)
    attention = into_q + D * (C + R) + C * H * (K + P) + H * P * D
    mixture = D * E + (A + 2) * 3 * D * F_EXPERT
    weights = L * attention + 3 * D * F_DENSE + (L - 1) * mixture + D * V
    with torch.no_grad():
        model(tokens[:, :9], cache)
    for S in range(10, 41):
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(tokens[:, S - 1 : S], cache)
        expected = weights + L * H * S * (2 * C + R)
        assert counter.get_total_flops() == 2 * B * expected, S


# --- nothing goes stale ---------------------------------------------------------------


def optimizer_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    moe.loss(model, some_tokens(2, 40, seed=5)).backward()
    optimizer.step()
    return model.eval()


def other_weights(model):
    other = moe.Transformer(model.config)
    moe.randomise(other, seed=7)
    model.load_state_dict(other.state_dict())
    return model


def assigned(model):
    other = moe.Transformer(model.config).double()
    moe.randomise(other, seed=8)
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def in_place(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attention.wkv_up.weight.mul_(-1.5)
    return model


def in_place_experts(model):
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.ffn.experts.w_gate_up.mul_(-1.5)
            block.ffn.experts.w_down.add_(0.1)
    return model


def other_choices(model):
    with torch.no_grad():
        for router in model.routers():
            router.bias.copy_(router.bias.flip(0))
    return model


def after_balance(model):
    """The biases move by so much that other experts are chosen."""
    for router in model.routers():
        router.config = replace(router.config, balance_rate=0.2)
    model.train()
    moe.loss(model, some_tokens(2, 40, seed=5))
    model.balance()
    return model.eval()


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
    "experts, in place": in_place_experts,
    "biases, in place": other_choices,
    "a balance of the loads": after_balance,
    "another parameter": another_parameter,
    "to float64 and back": lambda model: model.double().float().double(),
    "to float32": lambda model: model.float(),
    "to bfloat16 and back": lambda model: model.bfloat16().double(),
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
    if not change.startswith("to "):
        assert (after - before).abs().max() > 0.1, "the change must matter"
    kept = {name.rpartition(".")[2] for name, _ in changed.named_buffers()}
    assert kept == {"bias", "mtp_weight"}


@torch.no_grad()
def test_nothing_is_stale_after_loading(tmp_path):
    """Also where the model was built without memory, and in each dtype."""
    ours, tokens, each = ours_random(), some_tokens(2, 24), range(25)
    ours.save_pretrained(tmp_path)
    expected = ours(tokens)
    loaded = moe.Transformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens), expected)
    near(in_chunks(loaded, tokens, each)[0], expected)
    wide = moe.Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    equal(in_chunks(wide, tokens, each)[0], wide(tokens), 1e-10)
    low = moe.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(ours).bfloat16()(tokens), low(tokens))
    with torch.device("meta"):
        empty = moe.Transformer(ours.config)
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(ours.state_dict())
    assert torch.equal(filled(tokens), expected)
    near(in_chunks(filled, tokens, each)[0], expected)


# --- parity ---------------------------------------------------------------------------

SHAPES = {
    "V3": {},
    "V2": V2,
    "V2, greedy": GREEDY,
    "V3, queries uncompressed": {"q_latent_dim": None},
    "V2, queries uncompressed": V2 | {"q_latent_dim": None},
    "V3, half-split": {"rope_interleave": False},
    "no YaRN": {"rope_factor": 1.0},
    "another eps": {"norm_eps": 1e-3},
    "tied": {"tie_embeddings": True},
    "one block of one head": {"n_layers": 1, "n_heads": 1},
    "values wider than keys": {"value_dim": 28, "latent_dim": 40},
    "one group": {"n_groups": 1, "n_active_groups": 1},
    "all groups": {"n_active_groups": 4},
    "one expert of two groups": {"n_groups": 2, "n_active_groups": 1, "n_active": 1},
    "every expert": {"n_groups": 1, "n_active_groups": 1, "n_active": 12},
    "weights as they are": {"renormalise": False, "routed_scale": 1.5},
    "mixtures alone": {"n_dense_layers": 0, "n_shared": 1},
    "experts of an odd width": {"expert_ffn_dim": 21},
    "no mixture but in the modules": {"n_dense_layers": 3},
    "no modules": {"n_mtp": 0},
    "one module": {"n_mtp": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_equals_hugging_face(hf, monkeypatch, shape, dtype):
    config = small(**SHAPES[shape])
    monkeypatch.setattr(moe, "small_config", lambda: config)
    rows = moe.verify(dtype=dtype)
    blocks = [f"block {i}" for i in range(config.n_layers)]
    ahead = [f"{k} ahead" for k in range(2, 2 + config.n_mtp)]
    stages = ["embedding", *blocks, "final norm", "logits", *ahead]
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        assert row["relative"] <= 1e-5 == moe.TOLERANCE[dtype], row
        assert row["argmax"] == 1.0 or row["stage"] not in ("logits", *ahead)


VARIANTS = {
    "no scaling": {"rope_factor": 1.0, "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0},
    "no mscale": {"rope_mscale": 0.0, "rope_mscale_all_dim": 0.0},
    "of the rotary part": {"rope_mscale": 1.0, "rope_mscale_all_dim": 0.0},
    "of the softmax": {"rope_mscale": 0.0, "rope_mscale_all_dim": 0.7},
    "of both": {"rope_mscale": 1.0, "rope_mscale_all_dim": 0.5},
    "V2-Lite's": {"rope_mscale": 0.707, "rope_mscale_all_dim": 0.707},
    "V3's": {"rope_mscale": 1.0, "rope_mscale_all_dim": 1.0},
}
CLASSES = {"V3": {}, "V3, half-split": {"rope_interleave": False}, "V2": V2}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("q_latent_dim", [Q, None])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_yarn_queries_and_orders_in_every_combination(
    hf, tmp_path, kind, q_latent_dim, variant
):
    """The whole pass, in ragged chunks, and through a file."""
    changes = CLASSES[kind] | VARIANTS[variant]
    ours = ours_random(q_latent_dim=q_latent_dim, **changes)
    theirs = their_copy(ours)
    tokens = some_tokens(2, 80)
    logits = theirs(tokens).logits
    near(ours(tokens), logits)
    near(in_chunks(ours, tokens, [0, 27, 28, 29, 49, 52, 80])[0], logits)
    ours.save_pretrained(tmp_path)
    near(moe.reference(tmp_path)(tokens).logits, logits, 1e-6)
    back = moe.Transformer.from_pretrained(tmp_path)
    equal(back.state_dict(), ours.state_dict(), 0)
    plain = {"rope_original_len": 4096, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
    assert back.config == replace(
        ours.config, **(plain if ours.config.rope_factor == 1 else {})
    )
    mine, other = (model(tokens, detail=True) for model in (ours, back))
    for a, b in zip([mine[0], *mine[1]], [other[0], *other[1]], strict=True):
        assert torch.equal(a, b)


def choices(modules, pick, run):
    """What `run()` gives, and the experts that each router chose meanwhile."""
    seen = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, found=found: found.append(pick(out))
        )
        for module, found in zip(modules, seen, strict=True)
    ]
    out = run()
    for hook in hooks:
        hook.remove()
    return out, [torch.cat(found, 1) for found in seen if found]


def our_choices(model, run):
    return choices(model.routers(), lambda out: out[1].chosen, run)


def sent(model, tokens, chosen):
    """The logits where each token goes to these experts, whatever their scores."""
    model = copy.deepcopy(model)
    for router, ids in zip(model.routers(), chosen, strict=False):
        router.choose = lambda _, ids=ids: ids
    return model(tokens)


def share_of_same(one, other) -> float:
    """Of how many tokens the chosen experts are the same ones, in the worst mixture."""
    pairs = zip(one, other, strict=True)
    return min(
        (a.sort().values == b.sort().values).all(-1).double().mean() for a, b in pairs
    )


@pytest.mark.parametrize("shape", ["V3", "V2", "V2, greedy", "no YaRN"])
@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_hugging_faces(hf, shape):
    """A rounding can send a token to another expert; then the truth goes there too."""
    exact = ours_random(torch.float64, **SHAPES[shape])
    low = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(low.state_dict())  # the weights as they are rounded
    tokens, theirs = some_tokens(4, 80), their_copy(low)
    gates = [layer.mlp.gate for layer in theirs.model.layers[1:]]
    other, chosen = choices(
        gates, lambda out: out[2].unflatten(0, (4, 80)), lambda: theirs(tokens).logits
    )
    truth = sent(exact, tokens, chosen)
    other, top = (other.double() - truth).abs(), truth.abs().max()
    usual = our_choices(exact, lambda: exact(tokens))[1]
    assert share_of_same(chosen, usual) > 0.9
    for run in (
        lambda: low(tokens),
        lambda: in_chunks(low, tokens, [0, 40, *range(41, 81)])[0],
    ):
        logits, chosen = our_choices(low, run)
        assert share_of_same(chosen, usual) > 0.9
        mine = (logits.double() - sent(exact, tokens, chosen)).abs()
        assert mine.max() <= 1.3 * other.max() and mine.mean() <= 1.1 * other.mean()
        assert mine.max() <= moe.TOLERANCE[torch.bfloat16] * top


@pytest.mark.parametrize("shape", ["V3", "V2", "every expert"])
def test_verify_in_bfloat16(hf, monkeypatch, capsys, shape):
    """Tokens sent elsewhere do not count; where all experts are chosen, none is."""
    config, limit = small(**SHAPES[shape]), moe.TOLERANCE[torch.bfloat16]
    monkeypatch.setattr(moe, "small_config", lambda: config)
    rows = moe.verify(dtype=torch.bfloat16)
    for row in rows:
        assert row["typical"] <= limit / 2, row
        assert row["relative"] <= limit / 2 or shape != "every expert", row
    assert moe.show_distances(rows, torch.bfloat16)
    assert "in half of the tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("off", "good"), [(1, True), (3, False)])
def test_in_bfloat16_half_of_the_tokens_are_judged(capsys, off, good):
    """Of four tokens one may be far off, in float32 none."""
    theirs = torch.randn(4, 9)
    ours = theirs.clone()
    ours[:off] += 10
    row = moe.distance("some", ours, theirs)
    assert row["max_abs"] == pytest.approx(10) and row["relative"] > 1
    assert moe.show_distances([row], torch.bfloat16) == good
    assert ("above" in capsys.readouterr().out) != good
    assert not moe.show_distances([row], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_compares_a_saved_model(hf, tmp_path, kind):
    config = {"vocab_size": 300, "eos_id": None} | KINDS[kind]
    ours_random(**config).save_pretrained(tmp_path)
    rows = moe.verify(tmp_path)
    assert len(rows) == (8 if kind == "V3" else 6)
    assert max(row["relative"] for row in rows) < 1e-5


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
        {"n_active": 2},
        {"n_active_groups": 1},
        {"n_groups": 2},
        {"n_groups": 1, "n_active_groups": 1},
        {"renormalise": False},
        {"routed_scale": 2.4},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_comparison_is_not_blind_to(changes):
    """Each setting moves the logits by far more than the tolerance of parity."""
    ours, tokens = ours_random(torch.float64), some_tokens(2, 80)
    other = moe.Transformer(small(**changes)).eval().double()
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
            assert a.kv_norm.eps == a.q_norm.eps == 1e-6 == moe.LATENT_EPS
            assert block.attention_norm.eps == block.ffn_norm.eps == eps
            a.wkv_down.weight[:C] *= 1e-3
            a.wq_down.weight *= 1e-3
        assert ours.norm.eps == eps
        for module in ours.mtp:
            a, norms = module.block.attention, (module.embed_norm, module.hidden_norm)
            assert a.kv_norm.eps == a.q_norm.eps == 1e-6
            assert {norm.eps for norm in (*norms, module.norm)} == {eps}
        same_logits(ours, their_copy(ours))
        tokens = some_tokens(2, 80)
        logits = ours(tokens)
        for block in ours.blocks:
            block.attention.kv_norm.eps = block.attention.q_norm.eps = 1e-5
        assert (ours(tokens) - logits).abs().max() > 1e-2 * logits.abs().max()


# --- YaRN -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("DEEPSEEK_V3", 0.135234),
        ("DEEPSEEK_V2", 0.114721),
        ("DEEPSEEK_V2_LITE", 0.114721),
    ],
)
def test_yarn_at_full_size_is_hugging_faces(hf, name, scale):
    """Which pairs are left alone, blended, and slowed; both scales."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = moe.presets()[name]
    theirs_config = hf.AutoConfig.for_model(**config.to_hf())
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs_config, torch.device("cpu"))
    scaled = moe.rope_frequencies(config, torch.device("cpu"))
    torch.testing.assert_close(scaled, theirs, rtol=1e-6, atol=0)
    exact = [10000.0 ** (-2 * i / 64) for i in range(32)]
    plain = moe.rope_frequencies(replace(config, rope_factor=1.0), torch.device("cpu"))
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
    table = moe.rope_table(torch.tensor([0]), config)
    assert factor == pytest.approx(1.0) and table[0].max() == pytest.approx(1.0)
    assert config.softmax_scale == pytest.approx(scale, rel=1e-5)


def test_the_softmax_scale_by_hand():
    """(0.1·m·ln 40 + 1)² / √192: 1.873854 times as large for V3."""
    grown = (0.1 * math.log(40) + 1) ** 2
    assert grown == pytest.approx(1.873854, rel=1e-6)
    assert moe.DEEPSEEK_V3.softmax_scale == pytest.approx(grown / math.sqrt(192))
    lite = (0.0707 * math.log(40) + 1) ** 2
    assert lite == pytest.approx(1.589626, rel=1e-6)
    assert moe.DEEPSEEK_V2_LITE.softmax_scale == pytest.approx(lite / math.sqrt(192))
    for changes in ({"rope_factor": 1.0}, {"rope_mscale_all_dim": 0.0}):
        assert small(**changes).softmax_scale == pytest.approx(24**-0.5)
    # The rotary part's scale alone leaves that of the softmax as it is.
    assert small(rope_mscale=7.0).softmax_scale == small().softmax_scale


@pytest.mark.parametrize("kind", ["V3", "V2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_scales_are_hugging_faces(hf, kind, variant):
    config = small(**KINDS[kind], **VARIANTS[variant])
    theirs = moe.reference(config)
    rotary = theirs.model.rotary_emb
    assert config.softmax_scale == pytest.approx(
        theirs.model.layers[1].self_attn.scaling, rel=1e-9
    )
    table = moe.rope_table(torch.arange(80), config)
    if kind == "V2":
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
    two = moe.rope_table(torch.tensor([0, 3]), rope_config(rope_dim=2))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    equal(moe.apply_rope(x, two)[0, 0, 0], torch.tensor([1.0, 0.0]), 0)
    turned = torch.tensor([math.cos(3), math.sin(3)])
    equal(moe.apply_rope(x, two)[0, 0, 1], turned, 1e-6)
    # theta 100: the pair (0, 2) turns by 1 a position, the pair (1, 3) by 1/10.
    four = moe.rope_table(torch.tensor([5]), rope_config(rope_dim=4))
    got = moe.apply_rope(torch.tensor([[[[1.0, 2.0, 0.0, 0.0]]]]), four)[0, 0, 0]
    c, s = [math.cos(5), math.cos(0.5)], [math.sin(5), math.sin(0.5)]
    equal(got, torch.tensor([c[0], 2 * c[1], s[0], 2 * s[1]]), 1e-6)


def test_positions_of_each_row_broadcast_over_heads():
    config, position = small(), torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    table = moe.rope_table(position, config)
    assert table.shape == (2, 2, 1, 4, 7) and table.dtype == torch.float32
    x = torch.randn(2, H, 4, R)
    for row in range(2):
        alone = moe.rope_table(position[row], config)
        assert alone.shape == (2, 4, 7)
        expected = moe.apply_rope(x[row : row + 1], alone)
        assert torch.equal(moe.apply_rope(x, table)[row : row + 1], expected)


def turned(x, m: int, config):
    table = moe.rope_table(torch.tensor([m]), config)
    return moe.apply_rope(x.view(1, 1, 1, -1), table).flatten()


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
    model, tokens, real = shared(), some_tokens(2, 40), moe.positions_and_mask
    logits = model(tokens)

    def shifted(tokens, cache):
        position, seen = real(tokens, cache)
        return position + 37, seen

    monkeypatch.setattr(moe, "positions_and_mask", shifted)
    equal(model(tokens), logits, 1e-4)
    equal(in_chunks(model, tokens, [0, 30, *range(31, 41)])[0], logits, 1e-4)
    still = torch.stack([torch.ones(40, 7), torch.zeros(40, 7)])
    monkeypatch.setattr(moe, "rope_table", lambda p, c: still)
    assert (model(tokens) - logits).abs().max() > 0.1, "the positions matter"


def test_the_two_orders_by_hand():
    """Rows 0 … 5 are one head of width 6, rows 6 … 11 the next."""
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    order = moe.to_half_split(rows, 6)[:, 0].tolist()
    assert order == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    back = moe.to_interleaved(rows, 6)[:, 0].tolist()
    assert back == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_only_the_rotary_rows_are_reordered():
    """Two heads of 3 plain rows and 4 rotary ones; a latent of 5 before 4."""
    config = small(n_heads=2, head_dim=3, rope_dim=4, latent_dim=5)

    def order(name: str, rows: int, config=config, back=False):
        tensor = torch.arange(float(rows))[:, None].expand(rows, 2)
        move = moe.to_theirs if back else moe.to_ours
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
    seen, real = set(), moe.apply_rope
    monkeypatch.setattr(
        moe,
        "apply_rope",
        lambda x, rope: seen.add((x.dtype, rope.dtype)) or real(x, rope),
    )
    ours_random(torch.bfloat16)(some_tokens(1, 20))
    assert seen == {(torch.bfloat16, torch.float32)}
    config = rope_config(rope_theta=500000.0)
    table = moe.rope_table(torch.tensor([80_000]), config).double()
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
    into = moe.watch(model, [f"blocks.{i}:in" for i in range(L)], tokens=tokens)
    angle = torch.arange(40.0)[:, None] * moe.rope_frequencies(model.config, "cpu")
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
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_the_cache_equals_hugging_faces(hf, kind, q_latent_dim, cache_kind):
    """Theirs too holds the latent and the key; V2's has its pairs side by side."""
    ours = ours_random(q_latent_dim=q_latent_dim, **CLASSES[kind])
    theirs = their_copy(ours)
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
        if kind == "V2":
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
    ("name", "numbers"),
    [
        ("DEEPSEEK_V3", 61 * 576),
        ("DEEPSEEK_V2", 60 * 576),
        ("DEEPSEEK_V2_LITE", 27 * 576),
    ],
)
def test_its_bytes_at_full_size(name, numbers):
    """512 + 64 numbers a token and layer, for however many heads and experts."""
    with torch.device("meta"):
        model = moe.Transformer(moe.presets()[name]).bfloat16()
        assert model.new_cache(2, 1000).nbytes == 2 * 1000 * numbers * 2
        one = model.new_cache(2, 1000, n_layers=1)  # that of a prediction depth
        assert one.nbytes == 2 * 1000 * 576 * 2 and one.length == 0


@settings(max_examples=25, deadline=None)
@given(bounds_of(), st.sampled_from([Q, None]), st.sampled_from(list(KINDS)))
@example(list(range(61)), Q, "V3")  # one by one
@example(list(range(61)), None, "V2")
@example([0, 59, 60], None, "V2, greedy")
@example([0, 1, 60], Q, "V3")
def test_any_chunks_give_the_full_pass(bounds, q_latent_dim, kind):
    model, tokens = shared(q_latent_dim, kind), some_tokens(2, 60)
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
    layer, new = moe.LayerCache(kv), torch.randn(2, 4, 5)
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
    layers = [moe.LayerCache(torch.zeros(1, 90, C + R).double()) for _ in range(L)]
    cache = moe.KVCache(layers, 90)
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


def published_v2(**changes) -> dict:
    """That of DeepSeek-V2."""
    return (
        published_v2_lite(
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            n_group=8,
            n_routed_experts=160,
            num_attention_heads=128,
            num_hidden_layers=60,
            num_key_value_heads=128,
            q_lora_rank=1536,
            routed_scaling_factor=16.0,
            topk_group=3,
            topk_method="group_limited_greedy",
        )
        | changes
    )


def published_moonlight(**changes) -> dict:
    """That of a model of V3's kind: no groups, scaling, queries' latent or modules."""
    config = published_v3(
        bos_token_id=163584,
        eos_token_id=163585,
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=11264,
        max_position_embeddings=8192,
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        rms_norm_eps=1e-05,
        rope_theta=50000.0,
        routed_scaling_factor=2.446,
        topk_group=1,
        vocab_size=163840,
    )
    return without(config, "rope_scaling") | changes


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


PUBLISHED = {
    "DEEPSEEK_V3": published_v3,
    "DEEPSEEK_V2": published_v2,
    "DEEPSEEK_V2_LITE": published_v2_lite,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(hf, tmp_path, name):
    """Also as Hugging Face's class writes it anew."""
    published, preset = PUBLISHED[name](), moe.presets()[name]
    # DeepSeek-V3's file has not the α of its paper (arXiv:2412.19437 §4.2).
    assert moe.Config.from_hf(published) == replace(preset, balance_loss=0.001)
    assert moe.Config.from_hf(preset.to_hf()) == preset
    for written in (published, preset.to_hf()):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(written), encoding="utf-8")
        hf.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        again = json.loads(path.read_text(encoding="utf-8"))
        assert moe.Config.from_hf(again) == moe.Config.from_hf(written)
    for key, value in published.items():
        if key in (written := preset.to_hf()) and key != "rope_scaling":
            assert written[key] == value or key == "aux_loss_alpha", key


def test_a_config_like_moonlights():
    found = moe.Config.from_hf(published_moonlight())
    assert (found.n_groups, found.n_active_groups, found.n_mtp) == (1, 1, 0)
    assert (found.n_experts, found.n_active, found.n_shared) == (64, 6, 2)
    assert found.q_latent_dim is None and found.rope_factor == 1.0
    assert found.routed_scale == 2.446 and found.renormalise
    assert found.softmax_scale == 192**-0.5 and found.rope_theta == 50000.0
    assert moe.Config.from_hf(found.to_hf()) == found
    for scaling in ({"rope_scaling": None}, {"rope_parameters": None}):
        assert moe.Config.from_hf(published_moonlight(**scaling)) == found


def whole(c, active: bool = False) -> dict[str, int]:
    """The parameters of a model, counted matrix by matrix; if `active`, a token's."""
    d, q, h = c.dim, c.q_latent_dim, c.n_heads
    head = c.head_dim + c.rope_dim
    into_q = d * h * head if q is None else d * q + q + q * h * head
    latent = d * (c.latent_dim + c.rope_dim) + c.latent_dim
    expanded = c.latent_dim * h * (c.head_dim + c.value_dim)
    attention = into_q + latent + expanded + h * c.value_dim * d
    met = c.n_active if active else c.n_experts
    mixture = c.n_experts * d + (met + c.n_shared) * 3 * d * c.expert_ffn_dim
    layer = attention + 2 * d + mixture
    dense = attention + 2 * d + 3 * d * c.ffn_dim
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * d
    layers = c.n_dense_layers * dense + (c.n_layers - c.n_dense_layers) * layer
    ahead = c.n_mtp * (layer + 2 * d * d + 3 * d)
    return {
        "attention": attention,
        "layer": layer,
        "total": tables + d + layers,
        "mtp": ahead,
    }


@pytest.mark.parametrize(
    ("name", "attention", "layer", "total", "active", "mtp"),
    [
        (
            *("DEEPSEEK_V3", 187_107_328, 11_507_286_016),
            *(671_026_404_352, 37_552_282_624, 11_610_067_968),
        ),
        (
            *("DEEPSEEK_V2", 149_227_520, 3_972_116_480),
            *(235_741_434_880, 21_375_800_320, 0),
        ),
        (
            *("DEEPSEEK_V2_LITE", 13_763_072, 584_847_872),
            *(15_706_484_224, 2_661_150_208, 0),
        ),
    ],
)
def test_presets_have_these_parameters(hf, name, attention, layer, total, active, mtp):
    config = moe.presets()[name]
    with torch.device("meta"):
        ours = moe.Transformer(config)
        their_config = hf.AutoConfig.for_model(**config.to_hf())
        theirs = hf.AutoModelForCausalLM.from_config(their_config)

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    for block in ours.blocks[config.n_dense_layers :]:
        assert (size(block.attention), size(block)) == (attention, layer)
    counts = {"attention": attention, "layer": layer, "total": total, "mtp": mtp}
    assert whole(config) == counts and whole(config, True)["total"] == active
    assert size(theirs) == total and size(ours) == total + mtp
    assert moe.parameter_counts(ours) == {"total": total, "active": active, "mtp": mtp}
    assert their_shapes(theirs) == {
        name: tuple(moe.find(ours, tensor)[2][index].shape)
        for name, (tensor, index) in published_names(ours).items()
        if not tensor.startswith("mtp.")
    }


def published_names(ours) -> dict:
    """Every name in a published file, and our tensor and the place in it."""
    return {theirs: moe.place(name) for theirs, name in moe.hf_names(ours).items()}


def their_shapes(theirs) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of Hugging Face's model have in a published file."""
    shapes = {}
    for name, tensor in theirs.state_dict().items():
        layer, _, kind = name.rpartition(".experts.")
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
        if not layer:
            shapes[name] = tuple(tensor.shape)
            continue
        rows, columns = tensor.shape[1] // len(parts[kind]), tensor.shape[2]
        for e in range(len(tensor)):
            for part in parts[kind]:
                shapes[f"{layer}.experts.{e}.{part}.weight"] = (rows, columns)
    return shapes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_latent_dim": None},
        {"n_heads": 2},
        {"tie_embeddings": True},
        {"n_dense_layers": 0},
        {"n_shared": 0},
        GREEDY,
    ],
    ids=str,
)
def test_the_count_of_a_small_model(changes):
    model = ours_random(**changes)
    counted = whole(model.config)
    size = sum(p.numel() for p in model.parameters())
    assert size == counted["total"] + counted["mtp"]


def spellings() -> dict[str, tuple[dict, float]]:
    """Configs of one model, in every way that they are found; its rotary factor."""
    old = dict(SIZES)
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
    config = config | THEIR_KINDS[kind]
    found = moe.Config.from_hf(config)
    expected = small(bos_id=95, **KINDS[kind])
    if kind != "V3":
        expected = replace(expected, routed_scale=1.0)
    if factor == 1:
        plain = {"rope_factor": 1.0, "rope_mscale": 0.0, "rope_mscale_all_dim": 0.0}
        plain |= {"rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
        expected = replace(expected, rope_original_len=4096, **plain)
    assert found == expected
    rope = YARN if factor > 1 else PLAIN
    theirs = theirs_random(hf, kind, rope_parameters=dict(rope))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    same_logits(moe.Transformer.from_pretrained(tmp_path), theirs)
    again, tokens = moe.reference(tmp_path), some_tokens(2, 80)
    with torch.no_grad():  # what the test takes for one model is one to them
        equal(again(tokens).logits, theirs(tokens).logits, 0)


def test_what_a_scaling_leaves_out_is_yarns_default(hf):
    """Turns of 32 and 1, no scale, and the context as the original one."""
    config = published_v3(rope_scaling={"type": "yarn", "factor": 7})
    found = moe.Config.from_hf(config)
    assert (found.rope_beta_fast, found.rope_beta_slow) == (32.0, 1.0)
    assert (found.rope_mscale, found.rope_mscale_all_dim) == (0.0, 0.0)
    assert found.rope_original_len == 163840 and found.rope_factor == 7.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = hf.DeepseekV3Config(**config)
    frequency, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    mine = moe.rope_frequencies(found, torch.device("cpu"))
    torch.testing.assert_close(mine, frequency, rtol=1e-6, atol=0)
    assert moe.rope_table(torch.tensor([0]), found)[0, 0, 0] == pytest.approx(factor)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        V2 | {"q_latent_dim": None},
        GREEDY,
        {"n_groups": 1, "n_active_groups": 1, "n_active": 5, "renormalise": False},
        {"n_dense_layers": 0, "n_shared": 1, "expert_ffn_dim": 7, "n_mtp": 0},
        {"routed_scale": 2.446, "balance_loss": 0.01, "balance_per_sequence": False},
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
    assert moe.Config.from_hf(again) == config


BARE = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
BARE += ["intermediate_size", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"]
BARE += ["qk_rope_head_dim", "num_experts_per_tok", "moe_intermediate_size"]


@pytest.mark.parametrize("kind", ["V3", "V2"])
def test_what_a_config_leaves_out_is_hugging_faces_default(hf, kind):
    """All but what tells ids, and what only training looks at."""
    bare = {name: published_v3()[name] for name in BARE}
    bare["model_type"] = THEIR_KINDS[kind]["model_type"]
    theirs = hf.AutoConfig.for_model(**bare).to_dict()
    found = moe.Config.from_hf(bare)
    ids = {"bos_id": None, "eos_id": None}
    assert found == replace(moe.Config.from_hf(theirs), **ids)
    assert found.q_latent_dim == theirs["q_lora_rank"] == 1536
    assert found.max_seq_len == theirs["max_position_embeddings"]
    assert found.n_dense_layers == theirs["first_k_dense_replace"]
    assert found.n_experts == theirs["n_routed_experts"]
    assert found.n_shared == theirs["n_shared_experts"]
    assert found.n_groups == (theirs["n_group"] or 1)
    assert found.n_active_groups == (theirs["topk_group"] or 1)
    assert found.routed_scale == theirs["routed_scaling_factor"]
    assert found.renormalise == theirs["norm_topk_prob"]
    assert found.n_mtp == theirs.get("num_nextn_predict_layers", 0)
    assert moe.Config.from_hf(bare | {"q_lora_rank": None}).q_latent_dim is None


def test_greedy_has_no_groups(hf, tmp_path):
    """Whatever the file names; and where it names no method, it is this one."""
    for config in (
        published_v2(topk_method="greedy"),
        published_v2(topk_method=None),
        without(published_v2(), "topk_method"),
    ):
        found = moe.Config.from_hf(config)
        assert (found.n_groups, found.n_active_groups) == (1, 1)
        assert found.to_hf()["topk_method"] == "greedy"
    found = moe.Config.from_hf(published_v2())
    assert (found.n_groups, found.n_active_groups) == (8, 3)
    assert found.to_hf()["topk_method"] == "group_limited_greedy"
    theirs = theirs_random(hf, "V2, greedy", q_lora_rank=None)
    theirs.save_pretrained(tmp_path)
    assert theirs.config.n_group == 4
    for method in ("greedy", ...):
        amend(tmp_path, topk_method=method)
        same_logits(moe.Transformer.from_pretrained(tmp_path), moe.reference(tmp_path))
        same_logits(moe.Transformer.from_pretrained(tmp_path), theirs)


@torch.no_grad()
def test_without_experts_it_is_dense(tmp_path):
    ours, tokens = ours_random(n_experts=0, n_mtp=0), some_tokens(2, 20)
    dense = ours_random(n_dense_layers=L, n_mtp=0)
    assert torch.equal(ours(tokens), dense(tokens)) and not ours.routers()
    dense.save_pretrained(tmp_path)
    # Then it needs not say what experts would be.
    names = ["num_experts_per_tok", "moe_intermediate_size", "n_routed_experts"]
    amend(tmp_path, **dict.fromkeys([*names, "n_group", "topk_group"], ...))
    again = moe.Transformer.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), dense(tokens))


def yarn_but(**changes) -> dict:
    return {"rope_scaling": {**SCALING, "type": "yarn", **changes}}


V2_FILE = {"model_type": "deepseek_v2", "norm_topk_prob": False}
V2_FILE |= {"num_nextn_predict_layers": ...}
REFUSED = {
    "another architecture": ({"model_type": "gpt2"}, "DeepSeek.*gpt2"),
    "a near relative": ({"model_type": "deepseek_v32"}, "deepseek_v32"),
    "no architecture": ({"model_type": ...}, "model_type|None"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "attention biases": ({"attention_bias": True}, "attention_bias"),
    "mlp biases": ({"mlp_bias": True}, "mlp_bias"),
    "V3 by a softmax": ({"scoring_func": "softmax"}, "scoring_func.*softmax"),
    "V3 without a bias": ({"topk_method": "greedy"}, "topk_method.*greedy"),
    "V2 by a sigmoid": (V2_FILE | {"scoring_func": "sigmoid"}, "scoring_func.*sigmoid"),
    "V2 with a bias": (V2_FILE | {"topk_method": "noaux_tc"}, "topk_method.*noaux_tc"),
    "V2 renormalised": (V2_FILE | {"norm_topk_prob": True}, "norm_topk_prob is True"),
    "V2 with modules": (
        V2_FILE | {"num_nextn_predict_layers": 1},
        "V2 has no multi-token prediction",
    ),
    "every other layer": ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "V2, every other layer": (V2_FILE | {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "no active experts": ({"num_experts_per_tok": ...}, "lacks num_experts_per_tok"),
    "no width of experts": (
        {"moe_intermediate_size": None},
        "lacks moe_intermediate_size",
    ),
    "active experts of 0": ({"num_experts_per_tok": 0}, "n_active is 0"),
    "too many active": ({"num_experts_per_tok": 7}, "n_active 7.*2 of 4 groups of 3"),
    "groups that do not divide": ({"n_group": 5}, "n_experts 12.*n_groups 5"),
    "more groups than there are": ({"topk_group": 5}, "n_active_groups 5"),
    "groups of one": ({"n_group": 12, "topk_group": 5}, "n_groups 12.*two"),
    "experts of text": ({"n_routed_experts": "twelve"}, "twelve"),
    "groups of text": ({"n_group": "four"}, "four"),
    "experts fewer than none": ({"n_routed_experts": -4}, "n_experts is -4"),
    "a scale of text": ({"routed_scaling_factor": "large"}, "routed_scale.*large"),
    "a scale of 0": ({"routed_scaling_factor": 0}, "routed_scale is 0"),
    "modules of text": ({"num_nextn_predict_layers": "one"}, "one"),
    "modules fewer than none": ({"num_nextn_predict_layers": -1}, "n_mtp is -1"),
    "a list for a method": ({"topk_method": ["noaux_tc"]}, "topk_method"),
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
        V2_FILE | {"rope_interleave": False},
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
        moe.Transformer.from_pretrained(tmp_path)


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
        (V2 | {"rope_interleave": False}, "interleaved"),
        (V2 | {"n_mtp": 1}, "n_mtp is 0"),
        ({"n_dense_layers": -1}, "n_dense_layers is -1"),
        ({"n_experts": -1}, "n_experts is -1"),
        ({"n_active": 0}, "n_active is 0"),
        ({"n_active": 7}, "n_active 7.*6, 2 of 4 groups of 3"),
        ({"n_shared": -1}, "n_shared is -1"),
        ({"expert_ffn_dim": 0}, "expert_ffn_dim is 0"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": 5}, "n_experts 12.*n_groups 5"),
        ({"n_groups": 12, "n_active_groups": 6}, "n_groups 12.*two of their experts"),
        ({"n_active_groups": 0}, "n_active_groups is 0"),
        ({"n_active_groups": 5}, "n_groups 4.*n_active_groups 5"),
        ({"n_mtp": -1}, "n_mtp is -1"),
        ({"n_mtp": 1.0}, "n_mtp is 1.0"),
        ({"routed_scale": 0.0}, "routed_scale is 0.0"),
        ({"balance_rate": -0.1}, "balance_rate is -0.1"),
        ({"balance_loss": math.nan}, "balance_loss is nan"),
        ({"mtp_weight": -1.0}, "mtp_weight is -1.0"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        small(**changes)
    small(**GREEDY | {"n_active": 12})
    small(**V2 | {"n_groups": 12, "n_active_groups": 3})  # groups of one expert


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
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 5},
        {"n_group": 1, "topk_group": 1},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
        {"first_k_dense_replace": 0, "n_shared_experts": 1},
        {"first_k_dense_replace": 3},
        {"eos_token_id": [94, 96], "pad_token_id": 93},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", THEIR_KINDS)
def test_checkpoints_go_from_them_to_us_and_back(hf, tmp_path, kind, changes):
    theirs = theirs_random(hf, kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = moe.Transformer.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    assert not ours.training and ours.config.n_mtp == 0, "they leave the modules out"
    assert ours.config.rope_interleave == ("half-split" not in kind)
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


@torch.no_grad()
def test_a_small_moonlight_goes_from_them_to_us_and_back(hf, tmp_path):
    less = {"hidden_size": 40, "intermediate_size": 52, "moe_intermediate_size": 20}
    less |= {"num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 18}
    less |= {
        "max_position_embeddings": 80,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 14,
        "v_head_dim": 8,
    }
    less |= {
        "n_routed_experts": 16,
        "num_hidden_layers": 4,
        "vocab_size": 97,
        "bos_token_id": 95,
    }
    config = without(published_moonlight(**less, eos_token_id=96), "torch_dtype")
    theirs = theirs_random(hf, **config, rope_parameters=None)
    theirs.save_pretrained(tmp_path)
    written = json.dumps(config)
    (tmp_path / "config.json").write_text(written, encoding="utf-8")
    ours = moe.Transformer.from_pretrained(tmp_path)
    assert ours.config == moe.Config.from_hf(config)
    assert len(ours.routers()) == 3 and len(ours.routers()[0].weight) == 16
    same_logits(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    again = moe.reference(tmp_path / "again")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert max(row["relative"] for row in moe.verify(tmp_path / "again")) < 1e-5


def tensors_of(folder: Path) -> dict:
    """Those of all safetensors files of a folder."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_shards_bins_and_old_tables_load(hf, tmp_path):
    """Old files hold the frequencies of every layer; they are not needed."""
    theirs = theirs_random(hf)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same_logits(moe.Transformer.from_pretrained(tmp_path / "shards"), theirs)
    theirs.config.save_pretrained(tmp_path)
    state = tensors_of(tmp_path / "shards")
    for i in range(L):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        state[name] = torch.full((7,), math.nan)
    for zipped in (True, False):
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        same_logits(moe.Transformer.from_pretrained(tmp_path), theirs)


def in_shards(folder: Path) -> None:
    """The one file of a folder cut in two, with an index."""
    from safetensors.torch import save_file

    state = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        part = {name: state[name] for name in state if where[name] == file}
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def as_bin(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("form", [lambda _: None, in_shards, as_bin])
@pytest.mark.parametrize("kept", ["modules", "no copies", "no modules"])
@torch.no_grad()
def test_modules_are_read_where_the_file_has_them(tmp_path, form, kept):
    """Its config names them in any case."""
    fewer = {"n_layers": 2, "n_experts": 4, "n_groups": 2, "n_active": 1}
    ours, tokens = ours_random(**fewer), some_tokens(2, 30)
    ours.save_pretrained(tmp_path)
    if kept != "modules":
        copies = r"(embed_tokens|shared_head\.head)\." if kept == "no copies" else ""
        rewrite(tmp_path, drop(rf"layers\.[23]\.{copies}"))
    form(tmp_path)
    again = moe.Transformer.from_pretrained(tmp_path)
    n_mtp = 0 if kept == "no modules" else M
    assert again.config == replace(ours.config, n_mtp=n_mtp)
    assert torch.equal(again(tokens), ours(tokens)) and len(again.mtp) == n_mtp
    if n_mtp:
        equal(again.predict_ahead(tokens), ours.predict_ahead(tokens), 0)


@torch.no_grad()
def test_modules_go_from_us_to_them_and_back(hf, tmp_path):
    from transformers.modeling_layers import MtpModel

    ours, tokens = ours_random(), some_tokens(2, 30)
    ours.save_pretrained(tmp_path / "ours")
    theirs = moe.reference(tmp_path / "ours")
    for mine, other in zip(
        ours.predict_ahead(tokens), moe.reference_ahead(theirs, tokens), strict=True
    ):
        near(mine, other)
    MtpModel.from_pretrained(theirs).save_pretrained(tmp_path / "ahead")
    theirs.save_pretrained(tmp_path / "theirs")
    ahead = tensors_of(tmp_path / "ahead")
    # They write the head's copy under another name than the published file.
    head = ahead.pop("model.shared_head.weight")
    ahead[f"model.layers.{L}.shared_head.head.weight"] = head
    rewrite(tmp_path / "theirs", lambda state: state.update(ahead))
    again = moe.Transformer.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    equal(again.state_dict(), ours.state_dict(), 0)


@pytest.mark.parametrize("kind", ["V3", "V2"])
def test_weights_load_in_the_asked_dtype(hf, tmp_path, kind):
    """All but the routers' biases, which stay in float32, and λ."""
    ours = ours_random(**KINDS[kind])
    ours.save_pretrained(tmp_path)
    low = moe.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(ours.named_buffers())
    assert len(buffers) == (5 if kind == "V3" else 1)
    for name, value in ours.state_dict().items():
        kept = value if name in buffers else value.bfloat16()
        found = low.state_dict()[name]
        assert found.dtype == kept.dtype and torch.equal(found, kept), name
    low.save_pretrained(tmp_path / "low")
    assert json.loads((tmp_path / "low/config.json").read_text())["dtype"] == "bfloat16"
    back = moe.Transformer.from_pretrained(tmp_path / "low")
    for name, value in low.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.float()), name
    theirs = moe.reference(tmp_path, torch.bfloat16).state_dict()
    for name, value in moe.stack_experts(dict(moe.export_tensors(low))).items():
        if name in theirs:
            assert theirs[name].dtype == value.dtype, name
            assert torch.equal(theirs[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_bias_in_another_dtype_becomes_float32(tmp_path, dtype):
    ours = ours_random()
    ours.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda s: s.update(
            {name: s[name].to(dtype) for name in s if "correction_bias" in name}
        ),
    )
    low = moe.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for mine, other in zip(ours.routers(), low.routers(), strict=True):
        assert other.bias.dtype == torch.float32
        assert torch.equal(other.bias, mine.bias.to(dtype).float())


def test_a_tensor_is_let_go_when_it_is_copied(tmp_path, monkeypatch):
    """The file is read tensor by tensor, and none is the model's own memory."""
    ours_random().save_pretrained(tmp_path)
    real, alive, count = moe.read_tensors, [], 0

    def one_by_one(folder: Path):
        nonlocal count
        for name, tensor in real(folder):
            copies = sum(".embed_tokens." in n or "head.head" in n for n, _ in alive)
            held = [n for n, ref in alive if ref() is not None]
            # Copies wait for what they repeat; the last tensor is still in the loop.
            assert len(held) <= copies + 1, held
            count += 1
            alive.append((name, weakref.ref(tensor)))
            yield name, tensor

    monkeypatch.setattr(moe, "read_tensors", one_by_one)
    model = moe.Transformer.from_pretrained(tmp_path)
    assert count == len(tensors_of(tmp_path)) > 200
    assert not any(ref() is not None for _, ref in alive), model


DOWN = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
QB = "model.layers.1.self_attn.q_b_proj.weight"
UP = "model.layers.1.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.1.mlp.experts.7.down_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
PROJ = "model.layers.3.eh_proj.weight"


def drop(pattern: str):
    """Takes out every tensor whose name holds the pattern."""

    def change(state: dict) -> None:
        found = [name for name in state if re.search(pattern, name)]
        assert found
        for name in found:
            del state[name]

    return change


def put(name: str, *shape: int):
    return lambda state: state.update({name: torch.zeros(shape)})


def more(name: str):
    """Adds a little to one number of a tensor."""

    def change(state: dict) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[-1] += 0.01

    return change


SPOILT = {
    "missing": (drop(UP), f"missing.*{UP}"),
    "no rotary key": (drop(DOWN), f"missing.*{DOWN}"),
    "no norm": (drop("layers.0.self_attn.kv_a_layernorm"), "missing.*kv_a_layernorm"),
    "unexpected": (put("extra", 2), "unexpected.*extra"),
    "queries in one matrix": (
        put(QB.replace("q_b_proj", "q_proj"), 144, 36),
        r"unexpected.*self_attn\.q_proj",
    ),
    "a bias": (
        put(DOWN.replace("weight", "bias"), 32),
        "unexpected.*kv_a_proj_with_mqa.bias",
    ),
    "a scale of eight bits": (
        put(UP.replace("weight", "weight_scale_inv"), 1),
        "unexpected.*weight_scale_inv",
    ),
    "a block more": (put(UP.replace("1", "5"), 108, 18), r"unexpected.*layers\.5\."),
    "transposed": (lambda s: s.update({UP: s[UP].T}), rf"{UP}.*18, 108.*108, 18"),
    "no rotary rows": (lambda s: s.update({DOWN: s[DOWN][:18]}), rf"{DOWN}.*18, 36"),
    "a head more": (put(QB, 168, 22), rf"{QB}.*168, 22"),
    "a row more": (put(QB, 145, 22), rf"{QB}.*145, 22"),
    "flat": (put(QB, 144), rf"{QB}.*144,"),
    "deep": (put(QB, 144, 22, 1), rf"{QB}.*22, 1"),
    "a number": (put(UP), UP),
    "a number for queries": (put(QB), QB),
    "a number for latents": (put(DOWN), DOWN),
    # Of the mixtures.
    "one expert's matrix": (drop(EXPERT), f"missing tensors: {EXPERT}$"),
    "one expert": (drop(r"\.1\.mlp\.experts\.11\."), r"missing.*experts\.11\.gate"),
    "an expert more": (
        put(EXPERT.replace(".7.", ".12."), 36, 20),
        r"unexpected.*experts\.12\.",
    ),
    "experts of a dense layer": (
        put(EXPERT.replace("layers.1", "layers.0"), 36, 20),
        r"unexpected.*layers\.0\.mlp\.experts",
    ),
    "experts in one tensor": (
        put("model.layers.1.mlp.experts.down_proj", 12, 36, 20),
        r"unexpected.*experts\.down_proj",
    ),
    "an expert transposed": (
        lambda s: s.update({EXPERT: s[EXPERT].T}),
        rf"{EXPERT}.*20, 36.*36, 20",
    ),
    "an expert of one row": (put(EXPERT, 1, 20), rf"{EXPERT}.*1, 20.*36, 20"),
    "an expert that is a number": (put(EXPERT), EXPERT),
    "no router": (drop(r"layers\.2\.mlp\.gate\.weight"), r"missing.*mlp\.gate\.weight"),
    "no bias of a router": (drop(BIAS), f"missing.*{BIAS}"),
    "a bias too short": (put(BIAS, 11), rf"{BIAS}.*11.*12"),
    "a bias for one": (put(BIAS, 1), rf"{BIAS}.*1,.*12"),
    "no shared experts": (drop(r"layers\.1\.mlp\.shared"), "missing.*shared_experts"),
    "one shared expert": (
        put("model.layers.1.mlp.shared_experts.up_proj.weight", 20, 36),
        r"shared_experts\.up_proj.*20, 36.*40, 36",
    ),
    # Of the prediction modules.
    "one module": (drop(r"layers\.4\."), r"missing.*layers\.4\."),
    "the first module": (drop(r"layers\.3\."), r"unexpected.*layers\.4\."),
    "no norm of a module": (drop(r"layers\.3\.enorm"), r"missing.*layers\.3\.enorm"),
    "no last norm": (drop(r"shared_head\.norm"), r"missing.*shared_head\.norm"),
    "no projection": (drop(PROJ), f"missing.*{PROJ}"),
    "a projection of one": (put(PROJ, 36, 36), rf"{PROJ}.*36, 36.*36, 72"),
    "an expert of a module": (
        drop(r"layers\.4\.mlp\.experts\.3\.up"),
        r"missing.*layers\.4\.mlp\.experts\.3\.up_proj",
    ),
    "a copy of another embedding": (
        more("model.layers.4.embed_tokens.weight"),
        r"layers\.4\.embed_tokens\.weight should repeat our embed",
    ),
    "a copy of another head": (
        more("model.layers.3.shared_head.head.weight"),
        r"layers\.3\.shared_head\.head\.weight should repeat our head",
    ),
    "a copy of another size": (
        put("model.layers.3.embed_tokens.weight", 96, 36),
        r"layers\.3\.embed_tokens\.weight should repeat",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_loading_is_strict(tmp_path, case):
    change, named = SPOILT[case]
    ours_random().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"(?s){tmp_path.name}.*{named}"):
        moe.Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("order", [list, lambda found: list(found)[::-1]])
def test_copies_are_checked_wherever_they_stand(tied, order):
    """Before what they repeat, or behind it."""
    ours = ours_random(tie_embeddings=tied)
    state = dict(moe.export_tensors(ours)) | dict(moe.mtp_copies(ours))
    copies = [name for name in state if "embed_tokens" in name or "head.head" in name]
    copies.remove("model.embed_tokens.weight")
    assert len(copies) == 2 * M

    def fill(**changes) -> None:
        found = order({**state, **changes}.items())
        model = moe.Transformer(ours.config)
        moe.load_tensors(model, found)
        equal(model.state_dict(), ours.state_dict(), 0)

    fill()
    for name in copies:
        with pytest.raises(ValueError, match=f"{name} should repeat"):
            fill(**{name: state[name] + 0.01})


def test_a_repeated_head_is_the_embedding(tmp_path):
    ours = ours_random(tie_embeddings=True)
    ours.save_pretrained(tmp_path)
    repeated = ours.embed.weight.detach().clone()
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated}))
    again = moe.Transformer.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated + 1}))
    with pytest.raises(ValueError, match="lm_head.weight should repeat"):
        moe.Transformer.from_pretrained(tmp_path)


def indexed(content):
    """Puts this in place of the index of a sharded checkpoint."""

    def damage(folder: Path) -> None:
        in_shards(folder)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps(content), encoding="utf-8")

    return damage


def saved(content):
    """Puts what torch saved in place of the weights."""

    def damage(folder: Path) -> None:
        as_bin(folder)
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def lost_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "part-1.safetensors").unlink()


def cut_bin(folder: Path) -> None:
    as_bin(folder)
    cut(folder / "pytorch_model.bin", 0.5)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: cut(f / "model.safetensors", 0.6), "model.safetensors"),
        (lambda f: cut(f / "model.safetensors", 0.0), "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
        (lambda f: cut(f / "config.json", 0.5), "config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (indexed({}), "index.json holds no weight_map"),
        (indexed({"weight_map": 5}), "index.json holds no weight_map"),
        (indexed({"weight_map": ["a"]}), "index.json holds no weight_map"),
        (indexed([]), "index.json holds no JSON object"),
        (lost_shard, "part-1.safetensors"),
        (cut_bin, "pytorch_model.bin"),
        (saved([1]), "pytorch_model.bin holds no table"),
        (saved({1: torch.zeros(2)}), "pytorch_model.bin: 1 is no tensor"),
        (saved({"a": "b"}), "pytorch_model.bin: a is no tensor"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, damage, named):
    ours_random().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=named):
        moe.Transformer.from_pretrained(tmp_path)


# --- the model ------------------------------------------------------------------------


def test_initialisation():
    torch.manual_seed(0)
    layers = 6
    config = small(n_layers=layers, dim=60, ffn_dim=240)
    drawn = {"scaled": [], "plain": []}
    for name, parameter in moe.Transformer(config).named_parameters():
        assert name.endswith("weight") or ".experts.w_" in name, "no biases"
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            scaled = re.search(r"(attention\.wo|\.w_down)(\.weight)?$", name)
            drawn["scaled" if scaled else "plain"].append(parameter.detach().flatten())
    for kind, std in (("plain", 0.02), ("scaled", 0.02 / math.sqrt(2 * layers))):
        values = torch.cat(drawn[kind])
        # Five standard errors of a standard deviation, and of a mean.
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * len(values)), kind
        assert abs(values.mean()) < 5 * std / math.sqrt(len(values)), kind
    mixtures = layers - 1 + M
    assert len(drawn["scaled"]) == 2 + 3 * mixtures
    # Embedding and head; of a dense block 6, of one with a mixture 8, of a module one.
    assert len(drawn["plain"]) == 2 + 6 + 8 * mixtures + M


def experts_met(model, tokens) -> list:
    """Train on `tokens` once; whether each expert of each mixture had one of them."""
    _, chosen = our_choices(model, lambda: moe.loss(model, tokens).backward())
    return [F.one_hot(ids.flatten(), E).any(0) for ids in chosen]


def mixtures_of(model) -> list:
    return [m for m in model.modules() if isinstance(m, moe.Mixture)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_latent_dim", [Q, None])
def test_gradients_reach_every_parameter(q_latent_dim, kind):
    """Of the model, and of the modules that predict further ahead."""
    model = ours_random(q_latent_dim=q_latent_dim, **KINDS[kind]).train()
    tokens = some_tokens(3, 80)
    met = experts_met(model, tokens)
    assert len(met) == L - 1 + model.config.n_mtp
    for mixture, used in zip(mixtures_of(model), met, strict=True):
        assert used.sum() >= 10
        for parameter in (mixture.router.weight, *mixture.experts.parameters()):
            assert (parameter.grad[used].abs().amax(-1) > 1e-7).all()
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().amax(-1)
        if (
            name != "embed.weight"
            and ".router." not in name
            and ".experts." not in name
        ):
            assert (size > 1e-7).all(), name
    used = tokens[:, :-1].unique()  # not every id is among the tokens
    assert (model.embed.weight.grad[used].abs().amax(-1) > 1e-7).all()


@pytest.mark.parametrize("width", [20, 21], ids=["grouped", "one by one"])
def test_an_expert_without_a_token_has_a_gradient_of_zero(width):
    """Not none: an optimizer, and several processes, want one of every parameter."""
    model = ours_random(expert_ffn_dim=width).train()
    met = experts_met(model, some_tokens(1, 5))
    for mixture, used in zip(mixtures_of(model), met, strict=True):
        assert not used.all()
        for parameter in mixture.experts.parameters():
            size = parameter.grad.flatten(1).abs().amax(-1)
            assert (size[used] > 1e-7).all() and not size[~used].any()


@pytest.mark.parametrize("q_latent_dim", [Q, None])
@pytest.mark.parametrize("kind", THEIR_KINDS)
def test_gradients_equal_hugging_faces(hf, kind, q_latent_dim):
    """Every one, in training mode, in the order of their rows."""
    changes = {**CLASSES, **KINDS}[kind]
    ours = ours_random(q_latent_dim=q_latent_dim, **changes).train()
    theirs, tokens = their_copy(ours).train(), some_tokens(2, 60)
    for model in (ours, theirs):
        logits = model(tokens[:, :-1])
        logits = getattr(logits, "logits", logits)
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    mine = {}
    for name, (tensor, index) in published_names(ours).items():
        if (grad := moe.find(ours, tensor)[2].grad) is not None:
            mine[name] = moe.to_theirs(name, grad[index], ours.config)
    mine = moe.stack_experts(mine)
    for name, parameter in theirs.named_parameters():
        near(mine.pop(name), parameter.grad, 1e-4)
    assert not mine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "changes", [{}, {"dim": 40, "expert_ffn_dim": 24}, V2], ids=str
)
@torch.no_grad()
def test_the_dtype_that_goes_in_comes_out(dtype, changes):
    """But routers score in float32 at least; experts as in the exact model."""
    exact, tokens = ours_random(torch.float64, **changes), some_tokens(2, 80)
    model = copy.deepcopy(exact).to(dtype)
    watched = ["blocks.0:in", "blocks.0.attention", "blocks.1", "norm", ""]
    seen, chosen = our_choices(model, lambda: moe.watch(model, watched, tokens=tokens))
    (parts, cache), again = our_choices(
        model, lambda: in_chunks(model, tokens, [0, 20, 21, 40, 80])
    )
    held = [layer.kv for layer in cache.layers]
    held += [logits for logits in moe.Transformer.predict_ahead(model, tokens)]
    assert {tensor.dtype for tensor in [*seen, *held, parts]} == {dtype}
    scores = [routing.scores for routing in model(tokens, detail=True).routed]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in scores} == {wide}
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-14}[dtype]
    for logits, ids in ((seen[-1], chosen), (parts, again)):
        truth = sent(exact, tokens, ids)
        assert (logits.double() - truth).abs().max() <= bound * truth.abs().max()


def test_the_routers_biases_stay_in_float32():
    """In bfloat16 a step of γ = 0.001 would be lost beside a bias of 0.5."""
    model = ours_random()
    with torch.no_grad():
        model.routers()[0].bias.fill_(0.5).add_(0.001)
    biases = [router.bias.clone() for router in model.routers()]
    for cast in ("bfloat16", "half", "double", "float"):
        getattr(model, cast)()
        for router, bias in zip(model.routers(), biases, strict=True):
            assert router.bias.dtype == torch.float32 and torch.equal(router.bias, bias)
    model.to(torch.bfloat16).to("cpu", torch.float64)
    for router, bias in zip(model.routers(), biases, strict=True):
        assert router.weight.dtype == torch.float64 and torch.equal(router.bias, bias)


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


@pytest.mark.parametrize(
    ("q_latent_dim", "kind"), [(Q, "V3"), (None, "V3"), (Q, "V2"), (None, "V2, greedy")]
)
@torch.no_grad()
def test_greedy_generation_equals_hugging_faces(hf, q_latent_dim, kind):
    ours, tokens = shared(q_latent_dim, kind), some_tokens(3, 8)
    mine = moe.generate(ours, tokens, 72)  # to the last place of the context
    assert mine.shape == (3, 80)
    assert torch.equal(mine, their_greedy(their_shared(q_latent_dim, kind), tokens, 72))
    assert len(set(mine[:, 8:].flatten().tolist())) > 5, "a dull continuation"
    assert torch.equal(ours(mine)[:, 7:-1].argmax(-1), mine[:, 8:])  # without a cache


@pytest.mark.parametrize(("q_latent_dim", "kind"), [(Q, "V3"), (None, "V2")])
def test_prompts_of_different_lengths_are_continued_as_each_alone(
    hf, q_latent_dim, kind
):
    ours, theirs = shared(q_latent_dim, kind), their_shared(q_latent_dim, kind)
    rows = [some_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 7, 1)]
    pad = torch.tensor([9 - len(row) for row in rows])
    tokens = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    batch = moe.generate(ours, tokens, 50, pad=pad)
    for row, padded, skip in zip(rows, batch, pad.tolist(), strict=True):
        alone = moe.generate(ours, torch.tensor([row]), 50)
        assert torch.equal(padded[skip:], alone[0])
    mask = (torch.arange(9) >= pad[:, None]).long()
    assert torch.equal(batch, their_greedy(theirs, tokens, 50, mask))
    careless = moe.generate(ours, tokens, 50)
    assert not torch.equal(careless[[0, 2, 3]], batch[[0, 2, 3]])


def test_rows_stop_as_in_hugging_face(hf):
    ours, theirs, tokens = shared(), their_shared(), some_tokens(3, 8)
    new = moe.generate(ours, tokens, 30)[:, 8:]
    stop = int(new[0, 4])
    mine = moe.generate(ours, tokens, 30, stop=[stop])
    assert torch.equal(mine, their_greedy(theirs, tokens, 30, stop=stop))
    two = [stop, int(new[1, 2])]
    for row in moe.generate(ours, tokens, 30, stop=two)[:, 8:].tolist():
        at = next((i for i, token in enumerate(row) if token in two), len(row))
        assert len(set(row[at:])) <= 1
    with pytest.raises(ValueError, match="40 tokens and 41 new"):
        moe.generate(ours, some_tokens(1, 40), 41)


# --- the swap -------------------------------------------------------------------------


def differing(first: str, second: str) -> dict[str, str]:
    """The units in which two chapters differ, and the diff of each."""
    found = {}
    for part in re.split(r"\n(?=--- )", "\n" + lineage.diff(first, second)):
        if part.strip():
            name = part.splitlines()[0].rpartition(": ")[2]
            found[name] = "\n".join(part.splitlines()[2:])
    return found


def test_experts_and_prediction_depths_come_in_and_little_else():
    units = differing("ch05", "ch06")
    for swap in (
        *["Router", "Experts", "Mixture", "MTPModule", "speculate", "Drafter"],
        *["Block.__init__", "Transformer.forward", "Transformer.predict_ahead", "loss"],
        *["HF_NAMES", "read_config", "after_step", "DEEPSEEK_V3"],
    ):
        assert swap in units, swap
    kept = {"RMSNorm", "apply_rope", "Attention", "LayerCache", "KVCache"}
    kept |= {"attend_naive", "attend_latent_cache", "absorption_pays", "generate"}
    kept |= {"rope_frequencies", "rope_table", "positions_and_mask", "rope_from_hf"}
    kept |= {"reorder_rotary", "read_tensors", "Training", "train", "held_out_loss"}
    kept |= {"Tokenizer", "Batches", "Recipe", "watch", "stream_text", "main"}
    assert not {unit.split(".")[0] for unit in units} & kept


# --- training and the command line ----------------------------------------------------

BYTES = moe.byte_tokenizer()
SENTENCE = "the cat sat on the mat and the dog ran to the red barn with a bone"
WORDS = SENTENCE.split()
MINI = moe.Config(
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
    n_dense_layers=1,
    n_experts=6,
    n_active=2,
    n_shared=1,
    expert_ffn_dim=12,
    n_groups=3,
    n_active_groups=2,
    n_mtp=2,
    rope_theta=100.0,
    eos_id=256,
)
RECIPE = moe.Recipe(steps=6, batch_size=4, warmup=2, eval_every=3, seq_len=16)


def tiny_text(n: int = 60, seed: int = 0) -> str:
    """Documents of a few predictable sentences."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        first = int(torch.randint(len(WORDS), (), generator=generator))
        documents.append(" ".join((WORDS * 3)[first : first + 12]))
    return f"\n{moe.END_OF_TEXT}\n".join(documents)


def new_training(recipe=RECIPE, seed: int = 0, dtype=torch.float32):
    """A fresh run on the tiny text."""
    data, tested = (
        moe.Batches(part, BYTES, recipe.seq_len, recipe.batch_size, recipe.seed)
        for part in moe.split_documents(tiny_text())
    )
    torch.manual_seed(seed)
    model = moe.Transformer(MINI)
    return moe.Training(model, data, tested, recipe, dtype, source="t")


def test_training_learns_a_tiny_text(hf, tmp_path):
    recipe = replace(RECIPE, steps=100, warmup=10, eval_every=50, lr=1e-2)
    training = new_training(recipe)
    assert moe.train(training, BYTES, tmp_path)
    first, last = training.log[0], training.log[-1]
    # ln 257 is 5.55; of λ, 0.3, come 15/16 and 14/16, halved, on top.
    assert 6.8 < first["loss"] < 7.4
    assert last["loss"] < 2.8 and last["held_out"] < 2.6
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same_logits(moe.Transformer.from_pretrained(tmp_path), theirs, 5e-5)


def test_training_in_bfloat16_takes_the_same_way():
    """Weights stay in float32; norms, the rotation and the routers are mixed in."""
    recipe = replace(RECIPE, steps=12, eval_every=12)
    exact, low = new_training(recipe), new_training(recipe, dtype=torch.bfloat16)
    for training in (exact, low):
        assert moe.train(training, BYTES)
    for a, b in zip(exact.log, low.log, strict=True):
        assert a["loss"] != b["loss"] and abs(a["loss"] - b["loss"]) < 0.05
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("at", [3, 5])
def test_a_resumed_run_is_the_same_run(tmp_path, at):
    """Weights, biases, λ, optimizer, log and random state, to the bit."""

    def bits(training) -> dict:
        log = [{k: v for k, v in r.items() if k != "seconds"} for r in training.log]
        return {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "log": log,
            "random": torch.get_rng_state(),
        }

    through = new_training()
    assert moe.train(through, BYTES)
    expected = copy.deepcopy(bits(through))
    state = expected["model"]
    for name in ("blocks.1", "mtp.1.block"):
        assert state[f"{name}.ffn.router.bias"].any()
    # After step 5 of 6 it falls to a third.
    assert float(state["mtp_weight"]) == pytest.approx(0.1)
    half = new_training()
    while half.step < at:
        row = half.take_step()
        if half.step % RECIPE.eval_every == 0:
            row["held_out"] = moe.held_out_loss(half)
    assert float(half.model.mtp_weight) == pytest.approx(0.3 if at == 3 else 0.1)
    half.save(tmp_path, BYTES)
    torch.rand(77)  # whatever happens in between
    again = new_training(seed=99)
    again.restore(moe.read_torch(tmp_path / "checkpoint.pt"))
    equal(again.model.state_dict(), half.model.state_dict(), 0)
    assert moe.train(again, BYTES, tmp_path)
    equal(bits(again), expected, 0)


def test_accumulation_changes_memory_and_not_the_gradient():
    """Nor the loads by which the experts are balanced."""
    recipe = replace(RECIPE, batch_size=8)
    whole = new_training(recipe)
    halves = new_training(replace(recipe, accumulate=2, batch_size=4))
    for _ in range(3):
        for training in (whole, halves):
            training.take_step()
        for mine, other in zip(
            halves.model.parameters(), whole.model.parameters(), strict=True
        ):
            equal(mine.grad, other.grad, 2e-6)
        assert halves.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], 1e-6)
        assert halves.log[-1]["tokens"] == whole.log[-1]["tokens"] == 8 * 16
        for mine, other in zip(
            halves.model.routers(), whole.model.routers(), strict=True
        ):
            assert torch.equal(mine.bias, other.bias) and mine.bias.any()


def test_the_held_out_loss_is_the_models_alone():
    """Neither depths nor balance are in it, and no load is counted."""
    training = new_training(replace(RECIPE, batch_size=5))
    rows = torch.cat(list(training.held_out.all()))
    assert len(rows) % 5, "the last batch should be a smaller one"
    model = training.model.eval()
    with torch.no_grad():
        log_p = model(rows[:, :-1]).log_softmax(-1)
    nats = -log_p.gather(2, rows[:, 1:, None]).mean().item()
    model.train()
    assert moe.held_out_loss(training) == pytest.approx(nats, rel=1e-5)
    model.balance()
    assert not any(router.bias.any() for router in model.routers())


def test_the_shortest_window_trains_every_depth():
    """The last one predicts a single token of it."""
    training = new_training(replace(RECIPE, seq_len=3))
    assert math.isfinite(training.take_step()["loss"])
    for parameter in training.model.mtp[1].block.attention.wkv_up.parameters():
        assert parameter.grad.any()


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """The exit code of `main` and what it wrote to stdout and stderr."""
    capsys.readouterr()
    try:
        code = moe.main([str(part) for part in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tiny corpus, and MINI as a preset."""
    monkeypatch.setattr(moe, "MINI", MINI, raising=False)
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
    assert moe.Transformer.from_pretrained(out).config == MINI
    asked = ["generate", "--model", out, "--prompt", "the", "--max-new-tokens", 13]
    first, again, other = (
        run(capsys, *asked, "--seed", seed, "--top-k", 50) for seed in (1, 1, 2)
    )
    assert first == again != other and first[0] == 0 and first[1].startswith("the")
    code, said, err = run(capsys, *asked, "--dtype", "bfloat16")
    assert (code, err) == (0, "") and said.startswith("the")
    code, said, err = run(capsys, "verify", "--model", out)
    assert (code, err) == (0, "") and "Equal within" in said


def test_drafts_on_the_command_line(capsys, trained_folder):
    """The same greedy text, and on stderr what became of the drafts."""
    asked = ["generate", "--model", trained_folder, "--prompt", "the", "--temperature"]
    plain = run(capsys, *asked, 0, "--max-new-tokens", 23)
    code, said, err = run(capsys, *asked, 0, "--max-new-tokens", 23, "--speculate")
    assert (code, said) == plain[:2] and plain[2] == ""
    found = re.fullmatch(
        r"(\d+) of (\d+) drafts accepted \((\d+)%\), (\d+) passes\n", err
    )
    accepted, drafted, rate, passes = map(int, found.groups())
    assert rate == round(100 * accepted / drafted) and drafted > accepted
    assert accepted + passes == 23
    drawn = [*asked, 0.8, "--top-k", 50, "--speculate", "--seed"]
    first, again, other = (run(capsys, *drawn, seed) for seed in (1, 1, 2))
    assert first == again != other and first[0] == 0


def test_modules_are_asked_for_on_the_command_line(capsys, corpus, tmp_path):
    for n in (0, 2):
        trained(capsys, corpus, tmp_path / f"run{n}", "--n-mtp", n)
        assert moe.read_config(tmp_path / f"run{n}").n_mtp == n
    for more, what in (
        (["--speculate", "--model", tmp_path / "run0"], "needs at least one module"),
        (["--model", tmp_path / "run0", "--chat"], "no tokens for a conversation"),
    ):
        code, said, err = run(capsys, "generate", "--prompt", "the", *more)
        assert (code, said) == (2, "") and what in err and err.count("\n") == 1
    again = ["train", "--out", tmp_path / "run0", "--resume", "--n-mtp", 1]
    code, _, err = run(capsys, *again)
    assert code == 2 and "leave out --n-mtp" in err
    asked = [
        "train",
        "--init",
        tmp_path / "run0",
        "--out",
        tmp_path / "x",
        "--n-mtp",
        1,
    ]
    code, _, err = run(capsys, *asked)
    assert code == 2 and "--init has what it has" in err


@pytest.mark.parametrize("kind", [*KINDS, "with modules"])
def test_a_checkpoint_is_trained_further(hf, capsys, corpus, tmp_path, kind):
    """It starts where the file ends, whoever wrote it, and stays of its kind."""
    first = (
        ours_random(vocab_size=257)
        if kind == "with modules"
        else theirs_random(hf, kind, vocab_size=257, q_lora_rank=None)
    )
    first.save_pretrained(tmp_path / "first")
    asked = ["train", "--init", tmp_path / "first", "--data", corpus, "--lr", 1e-12]
    asked += ["--out", tmp_path / "second", "--steps", 1, "--weight-decay", 0]
    code, _, err = run(capsys, *asked, "--warmup", 0, "--seq-len", 16)
    assert (code, err) == (0, "")
    first, second = (
        moe.Transformer.from_pretrained(tmp_path / name) for name in ("first", "second")
    )
    assert first.config == second.config
    assert first.config.n_mtp == (2 if kind == "with modules" else 0)
    assert first.config.model_type == f"deepseek_v{'2' if 'V2' in kind else '3'}"
    for name, value in second.state_dict().items():
        moved = 0.001 if name.endswith("router.bias") else 0  # by γ, after the step
        equal(value, first.state_dict()[name], 1.001 * moved + 1e-9)
    same_logits(second, moe.reference(tmp_path / "second"))


@pytest.mark.skipif(not STORIES.exists(), reason="no data/stories.txt")
def test_the_demonstration(hf, capsys, monkeypatch, tmp_path):
    """All of it, on two steps of training."""
    monkeypatch.chdir(tmp_path)
    real, few = moe.Recipe, {"steps": 2, "eval_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(moe, "Recipe", lambda **asked: real(**asked | few))
        patch.setattr(moe, "held_out_loss", lambda training: 6.5)
        said = moe.demo("row.json")
    out = capsys.readouterr().out
    row = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert row == said and row["chapter"] == CHAPTER.name
    assert row["distance"] < 1e-4 and row["said"]
    for i in (1, 2, 3):  # two of the model, and that of the module
        [shares] = re.findall(rf"mixture {i}: (.*)", out)
        shares = [int(share.removesuffix("%")) for share in shares.split(" ")]
        assert len(shares) == 16 and abs(sum(shares) - 100) <= 8
        assert shares == sorted(shares, reverse=True)
    kept, drafted, passes = map(
        int, re.search(r"(\d+) of (\d+) drafts .*; (\d+) passes", out).groups()
    )
    assert 0 <= kept <= drafted < passes <= 60 and kept + passes == 60
    active, total = (whole(moe.TINY, part)["total"] for part in (True, False))
    assert f"meets {active:,} of the model's {total:,}" in out
    assert "2 steps" in row["did"] and f"{kept / drafted:.0%} of its" in row["did"]
    folder = tmp_path / "out" / CHAPTER.name / "demo"
    code, _, err = run(capsys, "generate", "--model", folder, "--prompt", "The old dog")
    assert (code, err) == (0, "")


def test_the_demonstration_stops_where_the_model_differs(hf, monkeypatch, capsys):
    real = moe.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.model.layers[1].self_attn.kv_a_layernorm.weight[-1] += 1e-2

    monkeypatch.setattr(moe, "copy_to_reference", perturb)
    code, out, err = run(capsys, "demo")
    assert code == 2 and "differs from the reference" in err
    assert "NOT equal" in out and "\n2. " not in out


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
    tokenizer = moe.load_tokenizer(tmp_path)
    calls, dtypes = [], []

    def fake(model, tokens, max_new_tokens, **asked):
        calls.append((tokens[0].tolist(), max_new_tokens, asked["stop"]))
        dtypes.append(model.embed.weight.dtype)
        for i in [*tokenizer.encode("Gut é!"), 260]:
            yield torch.tensor([i])

    monkeypatch.setattr(moe, "stream", fake)
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
    assert calls[1][0] == moe.encode_chat(tokenizer, talk)
    for ids, n, stop in calls:
        assert n == min(200, 160 - len(ids)) and stop == [257, 260]


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder that `train` left, to be copied and spoilt."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert moe.train(new_training(), BYTES, out)
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


def of_chapter_five(folder: Path) -> None:
    """Its config has nothing that this chapter's has not, and no experts."""
    state = torch.load(folder / "checkpoint.pt")
    known = {field.name for field in fields(load(find("ch05")).Config)}
    assert known < state["config"].keys()
    state["config"] = {name: state["config"][name] for name in known}
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
    "a softmax in V3": (
        lambda d: [*GENERATE, amended(d, scoring_func="softmax")],
        "scoring_func.*softmax",
    ),
    "V3's weights called V2": (
        lambda d: [*GENERATE, amended(d, model_type="deepseek_v2")],
        "norm_topk_prob|multi-token",
    ),
    "groups that do not divide": (
        lambda d: [*GENERATE, amended(d, n_group=4)],
        "n_experts 6.*n_groups 4",
    ),
    "more experts than there are": (
        lambda d: [*GENERATE, amended(d, n_routed_experts=9)],
        r"mlp\.(gate|experts)",
    ),
    "more active ones than the groups have": (
        lambda d: [*GENERATE, amended(d, num_experts_per_tok=5)],
        "n_active 5.*2 of 3 groups of 2",
    ),
    "one module more": (
        lambda d: [*GENERATE, amended(d, num_nextn_predict_layers=3)],
        r"missing.*layers\.4\.",
    ),
    "an expert is missing": (
        lambda d: [
            *GENERATE,
            spoilt(d, lambda f: rewrite(f, drop(r"layers\.1\..*experts\.5\.down"))),
        ],
        r"missing.*experts\.5\.down_proj",
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
    "a window that the depths exceed": (
        lambda d: [*TRAIN, "--seq-len", 2],
        "seq_len is 2.*2 .*depths",
    ),
    "no window": (lambda d: [*TRAIN, "--seq-len", 0], "seq_len is 0"),
    "no key/value heads here": (lambda d: [*TRAIN, "--n-kv-heads", 2], "--n-kv-heads"),
    "no such preset": (
        lambda d: ["train", "--preset", "LLAMA_3_2_1B"],
        "DEEPSEEK_V2.*DEEPSEEK_V3",
    ),
    "init from a Llama": (
        lambda d: ["train", "--init", amended(d, model_type="llama")],
        "llama",
    ),
    "init from too many dense layers": (
        lambda d: ["train", "--init", amended(d, first_k_dense_replace=2)],
        r"unexpected.*layers\.1\.mlp",
    ),
    "resume with a window": (
        lambda d: ["train", "--resume", "--out", d / "run", "--seq-len", 8],
        "leave out --seq-len",
    ),
    "resume chapter 4's": (
        lambda d: ["train", "--resume", "--out", spoilt(d, of_chapter_four)],
        "checkpoint.pt.*latent_dim",
    ),
    "resume chapter 5's": (
        lambda d: ["train", "--resume", "--out", spoilt(d, of_chapter_five)],
        "checkpoint.pt.*n_experts",
    ),
    "verify a Llama": (
        lambda d: ["verify", "--model", amended(d, model_type="llama")],
        "llama",
    ),
    "verify without groups": (
        lambda d: ["verify", "--model", amended(d, topk_group=0)],
        "n_active_groups is 0",
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
    assert err.startswith("deepseek_moe_mtp.py") and re.search(named, err), err
    assert out == "", "nothing is said before the mistake is found"
    assert files(tmp_path) == before, "nothing is half-written"
    assert not (tmp_path / "new").exists()


def test_verify_says_when_it_disagrees(hf, capsys, monkeypatch):
    code, out, err = run(capsys, "verify")
    assert (code, err) == (0, "") and "Equal within" in out and "block 2" in out
    real = moe.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.model.layers[1].self_attn.kv_b_proj.weight[-1, -1] += 1e-1

    monkeypatch.setattr(moe, "copy_to_reference", perturb)
    code, out, err = run(capsys, "verify")
    assert (code, err) == (1, "") and "NOT equal" in out
    marked = [line.split("  ")[0] for line in out.splitlines() if "above" in line]
    assert marked[0] == "block 1", out  # the first stage that is wrong is shown


def test_help_reads_well(capsys):
    for argv in (["--help"], ["train", "--help"], ["generate", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "") and "usage: deepseek_moe_mtp.py" in out
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
    config = moe.Config(
        vocab_size=1025, max_seq_len=1024, dim=256, n_layers=4, n_heads=8,
        q_latent_dim=96, latent_dim=64, head_dim=32, rope_dim=16, value_dim=32,
        ffn_dim=704, n_dense_layers=1, n_experts=16, n_active=3, expert_ffn_dim=176,
        n_groups=1, n_active_groups=1, n_mtp=0,
    )  # fmt: skip
    return moe.Transformer(config), moe.reference(config)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training step"])
def test_no_slower_than_hugging_face(speed_pair, training):
    """A lenient bound, best of several; `make bench` measures properly."""
    batch, steps = some_tokens(4, 129, 1025), []
    for model in speed_pair:
        model.train(training)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

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


def test_a_model_without_experts_is_dense_in_its_file():
    config = replace(moe.small_config(), n_experts=0, n_mtp=0)
    hf = config.to_hf()
    assert hf["first_k_dense_replace"] == hf["num_hidden_layers"]
    theirs, ours = moe.reference(config), moe.Transformer(config).eval()
    moe.randomise(ours)
    moe.copy_to_reference(ours, theirs)
    tokens = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5
        )


def test_what_no_file_can_say_is_not_written():
    config = replace(moe.small_config(), **V2 | {"renormalise": True})
    with pytest.raises(ValueError, match="does not renormalise"):
        config.to_hf()
