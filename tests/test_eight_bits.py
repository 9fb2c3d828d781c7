# SPDX-License-Identifier: MIT
"""The study of eight bits measures what it says it does, and its record is whole."""

import json
import math
import shutil
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import results
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import eight_bits as study  # noqa: E402
import low_rank  # noqa: E402
from eight_bits import FORMATS, TRAININGS, llama, module  # noqa: E402

SMALL = replace(
    llama.TINY, vocab_size=31, dim=20, n_layers=2, n_heads=4, head_dim=6, ffn_dim=14
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick run, its record and figures in it."""
    folder = tmp_path_factory.mktemp("quick")
    assert study.main(["--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """A copy of that folder, and the flags that name it."""
    folder = shutil.copytree(done, tmp_path / "quick")
    return folder, ["--quick", "--out", str(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A quick study of which nothing was trained."""
    return study.Runs(study.quick(), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def model():
    model = llama.Transformer(SMALL)
    llama.randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def recorded():
    return results.read(study.RECORD)["data"]


def data(path):
    return results.read(path)["data"]


# ---------------------------------------------------------------------------
# codes, by hand
# ---------------------------------------------------------------------------


def e4m3(value):
    """A number rounded to one sign, four bits of exponent and three of mantissa."""
    if value == 0:
        return 0.0
    exponent = max(math.frexp(abs(value))[1] - 1, -6)  # below 2^-6, subnormal
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448), value)


def areas(form, shape, tile):
    """The rows and columns that share a scale: a pair of ranges for each scale."""
    (M, K), kind = shape, form.removesuffix("_2")
    m, k = {"tensor": (M, K), "row": (1, K), "block": tile}[kind]
    return [
        (range(i, min(i + m, M)), range(j, min(j + k, K)))
        for i in range(0, M, m)
        for j in range(0, K, k)
    ]


def by_hand(x, form, tile):
    """What the codes of `x` stand for."""
    rows, out = x.tolist(), torch.zeros_like(x)
    for across, along in areas(form, x.shape, tile):
        largest = max(abs(rows[i][j]) for i in across for j in along)
        scale = largest / 448 or 1.0
        if form.endswith("_2"):
            scale = 2.0 ** math.ceil(math.log2(scale))
        for i in across:
            for j in along:
                out[i, j] = e4m3(rows[i][j] / scale) * scale
    return out


