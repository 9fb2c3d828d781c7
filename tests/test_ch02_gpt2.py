# SPDX-License-Identifier: MIT
"""Chapter 2, GPT-2: equal to Hugging Face's, loaded strictly, trained resumably."""

import copy
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chapters import ROOT, find, load
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

CHAPTER = find("ch02")
gpt2 = load(CHAPTER)
STORIES = ROOT / "data" / "stories.txt"
STORIES_RANKS = ROOT / "data" / "stories.tiktoken"
GPT2_FILES = ROOT / "data" / "gpt2-tokenizer"

needs_stories = pytest.mark.skipif(
    not (STORIES.exists() and STORIES_RANKS.exists()), reason="data/stories.* is absent"
)


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


def theirs_random(hf, seed: int = 0, **changes):
    """A small GPT2LMHeadModel, every parameter random, norms and biases too."""
    sizes = {"vocab_size": 97, "n_positions": 48, "n_embd": 30, "n_layer": 3}
    sizes |= {"n_head": 5, "n_inner": 52, "bos_token_id": 96, "eos_token_id": 96}
    config = hf.GPT2Config(**{**sizes, **changes})
    model = hf.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = float("ln_" in name and name.endswith("weight"))
            parameter.copy_(centre + noise * (0.3 if centre else 0.1))
    return model


def ours_random(dtype: torch.dtype = torch.float32, **changes):
    """Our small model, every parameter random, in eval mode."""
    model = gpt2.Transformer(replace(gpt2.small_config(), **changes)).eval()
    gpt2.randomise(model)
    return model.to(dtype)


def some_tokens(B: int, T: int, vocab: int = 97, seed: int = 1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_logits(ours, theirs, atol: float = 1e-5) -> None:
    tokens = some_tokens(2, ours.config.max_seq_len, ours.config.vocab_size)
    logits = theirs(input_ids=tokens).logits
    assert logits.abs().max() > 0.2, "the comparison would be blind"
    equal(ours(tokens), logits, atol)


# --- parity ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_every_stage_equals_hugging_face(hf, dtype, atol):
    rows = gpt2.verify(dtype=dtype)
    stages = ["embedding", "block 0", "block 1", "block 2", "final norm", "logits"]
    assert [row["stage"] for row in rows] == stages
    for row in rows:
        assert row["max_abs"] <= atol, row
        assert row["relative"] <= gpt2.TOLERANCE[dtype], row
        assert row["argmax"] == 1.0 or row["stage"] != "logits"


def test_verify_compares_a_saved_model(hf, tmp_path):
    ours_random(vocab_size=300, eos_id=None).save_pretrained(tmp_path)
    rows = gpt2.verify(tmp_path)
    assert len(rows) == 6 and max(row["max_abs"] for row in rows) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-3},
        {"n_inner": None},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_embd": 40, "n_head": 1, "n_layer": 1},
    ],
    ids=str,
)
def test_their_checkpoints_load(hf, tmp_path, changes):
    theirs = theirs_random(hf, **changes)
    theirs.save_pretrained(tmp_path)
    ours = gpt2.Transformer.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    assert not ours.training
    tied = changes.get("tie_word_embeddings", True)
    assert (ours.head.weight is ours.embed.weight) == tied
    assert ours.config.eos_id == 96


@pytest.mark.parametrize("tied", [True, False])
def test_our_checkpoints_load_in_hugging_face(hf, tmp_path, tied):
    ours = ours_random(tie_embeddings=tied, norm_eps=1e-4)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    same_logits(ours, theirs.eval())
    assert theirs.config.tie_word_embeddings == tied
    assert theirs.dtype == torch.float32 and theirs.config.n_positions == 48
    again = gpt2.Transformer.from_pretrained(tmp_path)
    assert again.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


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


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_openai_style_files_load(hf, tmp_path, prefix, masks):
    theirs = theirs_random(hf, n_inner=None)
    write_openai_style(theirs, tmp_path, prefix, masks)
    ours = gpt2.Transformer.from_pretrained(tmp_path)
    assert ours.config.ffn_dim == 120 and ours.config.max_seq_len == 48
    assert ours.config.tie_embeddings
    same_logits(ours, theirs)


def test_sharded_files_load(hf, tmp_path):
    theirs = theirs_random(hf)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(gpt2.Transformer.from_pretrained(tmp_path), theirs)


def test_pytorch_model_bin_loads_and_is_not_executed(hf, tmp_path):
    theirs = theirs_random(hf)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    same_logits(gpt2.Transformer.from_pretrained(tmp_path), theirs)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        gpt2.Transformer.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_without_safetensors_the_bin_is_written(monkeypatch, tmp_path):
    ours = ours_random()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    ours.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "pytorch_model.bin"]
    tokens = some_tokens(1, 20)
    again = gpt2.Transformer.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), ours(tokens))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of a saved folder."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_repeated_head_must_be_the_embedding(tmp_path):
    ours = ours_random()
    ours.save_pretrained(tmp_path)
    repeated = ours.embed.weight.detach().clone()
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated}))
    again = gpt2.Transformer.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    repeated[3, 5] += 0.1
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        gpt2.Transformer.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.update({"lm_head.weight": repeated[:9]}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        gpt2.Transformer.from_pretrained(tmp_path)


QKV = "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop(QKV), f"missing.*{QKV}"),
        (lambda s: s.pop("transformer.wpe.weight"), "missing.*transformer.wpe.weight"),
        (lambda s: s.pop("transformer.ln_f.bias"), "missing.*transformer.ln_f.bias"),
        (
            lambda s: s.update({"transformer.h.3.ln_1.bias": torch.zeros(30)}),
            "unexpected.*transformer.h.3.ln_1.bias",
        ),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "unexpected.*extra"),
        (lambda s: s.update({QKV: torch.zeros(90, 30)}), f"{QKV}.*90"),
        (lambda s: s.update({QKV: torch.zeros(30, 91)}), f"{QKV}.*91"),
        (
            lambda s: s.update({"transformer.wte.weight": torch.zeros(98, 30)}),
            "transformer.wte.weight.*98.*97",
        ),
        (
            lambda s: s.update({"transformer.ln_f.bias": torch.zeros(30, 1)}),
            "transformer.ln_f.bias.*30, 1",
        ),
    ],
)
def test_loading_is_strict(tmp_path, change, named):
    ours_random().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        gpt2.Transformer.from_pretrained(tmp_path)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def damage_config(text: str):
    def damage(folder: Path) -> None:
        (folder / "config.json").write_text(text, encoding="utf-8")

    return damage


def bin_of(content: object):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def cut_bin(folder: Path) -> None:
    bin_of({"transformer.wte.weight": torch.zeros(97, 30)})(folder)
    cut(folder / "pytorch_model.bin", 0.7)


def broken_index(text: str):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(text, encoding="utf-8")

    return damage


def config_with(**changes) -> str:
    config = {**gpt2.small_config().to_hf(), **changes}
    return json.dumps({k: v for k, v in config.items() if v is not ...})


