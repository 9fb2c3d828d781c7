# SPDX-License-Identifier: MIT
"""The study of low rank truncates as well as can be done, and its record is whole."""

import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
import results
import torch
from chapters import ROOT
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import low_rank  # noqa: E402
from low_rank import module  # noqa: E402

CONFIG = replace(
    module.TINY, vocab_size=31, dim=20, n_layers=3, n_heads=6, head_dim=6, ffn_dim=14
)
ROWS = CONFIG.n_kv_heads * CONFIG.head_dim  # of W_K, and of W_V: G·K = 12


@pytest.fixture(scope="module", autouse=True)
def hashed_once():
    """The sources stay as they are while the tests run, so each is hashed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "digest", lru_cache(results.digest))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick run, its record in it."""
    out = tmp_path_factory.mktemp("quick")
    assert low_rank.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done, tmp_path / "out")


@pytest.fixture
def model():
    model = module.Transformer(CONFIG)
    module.randomise(model)
    return model.double().eval()


@pytest.fixture
def matrices():
    """W_K and W_V, keys the larger, and the moment S of a stream that is not white."""
    torch.manual_seed(3)
    wk = 3 * torch.randn(7, 11, dtype=torch.float64)
    wv = torch.randn(7, 11, dtype=torch.float64)
    x = torch.randn(40, 11, dtype=torch.float64) * torch.logspace(1, -1, 11) + 0.5
    return wk, wv, x.mT @ x / 40


def data(path):
    return results.read(path)["data"]


def weights(model):
    return [
        [w.weight.detach() for w in (b.attention.wk, b.attention.wv)]
        for b in model.blocks
    ]


def error(weight, new, second):
    """E‖W x - M x‖², by its definition."""
    gap = weight - new
    return torch.trace(gap @ second @ gap.mT).item()


# ---------------------------------------------------------------------------
# the nearest matrix of a rank
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_without_a_moment_it_is_the_plain_svd(matrices, rank):
    weight = matrices[0]
    u, s, vt = torch.linalg.svd(weight)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    torch.testing.assert_close(low_rank.nearest(weight, rank), plain)
    torch.testing.assert_close(low_rank.directions(weight)[1], s)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_its_error_is_the_least_by_eckart_and_young(matrices, rank):
    weight, _, second = matrices
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.sqrt() @ vectors.mT
    discarded = torch.linalg.svdvals(weight @ root)[rank:].square().sum().item()
    near = low_rank.nearest(weight, rank, second)
    assert error(weight, near, second) == pytest.approx(discarded, rel=1e-9)
    assert torch.linalg.matrix_rank(near) == rank
    assert error(weight, low_rank.nearest(weight, rank), second) > 1.05 * discarded
    torch.testing.assert_close(
        low_rank.directions(weight, second)[1], torch.linalg.svdvals(weight @ root)
    )


@pytest.mark.parametrize("rank", [2, 5])
def test_no_descent_ends_below_it(matrices, rank):
    """Alternating least squares from anywhere goes down to the closed form's error."""
    weight, _, second = matrices
    least = error(weight, low_rank.nearest(weight, rank, second), second)
    for seed in range(4):
        torch.manual_seed(seed)
        up = torch.randn(7, rank, dtype=torch.float64)
        for _ in range(3000):
            down = torch.linalg.pinv(up) @ weight  # best for this up
            inner = down @ second @ down.mT
            up = weight @ second @ down.mT @ torch.linalg.inv(inner)
            assert error(weight, up @ down, second) >= least * (1 - 1e-9)
        assert error(weight, up @ down, second) == pytest.approx(least, rel=1e-6)


def test_a_moment_of_few_tokens_loses_nothing_of_them(matrices):
    weight = matrices[0]
    x = torch.randn(3, 11, dtype=torch.float64)  # S has rank 3
    near = low_rank.nearest(weight, 3, x.mT @ x)
    torch.testing.assert_close(x @ near.mT, x @ weight.mT)