def wild(M, K, seed=0):
    """Numbers over many powers of two, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x, size = (torch.randn(M, K, generator=generator) for _ in range(2))
    x = x * torch.exp2(3 * size)
    x[0, 3] = 0
    return x


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_by_hand(form, tile):
    x = wild(131, 150)
    q = study.coded(x, form, tile)
    found, expected = module.dequantize(q), by_hand(x, form, tile)
    # A scale is rounded to float32, so a number midway may go to its other side.
    wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=0)
    assert wrong.sum() <= 2
    assert torch.allclose(found, expected, rtol=0.13, atol=1e-4)
    if form.endswith("_2"):
        assert torch.equal(found, expected)


def test_a_tensor_by_hand():
    x = torch.tensor([[4.0, -2.0, 1.0], [0.3, 0.01, 0.00001]])
    q = study.coded(x, "tensor", module.TILE)
    # 0.3 / 4 · 448 = 33.6 lies between 32 and 36, 1.12 between 1.125 and 1.
    assert q.codes.float().tolist() == [[448, -224, 112], [32, 1.125, 0.001953125]]
    assert q.scale.tolist() == [pytest.approx([4 / 448])]
    assert q.block == (2, 128)
    assert study.lost(q, x) == 0
    y = torch.tensor([[4.0, 0.0, 1e-6], [1.0, 1e-6, 1e-6]])
    assert study.lost(study.coded(y, "tensor", module.TILE), y) == 3 / 5
    assert study.lost(study.coded(y, "row", module.TILE), y) == 3 / 5


def test_how_many_scales_there_are():
    x = wild(131, 300)
    shapes = {
        form: [tuple(study.coded(x, form, tile).scale.shape) for tile in BLOCKS]
        for form in FORMATS
    }
    for form, pair in shapes.items():
        kind = form.removesuffix("_2")
        assert (
            pair
            == {
                "tensor": [(1, 3), (1, 3)],
                "row": [(131, 3), (131, 3)],
                "block": [(131, 3), (2, 3)],
            }[kind]
        )
        distinct = study.coded(x, form, module.SQUARE).scale.unique().numel()
        if kind == "tensor":
            assert distinct == 1
    rows = study.coded(x, "row", module.TILE).scale
    assert torch.equal(rows[:, 0], rows[:, 2]) and rows.unique().numel() > 100


BLOCKS = (module.TILE, module.SQUARE)


def test_powers_of_two_make_all_formats_one_while_nothing_is_small():
    """Only the exponent moves, so the three bits of the mantissa are the same ones."""
    x = torch.randn(40, 300)
    x = x.sign() * (0.5 + x.abs())
    tensor, row, block = (
        module.dequantize(study.coded(x, f"{kind}_2", module.TILE))
        for kind in ("tensor", "row", "block")
    )
    assert torch.equal(tensor, row) and torch.equal(row, block)
    x[0, 0] = 1e6  # next to which the rest of the tensor has no exponent left
    tensor, row, block = (
        study.relative_error(
            module.dequantize(study.coded(x, f"{kind}_2", module.TILE))[1:], x[1:]
        )
        for kind in ("tensor", "row", "block")
    )
    assert tensor > 10 * row and row == block


# ---------------------------------------------------------------------------
# layers and models
# ---------------------------------------------------------------------------


def chapters_layer(weight, power_of_two=False):
    """The chapter's own layer with that weight."""
    config = replace(module.TINY, fp8=True, fp8_power_of_two=power_of_two)
    layer = module.FP8Linear(config, weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight})
    return layer


@pytest.mark.parametrize("form", ["block", "block_2"])
def test_a_swapped_layer_is_the_chapters(form):
    weight, x = torch.randn(150, 300), wild(14, 300).view(2, 7, 300)
    ours = study.CodedLinear(weight, form)(x)
    assert torch.equal(ours, chapters_layer(weight, form == "block_2")(x))
    assert ours.shape == (2, 7, 150)
    other = chapters_layer(weight, form != "block_2")(x)
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_multiplies_what_its_codes_stand_for(form):
    weight, x = wild(140, 260, seed=1), wild(9, 260, seed=2)
    found = study.CodedLinear(weight, form)(x)
    factors = [by_hand(x, form, (1, 128)), by_hand(weight, form, (128, 128))]
    expected = (factors[0].double() @ factors[1].double().T).float()
    # One number of `by_hand` may lie on the other side of a midpoint.
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-6 if form.endswith("_2") else 5e-3)


def test_what_is_swapped_and_that_it_comes_back(model):
    tokens = torch.randint(31, (1, 12))
    before, whole = model(tokens), set(study.linear_layers(model))
    matrices = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")]
    matrices += [f"ffn.{w}" for w in ("w_gate", "w_up", "w_down")]
    assert whole == {f"blocks.{i}.{name}" for i in (0, 1) for name in matrices}
    with pytest.raises(KeyError), study.swapped(model, "tensor"):
        kinds = {name: type(m) for name, m in model.named_modules()}
        swapped = {n for n, kind in kinds.items() if kind is study.CodedLinear}
        assert swapped == whole
        assert kinds["head"] is nn.Linear and kinds["embed"] is nn.Embedding
        assert (model(tokens) - before).abs().max() > 1e-3
        raise KeyError
    assert torch.equal(model(tokens), before)
    assert set(study.linear_layers(model)) == whole