DAMAGE = {
    "weights cut": (lambda f: cut(f / "model.safetensors", 0.6), "model.safetensors"),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors"),
    "header cut": (lambda f: cut(f / "model.safetensors", 0.001), "model.safetensors"),
    "weights absent": (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
    "bin cut": (cut_bin, "pytorch_model.bin"),
    "bin of a list": (bin_of([1, 2]), "pytorch_model.bin"),
    "bin of text": (bin_of({"transformer.wte.weight": "hello"}), "wte"),
    "index cut": (broken_index('{"weight_map": {'), "index.json"),
    "index empty": (broken_index("{}"), "index.json"),
    "shard absent": (broken_index('{"weight_map": {"a": "b.safetensors"}}'), "b.safe"),
    "config absent": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut": (damage_config('{"model_type": "gp'), "config.json"),
    "config a list": (damage_config("[]"), "config.json"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config"),
    "config poor": (damage_config(config_with(n_head=...)), "n_head"),
    "config odd": (damage_config(config_with(n_head=7)), "30.*7"),
    "config of text": (damage_config(config_with(n_layer="three")), "n_layer|three"),
    "config of null": (damage_config(config_with(n_layer=None)), "n_layer|None"),
    "other model": (damage_config(config_with(model_type="llama")), "llama"),
    "no model": (damage_config("{}"), "config|model_type"),
    "other GELU": (damage_config(config_with(activation_function="gelu")), "gelu"),
    "other scale": (
        damage_config(config_with(scale_attn_by_inverse_layer_idx=True)),
        "scale_attn",
    ),
    "no scale": (damage_config(config_with(scale_attn_weights=False)), "scale_attn"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_named(tmp_path, case):
    damage, named = DAMAGE[case]
    ours_random().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"(?s){named}"):
        gpt2.Transformer.from_pretrained(tmp_path)


def test_weights_load_in_the_asked_dtype(tmp_path):
    ours = ours_random()
    ours.save_pretrained(tmp_path)
    low = gpt2.Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in ours.state_dict().items():
        assert torch.equal(low.state_dict()[name], value.bfloat16()), name
    assert low.head.weight is low.embed.weight
    low.save_pretrained(tmp_path / "low")
    back = gpt2.Transformer.from_pretrained(tmp_path / "low")
    assert back.embed.weight.dtype == torch.float32
    assert torch.equal(back.embed.weight, low.embed.weight.float())


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
def test_presets_have_the_published_parameter_counts(hf, name, count):
    config = gpt2.presets()[name]
    with torch.device("meta"):
        ours = gpt2.Transformer(config)
        theirs = hf.GPT2LMHeadModel(hf.GPT2Config(**config.to_hf()))
    assert sum(p.numel() for p in ours.parameters()) == count
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert config.dim // config.n_heads == 64


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    L = 6
    config = replace(gpt2.small_config(), n_layers=L, dim=60, ffn_dim=240)
    drawn = {"scaled": [], "plain": []}
    for name, parameter in gpt2.Transformer(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones(60)), name
        else:
            scaled = name.endswith(("attention.wo.weight", "ffn.w_down.weight"))
            drawn["scaled" if scaled else "plain"].append(parameter.detach().flatten())
    for kind, std in (("plain", 0.02), ("scaled", 0.02 / math.sqrt(2 * L))):
        values = torch.cat(drawn[kind])
        # Five standard errors of a standard deviation, and of a mean.
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * len(values)), kind
        assert abs(values.mean()) < 5 * std / math.sqrt(len(values)), kind
    assert len(drawn["scaled"]) == 2 * L and len(drawn["plain"]) == 2 + 4 * L


def test_the_head_is_the_embedding_itself():
    model = gpt2.Transformer(gpt2.small_config())
    V, D = model.config.vocab_size, model.config.dim
    assert model.head.weight is model.embed.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names and "head.weight" not in names
    for moved in (model.double(), copy.deepcopy(model)):
        assert moved.head.weight.data_ptr() == moved.embed.weight.data_ptr()
    untied = gpt2.Transformer(replace(model.config, tie_embeddings=False))
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()
    counts = [sum(p.numel() for p in m.parameters()) for m in (untied, model)]
    assert counts[0] - counts[1] == V * D


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 3])])
def test_no_position_sees_a_later_one(pad):
    model = ours_random(torch.float64)
    T, tokens = 11, some_tokens(2, 11)
    with torch.no_grad():
        before = model(tokens, pad)
        for t in range(T):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 97
            moved = (model(changed, pad) - before).abs().amax(-1)  # (2, 11)
            assert (moved[:, :t] < 1e-12).all(), t
            first = 0 if pad is None else int(pad[1])
            assert (moved[0, t:] > 1e-6).all(), t
            assert (moved[1, max(t, first) :] > 1e-6).all() or t < first, t
            if t < first:  # a padding token is seen by no real one
                assert (moved[1, first:] < 1e-12).all(), t


def test_gradients_reach_every_parameter():
    model = ours_random().train()
    gpt2.loss(model, some_tokens(2, 49)).backward()
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().amax(-1)
        if name.endswith("wk.bias"):
            # It adds q·b to all scores of a query alike, which softmax ignores.
            assert size < 1e-7, name
        else:
            assert (size > 1e-7).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_that_goes_in_comes_out(dtype):
    model, tokens = ours_random(torch.float64), some_tokens(2, 48)
    exact = model(tokens)
    model.to(dtype)
    seen = gpt2.watch(model, ["blocks.0:in", "blocks.1", "norm", ""], tokens=tokens)
    assert {tensor.dtype for tensor in seen} == {dtype}
    bound = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-14}[dtype]
    assert (seen[-1].double() - exact).abs().max() <= bound * exact.abs().max()


def test_a_context_too_long_is_refused():
    model = ours_random()
    assert model(some_tokens(1, 48)).shape == (1, 48, 97)
    with pytest.raises(ValueError, match="49.*48"):
        model(some_tokens(1, 49))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 31}, "31.*5"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_impossible_shapes_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(gpt2.small_config(), **changes)


def test_dropout_acts_in_training_only():
    model, tokens = ours_random(dropout=0.5), some_tokens(1, 20)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))


def test_dropout_stands_where_hugging_face_has_it(hf):
    """With the same random state, training mode gives the same numbers."""
    theirs = theirs_random(hf, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)
    ours = gpt2.Transformer(replace(gpt2.small_config(), dropout=0.3))
    gpt2.load_tensors(ours, theirs.state_dict().items())
    ours.train(), theirs.train()
    for block in ours.blocks:
        block.attention.dropout = 0.0
    tokens = some_tokens(2, 48)
    torch.manual_seed(5)
    mine = ours(tokens)
    torch.manual_seed(5)
    equal(mine, theirs(input_ids=tokens).logits)


# --- generation -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(hf):
    """The same random weights in ours and in theirs, in float64: no near ties."""
    theirs = theirs_random(hf).double()
    with torch.no_grad():  # positions that matter keep greedy text from one dull token
        theirs.transformer.wpe.weight.mul_(4)
    ours = gpt2.Transformer(gpt2.small_config()).eval()
    gpt2.load_tensors(ours, theirs.state_dict().items(), torch.float64)
    return ours, theirs


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


def test_greedy_generation_equals_hugging_face(pair):
    ours, theirs = pair
    tokens = some_tokens(3, 8)
    mine = gpt2.generate(ours, tokens, 40)
    assert mine.shape == (3, 48)
    assert torch.equal(mine, their_greedy(theirs, tokens, 40))
    assert len(set(mine[:, 8:].flatten().tolist())) > 5, "a dull continuation"


def test_rows_stop_as_in_hugging_face(pair):
    ours, theirs = pair
    tokens = some_tokens(3, 8)
    new = gpt2.generate(ours, tokens, 30)[:, 8:]
    stop = int(new[0, 4])
    first = [row.index(stop) if stop in row else 30 for row in new.tolist()]
    assert len(set(first)) > 1, "the rows should stop at different steps"
    mine = gpt2.generate(ours, tokens, 30, stop=[stop])
    assert torch.equal(mine, their_greedy(theirs, tokens, 30, stop=stop))
    for row, at in zip(mine[:, 8:].tolist(), first, strict=True):
        assert row[at:] == [stop] * len(row[at:])
    assert mine.shape[1] == 8 + min(30, max(first) + 1)