def test_the_factors_are_an_mlas(matrices):
    wk, wv, second = matrices
    both = torch.cat([wk, wv])
    down, up = low_rank.factors(both, 5, second)
    assert (down.shape, up.shape) == ((5, 11), (14, 5))
    new = low_rank.truncate(wk, wv, "joint", 5, second)
    assert new[2] is None
    torch.testing.assert_close(torch.cat(new[:2]), up @ down)
    torch.testing.assert_close(up.mT @ up, torch.eye(5, dtype=torch.float64))


def errors(wk, wv, new, second):
    return error(wk, new[0], second) + error(wv, new[1], second)


@pytest.mark.parametrize("latent", [2, 4, 6])
def test_jointly_is_nearer_than_apart_and_the_split_is_the_best(matrices, latent):
    wk, wv, second = matrices
    found = {
        how: errors(wk, wv, low_rank.truncate(wk, wv, how, latent, second), second)
        for how in ("joint", "balanced", "halves", "split")
    }
    every = [
        error(wk, low_rank.nearest(wk, keys, second), second)
        + error(wv, low_rank.nearest(wv, latent - keys, second), second)
        for keys in range(max(0, latent - 7), min(7, latent) + 1)
    ]
    assert found["split"] == pytest.approx(min(every), rel=1e-9)
    assert found["joint"] < found["split"] < found["halves"]
    assert found["joint"] < found["balanced"]
    energy = [error(w, 0 * w, second) for w in (wk, wv)]
    relative = [
        error(wk, low_rank.nearest(wk, keys, second), second) / energy[0]
        + error(wv, low_rank.nearest(wv, latent - keys, second), second) / energy[1]
        for keys in range(max(0, latent - 7), min(7, latent) + 1)
    ]
    own = low_rank.truncate(wk, wv, "relative", latent, second)[2]
    assert own == relative.index(min(relative)) + max(0, latent - 7)
    assert own < low_rank.truncate(wk, wv, "split", latent, second)[2]
    halves = low_rank.truncate(wk, wv, "halves", latent, second)
    ranks = [torch.linalg.matrix_rank(w).item() for w in halves[:2]]
    assert ranks == [latent // 2, latent // 2] and halves[2] == latent // 2


@pytest.mark.parametrize("by", ["weights", "text"])
def test_balanced_does_not_see_how_large_the_values_are(matrices, by):
    wk, wv, second = matrices
    second = None if by == "weights" else second
    k, v, _ = low_rank.truncate(wk, wv, "balanced", 5, second)
    for size in (0.01, 100):
        again = low_rank.truncate(wk, size * wv, "balanced", 5, second)
        torch.testing.assert_close(again[0], k)
        torch.testing.assert_close(again[1], size * v)


@pytest.mark.parametrize("how", sorted({how for how, _ in low_rank.WAYS}))
def test_the_whole_rank_loses_nothing(matrices, how):
    wk, wv, second = matrices
    k, v, _ = low_rank.truncate(wk, wv, how, 14, second)
    torch.testing.assert_close(k, wk)
    torch.testing.assert_close(v, wv)
    assert low_rank.kept(wk, k, second) == pytest.approx(1)


def test_what_is_kept_is_a_share_of_the_outputs(matrices):
    weight, _, second = matrices
    square = low_rank.directions(weight, second)[1].square()
    for rank in (1, 5):
        near = low_rank.nearest(weight, rank, second)
        share = (square[:rank].sum() / square.sum()).item()
        assert low_rank.kept(weight, near, second) == pytest.approx(share)


def test_the_least_directions_are_the_weights_own():
    """What a weight makes least of may be what the stream has most of."""
    weight = torch.diag(torch.arange(24.0, 0, -1).double())
    x = torch.ones(24, dtype=torch.float64)
    x[-1] = 100  # of what W makes 1·100, the most of all
    x[-2] = 0
    moments = low_rank.Moments(torch.diag(x.square()), 0 * x, weight)
    squares = weight.diagonal().square()
    total = squares.sum().item()
    assert low_rank.least_share(weight, None) == pytest.approx(5 / total)
    share = 1e4 / (squares * x.square()).sum().item()
    assert low_rank.least_share(weight, moments) == pytest.approx(share)
    assert share > 0.6


def test_ranks_and_curves():
    values = torch.tensor([3.0, 1.0, 0.5, 0.1])  # squares 9, 1, 0.25, 0.01
    assert [low_rank.rank_of(values, s) for s in (0.5, 0.87, 0.9, 0.97, 1)] == [
        *(1, 1, 2, 2, 4)
    ]
    found = low_rank.spectrum([values, 2 * values, torch.ones(4)], shown=[1])
    assert found["ranks"]["90%"] == [2, 2, 2, 3, 4]
    assert found["ranks"]["99%"] == [3, 3, 3, 3.5, 4]
    assert found["layers"] == {"1": [1.0, 0.3333, 0.1667, 0.03333]}
    assert found["curve"]["rank"] == [1, 2, 3, 4]
    assert found["curve"]["median"] == found["layers"]["1"]
    assert found["curve"]["upper"][1] == pytest.approx(2 / 3, rel=1e-3)
    long = low_rank.spectrum([torch.arange(384.0, 0, -1)], shown=[])
    assert long["curve"]["rank"][:3] == [1, 8, 16]
    assert long["curve"]["rank"][-1] == 384 and len(long["curve"]["median"]) == 49


# ---------------------------------------------------------------------------
# in the model
# ---------------------------------------------------------------------------


class LatentAttention(nn.Module):
    """Attention that keeps C numbers a token and makes its keys and values of them."""

    def __init__(self, old, down, up):
        super().__init__()
        self.old, self.down = old, down
        self.w_uk, self.w_uv = up[:ROWS], up[ROWS:]

    def forward(self, x, rope, seen=None, cache=None):
        old, c = self.old, x @ self.down.mT
        q = old.wq(x).unflatten(2, (old.H, -1)).transpose(1, 2)
        k, v = (
            (c @ up.mT).unflatten(2, (old.G, -1)).transpose(1, 2)
            for up in (self.w_uk, self.w_uv)
        )
        q, k = module.apply_rope(q, rope), module.apply_rope(k, rope)
        k, v = (x.repeat_interleave(old.H // old.G, dim=1) for x in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
        return old.wo(out.transpose(1, 2).flatten(2))


def test_the_truncated_model_is_one_that_keeps_a_latent(model):
    tokens = torch.randint(31, (2, 30))
    moments = low_rank.measure_moments(model, torch.randint(31, (9, 30)))
    pairs = weights(model)
    made = [
        low_rank.factors(torch.cat(pair), 9, m.second)
        for pair, m in zip(pairs, moments, strict=True)
    ]
    new = [
        low_rank.truncate(*pair, "joint", 9, m.second)[:2]
        for pair, m in zip(pairs, moments, strict=True)
    ]
    whole = model(tokens)
    with low_rank.replaced(model, new):
        truncated = model(tokens)
    for block, (down, up) in zip(model.blocks, made, strict=True):
        block.attention = LatentAttention(block.attention, down, up)
    torch.testing.assert_close(truncated, model(tokens), rtol=1e-8, atol=1e-8)
    assert (truncated - whole).abs().max() > 0.1


def test_the_model_is_itself_again_afterwards(model):
    tokens = torch.randint(31, (1, 12))
    before = model(tokens)
    zeros = [[torch.zeros_like(w) for w in pair] for pair in weights(model)]
    with pytest.raises(KeyError), low_rank.replaced(model, zeros):
        assert all((w == 0).all() for pair in weights(model) for w in pair)
        raise KeyError
    assert torch.equal(model(tokens), before)


def test_the_moments_are_of_what_the_projections_read(model):
    rows = torch.randint(31, (5, 17))
    found = low_rank.measure_moments(model, rows)
    assert len(found) == 3
    first = model.blocks[0]
    x = first.attention_norm(model.embed(rows)).flatten(0, 1)  # (N, D)
    torch.testing.assert_close(found[0].second, x.mT @ x / 85)
    torch.testing.assert_close(found[0].mean, x.mean(dim=0))
    cache = model.new_cache(5, 17)
    model(rows, cache=cache)
    for i, (layer, moments) in enumerate(zip(cache.layers, found, strict=True)):
        k = layer.k.transpose(1, 2).flatten(0, 1).flatten(1)  # (N, G·K)
        torch.testing.assert_close(moments.turned, k.mT @ k / 85)
        v = layer.v.transpose(1, 2).flatten(0, 1).flatten(1)
        wv = model.blocks[i].attention.wv.weight
        torch.testing.assert_close(wv @ moments.second @ wv.mT, v.mT @ v / 85)
    share = low_rank.mean_share(first.attention.wv.weight, found[0])
    v = x @ first.attention.wv.weight.mT
    assert share == pytest.approx(
        (v.mean(dim=0).square().sum() / v.square().sum(dim=1).mean()).item()
    )


def test_the_loss_is_the_chapters(model):
    rows = torch.randint(31, (3, 25))
    ours = [low_rank.window_loss(model, row) for row in rows]
    assert sum(ours) / 3 == pytest.approx(module.loss(model, rows).item(), rel=1e-6)


def test_a_comparison_is_of_the_same_windows(tmp_path):
    study = low_rank.Study(low_rank.quick(), tmp_path, "version")
    same = study.compare("same", lambda pair, layer: (*pair, 10 + layer))
    assert same["difference"] == same["error"] == 0
    assert same["kept_keys"] == same["kept_values"] == 1
    assert same["keys"] == [10, 10.25, 10.5, 10.75, 11]
    zero = study.compare("zero", lambda pair, layer: (0 * pair[0], 0 * pair[1], None))
    assert zero["keys"] is None
    assert zero["kept_keys"] == zero["kept_values"] == 0
    with low_rank.replaced(study.model, [[0 * w for w in p] for p in study.weights]):
        losses = [low_rank.window_loss(study.model, r) for r in study.texts.held_out]
    gaps = torch.tensor(losses) - torch.tensor(study.whole)
    assert zero["difference"] == pytest.approx(gaps.mean().item(), abs=1e-6)
    assert zero["error"] == pytest.approx(gaps.std().item() / 3**0.5, rel=1e-3)


# ---------------------------------------------------------------------------
# rounding
# ---------------------------------------------------------------------------


def rounded(weight):
    """A weight as Q4_1 keeps it: equal steps between the ends of each block of 32."""
    blocks = weight.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    return (low + step * ((blocks - low) / step).round()).flatten(1)


def test_the_drawn_noise_is_like_that_of_rounding():
    torch.manual_seed(0)
    weight = torch.randn(96, 192, dtype=torch.float64) * torch.logspace(0, -1, 192)
    stored = rounded(weight)
    real = stored - weight
    drawn = low_rank.rounding_noise(stored, torch.Generator().manual_seed(1))
    assert drawn.norm().item() == pytest.approx(real.norm().item(), rel=0.03)
    ours, theirs = (torch.linalg.svdvals(noise) for noise in (drawn, real))
    torch.testing.assert_close(ours, theirs, rtol=0.12, atol=0)
    assert low_rank.levels(stored) == 16 and low_rank.levels(weight) == 32


def test_the_noise_is_counted_in_the_outputs_directions(tmp_path):
    """Noise that is the weights themselves makes up all of every band."""
    study = low_rank.Study(low_rank.quick(), tmp_path, "version")
    bands = low_rank.noise_bands(study, study.weights)
    assert [(b["from"], b["to"]) for b in bands] == [(1, 16), (17, 32), (33, 48)]
    assert all(b["share"] == [1] * 5 for b in bands)
    half = [[0.5 * w for w in pair] for pair in study.weights]
    assert low_rank.noise_bands(study, half)[2]["share"] == [0.25] * 5
    ones, twos = torch.ones(5), torch.tensor([2.0, 2, 2, 5, 10])
    assert low_rank.band_shares(ones, twos, [0, 3, 5]) == pytest.approx([1 / 2, 2 / 15])


# ---------------------------------------------------------------------------
# the texts
# ---------------------------------------------------------------------------


def test_no_paragraph_is_in_both_halves():
    text = "a b\n\nc\n\na  b\n\nd\n\nc\n\n e"
    assert low_rank.paragraphs(text) == ["a b", "c", "d", " e"]
    assert low_rank.halves(text) == ("a b\n\nc", "d\n\n e")
    first, second = (
        {" ".join(p.split()) for p in half.split("\n\n")}
        for half in low_rank.halves(module.real_text())
    )
    assert len(first) > 500 and len(second) > 500 and not first & second


def test_windows_are_spread_and_do_not_overlap():
    rows = low_rank.windows(list(range(103)), 4, 20)
    assert rows[:, 0].tolist() == [0, 27, 54, 81] and rows[-1, -1] == 100
    assert (rows.diff(dim=1) == 1).all()
    assert low_rank.windows(list(range(80)), 4, 20).unique().numel() == 80
    assert low_rank.windows(list(range(9)), 1, 5).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="79 tokens; 80 are needed"):
        low_rank.windows(list(range(79)), 4, 20)


def test_overlap_counts_runs_of_words():
    assert low_rank.overlap("a b c d", "x b  c\nd y", n=2) == pytest.approx(2 / 3)
    assert low_rank.overlap("a b c", "c b a", n=2) == 0


# ---------------------------------------------------------------------------
# a quick run
# ---------------------------------------------------------------------------


def keys(found):
    """The keys of a record at every depth, lists of rows by their first row."""
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = found[0]
    if not isinstance(found, dict):
        return None
    return {key: keys(value) for key, value in found.items() if key != "layers"}


def test_a_quick_run_writes_the_record_and_the_figure(done):
    found = data(done / "quick.json")
    assert list(found) == list(low_rank.PARTS)
    assert results.read(done / "quick.json")["files"] == {
        "quick.png": results.file_digest(done / "quick.png")
    }
    assert found["model"]["cache_numbers"] == 2 * 2 * 12
    at = [(r["how"], r["by"], r["C"]) for r in found["truncated"]]
    expected = [(*way, C) for way in low_rank.WAYS for C in (48, 32, 16)]
    others = [way for way in low_rank.WAYS if way != ("joint", "text")]
    assert at == [row for row in expected if row not in [(*w, 48) for w in others]]
    whole = next(r for r in found["truncated"] if r["C"] == 48)
    assert whole["of_cache"] == 1 and abs(whole["difference"]) < 1e-5
    assert [(r["what"], r["by"], r["rank"]) for r in found["alone"]] == [
        (what, by, rank)
        for what in ("keys", "values")
        for by in ("weights", "text")
        for rank in (12, 6)
    ]
    for row in found["alone"]:
        left = "kept_values" if row["what"] == "keys" else "kept_keys"
        assert row[left] == pytest.approx(1) and row[f"kept_{row['what']}"] < 0.999


def test_a_second_run_measures_no_perplexity_again(out, monkeypatch):
    def loss(*_):
        raise AssertionError("this was measured already")

    monkeypatch.setattr(low_rank, "window_loss", loss)
    before = data(out / "quick.json")
    assert low_rank.main(["--quick", "--out", str(out)]) == 0
    assert data(out / "quick.json") == before


def test_a_stopped_run_goes_on(tmp_path, done, monkeypatch, capsys):
    compare, count = low_rank.Study.compare, []

    def stop(self, name, new):
        count.append(name)
        if len(count) == 5:
            raise KeyboardInterrupt
        return compare(self, name, new)

    monkeypatch.setattr(low_rank.Study, "compare", stop)
    assert low_rank.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "quick.json").exists()
    assert len(list(tmp_path.glob("*/*.json"))) == 5  # four, and the whole model
    assert low_rank.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "full:" not in capsys.readouterr().out
    assert data(tmp_path / "quick.json") == data(done / "quick.json")


def test_perplexities_of_another_version_are_not_taken(monkeypatch):
    sources = {source: "0" for source in low_rank.SOURCES}
    sizes = low_rank.quick()
    same = low_rank.version(sizes, sources)
    assert same == low_rank.version(replace(sizes, latents=(4,), shown=()), sources)
    others = [
        low_rank.version(replace(sizes, length=41), sources),
        low_rank.version(sizes, sources | {"data/stories.txt": "1"}),
        low_rank.version(sizes, sources | {"ch04_llama3/llama3.py::model": "1"}),
    ]
    monkeypatch.setattr(module, "real_text", lambda: "another Python's help")
    others.append(low_rank.version(sizes, sources))
    assert same not in others


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


def test_nothing_is_recorded_when_a_source_changes_meanwhile(out, monkeypatch, capsys):
    path, digest = out / "quick.json", results.digest
    before = path.read_bytes(), (out / "quick.png").read_bytes()

    def alone(study):
        monkeypatch.setattr(results, "digest", changed)
        return []

    def changed(source, root=ROOT):
        return "0" * 64 if source == "data/stories.txt" else digest(source, root)

    monkeypatch.setitem(low_rank.PARTS, "alone", alone)
    assert low_rank.main(["--quick", "--out", str(out)]) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert (path.read_bytes(), (out / "quick.png").read_bytes()) == before


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(low_rank, "FOLDER", tmp_path / "smollm2")
    for flags, said in (
        (["--quick", "--out", str(tmp_path / "file")], "--out names a folder"),
        (["--quick", "--record", str(tmp_path / "folder")], "--record names a file"),
        (["--out", str(tmp_path)], "python data/download.py smollm2"),
    ):
        assert low_rank.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("low_rank.py: ") and error.count("\n") == 1
        assert said in error
    with pytest.raises(SystemExit) as stop:
        low_rank.main(["--only", "spectra"])
    assert stop.value.code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    not low_rank.FOLDER.is_dir(),
    reason="no data/smollm2: python data/download.py smollm2",
)