def test_a_swapped_model_is_one_of_the_chapters_layers(model):
    row = torch.randint(31, (25,))
    with study.swapped(model, "block"):
        ours = low_rank.window_loss(model, row)
    for name, layer in study.linear_layers(model).items():
        model.set_submodule(name, chapters_layer(layer.weight.detach()))
    assert low_rank.window_loss(model, row) == ours


def test_the_models_of_stories_are_those_of_the_chapter(runs):
    training = runs.training("fp32", 0)
    module.randomise(training.model)
    config, weights = training.model.config, training.model.state_dict()
    plain, coded = (module.Transformer(replace(config, fp8=f)) for f in (False, True))
    plain.load_state_dict(weights)
    coded.load_state_dict(weights)
    held_out = runs.batches(runs.held_out)
    held_out.starts = held_out.starts[:3]
    exact = study.window_losses(plain, held_out)
    chapters = study.window_losses(coded, held_out)
    assert exact != chapters
    found = {}
    for form in FORMATS:
        as_form = partial(study.fp8_linear_as, form)
        with patch.object(module, "fp8_linear", as_form):
            found[form] = study.window_losses(coded, held_out)
    assert found["block"] == chapters
    assert found["tensor"] != chapters and found["row"] != found["tensor"]
    assert found["block"] == pytest.approx(exact, rel=0.1)


# ---------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------


def test_losses_by_hand(runs):
    training = runs.training("fp32", 0)
    held_out = runs.batches(runs.held_out)
    held_out.starts = held_out.starts[:3]
    found = study.window_losses(training.model, held_out)
    for start, loss in zip(held_out.starts.tolist(), found, strict=True):
        tokens = held_out.stream[start : start + 49]
        logits = training.model(tokens[None, :-1])[0].double()
        chances = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        nats = [-math.log(chances[i, t].item()) for i, t in enumerate(tokens[1:])]
        assert loss == pytest.approx(sum(nats) / 48, rel=1e-5)