def test_two_stop_tokens_are_both_obeyed(pair):
    ours, _ = pair
    tokens = some_tokens(2, 8)
    new = gpt2.generate(ours, tokens, 12)[:, 8:]
    stops = [int(new[0, 2]), int(new[1, 3])]
    for row, plain in zip(
        gpt2.generate(ours, tokens, 12, stop=stops)[:, 8:].tolist(),
        new.tolist(),
        strict=True,
    ):
        at = min(i for i, token in enumerate(plain) if token in stops)
        assert row[: at + 1] == plain[: at + 1]
        assert set(row[at:]) == {plain[at]}


def left_padded(rows):
    """Rows of ids, padded on the left with id 0; how much; the mask."""
    longest = max(len(row) for row in rows)
    pad = torch.tensor([longest - len(row) for row in rows])
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return tokens, pad, (torch.arange(longest) >= pad[:, None]).long()


def test_left_padding_changes_nothing(pair):
    ours, theirs = pair
    rows = [some_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 7, 1)]
    tokens, pad, mask = left_padded(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        mine = ours(tokens, pad)
        asked = {"input_ids": tokens, "attention_mask": mask}
        logits = theirs(**asked, position_ids=position_ids).logits
        equal(mine[mask.bool()], logits[mask.bool()], 1e-12)
        assert torch.isfinite(mine).all()
        # Without position ids a padded GPT-2 batch is another model.
        careless = theirs(**asked).logits
    assert (mine - careless)[mask.bool()].abs().max() > 0.5
    batch = gpt2.generate(ours, tokens, 20, pad=pad)
    assert torch.equal(batch, their_greedy(theirs, tokens, 20, mask))
    for row, whole, skip in zip(rows, batch, pad.tolist(), strict=True):
        alone = gpt2.generate(ours, torch.tensor([row]), 20)
        assert torch.equal(whole[skip:], alone[0])


def test_stream_yields_what_generate_returns(pair):
    ours, _ = pair
    tokens = some_tokens(3, 8)
    asked = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "stop": [5, 6, 7]}
    runs = [
        run(ours, tokens, 25, **asked, generator=torch.Generator().manual_seed(3))
        for run in (gpt2.stream, gpt2.generate)
    ]
    steps = list(runs[0])
    assert all(step.shape == (3,) for step in steps)
    assert torch.equal(torch.stack(steps, 1), runs[1][:, 8:])
    assert torch.equal(runs[1][:, :8], tokens)


def test_rows_of_a_batch_are_independent(pair):
    ours, _ = pair
    tokens = some_tokens(4, 8)
    whole = gpt2.generate(ours, tokens, 20)
    for i in range(4):
        assert torch.equal(gpt2.generate(ours, tokens[i : i + 1], 20)[0], whole[i])
    changed = tokens.clone()
    changed[2] = 11
    kept = gpt2.generate(ours, changed, 20)
    assert torch.equal(kept[[0, 1, 3]], whole[[0, 1, 3]])


def test_generation_refuses_what_does_not_fit(pair):
    ours, _ = pair
    assert torch.equal(gpt2.generate(ours, some_tokens(1, 9), 0), some_tokens(1, 9))
    with pytest.raises(ValueError, match="40 tokens and 9 new"):
        gpt2.generate(ours, some_tokens(1, 40), 9)
    with pytest.raises(ValueError, match="empty"):
        gpt2.generate(ours, some_tokens(1, 0), 9)


# --- sampling -------------------------------------------------------------------------

# Probabilities 1/2, 1/4, 1/8, 1/8 of the tokens 2, 0, 3, 1.
HALVES = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log()


def drawn(logits, n: int = 400, **asked) -> set[int]:
    """The set of tokens that come up in `n` draws."""
    generator = torch.Generator().manual_seed(0)
    many = logits.expand(n, -1)
    return set(gpt2.sample(many, generator=generator, **asked).tolist())


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 97)
    asked = {"top_k": 3, "top_p": 0.5}
    for more in ({}, asked):
        assert torch.equal(gpt2.sample(logits, 0, **more), logits.argmax(-1))
    assert torch.equal(gpt2.sample(logits, 1e-30), logits.argmax(-1))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_top_k_keeps_exactly_k_under_ties(k):
    assert len(drawn(torch.zeros(1, 6), top_k=k)) == min(k, 6)
    some = torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0]])
    if k <= 4:
        kept = drawn(some, 3000, top_k=k)
        assert 1 in kept and len(kept) == k


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.74, {2, 0}),
        (0.99, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert drawn(HALVES, top_p=top_p) == kept


def test_top_p_stops_when_p_is_reached():
    # Four equal quarters are exact in binary: two of them reach one half exactly.
    assert len(drawn(torch.zeros(1, 4), top_p=0.5)) == 2
    assert len(drawn(torch.zeros(1, 4), top_p=0.51)) == 3


def test_top_p_counts_among_the_top_k():
    # Of 1/2 and 1/4 alone, the first is 2/3 of the mass and reaches 0.6 by itself.
    assert drawn(HALVES, top_k=2, top_p=0.6) == {2}
    assert drawn(HALVES, top_k=2, top_p=0.7) == {2, 0}
    assert drawn(HALVES, top_k=3, top_p=1.0) >= {2, 0}


def test_the_kept_sets_are_hugging_faces(hf):
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    for temperature, k, p in ((1.0, 5, 0.8), (0.7, 9, 0.9), (1.5, 12, 0.6)):
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        theirs = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, theirs))
        kept = set(theirs.isfinite()[0].nonzero()[:, 0].tolist())
        asked = {"temperature": temperature, "top_k": k, "top_p": p}
        assert drawn(logits, 20_000, **asked) == kept


@pytest.mark.parametrize("asked", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_tokens_come_as_often_as_they_should(asked):
    logits = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.7]])
    chance = (logits[0] / 0.7).softmax(0)
    if asked.get("top_k") == 4:
        chance[2] = 0  # the least likely
    elif "top_p" in asked:
        order = (logits[0] / 0.7).softmax(0).sort(descending=True)
        n = int((order.values.cumsum(0) < 0.9).sum()) + 1
        chance = torch.zeros(5).index_put((order.indices[:n],), order.values[:n])
    chance, n = chance / chance.sum(), 40_000
    generator = torch.Generator().manual_seed(1)
    tokens = gpt2.sample(logits.expand(n, -1), 0.7, generator=generator, **asked)
    counts = torch.bincount(tokens, minlength=5)
    assert not counts[chance == 0].any()
    kept = chance > 0
    expected = n * chance[kept]
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi_square < 18.5, counts  # 4 degrees of freedom, one in a thousand


def test_a_generator_makes_sampling_reproducible():
    logits = torch.randn(64, 97)

    def draw(seed):
        return gpt2.sample(logits, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(4), draw(4))
    assert not torch.equal(draw(4), draw(5))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_impossible_sampling_is_refused(asked, named):
    with pytest.raises(ValueError, match=named):
        gpt2.sample(HALVES, **asked)


# --- byte-pair encoding ---------------------------------------------------------------


def test_bpe_learns_what_a_hand_derives():
    # Words with their leading space "_" and counts: ab 1, _ab 2, _abc 2, _bc 2.
    # Pairs:                 ab 5, _a 4, bc 4, _b 2        -> "ab"
    # _|ab 2, _|ab|c 2, ...: _+ab 4, ab+c 2, _b 2, bc 2    -> "_ab"
    # _ab|c 2, _|b|c 2:      _ab+c 2, _+b 2, b+c 2: a tie. In byte order "_" comes
    #                        before "_ab" and "b"          -> "_b"
    # _ab|c 2, _b|c 2:       again a tie                   -> "_abc", then "_bc"
    # Nothing is left to join.
    ranks = gpt2.train_bpe("ab ab ab abc abc bc bc", 1000)
    learned = [token for token, rank in ranks.items() if rank >= 256]
    assert learned == [b"ab", b" ab", b" b", b" abc", b" bc"]
    assert [ranks[bytes([byte])] for byte in range(256)] == list(range(256))
    assert list(ranks.values()) == list(range(261))
    assert gpt2.encode_bpe(" abcab", ranks) == [259, 256]