@pytest.fixture(scope="module")
def recorded():
    return data(low_rank.RECORD)


def rows_of(recorded, how, by):
    found = [r for r in recorded["truncated"] if (r["how"], r["by"]) == (how, by)]
    return {row["C"]: row for row in found}


def test_the_record_has_what_a_quick_run_has(recorded, done):
    quick = json.loads(json.dumps(data(done / "quick.json")))
    assert keys(quick) == keys(recorded)


def test_what_the_record_is_of(recorded):
    sizes, found = low_rank.full(), recorded["model"]
    assert found["cache_numbers"] == 384 == 2 * 3 * 64
    assert "dequantised from 4 bits" in found["weights"] and found["levels"] == 16
    text = recorded["text"]
    assert text["held_out_tokens"] == sizes.held_out * sizes.length >= 2000
    assert text["calibration_tokens"] == text["stories_tokens"] == 32 * 256
    assert text["overlap"] < 0.01 < text["repeated"] / text["characters"]
    ways = {(r["how"], r["by"]) for r in recorded["truncated"]}
    assert ways == set(low_rank.WAYS)
    for way in ways:
        expected = set(sizes.latents) - (set() if way == ("joint", "text") else {384})
        assert rows_of(recorded, *way).keys() == expected
    assert len(recorded["alone"]) == 4 * len(sizes.ranks)