def test_perplexity_and_difference_by_hand():
    found = study.compared([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert found == {
        "loss": 2.0,
        "perplexity": pytest.approx(7.38905609893),  # e²
        "difference": 1.0,
        "error": pytest.approx(1 / 3**0.5),  # of 0, 1 and 2
    }
    rows = study.against_fp32({"fp32": [2.0, 4.0], "row": [2.5, 4.1]})
    assert rows["fp32"]["difference"] == rows["fp32"]["error"] == 0
    assert rows["row"]["difference"] == pytest.approx(0.3)


def test_relative_losses_and_thinning_by_hand():
    found = study.relative_losses([[5, 2.2], [10, 1.9]], [[5, 2.0], [10, 2.0]])
    assert found == [[5, pytest.approx(0.1)], [10, pytest.approx(-0.05)]]
    log = [{"step": i, "main": float(i * i)} for i in range(1, 8)]
    assert study.thinned(log, 3) == [[3, 14 / 3], [6, 77 / 3], [7, 49]]


def test_errors_by_hand():
    assert study.rms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == 2.5
    exact = torch.tensor([3.0, 4.0])
    assert study.relative_error(exact + torch.tensor([0.3, -0.4]), exact) == (
        pytest.approx(0.1)
    )
    weight, rows = wild(140, 260, seed=3), [wild(5, 260, 4), wild(5, 260, 5)]
    found = study.layer_errors(weight, rows)
    x = torch.cat(rows).double()
    assert found["outliers"] == {
        "weight": pytest.approx((weight.abs().max() / study.rms(weight)).item()),
        "input": pytest.approx((x.abs().max() / x.square().mean().sqrt()).item()),
    }
    for form in FORMATS:
        w = by_hand(weight, form, (128, 128)).double()
        # A window has its own scales: that of a tensor is of each window alone.
        parts = torch.cat([by_hand(row, form, (1, 128)) for row in rows]).double()
        exact, wide = x @ weight.double().T, weight.double()
        expected = {
            "weight": (w - wide).norm() / wide.norm(),
            "input": (parts - x).norm() / x.norm(),
            "output": (parts @ w.T - exact).norm() / exact.norm(),
            "lost": ((parts == 0) & (x != 0)).sum() / (x != 0).sum(),
        }
        for part, value in expected.items():
            assert found[part][form] == pytest.approx(value.item(), rel=0.02, abs=1e-6)


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


def test_of_one_seed_all_start_alike_and_see_the_same(runs):
    models = {arm: runs.training(arm, 0).model for arm, _ in TRAININGS}
    digests = {arm: study.weights_digest(model) for arm, model in models.items()}
    assert digests["fp32"] == digests["fp8"] != digests["nudged"]
    other = runs.training("fp32", 1)
    assert study.weights_digest(other.model) != digests["fp32"]
    assert models["fp8"].config.fp8 and not models["nudged"].config.fp8
    pairs = zip(models["nudged"].parameters(), models["fp32"].parameters(), strict=True)
    for near, first in pairs:
        assert torch.allclose(near, first, rtol=6e-6, atol=0)
    tokens = [
        study.tokens_digest(runs.training(arm, seed).data, 5)
        for arm, seed in (("fp32", 0), ("fp8", 0), ("nudged", 0), ("fp32", 1))
    ]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]


def test_the_seed_alone_would_not_give_them_the_same_weights(runs):
    """The reason for copying: a plain linear layer draws numbers when it is made."""
    config = runs.training("fp32", 0).model.config
    made = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        made.append(module.Transformer(replace(config, fp8=fp8)))
    assert study.weights_digest(made[0]) != study.weights_digest(made[1])


@pytest.mark.parametrize("arm", ["fp32", "fp8"])
def test_the_logged_loss_is_that_of_the_model_itself(runs, arm):
    training = runs.training(arm, 0)
    training.model.eval()
    with torch.no_grad():
        expected = module.loss(training.model, training.data.batch(0)).item()
    row = training.take_step()
    assert row["main"] == pytest.approx(expected, rel=1e-5)
    assert row["loss"] > row["main"] + 0.1


def test_the_curve_looks_at_every_second_window(runs):
    training, whole = runs.training("fp32", 0), runs.batches(runs.held_out)
    assert torch.equal(training.held_out.starts, whole.starts[::2])


def test_a_training_that_was_stopped_goes_on(tmp_path, monkeypatch):
    whole = study.Runs(study.quick(), tmp_path / "whole").train("fp8", 0)
    half, look, steps = study.Runs(study.quick(), tmp_path / "half"), [], []

    def stopped(training, usual=module.held_out_loss):
        look.append(training.step)
        if len(look) == 3:
            raise KeyboardInterrupt
        return usual(training)

    with monkeypatch.context() as patched:
        patched.setattr(module, "held_out_loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            half.train("fp8", 0)
    assert look == [2, 4, 6] and not (half.place("fp8", 0) / "run.json").exists()
    take_step = study.Training.take_step

    def counted(training):
        steps.append(training.step)
        return take_step(training)

    monkeypatch.setattr(study.Training, "take_step", counted)
    found = half.train("fp8", 0)
    assert steps == [4, 5]
    for run in (whole, found):
        del run["seconds"]
    assert found == whole


# ---------------------------------------------------------------------------
# a quick run
# ---------------------------------------------------------------------------


def keys(found):
    """The keys of a record at every depth; of lists, those of the first entry."""
    if isinstance(found, list):
        return [keys(found[0])] if found else []
    return {k: keys(v) for k, v in found.items()} if isinstance(found, dict) else None


def stored(folder, part):
    (found,) = folder.glob(f"{part}_*")
    return found


def test_a_quick_run_writes_record_and_figures(done):
    found = results.read(done / "quick.json")
    assert found["command"] == "python tests/studies/eight_bits.py --quick"
    names = ("quick_errors.png", "quick_training.png")
    assert found["files"] == {name: results.file_digest(done / name) for name in names}
    assert list(found["data"]) == ["errors", "perplexity", "training"]
    check_derived(found["data"])


def check_derived(found):
    """What a record derives from its own numbers."""
    errors, text = found["errors"], found["perplexity"]
    for part, forms in errors["summary"].items():
        for form, quartiles in forms.items():
            rows = [layer[part][form] for layer in errors["layers"].values()]
            assert quartiles == low_rank.quartiles(sum(rows, []))
    for part, quartiles in errors["outliers"].items():
        rows = [layer["outliers"][part] for layer in errors["layers"].values()]
        assert quartiles == low_rank.quartiles(sum(rows, []))
    base = text["smollm2"]["fp32"]["losses"]
    for name in ("smollm2", "stories", "stories_fp8"):
        for row in text[name].values():
            gap = row["loss"] - text[name]["fp32"]["loss"]
            assert row["difference"] == pytest.approx(gap, abs=1e-9)
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    for row in text["smollm2"].values():
        gaps = [a - b for a, b in zip(row["losses"], base, strict=True)]
        assert row["loss"] == pytest.approx(statistics.mean(row["losses"]))
        assert row["error"] == pytest.approx(statistics.stdev(gaps) / len(gaps) ** 0.5)
    check_training(found["training"], text)


def check_training(training, text):
    """The differences of a record's trainings, from its own runs."""
    first, *others = training["runs"]
    assert [(run["arm"], run["seed"]) for run in training["runs"]] == list(TRAININGS)
    for run, row in zip(others, training["differences"], strict=True):
        assert (run["arm"], run["seed"]) == (row["arm"], row["seed"])
        gap = run["held_out"] - first["held_out"]
        assert row["held_out"] == pytest.approx(gap / first["held_out"], abs=1e-9)
        assert row["error"] > 0
        for part in ("curve", "log"):
            pairs = zip(run[part], first[part], row[part], strict=True)
            for (step, loss), (_, base), (at, relative) in pairs:
                assert at == step
                assert relative == pytest.approx(loss / base - 1, abs=1e-9)
        assert (run["weights"] == first["weights"]) == (run["arm"] == "fp8")
        assert (run["tokens"] == first["tokens"]) == (run["seed"] == 0)
    by_arm = {run["arm"]: run for run in training["runs"] if run["seed"] == 0}
    pairs = (("stories", "fp32", "fp32"), ("stories_fp8", "fp8", "block"))
    for name, arm, form in pairs:  # each model in the format that it was trained in
        assert text[name][form]["loss"] == pytest.approx(
            by_arm[arm]["held_out"], rel=1e-5
        )
    assert text["stories_windows"] == first["held_out_windows"]


def test_numbers_of_the_quick_record_measured_again(done):
    found, sizes = data(done / "quick.json"), study.quick()
    model, tokenizer = low_rank.open_model(sizes.text)
    texts = low_rank.open_texts(sizes.text, tokenizer)
    with study.swapped(model, "row"):
        losses = [low_rank.window_loss(model, row) for row in texts.held_out]
    assert found["perplexity"]["smollm2"]["row"]["losses"] == losses
    name = "blocks.1.ffn.w_down"
    rows = [
        llama.watch(model, [f"{name}:in"], tokens=row[None])[0][0]
        for row in texts.calibration[:2]
    ]
    weight = model.get_submodule(name).weight.detach()
    again = study.shortened(study.layer_errors(weight, rows))
    layer = found["errors"]["layers"]["ffn.w_down"]
    assert again == {
        part: {form: values[1] for form, values in forms.items()}
        for part, forms in layer.items()
    }
    assert found["errors"]["tokens"] == 2 * sizes.text.length


def test_a_second_run_measures_nothing_again(copy, monkeypatch):
    folder, flags = copy
    before = data(folder / "quick.json")

    def never(*_):
        raise AssertionError

    for name in ("layer_errors", "smollm2_losses", "stories_losses"):
        if name != "layer_errors":  # that of normal numbers is made anew
            monkeypatch.setattr(study, name, never)
    monkeypatch.setattr(study, "errors_of_all", never)
    monkeypatch.setattr(module, "train", never)
    assert study.main(flags) == 0
    assert data(folder / "quick.json") == before
    (stored(folder, "perplexity") / "row.json").unlink()
    with pytest.raises(AssertionError):
        study.main([*flags, "--part", "perplexity"])


def test_a_part_joins_the_record_that_is_there(copy, capsys):
    folder, flags = copy
    before = results.read(folder / "quick.json")
    spoilt = json.loads(json.dumps(before))
    del spoilt["data"]["errors"]["normal"]
    results.save(folder / "quick.json", spoilt)
    assert study.main([*flags, "--part", "errors"]) == 0
    assert results.read(folder / "quick.json") == before
    (folder / "quick.json").unlink()
    capsys.readouterr()
    assert study.main([*flags, "--part", "errors"]) == 0
    assert "run all of it for a record" in capsys.readouterr().out
    assert not (folder / "quick.json").exists()


def test_a_part_joins_no_stale_record(copy, capsys):
    folder, flags = copy
    stale = results.read(folder / "quick.json")
    stale["sources"]["data/stories.txt"] = "0" * 64
    results.save(folder / "quick.json", stale)
    assert study.main([*flags, "--part", "errors"]) == 0
    assert "run all of it for a record" in capsys.readouterr().out
    assert results.read(folder / "quick.json") == stale


def test_figures_are_drawn_again_from_the_record(copy):
    folder, flags = copy
    before = results.read(folder / "quick.json")
    for name in before["files"]:
        (folder / name).write_bytes(b"")
    for part in study.PARTS:
        shutil.rmtree(stored(folder, part))
    assert study.main([*flags, "--plot"]) == 0
    assert results.read(folder / "quick.json") == before
    for name, hashed in before["files"].items():
        assert results.file_digest(folder / name) == hashed


def test_another_source_is_another_folder_of_what_follows_from_it():
    sources, sizes = dict.fromkeys(study.SOURCES, ""), study.quick()
    first = {part: study.version(part, sizes, sources) for part in study.PARTS}
    moved = {}
    for name in ("Recipe", "quantize"):
        changed = sources | {f"{study.CHAPTER.path}::{name}": "changed"}
        moved[name] = {
            part
            for part in study.PARTS
            if study.version(part, sizes, changed) != first[part]
        }
    assert moved == {"Recipe": {"training", "perplexity"}, "quantize": {*study.PARTS}}
    other = replace(sizes, windows=1)
    assert all(study.version(p, other, sources) != first[p] for p in study.PARTS)


def test_a_source_that_changes_meanwhile_leaves_no_record(copy, monkeypatch, capsys):
    folder, flags = copy
    (folder / "quick.json").unlink()
    digest, seen = results.digest, []

    def changed(source):
        seen.append(source)
        late = len(seen) > len(study.SOURCES) and source == "data/stories.txt"
        return "0" * 64 if late else digest(source)

    monkeypatch.setattr(results, "digest", changed)
    assert study.main(flags) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert not (folder / "quick.json").exists()


def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(low_rank, "FOLDER", tmp_path / "smollm2")
    for flags, said in (
        (["--record", str(tmp_path / "folder")], "--record names a file"),
        (["--out", str(tmp_path / "file")], "--out names a folder"),
        (["--plot", "--record", str(tmp_path / "none.json")], "No such file"),
        (["--part", "errors", "--out", str(tmp_path)], "download.py smollm2"),
    ):
        assert study.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("eight_bits.py: ") and error.count("\n") == 1
        assert said in error
    with pytest.raises(SystemExit) as stop:
        study.main(["--part", "speed"])
    assert stop.value.code == 2


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_: False)
    assert study.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "quick.json").exists()


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    not low_rank.FOLDER.is_dir(),
    reason="no data/smollm2: python data/download.py smollm2",
)


