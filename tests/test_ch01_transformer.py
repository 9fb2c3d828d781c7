# SPDX-License-Identifier: MIT
"""Chapter 1, the transformer: equal to Marian's, exact in search, it learns."""

import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from chapters import ROOT, find, load

CHAPTER = find("ch01")
ch1 = load(CHAPTER)
CORPUS = ROOT / "data" / "english_hindi.train.tsv"
ACTIVATIONS = ["relu", "silu"]


def equal(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def refused(argv, capsys, *parts):
    """`main` ends with exit code 2 and one line on stderr that holds `parts`."""
    capsys.readouterr()
    assert ch1.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("transformer.py: ") and error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error, error


# --- models of both sides -------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    """The transformers package, imported once."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def random_model(dtype=torch.float32, seed=0, activation="relu", **changes):
    """Our small model, every parameter random, in eval mode."""
    config = replace(ch1.small_config(activation), **changes)
    model = ch1.Transformer(config).eval()
    ch1.randomise(model, seed)
    return model.to(dtype)


def both(dtype=torch.float32, **changes):
    """Our random model, and Hugging Face's with the same weights."""
    ours = random_model(dtype, **changes)
    theirs = ch1.reference(ours.config, dtype)
    ch1.copy_to_reference(ours, theirs)
    return ours, theirs


def padded(config, lengths, width=None, seed=1):
    """Rows of random tokens that are no special ones, padded at the right."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), width or max(lengths))
    tokens = torch.randint(3, config.vocab_size, size, generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = config.pad_id
    return tokens


@torch.no_grad()
def same_logits(ours, theirs, atol=1e-5) -> None:
    """Both models give the same logits for the real tokens of a padded batch."""
    config = ours.config
    source, target = padded(config, [17, 9, 13]), padded(config, [11, 19, 6], seed=2)
    logits = theirs(**ch1.reference_inputs(config, source, target)).logits
    assert logits.abs().max() > 0.5, "the comparison would be blind"
    real = target != config.pad_id
    equal(ours(source, target)[real], logits[real], atol)


# --- parity ---------------------------------------------------------------------------

STAGES = [
    "source embedding",
    "encoder block 0",
    "encoder block 1",
    "encoder block 2",
    "target embedding",
    "decoder block 0",
    "decoder block 1",
    "logits",
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_every_stage_equals_marian(hf, monkeypatch, activation, dtype, atol):
    small = ch1.small_config(activation)
    monkeypatch.setattr(ch1, "small_config", lambda: small)
    rows = ch1.verify(dtype=dtype)
    assert [row["stage"] for row in rows] == STAGES
    for row in rows:
        assert row["max_abs"] <= atol, row
        assert row["relative"] <= ch1.TOLERANCE[dtype], row
        assert row["argmax"] == 1.0 or row["stage"] != "logits"
    source, target = ch1.verify_inputs(small, None)
    assert {len(source), len(target)} == {3}
    assert (source == small.pad_id).any() and (target == small.pad_id).any()


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "gelu"])
def test_their_checkpoints_load(hf, tmp_path, activation):
    _, theirs = both(activation=activation, pad_id=96, bos_id=96, eos_id=0)
    theirs.save_pretrained(tmp_path)
    ours = ch1.Transformer.from_pretrained(tmp_path)
    assert not ours.training
    assert ours.config.activation == activation
    assert (ours.config.pad_id, ours.config.bos_id, ours.config.eos_id) == (96, 96, 0)
    same_logits(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_our_checkpoints_load_in_hugging_face(hf, tmp_path, activation):
    ours = random_model(activation=activation)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.MarianMTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert theirs.generation_config.decoder_start_token_id == ours.config.bos_id
    same_logits(ours, theirs.eval())
    again = ch1.Transformer.from_pretrained(tmp_path)
    for name, parameter in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


def test_verify_compares_a_saved_model_in_every_precision(hf, tmp_path):
    random_model(activation="silu").save_pretrained(tmp_path)
    for dtype, limit in ch1.TOLERANCE.items():
        rows = ch1.verify(tmp_path, dtype)
        assert [row["stage"] for row in rows] == STAGES
        assert max(row["relative"] for row in rows) <= limit


# What the config.json of opus-mt checkpoints holds beside the sizes.
OPUS = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0,
    "bad_words_ids": [[96]],
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "decoder_start_token_id": 96,
    "dropout": 0.1,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "is_encoder_decoder": True,
    "max_length": 512,
    "model_type": "marian",
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 6,
    "pad_token_id": 96,
    "scale_embedding": True,
    "static_position_embeddings": True,
    "transformers_version": "4.22.0.dev0",
    "use_cache": True,
}
SIZES = {
    "d_model": 30,
    "decoder_attention_heads": 5,
    "decoder_ffn_dim": 52,
    "decoder_layers": 2,
    "encoder_attention_heads": 5,
    "encoder_ffn_dim": 52,
    "encoder_layers": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": 48,
    "vocab_size": 97,
}


def opus_folder(folder, seed=0, **changes):
    """A folder as opus-mt was published: an old config, and pytorch_model.bin."""
    model = random_model(
        seed=seed, activation="silu", pad_id=96, bos_id=96, eos_id=0, vocab_size=97
    )
    state = {name: tensor.clone() for name, tensor in ch1.export_tensors(model)}
    table = ch1.sinusoids(48, 30).float()
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_tokens.weight"] = state["model.shared.weight"]
        state[f"model.{side}.embed_positions.weight"] = table.clone()
    state["lm_head.weight"] = state["model.shared.weight"]
    folder.mkdir(exist_ok=True)
    config = {**OPUS, **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(state, folder / "pytorch_model.bin")
    return state


def test_the_published_format_loads_in_both(hf, tmp_path):
    opus_folder(tmp_path)
    ours = ch1.Transformer.from_pretrained(tmp_path)
    assert ours.config.activation == "silu" and ours.config.bos_id == 96
    theirs = hf.MarianMTModel.from_pretrained(tmp_path).eval()
    same_logits(ours, theirs)


def test_sharded_safetensors_load(hf, tmp_path):
    _, theirs = both()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_logits(ch1.Transformer.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.encoder.embed_positions.weight", lambda t: t.flip(1)),
        ("model.decoder.embed_positions.weight", lambda t: t[:40]),
        ("model.decoder.embed_tokens.weight", lambda t: t + 0.1),
        ("lm_head.weight", lambda t: -t),
    ],
)
def test_a_table_that_differs_from_what_it_repeats_is_refused(tmp_path, name, change):
    state = opus_folder(tmp_path)
    state[name] = change(state[name]).clone()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=name):
        ch1.Transformer.from_pretrained(tmp_path)


LAYER = "model.decoder.layers.1.encoder_attn.out_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LAYER), f"missing tensors: {LAYER}"),
        (lambda s: s.update({LAYER: torch.zeros(30, 31)}), rf"{LAYER}.*31.*30"),
        (lambda s: s.update(extra=torch.zeros(3)), r"unexpected tensor extra \(3,\)"),
        (
            lambda s: s.update({LAYER.replace(".1.", ".2."): torch.zeros(30, 30)}),
            r"unexpected tensor model.decoder.layers.2.encoder_attn",
        ),
    ],
)
def test_loading_is_strict_and_names_the_tensor(tmp_path, change, message):
    state = opus_folder(tmp_path)
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        ch1.Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"normalize_before": True}, "normalize_before"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm"),
        ({"normalize_embedding": True}, "normalize_embedding"),
        ({"scale_embedding": False}, "scale_embedding"),
        ({"decoder_vocab_size": 98}, "decoder vocabulary"),
        ({"decoder_ffn_dim": 51}, "narrower decoder"),
        ({"decoder_attention_heads": 6}, "narrower decoder"),
        ({"activation_function": "tanh"}, "'tanh'.*relu"),
        ({"d_model": 31}, "dim 31"),
        ({"d_model": "30"}, "d_model is '30', and no int"),
        ({"dropout": None}, "dropout is None, and no float"),
        ({"pad_token_id": 97}, "pad_id is 97"),
    ],
    ids=str,
)
def test_other_architectures_are_refused_in_one_line(tmp_path, capsys, change, message):
    opus_folder(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        ch1.Transformer.from_pretrained(tmp_path)
    refused(["translate", "--model", str(tmp_path), "a."], capsys, str(tmp_path))


def test_the_base_preset_has_the_papers_size(hf):
    with torch.device("meta"):
        ours = ch1.Transformer(ch1.TRANSFORMER_BASE)
        theirs = hf.MarianMTModel(hf.MarianConfig(**ch1.TRANSFORMER_BASE.to_hf()))
    assert ch1.TRANSFORMER_BASE.vocab_size == 37000
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count == 63_082_496
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


# --- the parts ------------------------------------------------------------------------


def test_sinusoids_equal_the_papers_formula():
    length, D = 50, 12
    paper = torch.zeros(length, D, dtype=torch.float64)
    for t, i in itertools.product(range(length), range(D // 2)):
        angle = t / 10000 ** (2 * i / D)
        paper[t, 2 * i] = math.sin(angle)
        paper[t, 2 * i + 1] = math.cos(angle)
    interleaved = [*range(0, D, 2), *range(1, D, 2)]
    ours = ch1.sinusoids(length, D)
    equal(ours, paper[:, interleaved], atol=1e-14)
    assert ours.dtype == torch.float64
    # By hand: t = 3, the second of six frequencies is 10000^(-1/6).
    assert abs(ours[3, 1].item() - math.sin(3 * 0.21544346900318842)) < 1e-14
    assert ours[0].tolist() == [0.0] * 6 + [1.0] * 6


def test_sinusoids_equal_marians_table_to_the_bit(hf):
    table = ch1.reference(ch1.small_config()).model.encoder.embed_positions.weight
    assert torch.equal(ch1.sinusoids(48, 30).float(), table)


def test_embeddings_are_scaled_and_positions_added():
    model = random_model(torch.float64)
    tokens = torch.tensor([[5, 7, 5]])
    expected = model.embed.weight[tokens[0]] * 30**0.5 + model.positions[:3]
    equal(model.embedded(tokens)[0], expected, atol=1e-14)
    equal(model.positions, ch1.sinusoids(48, 30), atol=1e-7)


def test_positions_are_in_no_checkpoint_and_follow_the_model(tmp_path):
    model = random_model()
    assert not any("position" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any("position" in name for name in names)
    assert {"model.shared.weight", "final_logits_bias"} <= names
    assert "lm_head.weight" not in names
    assert model.double().positions.dtype == torch.float64


def test_the_embedding_is_the_output_layer():
    model = random_model(torch.float64)
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    equal(model.logits(x), x @ model.embed.weight.T + model.logits_bias, atol=1e-12)


@torch.no_grad()
def test_attention_of_two_tokens_by_hand():
    config = replace(ch1.small_config(), dim=2, n_heads=2, ffn_dim=3)
    attention = ch1.Attention(config).double()
    for linear in (attention.wq, attention.wk, attention.wv, attention.wo):
        linear.weight.copy_(torch.eye(2))
        linear.bias.zero_()
    attention.wk.weight[1, 1] = 3.0
    attention.wv.weight[1, 1] = 10.0
    # Head 0 sees (1, 0), head 1 sees (0, 1); K = 1. Scores of head 0: [[1, 0], [0, 0]],
    # of head 1, whose keys are tripled: [[0, 0], [0, 3]].
    x = torch.eye(2, dtype=torch.float64)[None]
    a = math.e / (math.e + 1)
    b = math.e**3 / (math.e**3 + 1)
    weights = torch.tensor(
        [[[a, 1 - a], [0.5, 0.5]], [[0.5, 0.5], [1 - b, b]]], dtype=torch.float64
    )
    seen = torch.ones(2, 2, dtype=torch.bool)
    equal(attention.weights(x, x, seen)[0], weights, atol=1e-14)
    out = torch.tensor([[a, 5.0], [0.5, 10 * b]], dtype=torch.float64)
    equal(attention(x, x, seen)[0], out, atol=1e-14)
    # The first token may look at itself alone; with K = 2 the scores shrink by √2.
    causal = seen.tril()
    assert attention.weights(x, x, causal)[0, :, 0].tolist() == [[1.0, 0.0]] * 2
    attention.H, attention.K = 1, 2
    c = math.exp(1 / 2**0.5) / (math.exp(1 / 2**0.5) + 1)
    assert abs(attention.weights(x, x, seen)[0, 0, 0, 0].item() - c) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_weights_sum_to_one_over_what_is_seen(dtype):
    model = random_model(dtype)
    attention = model.decoder[0].cross_attention
    x, memory = torch.randn(2, 7, 30, dtype=dtype), torch.randn(2, 11, 30, dtype=dtype)
    seen = (torch.arange(11) < torch.tensor([[11], [4]]))[:, None, None]
    weights = attention.weights(x, memory, seen)
    assert weights.shape == (2, 5, 7, 11) and weights.dtype == dtype
    one = torch.ones(2, 5, 7, dtype=dtype)
    equal(weights.sum(-1), one, atol={torch.bfloat16: 2e-2}.get(dtype, 1e-6))
    assert (weights[1, :, :, 4:] == 0).all() and (weights[1, :, :, :4] > 0).all()


def test_layer_norm_equals_its_formula():
    norm = ch1.LayerNorm(6, 0.3).double()  # an eps that shows
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
        norm.bias.copy_(torch.arange(6.0).flip(0))
    x = torch.randn(4, 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).sum(-1, keepdim=True) / 6
    expected = centred / (variance + 0.3).sqrt() * norm.weight + norm.bias
    equal(norm(x), expected, atol=1e-14)


def test_feed_forward_by_hand():
    config = replace(ch1.small_config(), dim=2, n_heads=1, ffn_dim=2)
    ffn = ch1.FeedForward(config)
    with torch.no_grad():
        ffn.w_up.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        ffn.w_up.bias.copy_(torch.tensor([0.5, 0.5]))
        ffn.w_down.weight.copy_(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        ffn.w_down.bias.copy_(torch.tensor([-1.0, 1.0]))
    # max(0, (3.5, -0.5)) = (3.5, 0); twice that less one, and one.
    assert ffn(torch.tensor([[1.0, 1.0]])).tolist() == [[6.0, 1.0]]


def test_blocks_end_in_a_norm():
    """Post-norm: at the start, where w is 1 and b is 0, results have mean 0, var 1."""
    model = ch1.Transformer(ch1.small_config()).double().eval()
    source, target = padded(model.config, [9, 9]), padded(model.config, [7, 7])
    names = [f"encoder.{i}" for i in range(3)] + [f"decoder.{i}" for i in range(2)]
    inputs = {"source": source, "target": target}
    for out in ch1.watch(model, names, **inputs):
        equal(out.mean(-1), torch.zeros(out.shape[:2]).double(), atol=1e-12)
        equal(out.var(-1, correction=0), torch.ones(out.shape[:2]).double(), atol=1e-3)


@torch.no_grad()
def test_a_block_adds_each_sublayer_to_the_stream():
    model = random_model(torch.float64)
    x, memory = torch.randn(2, 1, 7, 30, dtype=torch.float64)
    seen = torch.ones(7, 7, dtype=torch.bool)
    block = model.encoder[1]
    attended = block.attention_norm(x + block.attention(x, x, seen))
    expected = block.ffn_norm(attended + block.ffn(attended))
    equal(block(x, seen), expected, atol=1e-12)
    block, past = model.decoder[1], seen.tril()
    first = block.attention_norm(x + block.attention(x, x, past))
    second = block.cross_norm(first + block.cross_attention(first, memory, seen))
    expected = block.ffn_norm(second + block.ffn(second))
    equal(block(x, memory, past, seen), expected, atol=1e-12)


def test_dropout_acts_in_training_alone():
    model = random_model(dropout=0.4)
    source, target = padded(model.config, [9, 6]), padded(model.config, [7, 7])
    assert torch.equal(model(source, target), model(source, target))
    model.train()
    assert not torch.equal(model(source, target), model(source, target))
    # On the sum of embedding and position too (§5.4): some entries are zero.
    share = (model.embedded(source) == 0).double().mean()
    assert 0.3 < share < 0.5


@torch.no_grad()
def test_the_decoder_sees_the_past_alone():
    model = random_model(torch.float64)
    source, target = padded(model.config, [9, 6]), padded(model.config, [13, 13])
    logits = model(source, target)
    for t in range(13):
        changed = target.clone()
        changed[:, t] = (changed[:, t] - 3 + 1) % 94 + 3
        moved = (model(source, changed) - logits).abs().amax(-1)
        assert (moved[:, :t] == 0).all(), f"token {t} is seen from before"
        assert (moved[:, t:] > 1e-6).all(), f"token {t} is not seen from after"


@torch.no_grad()
def test_the_encoder_sees_the_whole_sentence():
    model = random_model(torch.float64)
    source = padded(model.config, [9])
    memory, seen = model.encode(source)
    for n in range(9):
        changed = source.clone()
        changed[:, n] = (changed[:, n] - 3 + 1) % 94 + 3
        assert ((model.encode(changed)[0] - memory).abs().amax(-1) > 1e-6).all()
    assert seen.all() and seen.shape == (1, 1, 1, 9)


@torch.no_grad()
def test_padding_changes_nothing():
    model = random_model(torch.float64)
    config = model.config
    source, target = padded(config, [9, 5]), padded(config, [7, 4])
    logits = model(source, target)
    wider = F.pad(source, (0, 6), value=config.pad_id)
    longer = F.pad(target, (0, 3), value=config.pad_id)
    equal(model(wider, longer)[:, :7], logits, atol=1e-12)
    equal(model(source[1:, :5], target[1:, :4])[0], logits[1, :4], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_in_low_precision_out(dtype):
    model = random_model()
    source, target = padded(model.config, [9, 5]), padded(model.config, [7, 7])
    exact = model(source, target)
    logits = model.to(dtype)(source, target)
    assert logits.dtype == dtype and logits.isfinite().all()
    cosine = F.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0)
    assert cosine > 0.999


def test_gradients_reach_every_parameter():
    model = random_model().train()
    source, target = padded(model.config, [9, 5]), padded(model.config, [8, 8])
    ch1.loss(model, (source, target)).backward()
    for name, parameter in model.named_parameters():
        if name == "logits_bias":
            assert parameter.grad is None and not parameter.requires_grad
        elif name.endswith("wk.bias"):  # softmax does not see what all keys share
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert parameter.grad.abs().max() > 1e-7, name


def test_the_start_is_scaled():
    model = ch1.Transformer(replace(ch1.TINY, n_encoder_layers=1, n_decoder_layers=1))
    x = model.embed(torch.arange(2000)) * 128**0.5
    assert abs(x.std().item() - 1) < 0.02
    bound = (6 / (128 + 512)) ** 0.5
    w = model.encoder[0].ffn.w_up.weight
    assert 0.98 * bound < w.abs().max() <= bound
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 32}, "32.*5"),
        ({"dim": 15, "n_heads": 5}, "15 must be even"),
        ({"activation": "sine"}, "sine"),
        ({"eos_id": 97}, "eos_id is 97.* 97"),
        ({"bos_id": -1}, "bos_id is -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"label_smoothing": -0.1}, "-0.1"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ch1.small_config(), **change)


def test_too_many_tokens_are_refused():
    model = random_model()
    with pytest.raises(ValueError, match="49 tokens .* 48"):
        model(torch.full((1, 49), 5), torch.full((1, 2), 5))


# --- search ---------------------------------------------------------------------------


MARIAN_IDS = {"pad_id": 96, "bos_id": 96, "eos_id": 0}


def words(config, lengths=(8, 3, 7, 2, 4, 6, 5), seed=3):
    """Sources for `reversing`: rows of words and eos, padded."""
    words = SimpleNamespace(vocab_size=15, pad_id=config.pad_id)
    rows = padded(words, lengths, max(lengths) + 1, seed)
    rows[range(len(lengths)), lengths] = config.eos_id
    return rows


def reversing(**changes):
    """A model trained for a moment to reverse its source; it errs, and ends at times.

    In float64, where no near-ties are decided differently. The bias keeps it from
    writing padding, which Hugging Face's search would let it do.
    """
    torch.manual_seed(0)
    config = replace(ch1.small_config(), dropout=0.0, label_smoothing=0.0, **changes)
    model = ch1.Transformer(config)
    optimizer = ch1.make_optimizer(model, ch1.Recipe(lr=1e-2))
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / 150)
        lengths = torch.randint(2, 9, (32,)).tolist()
        source = words(config, lengths, seed=step)
        target = torch.full((32, max(lengths) + 2), config.pad_id)
        target[:, 0] = config.bos_id
        for row, n in enumerate(lengths):
            target[row, 1 : n + 1] = source[row, :n].flip(0)
            target[row, n + 1] = config.eos_id
        optimizer.zero_grad()
        ch1.loss(model, (source, target)).backward()
        optimizer.step()
    with torch.no_grad():
        model.logits_bias[config.pad_id] = -100.0
    return model.double().eval()


@pytest.fixture(scope="module")
def reverser():
    return reversing()


@pytest.fixture(scope="module")
def marian_reverser():
    """With the ids of published checkpoints: a target starts with padding."""
    return reversing(activation="silu", **MARIAN_IDS)


@pytest.mark.parametrize("name", ["reverser", "marian_reverser"])
def test_greedy_equals_hugging_face(hf, request, name):
    ours = request.getfixturevalue(name)
    config = ours.config
    theirs = ch1.reference(config, torch.float64)
    ch1.copy_to_reference(ours, theirs)
    source = words(config)
    found = ch1.greedy(ours, source, max_new_tokens=7)
    expected = theirs.generate(
        input_ids=source,
        attention_mask=(source != config.pad_id).long(),
        max_new_tokens=7,
        num_beams=1,
        do_sample=False,
        bad_words_ids=None,
    )
    assert found.tolist() == expected.tolist()
    rows = trimmed(found, config)
    assert len({len(row) for row in rows}) > 2, "rows are too much alike"
    assert {row[-1] == config.eos_id for row in rows} == {True, False}


def trimmed(tokens, config):
    """Rows of ids without the bos before them and the padding behind."""
    rows = []
    for row in tokens[:, 1:].tolist():
        while row and row[-1] == config.pad_id:
            row.pop()
        rows.append(row)
    return rows


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["reverser", "marian_reverser"])
def test_a_batch_equals_one_by_one(request, name, beams):
    model = request.getfixturevalue(name)
    source = words(model.config)

    def search(rows):
        if beams == 1:
            return ch1.greedy(model, rows, max_new_tokens=20)
        return ch1.beam_search(model, rows, beams=beams, max_new_tokens=20)

    together = trimmed(search(source), model.config)
    assert len({len(row) for row in together}) > 2
    for row, tokens in zip(source, together, strict=True):
        alone = row[row != model.config.pad_id][None]
        assert trimmed(search(alone), model.config) == [tokens]


@pytest.mark.parametrize("limit", [3, 6, 20])
def test_one_beam_is_greedy(reverser, limit):
    source = words(reverser.config)
    greedy = ch1.greedy(reverser, source, max_new_tokens=limit)
    beam = ch1.beam_search(reverser, source, beams=1, max_new_tokens=limit)
    assert beam.tolist() == greedy.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_results_are_padded_behind_the_end_and_nowhere_else(marian_reverser, beams):
    model, config = marian_reverser, marian_reverser.config
    model.logits_bias[config.pad_id] += 200.0  # it would like to write padding
    try:
        if beams == 1:
            found = ch1.greedy(model, words(config), max_new_tokens=6)
        else:
            found = ch1.beam_search(model, words(config), beams=3, max_new_tokens=6)
    finally:
        model.logits_bias[config.pad_id] -= 200.0
    assert (found[:, 0] == config.bos_id).all()
    kinds = set()
    for row in trimmed(found, config):
        assert config.pad_id not in row and config.eos_id not in row[:-1]
        assert row[-1] == config.eos_id or len(row) == 6
        kinds.add(row[-1] == config.eos_id)
    assert kinds == {True, False}, "both ended and unfinished rows are needed"


@torch.inference_mode()
def every_ending(model, source, limit):
    """(tokens, log P) of every translation of at most `limit` tokens."""
    config = model.config
    writable = [i for i in range(config.vocab_size) if i != config.pad_id]
    middle = [i for i in writable if i != config.eos_id]
    for n in range(1, limit + 1):
        ends = [
            [*row, config.eos_id] for row in itertools.product(middle, repeat=n - 1)
        ]
        target = torch.tensor([[config.bos_id, *row] for row in ends])
        logits = model(source.expand(len(ends), -1), target[:, :-1])[..., writable]
        scores = logits - logits.exp().sum(-1, keepdim=True).log()
        for row, score in zip(ends, scores, strict=True):
            places = [writable.index(token) for token in row]
            yield row, score[range(n), places].sum().item()


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.5])
def test_a_wide_beam_finds_the_best_of_all(length_penalty):
    limit, winners = 4, set()
    for seed in range(4):
        model = random_model(torch.float64, seed, vocab_size=6)
        with torch.no_grad():  # more decided, and inclined to end
            for parameter in model.parameters():
                parameter *= 3.0 if parameter.dim() == 2 else 1.0
            model.logits_bias[model.config.eos_id] += 3.0
        source = padded(model.config, [5, 3], seed=seed)
        found = ch1.beam_search(
            model,
            source,
            beams=64,
            length_penalty=length_penalty,
            max_new_tokens=limit,
        )
        for row, tokens in zip(source, trimmed(found, model.config), strict=True):
            alone = row[row != model.config.pad_id][None]
            best, _ = max(
                every_ending(model, alone, limit),
                key=lambda end: end[1] / ((5 + len(end[0])) / 6) ** length_penalty,
            )
            assert tokens == best
            winners.add(len(best))
    assert len(winners) > 1, "one length always wins: the test is blind"


class Fixed:
    """Stands for a model whose next token depends on the last one alone.

    Where the source begins with 5, `other` stands for `table`.
    """

    def __init__(self, table, other=None):
        """`table[last][next]` is a probability; ids: 0 pad, 1 bos, 2 eos, words."""
        self.config = SimpleNamespace(pad_id=0, bos_id=1, eos_id=2, max_seq_len=99)
        tables = [table, other or table]
        self.tables = torch.tensor(tables, dtype=torch.float64).log()

    def encode(self, source):
        return source[..., None].double(), source != 0

    def decode(self, target, memory, seen):
        which = 1.0 + (memory[:, :1] == 5)  # (B, 1, 1)
        return F.one_hot(target, self.tables.shape[1]) * which

    def logits(self, x):
        return self.tables[x.amax(-1).long() - 1, x.argmax(-1)]


# From bos: half the time the end at once, half the time word 3, then word 4, then the
# end, 0.84 of what began so. P(end) = 0.50, log -0.693. P(3 4 end) = 0.42, log -0.868.
SHORT_OR_LONG = [
    #  pad  bos  eos    3     4     5
    [0.0, 0.0, 1.0, 0.00, 0.00, 0.00],
    [0.0, 0.0, 0.5, 0.50, 0.00, 0.00],
    [0.0, 0.0, 1.0, 0.00, 0.00, 0.00],
    [0.0, 0.0, 0.0, 0.00, 0.84, 0.16],
    [0.0, 0.0, 1.0, 0.00, 0.00, 0.00],
    [0.0, 0.0, 0.5, 0.00, 0.00, 0.50],
]


@pytest.mark.parametrize(
    ("length_penalty", "winner"),
    [
        (0.0, [2]),  # -0.693 > -0.868
        (0.6, [2]),  # -0.693 / 1 > -0.868 / (8/6)^0.6 = -0.868 / 1.188 = -0.730
        (0.7, [2]),  # … / 1.223 = -0.709
        (0.9, [3, 4, 2]),  # -0.693 < -0.868 / (8/6)^0.9 = -0.868 / 1.295 = -0.670
        (1.0, [3, 4, 2]),  # … / 1.333 = -0.651
    ],
)
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_the_length_penalty_decides_as_computed_by_hand(beams, length_penalty, winner):
    model = Fixed(SHORT_OR_LONG)
    source = torch.tensor([[3, 4], [5, 0]])
    found = ch1.beam_search(
        model, source, beams=beams, length_penalty=length_penalty, max_new_tokens=9
    )
    assert trimmed(found, model.config) == [winner, winner]


def test_a_beam_finds_what_greedy_misses():
    table = [row[:] for row in SHORT_OR_LONG]
    table[1] = [0.0, 0.0, 0.0, 0.40, 0.00, 0.60]  # greedy follows 5: 0.6 · 0.5
    table[3] = [0.0, 0.0, 0.0, 0.00, 1.00, 0.00]  # 3 4 end: 0.4
    model, source = Fixed(table), torch.tensor([[3]])
    greedy = ch1.greedy(model, source, max_new_tokens=9)
    assert trimmed(greedy, model.config)[0][0] == 5
    beam = ch1.beam_search(model, source, beams=2, max_new_tokens=9)
    assert trimmed(beam, model.config) == [[3, 4, 2]]


def test_beams_that_end_make_room_for_others():
    table = [row[:] for row in SHORT_OR_LONG]
    table[1] = [0.0, 0.0, 0.40, 0.35, 0.25, 0.00]
    table[3] = [0.0, 0.0, 0.30, 0.00, 0.30, 0.40]
    model, source = Fixed(table), torch.tensor([[3, 4]])
    # Two beams stay open when one has ended: 3 and 4. In two tokens, at penalty 3,
    # log 0.40 = -0.916; 4 end: log 0.25 / (7/6)^3 = -0.873; 3 end: -2.254 / 1.588.
    found = ch1.beam_search(
        model, source, beams=2, length_penalty=3.0, max_new_tokens=2
    )
    assert trimmed(found, model.config) == [[4, 2]]


def test_a_row_that_is_done_is_left_alone():
    table, other = ([row[:] for row in SHORT_OR_LONG] for _ in range(2))
    table[1] = [0.0, 0.0, 0.51, 0.49, 0.0, 0.0]  # greedy ends; 3 4 end scores higher
    other[1] = [0.0, 0.0, 0.00, 1.00, 0.0, 0.0]
    model, source = Fixed(table, other), torch.tensor([[3, 4], [5, 0]])
    found = ch1.beam_search(
        model, source, beams=1, length_penalty=1.0, max_new_tokens=9
    )
    assert trimmed(found, model.config) == [[2], [3, 4, 2]]


@pytest.mark.parametrize("beams", [2, 3, 4])
def test_poor_translations_that_end_early_do_not_end_the_search(beams):
    table = [row[:] for row in SHORT_OR_LONG]
    table[1] = [0.0, 0.0, 0.02, 0.96, 0.01, 0.01]
    table[3] = [0.0, 0.0, 0.02, 0.00, 0.96, 0.02]
    table[4] = [0.0, 0.0, 0.02, 0.00, 0.02, 0.96]
    table[5] = [0.0, 0.0, 0.98, 0.00, 0.01, 0.01]
    model, source = Fixed(table), torch.tensor([[3, 4], [5, 0]])
    found = ch1.beam_search(model, source, beams=beams, max_new_tokens=9)
    assert trimmed(found, model.config) == [[3, 4, 5, 2]] * 2
    assert found.shape[1] < 10, "it should see that nothing can overtake"


@pytest.mark.parametrize("search", ["greedy", "beam_search"])
def test_rows_that_do_not_end_are_returned_unfinished(search):
    table = [row[:] for row in SHORT_OR_LONG]
    table[1] = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    table[5] = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]  # 5 forever
    model, source = Fixed(table), torch.tensor([[3, 4], [5, 0]])
    found = getattr(ch1, search)(model, source, max_new_tokens=6)
    assert found.tolist() == [[1, 5, 5, 5, 5, 5, 5]] * 2
    # Without a limit: 50 more than the source has (§6.1).
    assert getattr(ch1, search)(model, source).shape == (2, 1 + 52)
    model.config.max_seq_len = 10
    assert getattr(ch1, search)(model, source).shape == (2, 10)


def test_no_beams_are_refused():
    with pytest.raises(ValueError, match="beams 0"):
        ch1.beam_search(random_model(), torch.tensor([[5]]), beams=0)


@pytest.mark.parametrize("penalty", [-0.1, math.nan])
def test_a_length_penalty_below_zero_is_refused(penalty):
    with pytest.raises(ValueError, match=f"length_penalty {penalty}"):
        ch1.beam_search(random_model(), torch.tensor([[5]]), length_penalty=penalty)


# --- tokenizers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    """The training pairs of the embedded corpus, and the tokenizer trained on them."""
    pairs = ch1.read_pairs(CORPUS)
    return pairs, ch1.train_tokenizer(pairs, ch1.TINY.vocab_size)


def test_hindi_comes_back_as_it_went_in(corpus):
    pairs, tokenizer = corpus
    tests = [pair for part in ch1.evaluation_sets(CORPUS).values() for pair in part]
    assert len(tests) > 1000
    for _, hindi in [*pairs, *tests]:
        assert unicodedata.is_normalized("NFC", hindi)
        ids = tokenizer.encode_target(hindi)
        assert tokenizer.decode(ids) == hindi
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        assert tokenizer.pad_id not in ids


def test_the_corpus_has_no_unknown_pieces(corpus):
    pairs, tokenizer = corpus
    unknown = json.loads(tokenizer.files["vocab.json"])["<unk>"]
    for english, hindi in pairs:
        source, target = (
            tokenizer.encode_source(english),
            tokenizer.encode_target(hindi),
        )
        assert source[-1] == tokenizer.eos_id and source[0] != tokenizer.bos_id
        assert unknown not in source + target
        assert max(source + target) < tokenizer.vocab_size <= ch1.TINY.vocab_size
    assert tokenizer.vocab_size > 1000


def test_spellings_of_one_sentence_are_one(corpus):
    _, tokenizer = corpus
    lower = tokenizer.encode_source("the old farmer drinks cold water.")
    assert tokenizer.encode_source("THE Old Farmer drinks cold water.") == lower
    # za: one character, which NFC takes apart, or ja and a dot.
    one, two = "\u095b\u092e\u0940\u0928", "\u091c\u093c\u092e\u0940\u0928"
    for encode in (tokenizer.encode_source, tokenizer.encode_target):
        assert encode(one) == encode(two)
    assert tokenizer.decode(tokenizer.encode_target(one)) == two


def test_training_a_tokenizer_is_deterministic(corpus):
    pairs = corpus[0][:3000]
    first, second = (ch1.train_tokenizer(pairs, 500) for _ in range(2))
    assert first.files == second.files
    assert first.vocab_size == 500
    assert ch1.train_tokenizer(pairs, 400).files != first.files


def test_a_tokenizer_travels_with_its_model(corpus, tmp_path):
    pairs, tokenizer = corpus
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = ch1.load_tokenizer(tmp_path)
    for name in ("vocab_size", "pad_id", "bos_id", "eos_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for english, hindi in pairs[:50]:
        assert again.encode_source(english) == tokenizer.encode_source(english)
        assert again.encode_target(hindi) == tokenizer.encode_target(hindi)


def test_without_a_tokenizer_there_are_bytes(tmp_path, monkeypatch, capsys):
    tokenizer = ch1.load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 259
    assert {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} == {256, 257, 258}
    for text in ("ठंडा पानी।", "cold water.", "\x00\U0001f600"):
        ids = tokenizer.encode_target(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_source(text) == ids[1:]
        assert ids == [257, *text.encode("utf-8"), 258]
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert ch1.train_tokenizer(PAIRS, 100).vocab_size == 259
    assert "bytes" in capsys.readouterr().out


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="259 ids, the model 97"):
        ch1.check_vocabulary(random_model(), ch1.byte_tokenizer())
    ch1.check_vocabulary(random_model(vocab_size=259), ch1.byte_tokenizer())
    random_model().save_pretrained(tmp_path)
    refused(["translate", "--model", tmp_path, "a."], capsys, "259 ids")
    refused(["evaluate", "--model", tmp_path], capsys, "259 ids")


# A little language: the verb agrees with the subject and comes last.
SUBJECTS = {
    "The boy": ("लड़का", "ता"),
    "The girl": ("लड़की", "ती"),
    "The old farmer": ("बूढ़ा किसान", "ता"),
    "My sister": ("मेरी बहन", "ती"),
}
PREDICATES = {
    "drinks cold water": ("ठंडा पानी", "पी"),
    "reads a book": ("किताब", "पढ़"),
    "eats an apple": ("सेब", "खा"),
    "sees the cow": ("गाय को", "देख"),
    "sings a song": ("गाना", "गा"),
}
PAIRS = [
    (f"{english} {what}.", f"{hindi} {thing} {verb}{ending} है।")
    for english, (hindi, ending) in SUBJECTS.items()
    for what, (thing, verb) in PREDICATES.items()
]
UNSEEN = ("Where is the cow?", "गाय कहाँ है?")


def write_pairs(path, pairs=(*PAIRS, UNSEEN)):
    """The pairs as a two-column file; of 21 the last one is held out."""
    text = "".join(f"{source}\t{target}\n" for source, target in pairs)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def spm(sentences, size):
    """A SentencePiece model for one language, and its pieces."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    return written.getvalue(), [p for p in pieces if p not in ("<unk>", "<s>", "</s>")]


def same_as_marian(hf, folder, sentences, targets):
    """MarianTokenizer and MarianMTModel read `folder`: same ids, same translations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sacremoses, which is not called
        theirs = hf.MarianTokenizer.from_pretrained(folder)
    ours = ch1.load_tokenizer(folder)
    for sentence in sentences:
        assert ours.encode_source(sentence) == theirs(sentence).input_ids
    for sentence in targets:
        expected = theirs(text_target=sentence).input_ids
        assert ours.encode_target(sentence) == [ours.bos_id, *expected]
    mine = ch1.Transformer.from_pretrained(folder, dtype=torch.float64)
    model = hf.MarianMTModel.from_pretrained(folder, dtype=torch.float64).eval()
    batch = theirs(sentences, return_tensors="pt", padding=True)
    written = model.generate(
        **batch,
        max_new_tokens=ch1.new_token_limit(mine, batch.input_ids, None),
        num_beams=1,
        do_sample=False,
        bad_words_ids=None,
        forced_eos_token_id=None,
    )
    expected = theirs.batch_decode(written, skip_special_tokens=True)
    assert ch1.translate(mine, ours, sentences) == expected
    assert len(set(expected)) > 2, "all translations are alike: the test is blind"


def test_a_published_folder_translates_as_in_hugging_face(hf, tmp_path):
    source, english = spm([source for source, _ in PAIRS], 60)
    target, hindi = spm([target for _, target in PAIRS], 70)
    pieces = dict.fromkeys(["</s>", "<unk>", *english, *hindi, "<pad>"])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    last = len(vocabulary) - 1
    model = random_model(
        activation="silu", vocab_size=last + 1, pad_id=last, bos_id=last, eos_id=0
    )
    with torch.no_grad():  # decided, varied, and without <unk> and padding
        for parameter in model.parameters():
            parameter *= 3.0 if parameter.dim() == 2 else 1.0
        model.logits_bias[[1, last]] -= 100.0
    model.save_pretrained(tmp_path)
    config = {**OPUS, **SIZES, "vocab_size": last + 1, "bad_words_ids": [[last]]}
    config |= {"pad_token_id": last, "decoder_start_token_id": last}
    about = {"source_lang": "en", "target_lang": "hi", "model_max_length": 512}
    for name, content in (
        ("config.json", config),
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", about),
    ):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "source.spm").write_bytes(source)
    (tmp_path / "target.spm").write_bytes(target)

    sentences = [source for source, _ in PAIRS[::3]] + ["Der große Hund?"]
    same_as_marian(hf, tmp_path, sentences, [target for _, target in PAIRS])
    tokenizer = ch1.load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (last, last, 0)
    assert 1 in tokenizer.encode_source(sentences[-1]), "ß should be unknown"
    assert tokenizer.decode([last, *tokenizer.encode_target("गाय को")]) == "गाय को"
    # Ids that have no piece say nothing, and a piece of the other model is written out.
    piece = next(p for p in english if p not in hindi and p.startswith("▁") and p[1:])
    assert tokenizer.decode([last + 1, vocabulary[piece]] * 2) == " ".join(
        [piece[1:]] * 2
    )


# --- batches, loss, schedule ----------------------------------------------------------


@pytest.fixture(scope="module")
def batches(corpus):
    pairs, tokenizer = corpus
    return ch1.Batches(pairs, tokenizer, 256, ch1.RECIPES["laptop"].batch_tokens, 0)


def rows_of(batch, pad_id):
    """The (source, target) ids of a batch, without the padding at the right."""
    found = []
    for rows in zip(*batch, strict=True):
        pair = []
        for row in rows:
            real = row != pad_id
            length = int(real.sum())
            assert real[:length].all(), "padding before the end"
            pair.append(tuple(row[:length].tolist()))
        found.append(tuple(pair))
    return found


def test_an_epoch_holds_every_pair_once(corpus, batches):
    pairs, tokenizer = corpus
    expected = Counter(
        (tuple(tokenizer.encode_source(a)), tuple(tokenizer.encode_target(b)))
        for a, b in pairs
    )
    n, found, real, total = len(batches.cuts), Counter(), 0, 0
    for index in range(n, 2 * n):  # the second epoch
        source, target = batch = batches.batch(index)
        assert (
            source.numel() + target.numel() <= batches.batch_tokens or len(source) == 1
        )
        rows = rows_of(batch, tokenizer.pad_id)
        found.update(rows)
        real += sum(len(a) + len(b) for a, b in rows)
        total += source.numel() + target.numel()
    assert found == expected
    assert 1 - real / total < 0.15, "too much padding"
    assert total / n > 0.8 * batches.batch_tokens, "batches are not filled"
    again = Counter(
        row for batch in batches.all() for row in rows_of(batch, tokenizer.pad_id)
    )
    assert again == expected


def test_a_pair_larger_than_a_batch_stands_alone():
    pairs = [("a" * n, "b" * n) for n in (3, 50, 4, 60, 5, 3)]
    batches = ch1.Batches(pairs, ch1.byte_tokenizer(), 256, 30, 0)
    sizes = sorted(source.shape for source, _ in batches.all())
    # 2 · (3 + 1 + 3 + 2) = 18; with 4 letters 2 · 11 = 22, 3 · 11 is too much.
    assert sizes == [(1, 51), (1, 61), (2, 4), (2, 6)]
    with pytest.raises(ValueError, match="at most 3 tokens"):
        ch1.Batches(pairs, ch1.byte_tokenizer(), 3, 30, 0)


def test_pairs_too_long_for_the_model_are_left_out_and_counted(capsys):
    pairs = [("a" * n, "b") for n in (3, 50, 4)]
    batches = ch1.Batches(pairs, ch1.byte_tokenizer(), 9, 30, 0)
    assert len(batches.pairs) == 2
    assert "1 pairs are left out: over 9 tokens" in capsys.readouterr().out


def test_the_order_follows_from_the_seed_and_differs_between_epochs(corpus, batches):
    pairs, tokenizer = corpus
    few = pairs[:2000]

    def order(seed, epoch):
        made = ch1.Batches(few, tokenizer, 256, 1600, seed)
        return [chosen.tolist() for chosen in made.plan(epoch)]

    first = order(0, 0)
    assert first == order(0, 0) != order(1, 0)
    assert {frozenset(b) for b in first} != {frozenset(b) for b in order(0, 1)}
    lengths = [batches.lengths[chosen[0]] for chosen in first]  # `few` come first
    assert lengths != sorted(lengths), "short batches should not all come first"


def test_the_loss_does_not_count_padding():
    model = random_model(torch.float64)
    config = model.config
    source, target = padded(config, [9, 5]), padded(config, [8, 4], seed=2)
    logits = model(source, target[:, :-1])
    total = 0.0
    for row, length in enumerate([8, 4]):
        for t in range(length - 1):
            scores = logits[row, t]
            total -= (scores[target[row, t + 1]] - scores.exp().sum().log()).item()
    mean = total / (7 + 3)
    assert abs(ch1.loss(model, (source, target)).item() - mean) < 1e-12
    assert ch1.count_tokens(model, (source, target)) == 10
    wider = F.pad(source, (0, 3)), F.pad(target, (0, 5))
    assert config.pad_id == 0
    assert abs(ch1.loss(model, wider).item() - mean) < 1e-12
    assert ch1.count_tokens(model, wider) == 10


def test_label_smoothing_equals_its_formula_and_ends_with_training():
    model = random_model(torch.float64, dropout=0.0, label_smoothing=0.3)
    V, share = model.config.vocab_size, 0.3
    source, target = padded(model.config, [9, 5]), padded(model.config, [8, 4], seed=2)
    log_p = model(source, target[:, :-1]).log_softmax(-1)
    plain, smooth = [], []
    for row, length in enumerate([8, 4]):
        for t in range(length - 1):
            wanted = torch.full((V,), share / V, dtype=torch.float64)
            wanted[target[row, t + 1]] += 1 - share
            smooth.append(-(wanted * log_p[row, t]).sum().item())
            plain.append(-log_p[row, t, target[row, t + 1]].item())
    plain, smooth = sum(plain) / 10, sum(smooth) / 10
    assert abs(plain - smooth) > 0.01
    model.train()
    assert abs(ch1.loss(model, (source, target)).item() - smooth) < 1e-12
    model.eval()
    assert abs(ch1.loss(model, (source, target)).item() - plain) < 1e-12


def test_the_papers_recipe():
    recipe, D, w = ch1.PAPER, 512, 4000
    for s in (1, 2, 100, 3999, 4000, 4001, 20_000, 100_000):
        paper = D**-0.5 * min(s**-0.5, s * w**-1.5)
        assert math.isclose(ch1.learning_rate(s - 1, recipe), paper, rel_tol=1e-12)
    rates = [ch1.learning_rate(step, recipe) for step in range(5000)]
    assert rates.index(max(rates)) == 3999
    assert ch1.RECIPES["paper"] is recipe
    assert (recipe.dropout, recipe.label_smoothing, recipe.weight_decay) == (
        0.1,
        0.1,
        0,
    )
    group = ch1.make_optimizer(random_model(), recipe).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-9)


def test_the_cosine_falls_to_a_tenth():
    recipe = ch1.Recipe(steps=1000, warmup=100, lr=2e-3)
    rates = [ch1.learning_rate(step, recipe) for step in range(1001)]
    assert math.isclose(rates[0], 2e-5) and math.isclose(rates[49], 1e-3)
    assert rates[99] == rates[100] == 2e-3 == max(rates)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert math.isclose(rates[550], 2e-3 * 0.55)  # halfway
    assert math.isclose(rates[1000], 2e-4)


# --- learning -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `train` made of twenty pairs of the little language, seen often."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_pairs(folder / "pairs.tsv")
    asked = {"steps": 90, "warmup": 20, "batch-tokens": 800, "eval-every": 90}
    asked["device"] = "cpu"  # where every run gives the same bits
    flags = [f"--{name}={value}" for name, value in asked.items()]
    out = folder / "run"
    assert ch1.main(["train", "--data", str(data), "--out", str(out), *flags]) == 0
    return out


def test_twenty_pairs_are_learnt_exactly(trained):
    model = ch1.Transformer.from_pretrained(trained)
    tokenizer = ch1.load_tokenizer(trained)
    sources, targets = map(list, zip(*PAIRS, strict=True))
    assert ch1.translate(model, tokenizer, sources) == targets
    assert ch1.translate(model, tokenizer, sources, beams=4) == targets
    # Order, batches, capitals and a full stop too few change nothing.
    some = [sources[i].rstrip(".").upper() for i in (7, 3, 19)]
    found = ch1.translate(model, tokenizer, some, batch_size=2)
    assert found == [targets[i] for i in (7, 3, 19)]


def test_an_open_sentence_is_closed(trained):
    tokenizer, read = ch1.load_tokenizer(trained), []

    def note(sentence):
        read.append(sentence)
        return tokenizer.encode_source(sentence)

    model = ch1.Transformer.from_pretrained(trained)
    given = [
        "  The  boy\tsings ",
        "The boy sings.",
        "Who sings?",
        "Sing!",
        'He: "Sing."',
    ]
    ch1.translate(model, replace(tokenizer, encode_source=note), given)
    assert read == ["The boy sings.", *given[1:]]


def test_the_loss_falls_and_is_logged(trained):
    with open(trained / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 91))
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] > 3 > 0.1 > losses[-1]
    assert float(rows[-1]["held_out"]) > 1, "the unseen sentence cannot be known"
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert {name: row["pairs"] for name, row in results.items()} == {
        "held out, up to 12 words": 1
    }


def test_what_train_writes_is_a_marian_folder(hf, trained):
    sources, targets = map(list, zip(*PAIRS, strict=True))
    same_as_marian(hf, trained, [*sources, "The cow sees the old sister."], targets)
    rows = ch1.verify(trained)  # on sentences written by hand
    assert max(row["relative"] for row in rows) <= ch1.TOLERANCE[torch.float32]


def weights_in(out):
    return ch1.read_torch(out / "checkpoint.pt")["model"]


def test_interrupted_and_resumed_is_the_same_run(tmp_path, monkeypatch, capsys):
    data = str(write_pairs(tmp_path / "pairs.tsv"))
    flags = ["--batch-tokens", "200", "--dropout", "0.1", "--eval-every", "3"]

    def run(name, *more):
        return ch1.main(
            ["train", "--device", "cpu", "--out", str(tmp_path / name), *more]
        )

    assert run("straight", "--data", data, "--steps", "6", *flags) == 0
    assert run("stopped", "--data", data, "--steps", "4", *flags) == 0
    assert run("stopped", "--resume", "--steps", "6") == 0
    take_step = ch1.Training.take_step

    def interrupted(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return take_step(self)

    monkeypatch.setattr(ch1.Training, "take_step", interrupted)
    assert run("ctrl-c", "--data", data, "--steps", "6", *flags) == 130
    assert "--resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert ch1.read_torch(tmp_path / "ctrl-c" / "checkpoint.pt")["step"] == 2
    assert run("ctrl-c", "--resume") == 0
    straight = weights_in(tmp_path / "straight")
    for name in ("stopped", "ctrl-c"):
        for key, weight in weights_in(tmp_path / name).items():
            assert torch.equal(weight, straight[key]), f"{name}: {key}"
    refused(
        ["train", "--data", data, "--out", tmp_path / "stopped", "--steps", "1"],
        capsys,
        "--resume",
    )
    write_pairs(tmp_path / "pairs.tsv", [*PAIRS[1:], PAIRS[0], UNSEEN])
    again = ["train", "--out", tmp_path / "stopped", "--resume", "--steps", "9"]
    refused(again, capsys, "data")
    refused([*again, "--lr", "1"], capsys, "--lr")
    refused(["train", "--out", tmp_path / "none", "--resume"], capsys, "none")


# --- evaluation -----------------------------------------------------------------------


def test_evaluate_equals_sacrebleu(monkeypatch):
    import sacrebleu

    pairs = [*PAIRS[:3], ("Come.", "आओ।")]
    wanted = [target for _, target in pairs]
    found = [wanted[0], wanted[1].replace("किताब", "सेब"), wanted[2], "आओ"]
    given = []

    def fake(model, tokenizer, sentences, **options):
        given.append((list(sentences), options["beams"]))
        return found

    monkeypatch.setattr(ch1, "translate", fake)
    result = ch1.evaluate(None, None, pairs, beams=3)
    assert given == [([source for source, _ in pairs], 3)], "every pair is translated"
    assert result["pairs"] == 4 and result["exact"] == 0.5
    bleu = sacrebleu.corpus_bleu(found, [wanted], tokenize="intl").score
    assert result["bleu"] == bleu
    assert result["chrf"] == sacrebleu.corpus_chrf(found, [wanted]).score
    plain = sacrebleu.corpus_bleu(found, [wanted], tokenize="none").score
    assert plain != bleu, "the danda is a token of its own"
    monkeypatch.setattr(ch1, "translate", lambda *_, **__: wanted)
    result = ch1.evaluate(None, None, pairs)
    assert result["exact"] == 1
    assert math.isclose(result["bleu"], 100) and math.isclose(result["chrf"], 100)


def test_the_test_sets_are_whole_and_not_trained_on(corpus):
    known = {source.lower() for source, _ in corpus[0]}
    sets = ch1.evaluation_sets(CORPUS)
    names = ["held out, up to 12 words", "held out, longer"]
    assert list(sets) == [*names, "written by hand, outside the grammar"]
    held_out = ch1.read_pairs(CORPUS.with_name("english_hindi.test.tsv"))
    assert sorted(sets[names[0]] + sets[names[1]]) == sorted(held_out)
    for name, pairs in sets.items():
        lengths = [len(source.split()) for source, _ in pairs]
        assert (max(lengths) <= 12) == (name == names[0]) or "hand" in name
        assert not known.intersection(source.lower() for source, _ in pairs), name


def test_lines_end_at_line_ends_alone(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes("one\u2028two\tek\x85do\r\nb\tc\n\n".encode())
    assert ch1.read_pairs(path) == [("one\u2028two", "ek\x85do"), ("b", "c")]


def test_any_other_file_keeps_a_twentieth_back(tmp_path):
    pairs = [(f"a {i}", f"b {i}") for i in range(100)]
    path = write_pairs(tmp_path / "x.tsv", pairs)
    assert ch1.split_pairs(path) == (pairs[:95], pairs[95:])
    assert ch1.evaluation_sets(path) == {"held out, up to 12 words": pairs[95:]}
    write_pairs(tmp_path / "x.train.tsv", pairs)
    tests = [*PAIRS, ("A 7", "b 7")]
    write_pairs(tmp_path / "x.test.tsv", tests)
    assert ch1.split_pairs(tmp_path / "x.train.tsv") == (pairs, tests)
    # What training has, in any case of letters, is no test.
    sets = ch1.evaluation_sets(tmp_path / "x.train.tsv")
    assert sets == {"held out, up to 12 words": PAIRS}


# --- command line ---------------------------------------------------------------------


def test_translate_reads_arguments_and_pipes(trained, capsys, monkeypatch):
    sources, targets = map(list, zip(*PAIRS[:3], strict=True))
    capsys.readouterr()
    assert ch1.main(["translate", "--model", str(trained), *sources]) == 0
    assert capsys.readouterr().out.splitlines() == targets
    for text in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(sources) + "\n\n"))
        command = ["translate", "--model", str(trained), "--beams", "1", *text]
        assert ch1.main(command) == 0
        assert capsys.readouterr().out.splitlines() == targets


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are not for Windows")
def test_translate_prompts_at_a_terminal(trained):
    import pty

    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, CHAPTER.script, "translate", "--model", trained],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    os.write(controller, f"{PAIRS[6][0]}\n{PAIRS[0][0]}\n\n".encode())
    out, error = process.communicate(timeout=60)
    os.close(controller)
    os.close(terminal)
    assert process.returncode == 0 and not error, error
    lines = [line.removeprefix("> ") for line in out.splitlines()]
    assert lines[1:3] == [PAIRS[6][1], PAIRS[0][1]]


def test_evaluate_prints_a_table(trained, tmp_path, capsys):
    write_pairs(tmp_path / "x.train.tsv", [("Come.", "आओ।")])
    write_pairs(tmp_path / "x.test.tsv", [*PAIRS, UNSEEN])
    data = str(tmp_path / "x.train.tsv")
    capsys.readouterr()
    assert ch1.main(["evaluate", "--model", str(trained), "--data", data]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("held out, up to 12 words")
    assert line.split()[6:8] == ["21", "95.2%"]


def test_verify_passes_and_fails(hf, capsys, monkeypatch):
    assert ch1.main(["verify"]) == 0
    assert "Equal within 1e-05" in capsys.readouterr().out
    monkeypatch.setattr(ch1, "copy_to_reference", lambda ours, theirs: None)
    assert ch1.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "NOT equal" in out and out.count("above the tolerance") == len(STAGES)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no file"]),
        (b"", ["holds no text"]),
        (b" \n \n", ["holds no text"]),
        (b"a\tb\nonly one column\nc\td\n", ["line 2", "two tab-separated", "only one"]),
        (b"a\tb\nc\td\te\n", ["line 2"]),
        (b"a\tb\n\td\n", ["line 2"]),
        ("café\tb\n".encode("latin-1"), ["not UTF-8"]),
        (b"a\tb\n", ["two or more pairs"]),
    ],
    ids=str,
)
def test_bad_data_is_refused(tmp_path, capsys, content, parts):
    data, out = tmp_path / "data.tsv", tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    refused(["train", "--data", data, "--out", out], capsys, data, *parts)
    assert not out.exists()


def test_bad_models_are_refused(trained, tmp_path, capsys):
    def broken(name, change):
        folder = tmp_path / name.replace(".", "-")
        shutil.copytree(trained, folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(change(content))
        refused(["translate", "--model", folder, "a."], capsys, folder, name)

    broken("model.safetensors", lambda content: content[: len(content) // 2])
    broken("config.json", lambda content: content[:-20])
    broken("source.spm", lambda content: content[:100])
    broken("vocab.json", lambda content: b"{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(["translate", "--model", empty, "a."], capsys, empty, "config.json")
    shutil.copy(trained / "config.json", empty)
    refused(["translate", "--model", empty, "a."], capsys, "model.safetensors")
    absent = tmp_path / "absent"
    refused(["translate", "--model", absent, "a."], capsys, absent)
    refused(["evaluate", "--model", absent], capsys, absent)
    refused(["verify", "--model", absent], capsys, absent)


def test_bad_sentences_are_refused(trained, capsys):
    command = ["translate", "--model", trained]
    refused([*command, " "], capsys, "empty sentence")
    refused([*command, "cow " * 300], capsys, "256")
    refused([*command, "--beams", "0", "a."], capsys, "beams 0")
    refused([*command, "--device", "nowhere", "a."], capsys, "nowhere")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--preset", "HUGE"], "HUGE"),
        (["--recipe", "NONE"], "NONE"),
        (["--steps", "many"], "many"),
        (["--steps", "0"], "steps is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--dropout", "1"], "dropout 1"),
        (["--schedule", "linear"], "linear"),
        (["--batch-tokens", "0"], "batch_tokens is 0"),
        (["--device", "nowhere"], "nowhere"),
        (["--init", "no/such/folder"], "no/such/folder"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(tmp_path, capsys, flags, part):
    data, out = write_pairs(tmp_path / "data.tsv"), tmp_path / "out"
    command = ["train", "--data", str(data), "--out", str(out), *flags]
    try:
        code = ch1.main(command)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and part in error and error.count("\n") == 1, error
    assert not out.exists()