def test_the_recorded_numbers_agree_with_each_other(recorded):
    whole = recorded["model"]
    for row in [whole, *recorded["truncated"], *recorded["alone"]]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    for row in [*recorded["truncated"], *recorded["alone"]]:
        assert row["difference"] == pytest.approx(row["loss"] - whole["loss"])
    for row in recorded["truncated"]:
        assert row["of_cache"] == row["C"] / 384
        assert (row["keys"] is None) == (row["how"] in ("joint", "balanced"))
        if row["how"] == "halves":
            assert set(row["keys"]) == {row["C"] / 2}
    for by in ("weights", "text", "stories"):
        kept = [row["kept_keys"] for row in rows_of(recorded, "joint", by).values()]
        assert kept == sorted(kept, reverse=True)
    for part in ("weights", "outputs", "centred"):
        for name, found in recorded["spectra"][part].items():
            ranks = [found["ranks"][share] for share in ("90%", "95%", "99%")]
            assert ranks == sorted(ranks)
            rows = 384 if name == "joint" else 192
            assert all(len(curve) == rows for curve in found["layers"].values())
            assert (part == "centred") == (not found["layers"])
            for curve in [*found["layers"].values(), found["curve"]["median"]]:
                assert curve[0] == 1 and curve == sorted(curve, reverse=True)