def test_the_record_has_what_a_quick_run_has(recorded, done):
    assert keys(recorded) == keys(data(done / "quick.json"))


def test_what_the_record_derives(recorded):
    check_derived(recorded)


def test_the_record_is_of_what_the_study_asks(recorded):
    sizes = study.full()
    recipe = asdict(sizes.recipe)
    del recipe["seed"]
    training, errors = recorded["training"], recorded["errors"]
    assert training["recipe"] == recipe
    assert training["config"] == json.loads(json.dumps(asdict(sizes.config)))
    assert (training["paper"], training["nudge"]) == (0.0025, 1e-6)
    for run in training["runs"]:
        assert run["steps"] == recipe["steps"]
        steps = [step for step, _ in run["curve"]]
        assert steps == list(range(100, recipe["steps"] + 1, 100))
        assert len(run["log"]) == sizes.bins
        assert 0.5 < run["held_out"] < 2
    assert errors["tokens"] == sizes.windows * sizes.text.length
    for layer in errors["layers"].values():
        for forms in layer.values():
            assert all(len(values) == 30 for values in forms.values())
    assert errors["model"]["linear"] == 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)


def test_the_text_is_that_of_the_study_of_low_rank(recorded):
    other = results.read(study.RECORD.with_name("low_rank.json"))["data"]
    for part in ("errors", "perplexity"):
        assert recorded[part]["text"] == other["text"]
    fp32 = recorded["perplexity"]["smollm2"]["fp32"]
    assert fp32["loss"] == pytest.approx(other["model"]["loss"], rel=1e-5)


