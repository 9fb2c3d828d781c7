# SPDX-License-Identifier: MIT
"""The study of key/value heads measures what it says, and its record is whole."""

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

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import kv_heads  # noqa: E402
from kv_heads import module  # noqa: E402

CONFIG = replace(module.TINY, dim=24, n_layers=2, n_kv_heads=4, ffn_dim=20)


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
    assert kv_heads.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done, tmp_path / "out")


@pytest.fixture
def model():
    model = module.Transformer(CONFIG)
    module.randomise(model)
    return model.eval()


def data(path):
    return results.read(path)["data"]


def runs_in(folder):
    return kv_heads.Runs(kv_heads.quick(), folder, "version")


# ---------------------------------------------------------------------------
# a quick run
# ---------------------------------------------------------------------------


def keys(found):
    """The keys of a record at every depth, lists of rows by their first row."""
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = found[0]
    if not isinstance(found, dict):
        return None
    return {key: keys(value) for key, value in found.items()}


def test_a_quick_run_has_every_part(done):
    found = data(done / "quick.json")
    assert list(found) == list(kv_heads.PARTS)
    assert all(part["machine"] and part["date"] for part in found.values())


def test_a_second_run_trains_nothing_again(out, monkeypatch):
    def train(*_):
        raise AssertionError("this was trained already")

    monkeypatch.setattr(module, "train", train)
    before = data(out / "quick.json")
    assert kv_heads.main(["--quick", "--out", str(out)]) == 0
    after = data(out / "quick.json")
    assert {k: v for k, v in before.items() if k != "speed"} == {
        k: v for k, v in after.items() if k != "speed"
    }


def test_one_part_is_measured_again_and_the_others_stay(out, monkeypatch):
    path = out / "quick.json"
    before, accepted = data(path), [{"reason": "only words changed"}]
    results.save(path, results.read(path) | {"accepted": accepted})
    monkeypatch.setitem(kv_heads.PARTS, "speed", lambda runs: {"rows": []})
    assert kv_heads.main(["--quick", "--only", "speed", "--out", str(out)]) == 0
    assert results.read(path)["accepted"] == accepted
    after = data(path)
    assert after.pop("speed")["rows"] == []
    assert after == {k: v for k, v in before.items() if k != "speed"}


