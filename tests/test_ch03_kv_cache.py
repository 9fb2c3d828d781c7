# SPDX-License-Identifier: MIT
"""Chapter 3, the cache: equal to reading it all again; MHA, GQA and MQA to theirs."""

import copy
import json
import math
import re
import shutil
import sys
import time
from dataclasses import replace
from functools import cache as remember
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from chapters import ROOT, find, load
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

CHAPTER = find("ch03")
kv_cache = load(CHAPTER)
STORIES_RANKS = ROOT / "data" / "stories.tiktoken"

H = kv_cache.small_config().n_heads
HEADS = [6, 3, 2, 1]  # G: multi-head, two kinds of grouped-query, multi-query
EXACT = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def equal(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- models of both sides -------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    """The transformers package, imported once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def theirs_random(hf, kind: str = "GPT2", seed: int = 0, **changes):
    """A small GPT2LMHeadModel or GPTBigCodeForCausalLM, every parameter random."""
    sizes = {"vocab_size": 97, "n_positions": 48, "n_embd": 30, "n_layer": 3}
    sizes |= {"n_head": 6, "n_inner": 52, "bos_token_id": 96, "eos_token_id": 96}
    classes = {"GPT2": "GPT2LMHeadModel", "GPTBigCode": "GPTBigCodeForCausalLM"}
    config = getattr(hf, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(hf, classes[kind])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = float("ln_" in name and name.endswith("weight"))
            parameter.copy_(centre + noise * (0.3 if centre else 0.1))
    return model


def ours_random(dtype: torch.dtype = torch.float32, **changes):
    """Our small model, every parameter random, in eval mode."""
    config = replace(kv_cache.small_config(), **changes)
    model = kv_cache.Transformer(config).eval()
    kv_cache.randomise(model)
    return model.to(dtype)


@remember
def shared(G: int, dtype: torch.dtype = torch.float64):
    """A random model of G key/value heads for tests that leave it as it is.

    Its positions matter four times as much: a wrong one shows, and greedy text does
    not end in one dull token.
    """
    model = ours_random(dtype, n_kv_heads=G)
    with torch.no_grad():
        model.positions.weight.mul_(4)
    return model


@remember
def their_shared(G: int):
    """The same weights in Hugging Face's class, in float64: no near ties."""
    ours = shared(G)
    theirs = kv_cache.reference(ours.config, torch.float64)
    kv_cache.copy_to_reference(ours, theirs)
    return theirs


def some_tokens(B: int, T: int, vocab: int = 97, seed: int = 1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(ours, theirs, atol: float = 1e-5) -> None:
    tokens = some_tokens(2, ours.config.max_seq_len, ours.config.vocab_size)
    logits = theirs(input_ids=tokens).logits
    assert logits.abs().max() > 0.2, "the comparison would be blind"
    equal(ours(tokens), logits, atol)


# --- parity ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), EXACT)
@pytest.mark.parametrize("G", HEADS)
def test_every_stage_equals_hugging_face(hf, monkeypatch, G, dtype, atol):
    config = replace(kv_cache.small_config(), n_kv_heads=G)
    monkeypatch.setattr(kv_cache, "small_config", lambda: config)
    classes, real = [], kv_cache.reference
    monkeypatch.setattr(
        kv_cache, "reference", lambda *a: classes.append(real(*a)) or classes[-1]
    )
    rows = kv_cache.verify(dtype=dtype)
    stages = ["embedding", "block 0", "block 1", "block 2", "final norm", "logits"]
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        assert row["max_abs"] <= atol, row
        assert row["relative"] <= kv_cache.TOLERANCE[dtype], row
        assert row["argmax"] == 1.0 or row["stage"] != "logits"
    name = "GPTBigCodeForCausalLM" if G == 1 else "GPT2LMHeadModel"
    assert type(classes[0]).__name__ == name


@pytest.mark.parametrize("G", [3, 1])
def test_verify_compares_a_saved_model(hf, tmp_path, G):
    ours_random(vocab_size=300, eos_id=None, n_kv_heads=G).save_pretrained(tmp_path)
    rows = kv_cache.verify(tmp_path)
    assert len(rows) == 6 and max(row["max_abs"] for row in rows) < 1e-5


@torch.no_grad()
def repeat_heads(model, spread=torch.repeat_interleave):
    """Multi-head attention with H heads of its own: each of the G, for its group."""
    G, r = model.config.n_kv_heads, H // model.config.n_kv_heads
    whole = ours_random(model.embed.weight.dtype, n_kv_heads=H)
    state = model.state_dict()
    for name, tensor in state.items():
        if ".wk." in name or ".wv." in name:
            heads = tensor.unflatten(0, (G, -1))
            state[name] = spread(heads, r, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    return whole


def interleave_wrongly(heads, r: int, dim: int):
    """Query head h would read key/value head h % G."""
    return torch.cat([heads] * r, dim)


@pytest.mark.parametrize("G", [3, 2, 1])
def test_grouped_heads_are_multi_head_attention_with_repeated_ones(G):
    ours, tokens = shared(G), some_tokens(2, 48)
    with torch.no_grad():
        logits = ours(tokens)
        equal(repeat_heads(ours)(tokens), logits, 1e-12)
        other = repeat_heads(ours, interleave_wrongly)(tokens)
        assert G == 1 or (other - logits).abs().max() > 1e-2, "the order must show"


def starcoder2_of(hf, ours):
    """Starcoder2 with our weights; its rotation turned into the identity.

    The one Hugging Face class with LayerNorm, tanh GELU, biases and grouped-query
    attention. Learned positions are added to its embeddings by the caller.
    """
    c = ours.config
    config = hf.Starcoder2Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
        norm_epsilon=c.norm_eps, sliding_window=None, tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh", use_bias=True, bos_token_id=96, eos_token_id=96,
    )  # fmt: skip
    theirs = hf.Starcoder2ForCausalLM(config).eval().double()
    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj"}
    names |= {"wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    names |= {"attention_norm": "input_layernorm", "w_up": "mlp.c_fc"}
    names |= {"ffn_norm": "post_attention_layernorm", "w_down": "mlp.c_proj"}
    state = {}
    for name, tensor in ours.state_dict().items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(?:\w+\.)?(\w+)\.(\w+)", name):
            i, part, leaf = found.groups()
            name = f"model.layers.{i}.{names[part]}.{leaf}"
        elif name == "positions.weight":
            continue
        else:
            name = name.replace("embed.", "model.embed_tokens.")
            name = name.replace("head.", "lm_head.")
            name = "model." + name if name.startswith("norm.") else name
        state[name] = tensor
    theirs.load_state_dict(state)
    theirs.model.rotary_emb.inv_freq.zero_()  # cosine 1, sine 0 at every position
    return theirs


@pytest.mark.parametrize("G", [6, 3, 2, 1])
@torch.no_grad()
def test_grouped_heads_are_starcoder2s(hf, G):
    """And its cache holds what ours holds; an even K, since it rotates pairs."""
    ours = ours_random(torch.float64, dim=36, n_kv_heads=G)
    theirs, tokens = starcoder2_of(hf, ours), some_tokens(2, 48)
    x = ours.embed(tokens) + ours.positions.weight
    equal(ours(tokens), theirs(inputs_embeds=x).logits, 1e-12)
    mine, other = ours.new_cache(2, 48), hf.DynamicCache(config=theirs.config)
    for start, end in pairwise([0, 7, 8, 20, 21, 48]):
        logits = theirs(inputs_embeds=x[:, start:end], past_key_values=other).logits
        equal(ours(tokens[:, start:end], mine), logits, 1e-12)
    for layer, reference in zip(mine.layers, other.layers, strict=True):
        equal(layer.k, reference.keys, 1e-12)
        equal(layer.v, reference.values, 1e-12)


# --- checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-3},
        {"n_inner": None},
        {"n_embd": 40, "n_head": 1, "n_layer": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["GPT2", "GPTBigCode"])
def test_their_checkpoints_load(hf, tmp_path, kind, changes):
    if kind == "GPTBigCode" and changes.get("n_head") == 1:
        changes = {"activation_function": "gelu_new"}
    theirs = theirs_random(hf, kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = kv_cache.Transformer.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    assert not ours.training and ours.config.eos_id == 96
    tied = changes.get("tie_word_embeddings", True)
    assert (ours.head.weight is ours.embed.weight) == tied
    heads = 1 if kind == "GPTBigCode" else ours.config.n_heads
    assert ours.config.n_kv_heads == heads
    ours.save_pretrained(tmp_path / "again")  # as the class that it came from
    again = type(theirs).from_pretrained(tmp_path / "again")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("G", HEADS)
def test_our_checkpoints_load_in_hugging_face(hf, tmp_path, G, tied):
    ours = ours_random(tie_embeddings=tied, norm_eps=1e-4, n_kv_heads=G)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    expected = hf.GPTBigCodeForCausalLM if G == 1 else hf.GPT2LMHeadModel
    assert type(theirs) is expected
    same_logits(ours, theirs.eval())
    assert theirs.config.tie_word_embeddings == tied
    assert theirs.dtype == torch.float32 and theirs.config.n_positions == 48
    theirs.save_pretrained(tmp_path / "theirs")  # which keeps our own entry
    for folder in (tmp_path, tmp_path / "theirs"):
        again = kv_cache.Transformer.from_pretrained(folder)
        assert again.config.n_kv_heads == G, "the G heads should come back as they were"
        assert folder != tmp_path or again.config == ours.config
        for name, value in ours.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("G", [3, 1])
def test_weights_load_in_the_asked_dtype(tmp_path, G):
    ours = ours_random(n_kv_heads=G)
    ours.save_pretrained(tmp_path)
    low = kv_cache.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in ours.state_dict().items():
        assert torch.equal(low.state_dict()[name], value.bfloat16()), name
    assert low.head.weight is low.embed.weight
    low.save_pretrained(tmp_path / "low")
    back = kv_cache.Transformer.from_pretrained(tmp_path / "low")
    assert torch.equal(back.embed.weight, low.embed.weight.float())


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a saved folder."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def amend(folder: Path, **changes) -> None:
    """Change entries of a saved config.json; `...` takes one out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config), encoding="utf-8")


QKV = "transformer.h.1.attn.c_attn"
CLAIM = kv_cache.DISTINCT_KV


def shift(name: str, *where: int):
    """Change one number of one tensor."""

    def change(state) -> None:
        state[name][where] += 1e-3

    return change


def test_a_repeated_head_is_kept_once_and_must_be_repeated(hf, tmp_path):
    """Column 3D - 1 is the last of the last value head, which repeats its neighbour."""
    ours = ours_random(n_kv_heads=3)
    changes = [shift(f"{QKV}.weight", 4, 89), shift(f"{QKV}.bias", 59)]
    for i, change in enumerate(changes):
        folder = tmp_path / str(i)
        ours.save_pretrained(folder)
        rewrite(folder, change)
        with pytest.raises(ValueError, match=f"{QKV}.*group"):
            kv_cache.Transformer.from_pretrained(folder)
        amend(folder, **{CLAIM: ...})  # it is a model of H heads, and loads as one
        whole = kv_cache.Transformer.from_pretrained(folder)
        assert whole.config.n_kv_heads == H
        same_logits(whole, hf.GPT2LMHeadModel.from_pretrained(folder).eval())
    theirs_random(hf).save_pretrained(tmp_path)
    amend(tmp_path, **{CLAIM: 2})  # H heads, all different
    with pytest.raises(ValueError, match="group"):
        kv_cache.Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({CLAIM: 4}, "6.*4"),
        ({CLAIM: "three"}, "n_kv_heads|three"),
        ({CLAIM: 1}, "gpt2 with 6 heads and 1"),
        ({"multi_query": False, "model_type": "gpt_bigcode"}, "multi_query"),
        ({"n_head": 1, CLAIM: ..., "model_type": "gpt_bigcode"}, "bigcode with 1 head"),
        ({"model_type": "llama"}, "GPT-2 and GPTBigCode.*llama"),
        ({"model_type": ...}, "model_type"),
        ({"activation_function": "gelu"}, "gelu"),
        ({"n_head": ...}, "n_head"),
        ({"n_head": 7}, "30.*7"),
        ({"n_layer": None}, "n_layer"),
        ({"scale_attn_weights": False}, "scale_attn"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn"),
    ],
    ids=str,
)
def test_a_config_of_another_architecture_is_refused(tmp_path, changes, named):
    ours_random(n_kv_heads=3).save_pretrained(tmp_path)
    amend(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        kv_cache.Transformer.from_pretrained(tmp_path)


def test_their_own_multi_head_big_code_is_refused(hf, tmp_path):
    """Its c_attn holds q, k, v head by head: read as GPT-2's it would be nonsense."""
    theirs_random(hf, "GPTBigCode", multi_query=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multi_query"):
        kv_cache.Transformer.from_pretrained(tmp_path)


def write_openai_style(theirs, folder: Path, prefix: bool, masks: bool) -> None:
    """The files as OpenAI's own upload has them: bare names, masks, an old config."""
    from safetensors.torch import save_file

    T, state = theirs.config.n_positions, {}
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight":
            name = name if prefix else name.removeprefix("transformer.")
            state[name] = tensor.clone()
    for i in range(theirs.config.n_layer if masks else 0):
        start = f"transformer.h.{i}" if prefix else f"h.{i}"
        state[f"{start}.attn.bias"] = torch.ones(T, T).tril()[None, None]
        state[f"{start}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, folder / "model.safetensors")
    config = {"activation_function": "gelu_new", "model_type": "gpt2", "n_ctx": T}
    for name in ("n_embd", "n_head", "n_layer", "vocab_size", "layer_norm_epsilon"):
        config[name] = getattr(theirs.config, name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(("prefix", "masks"), [(False, True), (True, False)])
def test_openai_style_files_load(hf, tmp_path, prefix, masks):
    theirs = theirs_random(hf, n_inner=None)
    write_openai_style(theirs, tmp_path, prefix, masks)
    ours = kv_cache.Transformer.from_pretrained(tmp_path)
    assert ours.config.ffn_dim == 120 and ours.config.max_seq_len == 48
    assert ours.config.tie_embeddings and ours.config.n_kv_heads == 6
    same_logits(ours, theirs)


@pytest.mark.parametrize("kind", ["GPT2", "GPTBigCode"])
def test_shards_and_bins_load(hf, tmp_path, kind):
    theirs = theirs_random(hf, kind)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    for folder in (tmp_path / "shards", tmp_path):
        same_logits(kv_cache.Transformer.from_pretrained(folder), theirs)


def test_without_safetensors_the_bin_is_written(monkeypatch, tmp_path):
    ours = ours_random(n_kv_heads=2)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    ours.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "pytorch_model.bin"]
    tokens = some_tokens(1, 20)
    again = kv_cache.Transformer.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), ours(tokens))


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


WEIGHT = f"{QKV}.weight"
SPOILT = {
    "missing": (lambda s: s.pop(WEIGHT), f"missing.*{WEIGHT}"),
    "no bias": (lambda s: s.pop(f"{QKV}.bias"), f"missing.*{QKV}.bias"),
    "unexpected": (lambda s: s.update(extra=torch.zeros(2)), "unexpected.*extra"),
    "a fourth block": (
        lambda s: s.update({"transformer.h.3.ln_1.bias": torch.zeros(30)}),
        "unexpected.*h.3.ln_1.bias",
    ),
    "transposed": (
        lambda s: s.update({WEIGHT: s[WEIGHT].T}),
        rf"{WEIGHT}.*\((90|30|40), (90|30|40)\)",
    ),
    "a column more": (
        lambda s: s.update({WEIGHT: torch.zeros(30, 91)}),
        f"{WEIGHT}.*91",
    ),
    "a third dimension": (
        lambda s: s.update({WEIGHT: torch.zeros(90, 30, 2)}),
        WEIGHT,
    ),
    "a number": (lambda s: s.update({WEIGHT: torch.tensor(1.0)}), WEIGHT),
    "another head": (
        lambda s: s.update({"lm_head.weight": torch.zeros(97, 30)}),
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize("G", [6, 3, 1])
@pytest.mark.parametrize("case", SPOILT)
def test_loading_is_strict(tmp_path, case, G):
    change, named = SPOILT[case]
    ours_random(n_kv_heads=G).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        kv_cache.Transformer.from_pretrained(tmp_path)


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
        kv_cache.Transformer.from_pretrained(tmp_path)


# --- the model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("GPT2_124M", 124_439_808),
        ("GPT2_355M", 354_823_168),
        ("GPT2_774M", 774_030_080),
        ("GPT2_1558M", 1_557_611_200),
    ],
)
def test_presets_have_the_published_parameter_counts(name, count):
    config = kv_cache.presets()[name]
    assert config.n_kv_heads == config.n_heads and config.head_dim == 64
    counts = []
    for G in (config.n_heads, 1):
        with torch.device("meta"):
            model = kv_cache.Transformer(replace(config, n_kv_heads=G))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] == count
    fewer = (config.n_heads - 1) * 64 * (config.dim + 1)  # rows and biases of wk and wv
    assert counts[0] - counts[1] == config.n_layers * 2 * fewer


@pytest.mark.parametrize("G", HEADS)
def test_gradients_reach_every_parameter(G):
    model = ours_random(n_kv_heads=G).train()
    kv_cache.loss(model, some_tokens(2, 49)).backward()
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().amax(-1)
        if name.endswith("wk.bias"):
            # It adds q·b to all scores of a query alike, which softmax ignores.
            assert size < 1e-6, name
        else:
            assert (size > 1e-7).all(), name


@pytest.mark.parametrize("G", [3, 1])
def test_the_gradient_of_a_shared_head_is_the_sum_over_its_queries(G):
    """The chain rule: a head that is copied r times collects the gradients of all."""
    ours, batch = ours_random(torch.float64, n_kv_heads=G), some_tokens(2, 20)
    whole = repeat_heads(ours)
    for model in (ours, whole):
        kv_cache.loss(model, batch).backward()
    for mine, copies in zip(ours.blocks, whole.blocks, strict=True):
        for part in ("wk", "wv"):
            a = getattr(mine.attention, part).weight.grad
            b = getattr(copies.attention, part).weight.grad
            equal(a, b.unflatten(0, (G, H // G, -1)).sum(1).flatten(0, 1), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("G", [6, 3, 1])
@torch.no_grad()
def test_the_dtype_that_goes_in_comes_out(G, dtype):
    model, tokens = ours_random(torch.float64, n_kv_heads=G), some_tokens(2, 48)
    exact = model(tokens)
    model.to(dtype)
    watched = ["blocks.0:in", "blocks.1", "norm", ""]
    seen = kv_cache.watch(model, watched, tokens=tokens)
    parts, cache = in_chunks(model, tokens, [0, 20, 21, 40, 48])
    held = [part for layer in cache.layers for part in (layer.k, layer.v)]
    assert {tensor.dtype for tensor in [*seen, *held, parts]} == {dtype}
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-14}[dtype]
    for logits in (seen[-1], parts):
        assert (logits.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_kv_heads": 4}, "n_heads 6.*n_kv_heads 4"),
        ({"n_kv_heads": 12}, "n_heads 6.*n_kv_heads 12"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"n_kv_heads": 1.5}, "n_kv_heads is 1.5"),
        ({"dim": 31}, "31.*6"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(kv_cache.small_config(), **changes)


def test_dropout_acts_in_training_only():
    tokens = some_tokens(1, 20)
    for only in ("all", "attention"):
        model = ours_random(dropout=0.5)
        if only == "attention":  # the one that no module applies
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.allclose(model(tokens), model(tokens)), only


def test_dropout_stands_where_hugging_face_has_it(hf):
    """With the same random state, training mode gives the same numbers."""
    theirs = theirs_random(hf, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)
    config = replace(kv_cache.small_config(), dropout=0.3, n_kv_heads=6)
    ours = kv_cache.Transformer(config)
    kv_cache.load_tensors(ours, theirs.state_dict().items())
    ours.train(), theirs.train()
    for block in ours.blocks:
        block.attention.dropout = 0.0
    tokens = some_tokens(2, 48)
    torch.manual_seed(5)
    mine = ours(tokens)
    torch.manual_seed(5)
    equal(mine, theirs(input_ids=tokens).logits)


# --- the cache: the same numbers ------------------------------------------------------


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


@st.composite
def bounds_of(draw, T: int = 24):
    """0, some places in between, T: every way to cut T tokens into pieces."""
    return [0, *sorted(draw(st.sets(st.integers(1, T - 1)))), T]


def close_to(logits, whole) -> None:
    """Equal up to what the dtype allows."""
    assert logits.dtype == whole.dtype
    equal(logits, whole, {torch.float32: 2e-5, torch.float64: 1e-12}[whole.dtype])


@settings(max_examples=60, deadline=None)
@given(
    bounds_of(),
    st.sampled_from(HEADS),
    st.sampled_from([torch.float32, torch.float64]),
)
@example(list(range(25)), 6, torch.float64)  # one by one
@example(list(range(25)), 3, torch.float64)
@example(list(range(25)), 1, torch.float64)
@example([0, 23, 24], 3, torch.float64)
@example([0, 1, 24], 3, torch.float64)
def test_any_chunks_give_the_full_pass(bounds, G, dtype):
    model, tokens = shared(G, dtype), some_tokens(2, 24)
    with torch.no_grad():
        close_to(in_chunks(model, tokens, bounds)[0], model(tokens))


@settings(max_examples=60, deadline=None)
@given(
    bounds_of(),
    st.sampled_from(HEADS),
    st.lists(st.integers(0, 23), min_size=3, max_size=3),
)
@example([0, 4, 24], 3, [6, 0, 3])  # a whole chunk of nothing but padding
@example([0, 24], 6, [23, 0, 1])
@example(list(range(25)), 1, [5, 12, 0])
def test_any_chunks_of_padded_rows_give_each_row_alone(bounds, G, pads):
    model, tokens = shared(G), some_tokens(3, 24)
    logits, _ = in_chunks(model, tokens, bounds, torch.tensor(pads))
    assert logits.isfinite().all()
    with torch.no_grad():
        for row, padded, pad in zip(tokens, logits, pads, strict=True):
            close_to(padded[pad:], model(row[None, pad:])[0])


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("G", [6, 3, 1])
@torch.no_grad()
def test_the_cache_equals_hugging_faces(hf, G, kind):
    ours, theirs, tokens = shared(G), their_shared(G), some_tokens(2, 40)
    room = {"max_cache_len": 40} if kind == "StaticCache" else {}
    other = getattr(hf, kind)(config=theirs.config, **room)
    mine = ours.new_cache(2, 40)
    for start, end in pairwise([0, 9, 10, 11, 25, 40]):
        chunk = tokens[:, start:end]
        asked = {"past_key_values": other, "position_ids": torch.arange(start, end)}
        asked["position_ids"] = asked["position_ids"][None]
        logits = theirs(input_ids=chunk, **asked).logits
        equal(ours(chunk, mine), logits, 1e-12)
    repeat = 1 if G == 1 else H // G  # a GPT-2 file holds every head, repeated
    for layer, reference in zip(mine.layers, other.layers, strict=True):
        equal(layer.k.repeat_interleave(repeat, 1), reference.keys, 1e-12)
        equal(layer.v.repeat_interleave(repeat, 1), reference.values, 1e-12)


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 3])])
@pytest.mark.parametrize("G", [6, 3, 1])
def test_no_position_sees_a_later_one(G, pad):
    """Also over chunks: what is read later changes nothing that was said before."""
    model, T, tokens = shared(G), 11, some_tokens(2, 11)
    for bounds in ([0, 11], [0, 5, 6, 9, 11], list(range(12))):
        before, _ = in_chunks(model, tokens, bounds, pad)
        for t in range(T):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 97
            after, _ = in_chunks(model, changed, bounds, pad)
            moved = (after - before).abs().amax(-1)  # (2, 11)
            assert (moved[:, :t] < 1e-12).all(), t
            first = 0 if pad is None else int(pad[1])
            assert (moved[0, t:] > 1e-6).all(), t
            assert (moved[1, max(t, first) :] > 1e-6).all() or t < first, t
            if t < first:  # a padding token is seen by no real one
                assert (moved[1, first:] < 1e-12).all(), t


def test_positions_and_mask_by_hand():
    def state(length: int, pad=None):
        cache = shared(1).new_cache(2, 9, pad)
        cache.advance(length)
        return cache

    def asked(T: int, cache):
        return kv_cache.positions_and_mask(torch.zeros(2, T, dtype=torch.long), cache)

    for T, cache, at in (
        (3, None, [0, 1, 2]),
        (3, state(0), [0, 1, 2]),
        (1, state(4), [4]),
    ):
        position, seen = asked(T, cache)
        assert position.tolist() == at and seen is None
    position, seen = asked(2, state(3))
    assert position.tolist() == [3, 4] and seen.shape == (1, 1, 2, 5)
    assert seen[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    position, seen = asked(3, state(1, torch.tensor([0, 2])))
    assert position.tolist() == [[1, 2, 3], [0, 0, 1]]
    assert seen.shape == (2, 1, 3, 4)
    assert seen[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # The second row begins at position 2; its padding sees itself alone.
    assert seen[1, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


# --- the cache: its memory ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [6, 3, 1])
def test_its_bytes_are_the_formula_and_the_storage(G, dtype):
    """Pairwise different sizes: a factor in the wrong place shows."""
    model = ours_random(dtype, n_kv_heads=G)
    B, S, L, K = 4, 17, 3, 5
    cache = model.new_cache(B, S)
    assert cache.nbytes == 2 * B * L * S * G * K * dtype.itemsize
    parts = [part for layer in cache.layers for part in (layer.k, layer.v)]
    assert {tuple(part.shape) for part in parts} == {(B, G, S, K)}
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parts}
    assert sum(s.nbytes() for s in storages.values()) == cache.nbytes
    with torch.no_grad():
        model(some_tokens(B, 9), cache)
    assert cache.length == 9 and cache.nbytes == 2 * B * L * S * G * K * dtype.itemsize


def test_what_it_takes_at_full_size():
    """GPT-2 124M, a full context, float32: 75,497,472 bytes; a twelfth with G = 1."""
    for G, expected in ((12, 75_497_472), (4, 25_165_824), (1, 6_291_456)):
        with torch.device("meta"):
            config = replace(kv_cache.GPT2_124M, n_kv_heads=G)
            model = kv_cache.Transformer(config)
        assert model.new_cache(1, 1024).nbytes == expected


def addresses(cache):
    return [t.data_ptr() for layer in cache.layers for t in (layer.k, layer.v)]


class CountNewBytes(TorchDispatchMode):
    """Adds up the bytes of every result that is no view of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operators = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves
        given = {
            t.untyped_storage().data_ptr()
            for t in flat((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        self.operators += 1
        for tensor in flat(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self.bytes += storage.nbytes()
        return found


@pytest.mark.parametrize("G", [6, 3, 1])
@torch.no_grad()
def test_a_step_allocates_the_same_at_every_length(G):
    """Memory is taken once; a growing `cat`, or keys repeated for each query head, no.

    Where the fused kernel is not used, torch itself repeats shared heads at each step.
    """
    model, tokens = shared(G, torch.float32), some_tokens(2, 48)
    cache = model.new_cache(2, 48)
    before, taken = addresses(cache), {}
    model(tokens[:, :7], cache)
    for t in range(7, 48):
        with CountNewBytes() as count:
            model(tokens[:, t : t + 1], cache)
        taken[t] = (count.bytes, count.operators)
    assert len(set(taken.values())) == 1, taken
    assert addresses(cache) == before


def test_what_a_layer_returns_is_its_own_memory():
    k, v = torch.zeros(2, 2, 3, 9, 5)
    layer = kv_cache.LayerCache(k, v)
    new = torch.randn(2, 2, 3, 4, 5)
    keys, values = layer.append(*new)
    assert keys.data_ptr() == k.data_ptr() and values.data_ptr() == v.data_ptr()
    assert torch.equal(keys, new[0]) and torch.equal(values, new[1])
    assert layer.length == 0, "the model moves it on"
    assert not k[:, :, 4:].any() and not v[:, :, 4:].any()
    layer.length = 4
    keys, _ = layer.append(*new[:, :, :, :2])
    assert keys.shape == (2, 3, 6, 5) and torch.equal(k[:, :, 4:6], new[0][:, :, :2])
    assert torch.equal(k[:, :, :4], new[0])


def test_it_keeps_no_gradient():
    model, tokens = ours_random(n_kv_heads=3), some_tokens(2, 20)
    cache = model.new_cache(2, 20)
    for start, end in pairwise([0, 9, 10, 20]):
        logits = model(tokens[:, start:end], cache)
        for layer in cache.layers:
            for kept in (layer.k, layer.v):
                assert not kept.requires_grad and kept.grad_fn is None
    with torch.no_grad():
        equal(logits, model(tokens)[:, 10:])


def test_it_may_be_made_in_inference_mode_and_used_outside():
    model, tokens = shared(3), some_tokens(1, 12)
    with torch.inference_mode():
        cache = model.new_cache(1, 12)
        parts = [model(tokens[:, :5], cache)]
    with torch.no_grad():
        parts.append(model(tokens[:, 5:6], cache))
        whole = model(tokens)
    with torch.inference_mode():
        parts.append(model(tokens[:, 6:], cache))
    equal(torch.cat(parts, 1), whole, 1e-12)


# --- the cache: truncating, and what goes wrong ---------------------------------------


def filled(G: int = 3, n: int = 10, S: int = 30, pad=None):
    """A model, and a cache that has read the first n of some tokens."""
    model, tokens = shared(G), some_tokens(2, 48)
    cache = model.new_cache(2, S, pad)
    with torch.no_grad():
        model(tokens[:, :n], cache)
    return model, tokens, cache


def contents(cache):
    """All that a later pass can see of it."""
    kept = [part.clone() for layer in cache.layers for part in (layer.k, layer.v)]
    return [layer.length for layer in cache.layers], kept, cache.pad


@torch.no_grad()
def go_on(model, cache, tokens, *bounds: int):
    """The logits of the rest, which must not depend on what is past the length."""
    for layer in cache.layers:
        for part in (layer.k, layer.v):
            part[:, :, layer.length :] = math.nan
    chunks = [model(tokens[:, a:b], cache) for a, b in pairwise(bounds)]
    return torch.cat(chunks, 1)


@pytest.mark.parametrize("pad", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("G", [6, 3, 1])
def test_truncating_is_never_having_gone_further(G, pad):
    model, tokens, cache = filled(G, pad=pad)
    expected = go_on(model, cache, tokens, 10, 13, 14, 20)
    for length in (10, 6, 0):
        with torch.no_grad():
            model(some_tokens(2, 7, seed=9), cache)  # another continuation
        cache.truncate(length)
        assert cache.length == length
        assert {layer.length for layer in cache.layers} == {length}
        with torch.no_grad():
            model(tokens[:, length:10], cache) if length < 10 else None
        got = go_on(model, cache, tokens, 10, 13, 14, 20)
        equal(got, expected, 1e-12)
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


def test_a_context_too_long_is_refused():
    model = shared(3)
    assert model(some_tokens(1, 48)).shape == (1, 48, 97)
    with pytest.raises(ValueError, match="49.*48"):
        model(some_tokens(1, 49))
    # A cache that someone made by hand may be larger than the context.
    layers = [kv_cache.LayerCache(*torch.zeros(2, 1, 3, 60, 5).double())] * 3
    cache = kv_cache.KVCache(layers, 60)
    with pytest.raises(ValueError, match="49.*48"):
        model(some_tokens(1, 49), cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ((1, 49), "49.*48"),
        ((1, 0), "0 tokens"),
        ((0, 5), "0 rows"),
        ((1, -3), "-3"),
        ((2, 9, torch.tensor([1])), r"\[1\]"),
        ((2, 9, torch.tensor([[1, 2]])), r"\[\[1, 2\]\]"),
        ((2, 9, torch.tensor(1)), "pad is 1"),
        ((2, 9, torch.tensor([])), r"pad is \[\]"),
        ((2, 9, torch.tensor([0.0, 1.5])), "1.5.*integers"),
        ((2, 9, torch.tensor([False, True])), "True.*integers"),
        ((2, 9, torch.tensor([-1, 2])), "-1"),
        ((2, 9, torch.tensor([0, 9])), "9.*8"),
    ],
    ids=str,
)
def test_impossible_caches_are_refused(asked, named):
    with pytest.raises(ValueError, match=named):
        shared(3).new_cache(*asked)
    shared(3).new_cache(2, 9, torch.tensor([0, 8]))
    shared(3).new_cache(1, 48)


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
        assert [layer.length for layer in cache.layers] == [10] * 3
    equal(go_on(model, cache, tokens, 10, 12, 20), expected, 0)


# --- the work of a step ---------------------------------------------------------------


@torch.no_grad()
def test_a_step_processes_one_position():
    model, seen = shared(3), []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
        for block in model.blocks
        for module in (block, block.attention.wk, block.ffn.w_up)
    ]
    hooks.append(model.head.register_forward_hook(lambda m, a, out: seen.append(None)))
    tokens = some_tokens(2, 8)
    steps = kv_cache.stream(model, tokens, 12)
    for n in [8] + [1] * 11:
        seen.clear()
        next(steps)
        assert seen.count(None) == 1
        shapes = {shape[:2] for shape in seen if shape is not None}
        assert shapes == {(2, n)} and len(seen) == 3 * 3 + 1
    for hook in hooks:
        hook.remove()


def flops(model, tokens, cache=None) -> int:
    """What torch counts; with its plain attention, whose products it can see."""
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(tokens, cache)
    return counter.get_total_flops()


@pytest.mark.parametrize("G", HEADS)
def test_the_flops_of_a_step_are_the_formula(G):
    """Two for each weight of a matrix, and 4·B·H·S·K in the attention of each layer."""
    model, B, L, K = shared(G, torch.float32), 2, 3, 5
    D, ffn, V = 30, 52, 97
    tokens, cache = some_tokens(B, 48), model.new_cache(B, 48)
    weights = L * (2 * D * H * K + 2 * D * G * K + 2 * D * ffn) + D * V
    flops(model, tokens[:, :6], cache)
    for S in range(7, 49):
        counted = flops(model, tokens[:, S - 1 : S], cache)
        assert counted == 2 * B * weights + L * 4 * B * H * S * K, S
    # Without a cache the same step reads all 48 tokens again.
    assert flops(model, tokens) > 40 * counted


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


@pytest.mark.parametrize("G", [6, 3, 1])
def test_greedy_generation_equals_hugging_faces_and_the_uncached(hf, G):
    ours, tokens = shared(G), some_tokens(3, 8)
    mine = kv_cache.generate(ours, tokens, 40)  # to the last place of the context
    assert mine.shape == (3, 48)
    assert torch.equal(mine, their_greedy(their_shared(G), tokens, 40))
    assert torch.equal(mine, kv_cache.generate_uncached(ours, tokens, 40))
    assert len(set(mine[:, 8:].flatten().tolist())) > 5, "a dull continuation"


@pytest.mark.parametrize("G", [6, 3, 1])
def test_prompts_of_different_lengths_are_continued_as_each_alone(hf, G):
    ours, theirs = shared(G), their_shared(G)
    rows = [some_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 7, 1)]
    pad = torch.tensor([9 - len(row) for row in rows])
    tokens = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    batch = kv_cache.generate(ours, tokens, 30, pad=pad)
    for row, whole, skip in zip(rows, batch, pad.tolist(), strict=True):
        alone = kv_cache.generate(ours, torch.tensor([row]), 30)
        assert torch.equal(whole[skip:], alone[0])
    mask = (torch.arange(9) >= pad[:, None]).long()
    assert torch.equal(batch, their_greedy(theirs, tokens, 30, mask))
    careless = kv_cache.generate(ours, tokens, 30)
    assert not torch.equal(careless[[0, 2, 3]], batch[[0, 2, 3]])
    assert torch.equal(careless[1], batch[1])  # the longest row has no padding


def test_rows_stop_as_in_hugging_face(hf):
    ours, theirs, tokens = shared(3), their_shared(3), some_tokens(3, 8)
    new = kv_cache.generate(ours, tokens, 30)[:, 8:]
    stop = int(new[0, 4])
    first = [row.index(stop) if stop in row else 30 for row in new.tolist()]
    assert len(set(first)) > 1, "the rows should stop at different steps"
    mine = kv_cache.generate(ours, tokens, 30, stop=[stop])
    assert torch.equal(mine, their_greedy(theirs, tokens, 30, stop=stop))
    for row, at in zip(mine[:, 8:].tolist(), first, strict=True):
        assert row[at:] == [stop] * len(row[at:])
    assert mine.shape[1] == 8 + min(30, max(first) + 1)


def test_stream_yields_what_generate_returns():
    tokens = some_tokens(3, 8)
    asked = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "stop": [5, 6, 7]}
    asked["pad"] = torch.tensor([0, 3, 7])
    runs = [
        run(shared(3), tokens, 25, **asked, generator=torch.Generator().manual_seed(3))
        for run in (kv_cache.stream, kv_cache.generate)
    ]
    steps = list(runs[0])
    assert all(step.shape == (3,) for step in steps)
    assert torch.equal(torch.stack(steps, 1), runs[1][:, 8:])
    assert torch.equal(runs[1][:, :8], tokens)


def test_sampling_with_the_cache_draws_as_without():
    """The same generator, the same logits: the same tokens."""
    model, tokens = shared(2), some_tokens(3, 8)
    asked = {"temperature": 0.8, "top_k": 30, "top_p": 0.95}
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    mine = kv_cache.generate(model, tokens, 30, **asked, generator=generators[0])
    for _ in range(30):
        with torch.no_grad():
            last = model(tokens)[:, -1]
        chosen = kv_cache.sample(last, **asked, generator=generators[1])
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    assert torch.equal(mine, tokens)


def test_two_streams_do_not_disturb_each_other():
    """Each has its own cache; the model itself remembers nothing."""
    model, prompts = shared(3), [some_tokens(1, 8, seed=s) for s in (1, 2)]
    alone = [kv_cache.generate(model, prompt, 20)[0, 8:] for prompt in prompts]
    streams = [kv_cache.stream(model, prompt, 20) for prompt in prompts]
    steps = list(zip(*streams, strict=True))
    for i in range(2):
        assert torch.equal(torch.cat([step[i] for step in steps]), alone[i])


def test_generation_refuses_what_does_not_fit():
    model, nine = shared(3), some_tokens(2, 9)
    assert torch.equal(kv_cache.generate(model, nine, 0), nine)
    with pytest.raises(ValueError, match="40 tokens and 9 new"):
        kv_cache.generate(model, some_tokens(1, 40), 9)
    with pytest.raises(ValueError, match="empty"):
        kv_cache.generate(model, some_tokens(1, 0), 9)
    for pad in ([], [0], [0, -1], [0, 9], [0, 20]):  # nine: nothing but padding
        with pytest.raises(ValueError, match="pad"):
            kv_cache.generate(model, nine, 9, pad=torch.tensor(pad))


def test_with_and_without_a_cache_are_compared_fairly(capsys):
    model = ours_random(n_kv_heads=3, max_seq_len=200)
    ratio = kv_cache.compare_with_uncached(model, some_tokens(1, 2))
    said = capsys.readouterr().out
    assert "198 tokens after a prompt of 2, the same text both times" in said
    nbytes = 2 * 1 * 3 * 200 * 3 * 5 * 4
    assert f"{nbytes:,} bytes for 3 " in said and f"{2 * nbytes:,}." in said
    assert 0 < ratio < 1000 and "without a cache" in said


# --- pooling heads --------------------------------------------------------------------


def test_pooling_by_hand():
    """Two heads of width 2 over three inputs become their mean; the rest stays."""
    config = replace(kv_cache.small_config(), dim=4, n_heads=2, n_kv_heads=2)
    model = kv_cache.Transformer(replace(config, n_layers=1))
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.wk.weight.copy_(torch.arange(16.0).view(4, 4))
        attention.wk.bias.copy_(torch.tensor([1.0, 2.0, 5.0, 8.0]))
    pooled = kv_cache.pool_heads(model, 1).blocks[0].attention
    # Rows 0 and 2 are the first row of each head, 1 and 3 the second.
    expected = [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    assert pooled.wk.weight.tolist() == expected
    assert pooled.wk.bias.tolist() == [3.0, 5.0]
    equal(pooled.wv.weight, (attention.wv.weight[:2] + attention.wv.weight[2:]) / 2)
    assert torch.equal(pooled.wq.weight, attention.wq.weight)


@pytest.mark.parametrize(("G", "fewer"), [(6, 3), (6, 2), (6, 1), (3, 1), (2, 1)])
def test_pooling_heads_that_are_equal_changes_nothing(G, fewer):
    """And pooling different ones does: the test would be blind otherwise."""
    model, tokens = shared(G), some_tokens(2, 48)
    pooled = kv_cache.pool_heads(model, fewer)
    assert pooled.config == replace(model.config, n_kv_heads=fewer)
    with torch.no_grad():
        assert (pooled(tokens) - model(tokens)).abs().max() > 1e-2
        whole = repeat_heads(pooled)
        again = kv_cache.pool_heads(whole, fewer)
        equal(again.state_dict(), pooled.state_dict(), 1e-15)
        equal(again(tokens), whole(tokens), 1e-12)


@pytest.mark.parametrize("G", [6, 3, 1])
def test_pooling_into_as_many_heads_is_a_copy(G):
    model = ours_random(n_kv_heads=G)
    pooled = kv_cache.pool_heads(model, G)
    assert torch.equal(pooled(some_tokens(2, 48)), model(some_tokens(2, 48)))
    with torch.no_grad():
        pooled.embed.weight.add_(1)
        pooled.blocks[0].attention.wk.weight.add_(1)
    assert all(
        (p - q).any() == (name in ("embed.weight", "blocks.0.attention.wk.weight"))
        for (name, p), q in zip(
            model.named_parameters(), pooled.parameters(), strict=True
        )
    ), "the copy shares memory with the original"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pooling_leaves_the_rest_as_it_is(tied, training, dtype):
    model = ours_random(dtype, n_kv_heads=6, tie_embeddings=tied).train(training)
    before = copy.deepcopy(model.state_dict())
    pooled = kv_cache.pool_heads(model, 2)
    equal(model.state_dict(), before, 0)
    assert model.config.n_kv_heads == 6
    for name, parameter in pooled.named_parameters():
        assert parameter.dtype == dtype and parameter.device.type == "cpu"
        assert parameter.requires_grad and parameter.isfinite().all()
        if ".wk." not in name and ".wv." not in name:
            assert torch.equal(parameter, before[name]), name
    assert pooled.training == training == pooled.blocks[1].training
    assert (pooled.head.weight is pooled.embed.weight) == tied
    kv_cache.loss(pooled, some_tokens(2, 9)).backward()  # it is there to be trained


@pytest.mark.parametrize(("G", "wanted"), [(6, 4), (6, 0), (6, -2), (6, 12), (3, 2)])
def test_impossible_pooling_is_refused(G, wanted):
    with pytest.raises(ValueError, match=f"{G}.*{wanted}"):
        kv_cache.pool_heads(shared(G), wanted)


# --- training and the command line ----------------------------------------------------

BYTES = kv_cache.byte_tokenizer()
SENTENCE = "the cat sat on the mat and the dog ran to the red barn with a bone"
WORDS = SENTENCE.split()
MINI = kv_cache.Config(
    vocab_size=257,
    max_seq_len=16,
    dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=32,
    dropout=0.0,
    eos_id=256,
)
RECIPE = kv_cache.Recipe(steps=6, batch_size=4, warmup=2, eval_every=3, dropout=0.2)


def tiny_text(n: int = 60, seed: int = 0) -> str:
    """Documents of a few predictable sentences."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        first = int(torch.randint(len(WORDS), (), generator=generator))
        documents.append(" ".join((WORDS * 3)[first : first + 12]))
    return f"\n{kv_cache.END_OF_TEXT}\n".join(documents)


def new_training(recipe=RECIPE, G: int = 2, seed: int = 0):
    """A fresh run on the tiny text; dropout as the recipe says."""
    data, tested = (
        kv_cache.Batches(part, BYTES, 16, recipe.batch_size, recipe.seed)
        for part in kv_cache.split_documents(tiny_text())
    )
    torch.manual_seed(seed)
    model = kv_cache.Transformer(replace(MINI, dropout=recipe.dropout, n_kv_heads=G))
    return kv_cache.Training(model, data, tested, recipe, source="tiny")


@pytest.mark.parametrize("G", [4, 2, 1])
def test_training_learns_a_tiny_text(hf, tmp_path, G):
    recipe = replace(RECIPE, steps=120, warmup=10, eval_every=60, lr=1e-2, dropout=0.0)
    training = new_training(recipe, G)
    assert kv_cache.train(training, BYTES, tmp_path)
    first, last = training.log[0], training.log[-1]
    assert 5.3 < first["loss"] < 5.8  # ln 257 is 5.55
    assert last["loss"] < 2.6 and last["held_out"] < 2.6
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same_logits(kv_cache.Transformer.from_pretrained(tmp_path), theirs, 5e-5)


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
    assert kv_cache.train(through, BYTES)
    expected = copy.deepcopy(bits(through))
    half = new_training()
    while half.step < 3:
        half.take_step()
    half.log[-1]["held_out"] = kv_cache.held_out_loss(half)
    half.save(tmp_path, BYTES)
    torch.rand(77)  # whatever happens in between
    again = new_training(seed=99)
    again.restore(kv_cache.read_torch(tmp_path / "checkpoint.pt"))
    assert kv_cache.train(again, BYTES, tmp_path)
    equal(bits(again), expected, 0)


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """The exit code of `main` and what it wrote to stdout and stderr."""
    capsys.readouterr()
    try:
        code = kv_cache.main([str(part) for part in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tiny corpus, and MINI as a preset."""
    monkeypatch.setattr(kv_cache, "MINI", MINI, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.txt"
    path.write_text(tiny_text(), encoding="utf-8", newline="\n")
    return path


TRAIN = ["train", "--tokenizer", "bytes", "--preset", "MINI", "--batch-size", 4]
TRAIN += ["--warmup", 2, "--eval-every", 2, "--steps", 4]


def trained(capsys, corpus, out: Path, *more: object) -> str:
    code, said, err = run(capsys, *TRAIN, "--data", corpus, "--out", out, *more)
    assert (code, err) == (0, ""), err
    return said


@pytest.mark.parametrize("heads", [[], ["--n-kv-heads", 1], ["--n-kv-heads", 4]])
def test_train_resume_generate_and_verify(hf, capsys, corpus, tmp_path, heads):
    out, G = tmp_path / "run", heads[-1] if heads else 2
    said = trained(capsys, corpus, out, *heads)
    assert "held out" in said and "step     2 of 4" in said
    code, said, err = run(capsys, "train", "--out", out, "--resume", "--steps", 6)
    assert (code, err) == (0, "") and "step     6 of 6" in said
    assert kv_cache.Transformer.from_pretrained(out).config.n_kv_heads == G
    assert kv_cache.read_torch(out / "checkpoint.pt")["config"]["n_kv_heads"] == G
    asked = ["generate", "--model", out, "--prompt", "the", "--max-new-tokens", 13]
    first, again, other = (
        run(capsys, *asked, "--seed", seed, "--top-k", 50) for seed in (1, 1, 2)
    )
    assert first == again != other and first[0] == 0 and first[1].startswith("the")
    code, said, err = run(capsys, "verify", "--model", out)
    assert (code, err) == (0, "") and "Equal within" in said


@pytest.mark.parametrize("G", [4, 2, 1])
def test_a_checkpoint_is_trained_further_with_its_heads_pooled(
    capsys, corpus, tmp_path, G
):
    first, second = tmp_path / "first", tmp_path / "second"
    trained(capsys, corpus, first, "--n-kv-heads", 4)
    asked = ["train", "--init", first, "--data", corpus, "--out", second]
    asked += ["--steps", 1, "--warmup", 0, "--lr", 1e-12, "--batch-size", 2]
    asked += ["--n-kv-heads", G] if G != 4 else []
    code, _, err = run(capsys, *asked, "--dropout", 0.25, "--weight-decay", 0)
    assert (code, err) == (0, "")
    old, new = (kv_cache.Transformer.from_pretrained(f) for f in (first, second))
    equal(new.state_dict(), kv_cache.pool_heads(old, G).state_dict(), 1e-9)
    assert new.config.n_kv_heads == G
    assert new.config.dropout == 0.25, "--dropout must hold for --init too"


def test_their_multi_query_checkpoint_is_trained_further(hf, capsys, corpus, tmp_path):
    theirs = theirs_random(hf, "GPTBigCode", vocab_size=257, n_positions=16)
    theirs.save_pretrained(tmp_path / "theirs")
    asked = ["train", "--init", tmp_path / "theirs", "--data", corpus, "--steps", 1]
    asked += ["--out", tmp_path / "out", "--tokenizer", "bytes", "--lr", 1e-12]
    code, _, err = run(capsys, *asked, "--weight-decay", 0, "--batch-size", 2)
    assert (code, err) == (0, "")
    new = kv_cache.Transformer.from_pretrained(tmp_path / "out")
    same_logits(new, theirs)


def test_verify_says_when_it_disagrees(hf, capsys, monkeypatch):
    code, out, err = run(capsys, "verify")
    assert (code, err) == (0, "") and "Equal within" in out and "block 2" in out
    real = kv_cache.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.transformer.h[1].attn.c_attn.bias[-1] += 1e-3  # a copy of a v head

    monkeypatch.setattr(kv_cache, "copy_to_reference", perturb)
    code, out, err = run(capsys, "verify")
    assert (code, err) == (1, "") and "NOT equal" in out
    marked = [line.split("  ")[0] for line in out.splitlines() if "above" in line]
    assert marked[0] == "block 1", out  # the first stage that is wrong is shown


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder that `train` left, to be copied and spoilt; G = 2."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert kv_cache.train(new_training(), BYTES, out)
    return out


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def amended(folder: Path, **changes) -> Path:
    amend(folder / "run", **changes)
    return folder / "run"


def spoilt(folder: Path, damage) -> Path:
    damage(folder / "run")
    return folder / "run"


def of_chapter_two(folder: Path) -> None:
    """Its config has no n_kv_heads."""
    state = torch.load(folder / "checkpoint.pt")
    del state["config"]["n_kv_heads"]
    torch.save(state, folder / "checkpoint.pt")


GENERATE = ["generate", "--max-new-tokens", 3, "--prompt", "the", "--model"]
RESUME = ["train", "--resume", "--out"]
# What a user may get wrong: the command, given an empty folder with `run` in it, and
# what the one line on stderr must name.
MISTAKES = {
    "three heads of four": (lambda d: [*TRAIN, "--n-kv-heads", 3], "4.*n_kv_heads 3"),
    "more heads than queries": (
        lambda d: [*TRAIN, "--n-kv-heads", 8],
        "4.*n_kv_heads 8",
    ),
    "no heads": (lambda d: [*TRAIN, "--n-kv-heads", 0], "n_kv_heads is 0"),
    "negative heads": (lambda d: [*TRAIN, "--n-kv-heads", -1], "n_kv_heads is -1"),
    "heads of text": (lambda d: [*TRAIN, "--n-kv-heads", "few"], "--n-kv-heads.*few"),
    "half a head": (lambda d: [*TRAIN, "--n-kv-heads", 1.5], "--n-kv-heads.*1.5"),
    "init with more heads": (
        lambda d: ["train", "--init", d / "run", "--n-kv-heads", 4],
        "2 key/value heads.*4",
    ),
    "init with heads that do not divide": (
        lambda d: ["train", "--init", d / "run", "--n-kv-heads", 3],
        "4.*3",
    ),
    "init from nowhere": (lambda d: [*TRAIN, "--init", d / "no"], "no"),
    "init from a Llama": (
        lambda d: ["train", "--init", amended(d, model_type="llama")],
        "llama",
    ),
    "init from a false claim": (
        lambda d: ["train", "--init", amended(d, **{CLAIM: 1})],
        "gpt2 with 4 heads and 1",
    ),
    "init from weights cut": (
        lambda d: [
            *["train", "--init"],
            spoilt(d, lambda f: cut(f / "model.safetensors", 0.5)),
        ],
        "model.safetensors",
    ),
    "resume with heads": (
        lambda d: [*RESUME, d / "run", "--n-kv-heads", 2],
        "leave out --n-kv-heads",
    ),
    "resume with other flags": (
        lambda d: [*RESUME, d / "run", "--lr", 1, "--n-kv-heads", 1],
        "--lr.*--n-kv-heads",
    ),
    "resume chapter 2's": (
        lambda d: [*RESUME, spoilt(d, of_chapter_two)],
        "checkpoint.pt.*n_kv_heads",
    ),
    "resume a cut checkpoint": (
        lambda d: [*RESUME, spoilt(d, lambda f: cut(f / "checkpoint.pt", 0.5))],
        "checkpoint.pt",
    ),
    "nothing to resume": (lambda d: [*RESUME, d / "new"], "nothing to resume"),
    "out exists": (lambda d: [*TRAIN, "--out", d / "run"], "--resume"),
    "no such data": (lambda d: [*TRAIN, "--data", d / "nowhere.txt"], "nowhere.txt"),
    "empty data": (lambda d: [*TRAIN, "--data", write(d, "e.txt", b"")], "e.txt"),
    "no such preset": (lambda d: ["train", "--preset", "GPT5"], "GPT5"),
    "a Llama": (lambda d: [*GENERATE, amended(d, model_type="llama")], "llama"),
    "no multi-query": (
        lambda d: [
            *GENERATE,
            amended(d, model_type="gpt_bigcode", multi_query=False),
        ],
        "multi_query",
    ),
    "a false claim": (
        lambda d: [
            *GENERATE,
            spoilt(d, lambda f: rewrite(f, shift(f"{QKV}.bias", 47))),
        ],
        f"{QKV}.bias.*group",
    ),
    "no such model": (lambda d: [*GENERATE, d / "nowhere"], "nowhere"),
    "vocabulary too large": (
        lambda d: [
            *GENERATE,
            spoilt(d, lambda f: shutil.copy(STORIES_RANKS, f / "x.tiktoken")),
        ],
        "1025.*257",
    ),
    "prompt too long": (
        lambda d: [*GENERATE, d / "run", "--prompt", "the cat " * 20],
        "160 tokens.*16",
    ),
    "prompt and more too long": (
        lambda d: [*GENERATE, d / "run", "--max-new-tokens", 14],
        "14.*16",
    ),
    "empty prompt": (lambda d: [*GENERATE, d / "run", "--prompt", ""], "empty"),
    "negative temperature": (
        lambda d: [*GENERATE, d / "run", "--temperature", -1],
        "temperature",
    ),
    "verify nothing": (lambda d: ["verify", "--model", d / "nowhere"], "nowhere"),
    "verify a Llama": (
        lambda d: ["verify", "--model", amended(d, model_type="llama")],
        "llama",
    ),
}


def files(folder: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_clear_line(
    capsys, corpus, trained_folder, tmp_path, case
):
    make, named = MISTAKES[case]
    if case == "vocabulary too large" and not STORIES_RANKS.exists():
        pytest.skip("data/stories.tiktoken is absent")
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
    assert err.startswith("kv_cache.py") and re.search(named, err), err
    assert out == "", "nothing is said before the mistake is found"
    assert files(tmp_path) == before, "nothing is half-written"
    assert not (tmp_path / "new").exists()


def test_help_reads_well(capsys):
    for argv in (["--help"], ["train", "--help"], ["generate", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "") and "usage: kv_cache.py" in out
        assert "%(" not in out and max(map(len, out.splitlines())) < 100
    assert "--n-kv-heads G" in run(capsys, "train", "--help")[1]


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


@pytest.mark.slow
@pytest.mark.parametrize("G", [4, 1])
@torch.inference_mode()
def test_a_step_is_cheap_and_no_slower_than_hugging_faces(hf, G):
    """Lenient bounds, best of several; `make bench` measures properly."""
    config = kv_cache.Config(
        vocab_size=1025, max_seq_len=1024, dim=256, n_layers=4, n_heads=4,
        n_kv_heads=G, ffn_dim=1024, dropout=0.0,
    )  # fmt: skip
    ours, theirs = kv_cache.Transformer(config).eval(), kv_cache.reference(config)
    tokens, n = some_tokens(1, 1000, 1025), 900
    mine, other = ours.new_cache(1, 1024), hf.DynamicCache(config=theirs.config)
    ours(tokens[:, :n], mine)
    theirs(input_ids=tokens[:, :n], past_key_values=other)

    def our_step():
        ours(tokens[:, n : n + 1], mine)

    def their_step():
        theirs(input_ids=tokens[:, n : n + 1], past_key_values=other)

    def whole():
        ours(tokens[:, : n + 1])

    cached, reference = best_of(60, our_step, their_step)
    uncached = best_of(3, whole)[0]
    assert mine.length == other.get_seq_length() == n + 60
    assert cached <= 1.2 * reference, f"{cached / reference:.2f} times Hugging Face's"
    assert 10 * cached <= uncached, f"only {uncached / cached:.1f} times cheaper"