def test_what_the_study_found(recorded):
    """The statements that the text makes of it."""
    whole = recorded["model"]["perplexity"]
    joint, balanced, halves, split, relative = (
        rows_of(recorded, how, "text")
        for how in ("joint", "balanced", "halves", "split", "relative")
    )
    plain, stories = (rows_of(recorded, "joint", by) for by in ("weights", "stories"))
    assert abs(joint[384]["difference"]) < 1e-4
    for C in low_rank.full().latents[1:]:
        apart = [rows[C]["loss"] for rows in (halves, split, relative)]
        assert max(joint[C]["loss"], balanced[C]["loss"]) < min(apart)
        assert joint[C]["loss"] < stories[C]["loss"] < plain[C]["loss"]
    assert balanced[256]["perplexity"] < 1.02 * whole
    assert joint[192]["perplexity"] > 1.1 * whole


def test_the_last_directions_are_mostly_rounding(recorded):
    bands = recorded["noise"]["bands"]
    shares = [band["share"][2] for band in bands]
    assert shares == sorted(shares) and shares[0] < 0.01 and shares[-1] > 0.8
    assert bands[-1]["to"] == 384


def test_the_plain_svd_drops_what_the_stream_is_large_in(recorded):
    alone = {(r["what"], r["by"], r["rank"]): r for r in recorded["alone"]}
    plain, best = (alone["values", by, 160] for by in ("weights", "text"))
    assert plain["perplexity"] > 1000 and best["difference"] < 0.2
    spectra = recorded["spectra"]
    outputs, of_weights = spectra["least"], spectra["least_of_weights"]
    assert outputs["values"][2] > 2 * of_weights["values"][2]
    assert outputs["keys"][2] < of_weights["keys"][2]
    turned, keys = (spectra["outputs"][n]["ranks"] for n in ("turned_keys", "keys"))
    assert all(turned[share][2] > keys[share][2] for share in keys)