def test_a_part_is_not_joined_to_a_record_of_other_sources(out, capsys):
    path = out / "quick.json"
    record = results.read(path)
    record["sources"]["data/stories.txt"] = "0" * 64
    results.save(path, record)
    before = path.read_bytes()
    assert kv_heads.main(["--quick", "--only", "speed", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another data/stories.txt" in error
    assert path.read_bytes() == before


def test_nothing_is_recorded_when_a_source_changes_meanwhile(out, monkeypatch, capsys):
    path, digest = out / "quick.json", results.digest
    before = path.read_bytes()

    def speed(runs):
        monkeypatch.setattr(results, "digest", changed)
        return {"rows": []}

    def changed(source, root=ROOT):
        return "0" * 64 if source == "data/stories.txt" else digest(source, root)

    monkeypatch.setitem(kv_heads.PARTS, "speed", speed)
    assert kv_heads.main(["--quick", "--only", "speed", "--out", str(out)]) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert path.read_bytes() == before and not list(out.glob("*.partial"))


def test_trainings_of_another_version_are_not_taken():
    sources = {source: "0" for source in kv_heads.SOURCES}
    sizes = kv_heads.quick()
    same = kv_heads.version(sizes, sources)
    assert same == kv_heads.version(replace(sizes, rounds=99), sources)
    longer = replace(sizes, recipe=replace(sizes.recipe, steps=21))
    for other in (
        kv_heads.version(longer, sources),
        kv_heads.version(sizes, sources | {"data/stories.txt": "1"}),
    ):
        assert other != same


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    sizes = replace(kv_heads.quick(), points=4)
    whole = kv_heads.Runs(sizes, tmp_path, "whole").train(2)
    train, stopped = module.train, kv_heads.Runs(sizes, tmp_path, "stopped")

    def stop(training, tokenizer, out):
        recipe, training.recipe = training.recipe, replace(training.recipe, steps=10)
        training.take_step()
        while training.step < 10:
            row = training.take_step()
            if training.step % recipe.eval_every == 0:
                row["held_out"] = module.held_out_loss(training)
        training.recipe = recipe
        training.save(out, tokenizer)
        return False

    # The schedule of the stopped part has to be that of the whole run.
    rate = module.learning_rate
    monkeypatch.setattr(
        module,
        "learning_rate",
        lambda step, recipe: rate(step, replace(recipe, steps=sizes.recipe.steps)),
    )
    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(2)
    monkeypatch.setattr(module, "train", train)
    taken, take_step = [], module.Training.take_step
    monkeypatch.setattr(
        module.Training,
        "take_step",
        lambda run: taken.append(take_step(run)) or taken[-1],
    )
    after = stopped.train(2)
    assert [row["step"] for row in taken] == list(range(11, 21))
    assert [step for step, _ in after["curve"]] == [0, 5, 10, 15, 20]
    assert after["curve"] == whole["curve"]


# ---------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------


def test_the_first_and_the_mean_of_each_group(model):
    mean = kv_heads.converted(model, 2, "mean").state_dict()
    first = kv_heads.converted(model, 2, "first").state_dict()
    K = CONFIG.head_dim
    for name, old in model.state_dict().items():
        if ".wk." in name or ".wv." in name:
            h0, h1, h2, h3 = old.split(K)
            torch.testing.assert_close(mean[name], torch.cat([h0 + h1, h2 + h3]) / 2)
            assert torch.equal(first[name], torch.cat([h0, h2]))
        else:
            assert torch.equal(first[name], old) and torch.equal(mean[name], old)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_heads_that_are_the_same_lose_nothing(model, how):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".wk." in name or ".wv." in name:
                heads = parameter.unflatten(0, (2, 2, -1))
                heads[:, 1] = heads[:, 0]
    tokens = torch.randint(CONFIG.vocab_size, (2, 9))
    new = kv_heads.converted(model, 2, how)
    torch.testing.assert_close(new(tokens), model(tokens))
    assert new.config.n_kv_heads == 2


def test_random_heads_are_as_at_the_start(model):
    found = kv_heads.converted(model, 1, "random").blocks[1].attention
    new = torch.cat([found.wk.weight, found.wv.weight])
    assert 0.015 < new.std() < 0.025 and abs(new.mean()) < 0.005
    assert not found.wk.bias.any() and not found.wv.bias.any()
    assert torch.equal(found.wq.weight, model.blocks[1].attention.wq.weight)


def test_the_control_is_the_model_itself(model):
    same = kv_heads.converted(model, 4, "same")
    assert all(
        torch.equal(a, same.state_dict()[n]) for n, a in model.named_parameters()
    )


def test_the_second_training_has_the_first_ones_schedule():
    sizes = kv_heads.full()
    recipe = kv_heads.again_recipe(sizes, 250, 1e-3)
    rates = [module.learning_rate(step, recipe) for step in range(250)]
    assert max(rates) == pytest.approx(1e-3) == rates[24]
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    unchanged = replace(
        recipe,
        **{
            name: getattr(sizes.recipe, name)
            for name in ("steps", "warmup", "lr", "seed", "eval_every")
        },
    )
    assert unchanged == sizes.recipe
    assert recipe.seed != sizes.recipe.seed
    assert kv_heads.first_recipe(sizes, 0) == replace(sizes.recipe, eval_every=200)


def test_all_heads_see_the_same_data(tmp_path):
    runs = runs_in(tmp_path)
    first, again = runs.data(0)[0], runs.data(1)[0]
    assert torch.equal(first.stream, again.stream)
    assert not torch.equal(first.batch(0), again.batch(0))


def test_a_decode_step_is_taken_back(model):
    side, cache = kv_heads.decode_step(model, batch=2, cached=7)
    held = [layer.k[:, :, :7].clone() for layer in cache.layers]
    first = side.run()
    assert cache.length == 8 and first.shape == (2, 1, CONFIG.vocab_size)
    side.undo()
    assert cache.length == 7
    assert torch.equal(side.run(), first)
    for layer, before in zip(cache.layers, held, strict=True):
        assert torch.equal(layer.k[:, :, :7], before)


def test_the_bytes_of_a_step(model):
    _, cache = kv_heads.decode_step(model, batch=2, cached=7)
    found = kv_heads.step_bytes(model, cache)
    # 2 for keys and values, 2 rows, 2 layers, 8 positions, 4 heads of width 6, 4 bytes.
    assert found["cache_bytes"] == 2 * 2 * 2 * 8 * 4 * 6 * 4
    total = sum(p.numel() for p in model.parameters())
    assert found["weight_bytes"] == 4 * (total - CONFIG.max_seq_len * CONFIG.dim)
    assert found["bytes"] == found["weight_bytes"] + found["cache_bytes"]


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for flags, said in (
        (["--out", str(tmp_path / "file")], "--out names a folder"),
        (["--record", str(tmp_path / "folder")], "--record names a file"),
    ):
        assert kv_heads.main(["--quick", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("kv_heads.py: ") and error.count("\n") == 1
        assert said in error
    with pytest.raises(SystemExit) as stop:
        kv_heads.main(["--only", "loss"])
    assert stop.value.code == 2
    assert "invalid choice: 'loss'" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_: False)
    assert kv_heads.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "quick.json").exists()


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return data(kv_heads.RECORD)


def test_the_record_has_what_a_quick_run_has(recorded, done):
    quick = data(done / "quick.json")
    # Three more trainings, which say how much is chance, may be added later.
    assert kv_heads.PARTS.keys() - recorded.keys() <= {"seeds"}
    assert recorded.keys() <= kv_heads.PARTS.keys()
    for name, part in recorded.items():
        assert keys(part) == keys(quick[name])


def test_the_record_is_of_the_chapters_recipe(recorded):
    assert recorded["trained"]["recipe"] == asdict(module.Recipe())
    assert recorded["trained"]["stories"] == 200
    assert recorded["speed"]["config"] == asdict(replace(module.GPT2_124M, dropout=0.0))


def curves(found):
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "curve":
                yield value
            elif key == "curves":
                yield from value.values()
            else:
                yield from curves(value)


def test_the_recorded_curves_are_sane(recorded):
    found = list(curves(recorded))
    assert len(found) == 3 + 2 + 2 * 3 * 2
    for curve in found:
        steps = [step for step, _ in curve]
        assert steps[0] == 0 and steps == sorted(set(steps)) and len(steps) <= 100
        assert all(0.3 < loss < 12 for _, loss in curve)
        assert curve[-1][1] < 1


@pytest.mark.parametrize("G", [4, 2, 1])
def test_what_is_recorded_of_each_number_of_heads(recorded, G):
    row = recorded["trained"][str(G)]
    config = replace(module.TINY, n_kv_heads=G)
    model = module.Transformer(config)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["cache_nbytes"] == row["cache_tokens"] * row["cache_bytes_per_token"]
    assert row["cache_nbytes"] == model.new_cache(1, config.max_seq_len).nbytes
    assert row["cache_bytes_per_token"] == 2 * config.n_layers * G * 32 * 4
    assert row["steps"] == 5000 and row["curve"][-1] == [5000, row["held_out"]]
    # The first point is of a model that knows nothing: about log V.
    assert abs(row["curve"][0][1] - math.log(config.vocab_size)) < 0.1


def test_the_recorded_conversions_start_from_the_trained_model(recorded):
    pooled, trained = recorded["pooled"], recorded["trained"]
    before = pooled["original"]["before"]
    assert before == pytest.approx(trained["4"]["held_out"], abs=1e-5)
    assert pooled["steps"] == {"short": 250, "long": 500}
    for G in ("2", "1"):
        assert list(pooled[G]) == list(kv_heads.WAYS)
        for row in pooled[G].values():
            assert row["before"] > before and row["before"] > row["long"]
            for share, curve in row["curves"].items():
                assert curve[0] == [0, row["before"]]
                assert curve[-1] == [pooled["steps"][share], row[share]]


def test_the_recorded_peak_is_the_best_of_those_tried(recorded):
    pooled = recorded["pooled"]
    tried = {row["peak"]: row["2"] + row["1"] for row in pooled["peaks"]}
    assert list(tried) == list(kv_heads.PEAKS)
    assert pooled["peak"] == min(tried, key=tried.get) == pooled["recipe"]["lr"]
    chosen = next(row for row in pooled["peaks"] if row["peak"] == pooled["peak"])
    assert chosen["1"] == pooled["1"]["mean"]["short"]
    assert chosen["4"] == pooled["original"]["short"]


def test_the_recorded_steps_read_what_the_shapes_say(recorded):
    speed = recorded["speed"]
    rows = {(row["batch"], row["n_kv_heads"]): row for row in speed["rows"]}
    assert list(rows) == [(B, G) for B in (1, 8) for G in (12, 4, 1)]
    for (B, G), row in rows.items():
        S = speed["cached"] + 1
        assert row["cache_bytes"] == 2 * B * 12 * S * G * 64 * 4
        assert row["bytes"] == row["cache_bytes"] + row["weight_bytes"]
        assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
        assert row["ratio"] == pytest.approx(row["ms"] / rows[B, 12]["ms"])
        assert row["tokens_per_second"] == pytest.approx(B / row["ms"] * 1e3)
