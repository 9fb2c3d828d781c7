# SPDX-License-Identifier: MIT
"""Chapter 5, latent attention: four forms of one function; equal to Hugging Face's."""

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import cache as remember
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from chapters import ROOT, find, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CHAPTER = find("ch05")
mla = load(CHAPTER)
STORIES = ROOT / "data" / "stories.txt"

# The sizes of the small model, by the letters of the chapter.
D, H, Q, C, K, R, W, L, V = 30, 6, 22, 18, 10, 14, 8, 3, 97
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
SIZES |= {"qk_rope_head_dim": R, "v_head_dim": W, "max_position_embeddings": 80}
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
def shared(q_lora_rank: int | None = Q, dtype: torch.dtype = torch.float64):
    """A random model for tests that leave it as it is; attention far from uniform."""
    model = ours_random(dtype, q_lora_rank=q_lora_rank)
    with torch.no_grad():
        for block in model.blocks:
            a = block.attention
            (a.wq if q_lora_rank is None else a.wq_up).weight.mul_(4)
    return model


@remember
def their_shared(q_lora_rank: int | None = Q, dtype: torch.dtype = torch.float64):
    """The same weights in Hugging Face's class."""
    ours = shared(q_lora_rank, dtype)
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
    B, H, T, S, K, R, C, W = (sizes[letter] for letter in "BHTSKRCW")
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    w_up = random(H, K + W, C) / math.sqrt(C)
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
                keys = [
                    torch.cat([w_uk @ c, r])
                    for c, r in zip(latent, rotary, strict=True)
                ]
                values = [w_uv @ c for c in latent]
                at = [s for s in range(len(keys)) if mask[s]]
                power = torch.stack([(q[b, h, t] @ keys[s]) * scale for s in at])
                weights = (power - power.max()).exp()
                for weight, s in zip(weights / weights.sum(), at, strict=True):
                    out[b, h, t] += weight * values[s]
    return out


SMALL = {"B": 2, "H": 3, "T": 4, "S": 7, "K": 5, "R": 6, "C": 8, "W": 9}
CASES = {
    "a prompt": {"S": 4},
    "a step": {"T": 1},
    "the first step": {"T": 1, "S": 1},
    "a chunk": {},
    "one head, one row": {"B": 1, "H": 1},
    "values wider than keys": {"W": 13},
    # A matrix that is used the wrong way round has the right shape here.
    "K = C = W": {"K": 8, "W": 8},
    "K = R = C = W = H": {"H": 6, "K": 6, "R": 6, "C": 6, "W": 6, "S": 6},
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
    sizes = dict(zip("BHTKRCW", found, strict=True))
    sizes["S"] = sizes["T"] + before
    asked, seen = operands(sizes), mask_of(mask, sizes)
    equal(FORMS[form](*asked, seen), mla.attend_naive(*asked, seen), 1e-10)


# At the widths of DeepSeek-V3's heads.
FULL = {"B": 2, "H": 4, "T": 3, "S": 90, "K": 128, "R": 64, "C": 512, "W": 128}


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
        {"K": 10, "R": 14, "C": 18, "W": 24},
        {"K": 16, "R": 8, "C": 64, "W": 32},
        {"K": 3, "R": 2, "C": 5, "W": 6},
        {"K": 40, "R": 4, "C": 7, "W": 50},
    ],
    ids=str,
)
def test_absorption_pays_where_torch_counts_fewer_operations(widths):
    """Values at least as wide as keys, so that the naive form pads none."""
    config = small(
        nope_head_dim=widths["K"], rope_head_dim=widths["R"],
        kv_lora_rank=widths["C"], v_head_dim=widths["W"],
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
    narrow = 2 * widths["C"] < widths["K"] + widths["W"]
    assert seen == ({True} if narrow else {True, False})


@pytest.mark.parametrize("q_lora_rank", [Q, None])
def test_the_flops_of_a_step_are_the_formula(q_lora_rank):
    """The cache is read, never expanded: 2·B·L·H·(2C + R) more for each position."""
    model, B = shared(q_lora_rank, torch.float32), 2
    tokens, cache = some_tokens(B, 80), model.new_cache(B, 80)
    into_q = D * H * (K + R) if q_lora_rank is None else D * Q + Q * H * (K + R)
    weights = into_q + D * (C + R) + C * H * (K + W) + H * W * D + 3 * D * 52
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
    "V3, queries uncompressed": {"q_lora_rank": None},
    "V2, queries uncompressed": {"q_lora_rank": None, "model_type": "deepseek_v2"},
    "V3, half-split": {"rope_interleave": False},
    "no YaRN": {"rope_factor": 1.0},
    "another eps": {"norm_eps": 1e-3},
    "tied": {"tie_embeddings": True},
    "one block of one head": {"n_layers": 1, "n_heads": 1},
    "values wider than keys": {"v_head_dim": 28, "kv_lora_rank": 40},
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
@pytest.mark.parametrize("q_lora_rank", [Q, None])
@pytest.mark.parametrize(("kind", "interleave"), CLASSES)
@torch.no_grad()
def test_yarn_queries_and_orders_in_every_combination(
    hf, tmp_path, kind, interleave, q_lora_rank, variant
):
    """The whole pass, in ragged chunks, and through a file."""
    ours = ours_random(
        q_lora_rank=q_lora_rank,
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
    two = mla.rope_table(torch.tensor([0, 3]), rope_config(rope_head_dim=2))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    equal(mla.apply_rope(x, two)[0, 0, 0], torch.tensor([1.0, 0.0]), 0)
    turned = torch.tensor([math.cos(3), math.sin(3)])
    equal(mla.apply_rope(x, two)[0, 0, 1], turned, 1e-6)
    # theta 100: the pair (0, 2) turns by 1 a position, the pair (1, 3) by 1/10.
    four = mla.rope_table(torch.tensor([5]), rope_config(rope_head_dim=4))
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
    config = small(n_heads=2, nope_head_dim=3, rope_head_dim=4, kv_lora_rank=5)

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
    wider = replace(config, rope_head_dim=6)
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