def test_bpe_stops_at_the_asked_size_and_at_single_pairs():
    assert len(gpt2.train_bpe("ab ab ab abc abc bc bc", 258)) == 258
    assert len(gpt2.train_bpe("abcdefg", 1000)) == 256
    assert len(gpt2.train_bpe("", 1000)) == 256


def test_merge_joins_from_left_to_right():
    a, aa = b"a", b"aa"
    assert gpt2.merge([a, a, a], (a, a)) == [aa, a]
    assert gpt2.merge([a, a, a, a], (a, a)) == [aa, aa]
    assert gpt2.merge([a, b"b", a], (a, a)) == [a, b"b", a]


def naive_bpe(text: str, n_ranks: int) -> dict[bytes, int]:
    """`train_bpe` as its docstring says it, counting anew for each merge."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([b]) for b in word] for word in gpt2.split_words(text)]
    while len(ranks) < n_ranks:
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:], strict=False))
        if not pairs:
            break
        count, best = min((-count, pair) for pair, count in pairs.items())
        if -count < 2:
            break
        ranks[best[0] + best[1]] = len(ranks)
        words = [gpt2.merge(word, best) for word in words]
    return ranks


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab c'né\n", max_size=120), st.integers(257, 300))
@example("aaaa aaaa aaa aaaaaaaa", 300)
def test_bpe_equals_the_naive_count(text, n_ranks):
    assert list(gpt2.train_bpe(text, n_ranks).items()) == list(
        naive_bpe(text, n_ranks).items()
    )


@pytest.fixture(scope="module")
def story_ranks():
    if not STORIES_RANKS.exists():
        pytest.skip("data/stories.tiktoken is absent")
    return gpt2.read_ranks(STORIES_RANKS)


@pytest.fixture(scope="module")
def story_encoding(story_ranks):
    """tiktoken's own encoder over our ranks."""
    import tiktoken

    return tiktoken.Encoding(
        "stories",
        pat_str=gpt2.GPT2_PATTERN,
        mergeable_ranks=story_ranks,
        special_tokens={gpt2.END_OF_TEXT: len(story_ranks)},
    )


@needs_stories
def test_the_stories_encode_as_tiktoken_encodes_them(story_ranks, story_encoding):
    text = gpt2.read_text(STORIES)
    known, ids = {}, []
    for piece in gpt2.split_words(text):  # no merge crosses a piece
        if piece not in known:
            known[piece] = gpt2.encode_bpe(piece.decode(), story_ranks)
        ids += known[piece]
    assert ids == story_encoding.encode_ordinary(text)
    part = text[-20_000:]
    assert gpt2.encode_bpe(part, story_ranks) == story_encoding.encode_ordinary(part)
    assert story_encoding.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2.5, "the vocabulary hardly compresses"


HOSTILE = [
    "",
    "\x00\x00 \x00a",
    " " * 50 + "x" + " " * 7,
    "a\r\n\r\nb\n\r c\t\t \v\f\x1c\x1d\x85\u2028\u2029d",
    "\u00a0\u2003\u3000 x\u200b\ufeff y",
    "नमस्ते दुनिया, क्ष त्र ज्ञ श्री १२३ ॥",
    "e\u0301 \u0301\u0301\u0301 Z\u0351\u036b\u0343algo",
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇮🇳 👍🏽 \U0001f9d1\u200d\U0001f4bb",
    "\U0010ffff\U00020000\ue000\ufffe\uffff\ufffd",
    "I'll we've don't IT'S 's' ''d '",
    "١٢٣ ⅷ ² ½ x² 1,000.00 0x1F 20191000 1000000",
    "مرحبا בעולם \u202eabc\u202c",
    "<|endoftext", "<|endoftext |>", "a<|",
    "日本語の文章、한국어 문장。",
    "ǅ ʰ ª º ﬁ ß İi̇",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_encodes_as_in_tiktoken(story_ranks, story_encoding, text):
    ids = gpt2.encode_bpe(text, story_ranks)
    assert ids == story_encoding.encode_ordinary(text)
    assert story_encoding.decode(ids) == text


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.one_of(st.text(max_size=20), st.sampled_from(HOSTILE)), max_size=5).map(
        "".join
    )
)
def test_any_text_encodes_as_in_tiktoken(story_ranks, story_encoding, text):
    ids = gpt2.encode_bpe(text, story_ranks)
    assert ids == story_encoding.encode_ordinary(text)
    assert story_encoding.decode(ids) == text


def tokenizers(story_ranks):
    return [gpt2.byte_tokenizer(), gpt2.bpe_tokenizer(story_ranks, {})]


def test_decoding_undoes_encoding(story_ranks):
    for tokenizer in tokenizers(story_ranks):
        for text in [*HOSTILE, f"a{gpt2.END_OF_TEXT}{gpt2.END_OF_TEXT}b"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert ids.count(tokenizer.eos_id) == text.count(gpt2.END_OF_TEXT)
        assert tokenizer.eos_id == tokenizer.vocab_size - 1


def test_streamed_text_is_whole(story_ranks):
    for tokenizer in tokenizers(story_ranks):
        text = "ab नमस्ते 👨‍👩‍👧‍👦 é\x00 end"
        steps = [torch.tensor([i]) for i in tokenizer.encode(text)]
        pieces = list(gpt2.stream_text(tokenizer, steps))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_ranks_survive_a_file(tmp_path, story_ranks):
    path = tmp_path / "some.tiktoken"
    gpt2.write_ranks(story_ranks, path)
    assert list(gpt2.read_ranks(path).items()) == list(story_ranks.items())
    assert [p.name for p in tmp_path.iterdir()] == ["some.tiktoken"]
    from tiktoken.load import load_tiktoken_bpe

    assert load_tiktoken_bpe(str(path)) == story_ranks


@needs_stories
def test_the_vocabulary_is_the_one_that_its_program_makes(tmp_path):
    documents, held_out = gpt2.split_documents(gpt2.read_text(STORIES))
    ranks = gpt2.train_bpe("\n".join(documents), 1024)
    gpt2.write_ranks(ranks, tmp_path / "x.tiktoken")
    program = [sys.executable, str(ROOT / "data" / "make_tokenizer.py"), "--check"]
    assert (tmp_path / "x.tiktoken").read_bytes() == STORIES_RANKS.read_bytes(), (
        "the stories changed: run python data/make_tokenizer.py"
    )
    assert subprocess.run(program, stdout=subprocess.DEVNULL).returncode == 0
    (tmp_path / "stories.tiktoken").write_bytes(b"IQ== 0\n")
    asked = [*program, "--out", str(tmp_path)]
    assert subprocess.run(asked, stdout=subprocess.DEVNULL).returncode == 1
    assert (tmp_path / "stories.tiktoken").read_bytes() == b"IQ== 0\n"


def test_gpt2s_own_vocabulary(monkeypatch):
    if not (GPT2_FILES / "vocab.bpe").exists():
        pytest.skip(
            "needs data/gpt2-tokenizer (python data/download.py gpt2-tokenizer)"
        )
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_FILES))
    theirs = tiktoken.get_encoding("gpt2")
    ours = gpt2.load_tokenizer(GPT2_FILES)
    ranks = gpt2.read_ranks(GPT2_FILES / "vocab.bpe")
    assert ranks == theirs._mergeable_ranks
    assert ours.vocab_size == theirs.n_vocab == 50257 == gpt2.GPT2_124M.vocab_size
    assert ours.eos_id == theirs.eot_token == gpt2.GPT2_124M.eos_id
    for text in ["Hello world", *HOSTILE]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == gpt2.encode_bpe(text, ranks) == ids
    assert ours.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    "content", [b"YQ== 0\nYQ=\n", b"hello\n", b"\xff\xfe", b"YQ== x"]
)
def test_files_of_ranks_are_checked(tmp_path, content):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.tiktoken"):
        gpt2.load_tokenizer(path)