def test_normal_numbers_lose_what_is_recorded(recorded):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 576, generator=generator) for n in (576, 256))
    found = study.layer_errors(weight, [x])
    for part, forms in recorded["errors"]["normal"].items():
        assert forms == pytest.approx(found[part], rel=0.01, abs=1e-6)


def test_the_recorded_figures_are_those_of_the_record(recorded, tmp_path):
    from matplotlib.image import imread

    names = []
    for path in study.draw(recorded, tmp_path / study.RECORD.name):
        names.append(path.name)
        ours, theirs = imread(path), imread(study.RECORD.with_name(path.name))
        assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 0.01
    assert list(results.read(study.RECORD)["files"]) == names


@pytest.mark.smollm2
@needs_smollm2
def test_recorded_errors_can_be_measured_again(recorded):
    sizes = study.full().text
    model, tokenizer = low_rank.open_model(sizes)
    text = llama.real_text()
    known = recorded["errors"]["text"]
    if len(text) != known["characters"]:
        pytest.skip("the help texts are those of another Python")
    texts = low_rank.open_texts(sizes, tokenizer)
    names = ("blocks.0.attention.wk", "blocks.2.ffn.w_down")
    rows = [
        llama.watch(model, [f"{name}:in" for name in names], tokens=row[None])
        for row in texts.calibration[:2]
    ]
    for i, name in enumerate(names):
        weight = model.get_submodule(name).weight.detach()
        found = study.layer_errors(weight, [row[i][0] for row in rows])
        _, block, matrix = name.split(".", 2)
        layer = recorded["errors"]["layers"][matrix]
        for part, forms in found.items():
            for form, value in forms.items():
                theirs = layer[part][form][int(block)]
                assert value == pytest.approx(theirs, rel=0.02, abs=1e-5)
    with study.swapped(model, "block"):
        loss = low_rank.window_loss(model, texts.held_out[0])
    losses = recorded["perplexity"]["smollm2"]["block"]["losses"]
    assert loss == pytest.approx(losses[0], rel=2e-3)