def test_the_record_is_of_the_weights_that_are_here(recorded):
    sums = low_rank.FOLDER / "SHA256SUMS"
    if not sums.exists():
        pytest.skip("no data/smollm2: python data/download.py smollm2")
    line = f"{recorded['model']['sha256']}  model.safetensors"
    assert line in sums.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def smollm2():
    return module.Transformer.from_pretrained(low_rank.FOLDER)


@pytest.mark.smollm2
@needs_smollm2
def test_the_recorded_spectra_are_of_smollm2(recorded, smollm2):
    assert asdict(smollm2.config) == recorded["model"]["config"] | {
        "eos_id": smollm2.config.eos_id
    }
    for name, pick in low_rank.KINDS.items():
        found = recorded["spectra"]["weights"][name]
        curves = [
            torch.linalg.svdvals(pick([w.double() for w in pair]))
            for pair in weights(smollm2)
        ]
        for layer, curve in found["layers"].items():
            ours = curves[int(layer)] / curves[int(layer)][0]
            theirs = torch.tensor(curve, dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
        for share in low_rank.SHARES:
            ranks = [low_rank.rank_of(values, share) for values in curves]
            expected = found["ranks"][f"{share:.0%}"]
            assert low_rank.quartiles(ranks) == expected


@pytest.mark.smollm2
@needs_smollm2
def test_a_recorded_perplexity_can_be_measured_again(recorded, smollm2):
    """The plain SVD of rank 320, whose truncation needs no text, in one window."""
    text = module.real_text()
    if hashlib.sha256(text.encode()).hexdigest() != recorded["text"]["sha256"]:
        pytest.skip(f"the record is of {recorded['text']['of']}")
    sizes = low_rank.full()
    tokenizer = module.load_tokenizer(low_rank.FOLDER)
    rows = low_rank.windows(
        tokenizer.encode(low_rank.halves(text)[1]), sizes.held_out, sizes.length
    )
    new = [
        low_rank.truncate(*(w.double() for w in pair), "joint", 320)[:2]
        for pair in weights(smollm2)
    ]
    with low_rank.replaced(smollm2, new):
        losses = [low_rank.window_loss(smollm2, row) for row in rows]
    row = rows_of(recorded, "joint", "weights")[320]
    assert sum(losses) / len(losses) == pytest.approx(row["loss"], abs=1e-3)