# --- data -----------------------------------------------------------------------------

BYTES = gpt2.byte_tokenizer()
SENTENCE = "the cat sat on the mat and the dog ran to the red barn with a bone"
WORDS = SENTENCE.split()


def tiny_text(n: int = 60, seed: int = 0) -> str:
    """Documents of a few predictable sentences."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        first = int(torch.randint(len(WORDS), (), generator=generator))
        documents.append(" ".join((WORDS * 3)[first : first + 12]))
    return f"\n{gpt2.END_OF_TEXT}\n".join(documents)


def test_documents_are_split():
    text = f"\n{gpt2.END_OF_TEXT}\n".join(f"story {i}" for i in range(40))
    training, held_out = gpt2.split_documents(text)
    assert training == [f"story {i}" for i in range(38)]
    assert held_out == ["story 38", "story 39"]
    assert gpt2.split_documents("x" * 100) == (["x" * 95], ["x" * 5])
    training, held_out = gpt2.split_documents(f"a{gpt2.END_OF_TEXT}b")
    assert (training, held_out) == (["a"], ["b"])


def test_an_epoch_visits_every_window_once():
    documents = ["abcdefghij", "kl", "mnopq", "rstuvwxyz"]
    batches = gpt2.Batches(documents, BYTES, T=4, batch_size=3, seed=1)
    whole = "|".join([*documents, ""]).encode()
    stream = [256 if byte == ord("|") else byte for byte in whole]
    assert batches.stream.tolist() == stream
    n, last = len(batches.starts), len(stream) - 5
    # a 11-token document opens windows at 0, 4, 8; the next ones at 11, 14, 18, 20, …
    assert batches.starts.tolist() == [0, 4, 8, 11, 14, 18, 20, 24, last]
    rows = torch.cat([batches.batch(i) for i in range(2 * n)])  # six epochs
    windows = [stream[s : s + 5] for s in batches.starts.tolist()]
    epochs = [sorted(rows[i * n : i * n + n].tolist()) for i in range(6)]
    assert all(epoch == sorted(windows) for epoch in epochs)
    assert rows[:n].tolist() != rows[n : 2 * n].tolist(), "each epoch is shuffled anew"
    again = gpt2.Batches(documents, BYTES, T=4, batch_size=3, seed=1)
    other = gpt2.Batches(documents, BYTES, T=4, batch_size=3, seed=2)
    assert torch.equal(again.batch(11), batches.batch(11))
    assert any(not torch.equal(other.batch(i), batches.batch(i)) for i in range(n))
    assert torch.cat(list(batches.all())).tolist() == windows


def test_a_short_text_gives_a_short_window_and_too_short_a_one_is_refused():
    batches = gpt2.Batches(["abcdefgh"], BYTES, T=10, batch_size=1, seed=0)
    assert batches.batch(0).tolist() == [[*b"abcdefgh", BYTES.eos_id]]
    with pytest.raises(ValueError, match="too short"):
        gpt2.Batches([""], BYTES, T=10, batch_size=1, seed=0)


# --- training -------------------------------------------------------------------------

MINI = gpt2.Config(
    vocab_size=257,
    max_seq_len=16,
    dim=16,
    n_layers=2,
    n_heads=2,
    ffn_dim=32,
    dropout=0.0,
    eos_id=256,
)
RECIPE = gpt2.Recipe(steps=6, batch_size=4, warmup=2, eval_every=3, dropout=0.2)


def new_training(recipe=RECIPE, text: str | None = None, seed: int = 0):
    """A fresh run on the tiny text; dropout as the recipe says."""
    documents, held_out = gpt2.split_documents(tiny_text() if text is None else text)
    data, tested = (
        gpt2.Batches(part, BYTES, 16, recipe.batch_size, recipe.seed)
        for part in (documents, held_out)
    )
    torch.manual_seed(seed)
    model = gpt2.Transformer(replace(MINI, dropout=recipe.dropout))
    return gpt2.Training(model, data, tested, recipe, source="tiny")


def test_the_learning_rate_by_hand():
    recipe = gpt2.Recipe(steps=110, warmup=10, lr=2.0)
    rates = [gpt2.learning_rate(step, recipe) for step in range(120)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    # A quarter, half and all of the way from 2 down to a tenth, 0.2.
    assert rates[35] == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == rates[119] == pytest.approx(0.2)
    assert rates[10:110] == sorted(rates[10:110], reverse=True)
    assert gpt2.learning_rate(0, replace(recipe, warmup=0)) == 2.0


def test_the_optimizer_gets_this_rate_at_every_step():
    training = new_training()
    for step in range(6):
        row = training.take_step()
        rate = gpt2.learning_rate(step, RECIPE)
        assert row["lr"] == rate and row["step"] == step + 1
        assert {group["lr"] for group in training.optimizer.param_groups} == {rate}


def test_weight_decay_is_on_matrices_only():
    model = gpt2.Transformer(gpt2.small_config())
    optimizer = gpt2.make_optimizer(model, gpt2.Recipe(weight_decay=0.3))
    decay = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in decay, "a parameter in two groups"
            decay[id(parameter)] = group["weight_decay"]
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert decay.pop(id(parameter)) == (0.0 if vector else 0.3), name
    assert not decay


def gradients(training) -> list[torch.Tensor]:
    training.take_step()
    return [parameter.grad.clone() for parameter in training.model.parameters()]


def test_accumulation_changes_memory_and_not_the_gradient():
    recipe = replace(RECIPE, dropout=0.0, batch_size=8)
    whole = new_training(recipe)
    halves = new_training(replace(recipe, accumulate=2, batch_size=4))
    for _ in range(3):
        equal(gradients(halves), gradients(whole), 2e-6)
        assert halves.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], 1e-6)
        assert halves.log[-1]["tokens"] == whole.log[-1]["tokens"] == 8 * 16


def test_the_gradient_is_clipped():
    training = new_training(replace(RECIPE, clip=0.01))
    row = training.take_step()
    grads = torch.cat([p.grad.flatten() for p in training.model.parameters()])
    assert row["grad_norm"] > 0.1
    assert grads.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_held_out_loss_is_the_mean_over_all_predictions():
    training = new_training(replace(RECIPE, batch_size=5))
    rows = torch.cat(list(training.held_out.all()))
    assert len(rows) % 5, "the last batch should be a smaller one"
    training.model.eval()
    with torch.no_grad():
        log_p = training.model(rows[:, :-1]).log_softmax(-1)
    nats = -log_p.gather(2, rows[:, 1:, None]).mean().item()
    training.model.train()
    assert gpt2.held_out_loss(training) == pytest.approx(nats, rel=1e-5)


def test_the_loss_is_the_negative_log_likelihood_of_the_next_token():
    model, batch = ours_random(), some_tokens(2, 12)
    log_p = model(batch[:, :11]).log_softmax(-1)
    picked = [log_p[b, t, batch[b, t + 1]] for b in range(2) for t in range(11)]
    equal(gpt2.loss(model, batch), -torch.stack(picked).mean())
    assert gpt2.count_tokens(model, batch) == 22


def test_training_learns_a_tiny_text(tmp_path):
    recipe = replace(RECIPE, steps=120, warmup=10, eval_every=60, lr=1e-2, dropout=0.0)
    training = new_training(recipe)
    assert gpt2.train(training, BYTES, tmp_path)
    first, last = training.log[0], training.log[-1]
    assert 5.3 < first["loss"] < 5.8  # ln 257 is 5.55
    assert last["loss"] < 2.6 and last["held_out"] < 2.6
    assert not training.model.training


# --- resuming -------------------------------------------------------------------------


def bits(training) -> dict:
    """All that must be equal in two runs that are the same run."""
    log = [{k: v for k, v in r.items() if k != "seconds"} for r in training.log]
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "step": training.step,
        "log": log,
        "random": torch.get_rng_state(),
    }


def same_bits(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def restored(folder: Path):
    """A fresh model and optimizer that go on with the checkpoint in `folder`."""
    training = new_training(seed=99)  # another initialisation and random state
    training.restore(gpt2.read_torch(folder / "checkpoint.pt"))
    return training


@pytest.fixture(scope="module")
def straight():
    """The bits of six steps in one go, and after the first three."""
    training, seen = new_training(), {}
    while training.step < 6:
        training.take_step()
        if training.step % 3 == 0:
            training.log[-1]["held_out"] = gpt2.held_out_loss(training)
        seen[training.step] = copy.deepcopy(bits(training))
    return seen


def go_on(training, out: Path, tokenizer=BYTES) -> dict:
    assert gpt2.train(training, tokenizer, out)
    return bits(training)


def test_a_resumed_run_is_the_same_run(straight, tmp_path):
    training = new_training(replace(RECIPE, steps=6))
    while training.step < 3:
        training.take_step()
    training.log[-1]["held_out"] = gpt2.held_out_loss(training)
    training.save(tmp_path, BYTES)
    same_bits(bits(training), straight[3])
    torch.rand(77)  # whatever happens in between
    again = restored(tmp_path)
    same_bits(bits(again), straight[3])
    same_bits(go_on(again, tmp_path), straight[6])
    assert straight[6]["log"][5]["loss"] != straight[6]["log"][2]["loss"]


def test_a_run_leaves_a_published_model_its_log_and_its_curves(hf, tmp_path):
    training = new_training()
    gpt2.train(training, BYTES, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "checkpoint.pt",
        "config.json",
        "log.csv",
        "loss.png",
        "model.safetensors",
    ]
    same_logits(
        gpt2.Transformer.from_pretrained(tmp_path),
        hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval(),
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["held_out"] != "" for row in rows] == [False, False, True] * 2
    for row, logged in zip(rows, training.log, strict=True):
        assert float(row["loss"]) == logged["loss"]
        assert float(row["lr"]) == logged["lr"]


class Killed(BaseException):
    """What a test raises where the process would end."""


def count_replaces(monkeypatch, tmp_path, tokenizer) -> int:
    calls, real = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.os, "replace", lambda *a: (calls.append(a), real(*a)))
        new = new_training()
        new.take_step()
        new.save(tmp_path, tokenizer)
    return len(calls)


@pytest.mark.parametrize("how", ["error", "killed", "half written"])
def test_a_crash_at_any_moment_of_saving_loses_nothing(
    straight, monkeypatch, tmp_path, how
):
    """Each file's move into place fails in turn; the folder resumes all the same."""
    tokenizer = replace(BYTES, files={"tokenizer.note": b"travels with the model"})
    n = count_replaces(monkeypatch, tmp_path / "count", tokenizer)
    assert n == 6  # tokenizer, weights, config, log, curves, checkpoint
    base = tmp_path / "base"
    training = new_training()
    while training.step < 3:
        training.take_step()
    training.log[-1]["held_out"] = gpt2.held_out_loss(training)
    training.save(base, tokenizer)
    for fatal in range(n):
        folder = tmp_path / f"{how} {fatal}"
        shutil.copytree(base, folder)
        run, calls, real = restored(folder), [], os.replace
        run.take_step()

        def replace_or_fail(source, target, fatal=fatal, calls=calls, real=real):
            calls.append(target)
            if len(calls) > fatal:
                if how == "half written":
                    cut(Path(source), 0.5)
                raise OSError("no space left") if how == "error" else Killed
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(gpt2.os, "replace", replace_or_fail)
            if how != "error":  # a killed process cleans nothing up
                patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises((OSError, Killed)):
                run.save(folder, tokenizer)
        left = [path.name for path in folder.iterdir() if "partial" in path.name]
        assert len(left) == (how != "error"), left
        gpt2.Transformer.from_pretrained(folder)  # always a whole model
        same_bits(go_on(restored(folder), folder, tokenizer), straight[6])
        assert not list(folder.glob("*partial*"))


def test_ctrl_c_between_evaluations_saves_that_very_step(monkeypatch, tmp_path):
    training = new_training()
    take, handler = training.take_step, signal.getsignal(signal.SIGINT)

    def press_at_five():
        row = take()
        if training.step == 5:  # evaluations come at 3 and 6
            signal.raise_signal(signal.SIGINT)
        return row

    monkeypatch.setattr(training, "take_step", press_at_five)
    assert gpt2.train(training, BYTES, tmp_path) is False
    assert gpt2.read_torch(tmp_path / "checkpoint.pt")["step"] == 5
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_ends_at_once(monkeypatch):
    training = new_training()

    def press():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one should have raised")

    monkeypatch.setattr(training, "take_step", press)
    with pytest.raises(KeyboardInterrupt):
        gpt2.train(training, BYTES)


def test_other_data_is_refused_on_resume(tmp_path):
    training = new_training()
    training.take_step()
    training.save(tmp_path, BYTES)
    state = gpt2.read_torch(tmp_path / "checkpoint.pt")
    other = new_training(text=tiny_text(seed=1))
    before = copy.deepcopy(bits(other))
    with pytest.raises(ValueError, match="data"):
        other.restore(state)
    same_bits(bits(other), before)


def test_a_model_that_is_not_finite_is_never_saved(monkeypatch, tmp_path):
    """The update itself may spoil the weights, at the very step that saves."""
    training = new_training()
    step = training.optimizer.step

    def spoil():
        step()
        if training.step == 5:  # this is the sixth step
            training.model.norm.bias.data[0] = math.nan

    monkeypatch.setattr(training.optimizer, "step", spoil)
    with pytest.raises(FloatingPointError, match="step 6.*step 3"):
        gpt2.train(training, BYTES, tmp_path)
    assert restored(tmp_path).step == 3
    for value in gpt2.Transformer.from_pretrained(tmp_path).state_dict().values():
        assert value.isfinite().all()


def test_a_resumed_run_knows_its_last_good_checkpoint(monkeypatch, tmp_path):
    training = new_training()
    training.take_step()
    training.save(tmp_path, BYTES)
    again = restored(tmp_path)
    real = gpt2.loss
    monkeypatch.setattr(gpt2, "loss", lambda *a: real(*a) * math.nan)
    with pytest.raises(FloatingPointError, match="step 2.*step 1"):
        again.take_step()


# --- the command line -----------------------------------------------------------------


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """The exit code of `main` and what it wrote to stdout and stderr."""
    capsys.readouterr()
    try:
        code = gpt2.main([str(part) for part in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A tiny corpus, and MINI as a preset."""
    monkeypatch.setattr(gpt2, "MINI", MINI, raising=False)
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


def test_train_generate_and_resume(capsys, corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    said = trained(capsys, corpus, out, "--dropout", 0.1)
    assert "held out" in said and "step     2 of 4" in said
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["resid_pdrop"] == 0.1 and config["vocab_size"] == 257
    asked = ["generate", "--model", out, "--prompt", "the", "--max-new-tokens", 9]
    first, again, other = (
        run(capsys, *asked, "--seed", seed, "--top-k", 50, "--top-p", 0.95)
        for seed in (1, 1, 2)
    )
    assert first == again != other and first[0] == 0 and first[1].startswith("the")
    loaded, real = [], gpt2.Transformer.from_pretrained.__func__

    def note(cls, source, **more):
        loaded.append(real(cls, source, **more))
        return loaded[-1]

    monkeypatch.setattr(gpt2.Transformer, "from_pretrained", classmethod(note))
    for dtype in ("float32", "bfloat16"):
        code, _, err = run(capsys, *asked, "--dtype", dtype)
        assert (code, err) == (0, "")
        assert str(loaded[-1].embed.weight.dtype) == f"torch.{dtype}"
    code, said, err = run(capsys, "train", "--out", out, "--resume")
    assert (code, err) == (0, "") and "--steps" in said
    code, said, err = run(capsys, "train", "--out", out, "--resume", "--steps", 6)
    assert (code, err) == (0, "") and "step     6 of 6" in said
    state = gpt2.read_torch(out / "checkpoint.pt")
    assert state["step"] == 6 and len(state["log"]) == 6


def test_prompts_from_standard_input(capsys, corpus, tmp_path, monkeypatch):
    import io

    trained(capsys, corpus, tmp_path / "run")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    asked = ["generate", "--model", tmp_path / "run", "--prompt", "-"]
    code, said, err = run(capsys, *asked, "--max-new-tokens", 3)
    assert (code, err) == (0, "") and said.startswith("the cat")


def test_a_checkpoint_can_be_trained_further(capsys, corpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    trained(capsys, corpus, first)
    asked = ["train", "--init", first, "--data", corpus, "--out", second]
    asked += ["--steps", 1, "--warmup", 0, "--lr", 1e-12, "--batch-size", 2]
    code, _, err = run(capsys, *asked, "--dropout", 0.25, "--weight-decay", 0)
    assert (code, err) == (0, "")
    old, new = (gpt2.Transformer.from_pretrained(f) for f in (first, second))
    equal(new.state_dict(), old.state_dict(), 1e-9)
    assert new.config.dropout == 0.25, "--dropout must hold for --init too"


def test_the_tokenizer_travels_with_the_model(capsys, corpus, tmp_path, story_ranks):
    """Whatever its file is called, `generate` and `--resume` find it again."""
    odd = tmp_path / "ranks.txt"
    gpt2.write_ranks(story_ranks, odd)
    out = tmp_path / "run"
    text = tmp_path / "long.txt"
    text.write_text(tiny_text(400), encoding="utf-8")
    said = trained(capsys, text, out, "--tokenizer", odd)
    assert "step     4 of 4" in said
    found = gpt2.load_tokenizer(out)
    assert found.vocab_size == len(story_ranks) + 1
    code, _, err = run(capsys, "train", "--out", out, "--resume", "--steps", 5)
    assert (code, err) == (0, "")


def test_verify_says_when_it_disagrees(hf, capsys, monkeypatch):
    code, out, err = run(capsys, "verify")
    assert (code, err) == (0, "") and "Equal within" in out and "block 2" in out
    real = gpt2.copy_to_reference

    def perturb(ours, theirs):
        real(ours, theirs)
        with torch.no_grad():
            theirs.transformer.h[1].mlp.c_fc.bias[7] += 1e-3

    monkeypatch.setattr(gpt2, "copy_to_reference", perturb)
    code, out, err = run(capsys, "verify")
    assert (code, err) == (1, "") and "NOT equal" in out
    marked = [line.split("  ")[0] for line in out.splitlines() if "above" in line]
    assert marked[0] == "block 1", out  # the first stage that is wrong is shown


def test_verify_a_model_whose_tokenizer_is_lost(hf, capsys, tmp_path):
    ours_random().save_pretrained(tmp_path)  # 97 ids: fewer than there are bytes
    code, out, err = run(capsys, "verify", "--model", tmp_path)
    assert (code, err) == (0, "") and "Equal within" in out


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A folder that `train` left, to be copied and spoilt."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert gpt2.train(new_training(), BYTES, out)
    return out


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def llama(folder: Path) -> Path:
    damage_config(config_with(model_type="llama"))(folder / "run")
    return folder / "run"


def spoilt(folder: Path, damage) -> Path:
    damage(folder / "run")
    return folder / "run"


def state_without(key: str):
    def damage(folder: Path) -> None:
        state = torch.load(folder / "checkpoint.pt")
        del state[key]
        torch.save(state, folder / "checkpoint.pt")

    return damage


GENERATE = ["generate", "--max-new-tokens", 3, "--prompt", "the", "--model"]
# What a user may get wrong: the command, given an empty folder with `run` in it, and
# what the one line on stderr must name.
MISTAKES = {
    "no such data": (lambda d: [*TRAIN, "--data", d / "nowhere.txt"], "nowhere.txt"),
    "data is a folder": (lambda d: [*TRAIN, "--data", d], "no file"),
    "empty data": (lambda d: [*TRAIN, "--data", write(d, "e.txt", b"")], "e.txt"),
    "blank data": (lambda d: [*TRAIN, "--data", write(d, "b.txt", b" \n")], "b.txt"),
    "short data": (
        lambda d: [*TRAIN, "--data", write(d, "s.txt", b"abc")],
        "s.txt.*too short",
    ),
    "data not UTF-8": (
        lambda d: [*TRAIN, "--data", write(d, "l.txt", b"caf\xe9 " * 99)],
        "l.txt.*UTF-8",
    ),
    "no such preset": (lambda d: ["train", "--preset", "GPT5"], "GPT5"),
    "no such flag": (lambda d: ["train", "--leraning-rate", "1"], "--leraning-rate"),
    "no such command": (lambda d: ["fly"], "fly"),
    "steps of text": (lambda d: ["train", "--steps", "many"], "--steps.*many"),
    "no steps": (lambda d: [*TRAIN, "--steps", 0], "steps is 0"),
    "negative rate": (lambda d: [*TRAIN, "--lr", -1], "lr is -1"),
    "dropout of 2": (lambda d: [*TRAIN, "--dropout", 2], "dropout is 2"),
    "huge seed": (lambda d: [*TRAIN, "--seed", 10**30], "seed is 10"),
    "no such device": (lambda d: [*TRAIN, "--device", "abacus"], "abacus"),
    "no such tokenizer": (lambda d: [*TRAIN, "--tokenizer", "no.model"], "no.model"),
    "tokenizer of text": (
        lambda d: [*TRAIN, "--tokenizer", write(d, "t.tiktoken", b"hello there\n")],
        "t.tiktoken",
    ),
    "tokenizer.json cut": (
        lambda d: [*TRAIN, "--tokenizer", write(d, "tokenizer.json", b'{"a":')],
        "tokenizer.json",
    ),
    "init from nowhere": (lambda d: [*TRAIN, "--init", d / "no"], "no"),
    "init from a Llama": (lambda d: ["train", "--init", llama(d)], "llama"),
    "out exists": (lambda d: [*TRAIN, "--out", d / "run"], "--resume"),
    "out is a file": (lambda d: [*TRAIN, "--out", write(d, "f", b"mine")], "f"),
    "nothing to resume": (
        lambda d: ["train", "--resume", "--out", d / "new"],
        "nothing to resume",
    ),
    "resume with other data": (
        lambda d: [
            *["train", "--resume", "--out", d / "run", "--steps", 9],
            *["--data", write(d, "o.txt", tiny_text(seed=5).encode())],
        ],
        "data",
    ),
    "resume with other flags": (
        lambda d: ["train", "--resume", "--out", d / "run", "--lr", 1, "--seed", 2],
        "--lr.*--seed",
    ),
    "resume with a preset": (
        lambda d: ["train", "--resume", "--out", d / "run", "--preset", "TINY"],
        "--preset",
    ),
    "resume with a tokenizer": (
        lambda d: ["train", "--resume", "--out", d / "run", "--tokenizer", "bytes"],
        "--tokenizer",
    ),
    "resume with init": (
        lambda d: ["train", "--resume", "--out", d / "run", "--init", d / "run"],
        "--init",
    ),
    "resume a cut checkpoint": (
        lambda d: [
            *["train", "--resume", "--out"],
            spoilt(d, lambda f: cut(f / "checkpoint.pt", 0.5)),
        ],
        "checkpoint.pt",
    ),
    "resume a stranger": (
        lambda d: ["train", "--resume", "--out", spoilt(d, state_without("recipe"))],
        "checkpoint.pt",
    ),
    "no such model": (lambda d: [*GENERATE, d / "nowhere"], "nowhere"),
    "model is a file": (lambda d: [*GENERATE, d / "run" / "config.json"], "folder"),
    "empty folder": (lambda d: [*GENERATE, d / "empty"], "config.json"),
    "a Llama": (lambda d: [*GENERATE, llama(d)], "llama"),
    "weights cut": (
        lambda d: [*GENERATE, spoilt(d, DAMAGE["weights cut"][0])],
        "model.safetensors",
    ),
    "config cut": (
        lambda d: [*GENERATE, spoilt(d, DAMAGE["config cut"][0])],
        "config.json",
    ),
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
    "no prompt": (lambda d: ["generate", "--model", d / "run"], "--prompt"),
    "negative temperature": (
        lambda d: [*GENERATE, d / "run", "--temperature", -1],
        "temperature",
    ),
    "top-p of 2": (lambda d: [*GENERATE, d / "run", "--top-p", 2], "top_p"),
    "verify nothing": (lambda d: ["verify", "--model", d / "nowhere"], "nowhere"),
    "verify in float8": (lambda d: ["verify", "--dtype", "float8"], "float8"),
}


def contents(folder: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_clear_line(
    capsys, corpus, trained_folder, tmp_path, case
):
    make, named = MISTAKES[case]
    shutil.copytree(trained_folder, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    argv = make(tmp_path)
    if argv[0] == "train" and "--resume" not in argv:
        argv = ["train", *([] if "--data" in argv else ["--data", corpus]), *argv[1:]]
        argv += [] if "--out" in argv else ["--out", tmp_path / "new"]
    if argv[0] == "train" and "--resume" in argv and "--data" not in argv:
        argv += ["--data", corpus]
    before = contents(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2, (out, err)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("gpt2.py") and re.search(named, err), err
    assert out == "", "nothing is said before the mistake is found"
    assert contents(tmp_path) == before, "nothing is half-written"
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run(capsys, corpus, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "run", gpt2.loss, []

    def poisoned(model, batch):
        calls.append(model.training)
        value = real(model, batch)
        return value * math.nan if sum(calls) == 4 else value

    monkeypatch.setattr(gpt2, "loss", poisoned)
    code, said, err = run(
        capsys, *TRAIN, "--data", corpus, "--out", out, "--steps", 9, "--seed", 1
    )
    assert code == 2 and len(err.splitlines()) == 1
    assert (
        "step 4: the loss is nan" in err and f"{out / 'checkpoint.pt'}, step 2" in err
    )
    state = gpt2.read_torch(out / "checkpoint.pt")
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.setattr(gpt2, "loss", real)
    code, said, err = run(capsys, "train", "--out", out, "--resume")
    assert (code, err) == (0, "") and "step     9 of 9" in said


def test_a_rate_far_too_high_stops_the_run(capsys, corpus, tmp_path):
    out = tmp_path / "run"
    asked = [*TRAIN, "--data", corpus, "--out", out, "--lr", 1e38, "--steps", 50]
    code, _, err = run(capsys, *asked)
    assert code == 2 and len(err.splitlines()) == 1 and "--lr" in err


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # all of torch.compile but the C++ compiler
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not any(map(shutil.which, ("g++", "clang++", "cl"))),
                    reason="torch.compile needs a C++ compiler",
                ),
            ],
        ),
    ],
)
def test_compiled_training_is_the_same(capsys, corpus, tmp_path, monkeypatch, backend):
    real, used = torch.compile, []
    monkeypatch.setattr(gpt2, "MINI", replace(MINI, n_layers=1))
    monkeypatch.setattr(
        torch, "compile", lambda m: used.append(m) or real(m, backend=backend)
    )
    flags = {"run": ["--compile"], "plain": []}
    losses = {}
    for name, more in flags.items():
        out = tmp_path / name
        assert "held out" in trained(capsys, corpus, out, *more)
        state = gpt2.read_torch(out / "checkpoint.pt")
        assert not any("_orig_mod" in key for key in state["model"])
        losses[name] = [row[k] for row in state["log"] for k in ("loss", "grad_norm")]
        gpt2.Transformer.from_pretrained(out)
    assert len(used) == 1
    assert losses["run"] == pytest.approx(losses["plain"], rel=1e-4)


def command(*argv: object) -> list[str]:
    return [sys.executable, str(CHAPTER.script), *map(str, argv)]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT as a terminal does")
def test_ctrl_c_saves_and_the_resumed_run_is_the_same(corpus, tmp_path):
    """Real processes: one runs through; one is interrupted and then resumed."""
    asked = ["train", "--data", corpus, "--tokenizer", "bytes", "--batch-size", 1]
    asked += ["--steps", 16, "--eval-every", 4, "--warmup", 3, "--dropout", 0.1]
    text = tiny_text(130)
    corpus.write_text(text, encoding="utf-8", newline="\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    through = subprocess.Popen(command(*asked, "--out", whole), stdout=subprocess.PIPE)
    process = subprocess.Popen(
        command(*asked, "--out", parts), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    seen = b""
    for line in process.stdout:
        seen += line
        if line.startswith(b"step     4"):
            process.send_signal(signal.SIGINT)
            break
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, rest, err)
    assert b"--resume" in rest and b"Traceback" not in err
    step = gpt2.read_torch(parts / "checkpoint.pt")["step"]
    assert 4 <= step < 16
    assert not list(parts.glob("*partial*"))
    again = command("train", "--out", parts, "--resume")
    assert subprocess.run(again, stdout=subprocess.DEVNULL).returncode == 0
    through.communicate(timeout=120)
    assert through.returncode == 0
    states = [gpt2.read_torch(out / "checkpoint.pt") for out in (whole, parts)]
    for state in states:
        for row in state["log"]:
            del row["seconds"]
    assert states[0]["step"] == 16
    keys = ("model", "optimizer", "random", "step", "log")
    same_bits(*({key: state[key] for key in keys} for state in states))
    assert (whole / "model.safetensors").read_bytes() == (
        parts / "model.safetensors"
    ).read_bytes()


def test_help_reads_well(capsys):
    for argv in (["--help"], ["train", "--help"], ["generate", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "") and "usage: gpt2.py" in out
        assert "%(" not in out and max(map(len, out.splitlines())) < 100


# --- speed ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training step"])
def test_no_slower_than_hugging_face(hf, training):
    """A lenient bound, best of several; `make bench` measures properly."""
    config = gpt2.Config(
        vocab_size=1025, max_seq_len=128, dim=256, n_layers=4, n_heads=4,
        ffn_dim=1024, dropout=0.0,
    )  # fmt: skip
    ours, theirs = gpt2.Transformer(config), gpt2.reference(config)
    batch = some_tokens(4, 129, 1025)
    steps = []
    for model in (ours, theirs):
        model.train(training)
        optimizer = gpt2.make_optimizer(model, gpt2.Recipe())

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
    best = [math.inf, math.inf]
    for _ in range(9):
        for side, step in enumerate(steps):
            started = time.perf_counter()
            step()
            best[side] = min(best[side], time.perf_counter() - started)
    assert best[0] <= 1.15 * best[1], f"{best[0] / best[1]:.2f} times Hugging Face's"
