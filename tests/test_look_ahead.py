# SPDX-License-Identifier: MIT
"""The study of multi-token prediction compares like with like; its record is whole."""

import hashlib
import shutil
import struct
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
import results
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import look_ahead as study  # noqa: E402
from look_ahead import DEPTHS, TEMPERATURES, module  # noqa: E402

# Sizes are pairwise distinct; two MTP modules.
SHAPE = replace(
    study.quick().config,
    **{"vocab_size": 31, "dim": 24, "n_heads": 3, "head_dim": 10, "value_dim": 14},
    **{"latent_dim": 20, "q_latent_dim": 18, "rope_dim": 8, "eos_id": None, "n_mtp": 2},
)


@pytest.fixture(scope="module", autouse=True)
def digests():
    """The sources do not change while they are tested, and hashing them takes long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "digest", lru_cache(maxsize=None)(results.digest))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick run, its record in it."""
    out = tmp_path_factory.mktemp("quick")
    assert run(out) == 0
    return out


@pytest.fixture
def out(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done, tmp_path / "copy")


@pytest.fixture
def runs(tmp_path):
    """Trainings of the quick sizes, none of them made."""
    return study.Runs(study.quick(), tmp_path, "none")


@pytest.fixture
def model():
    """A random model with two modules, whose drafts are sometimes accepted."""
    model = study.new_model(SHAPE, 2, 0).eval()
    module.randomise(model)
    with torch.no_grad():  # few tokens are likely, so that drafts often agree
        model.head.weight[5:] *= 0.1
    return model


def run(out, *flags):
    path = out / "quick.json"
    return study.main(["--quick", "--record", str(path), "--out", str(out), *flags])


def data(path):
    return results.read(path)["data"]


def keys(value):
    """The names in nested dicts; of a list, those in its first."""
    if isinstance(value, dict):
        return {name: keys(each) for name, each in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


def test_all_begin_with_the_weights_of_the_model_without_modules():
    torch.manual_seed(5)
    plain = module.Transformer(replace(SHAPE, n_mtp=0)).state_dict()
    digest = study.weights_digest(study.new_model(SHAPE, 0, 5))
    for n_mtp in DEPTHS:
        model = study.new_model(SHAPE, n_mtp, 5)
        state = model.state_dict()
        for name, tensor in plain.items():
            assert torch.equal(state[name], tensor), name
        assert len(model.mtp) == n_mtp
        assert study.weights_digest(model) == digest
    torch.manual_seed(5)  # it is the copy that makes them the same
    alone = module.Transformer(replace(SHAPE, n_mtp=1))
    assert not torch.equal(alone.blocks[0].attention.wo.weight, tensor_of(plain))
    assert study.weights_digest(alone) != digest
    assert study.weights_digest(study.new_model(SHAPE, 0, 6)) != digest


def tensor_of(state):
    return state["blocks.0.attention.wo.weight"]


def test_the_digest_sees_one_changed_weight():
    model = study.new_model(SHAPE, 1, 0)
    before = study.weights_digest(model)
    model.mtp[0].proj.weight.data[0, 0] += 1
    assert study.weights_digest(model) == before
    model.blocks[1].ffn.router.bias[0] += 1
    assert study.weights_digest(model) != before


def test_all_see_the_same_tokens_in_the_same_order(runs):
    first, second = (runs.training(n_mtp, 0).data for n_mtp in (0, 2))
    digest = study.tokens_digest(first, 9)
    assert study.tokens_digest(second, 9) == digest
    trained_on = b"".join(first.batch(i).numpy().tobytes() for i in range(9))
    assert digest == hashlib.sha256(trained_on).hexdigest()
    assert study.tokens_digest(runs.training(0, 1).data, 9) != digest


def test_the_log_has_the_loss_of_the_model_itself(runs):
    training, plain = runs.training(2, 0), runs.training(0, 0)
    model, batch = training.model, training.data.batch(0)
    with torch.no_grad():
        main = module.loss(model.eval(), batch).item()
        whole = module.loss(model.train(), batch).item()
    for router in model.routers():
        router.update()  # what that pass counted
    row = training.take_step()
    assert row["main"] == pytest.approx(main, rel=1e-6)
    assert row["main"] == pytest.approx(plain.take_step()["main"], rel=1e-6)
    assert row["loss"] == pytest.approx(whole, rel=1e-6) and whole > main + 1
    later = module.loss(model.eval(), training.data.batch(1)).item()
    assert training.take_step()["main"] == pytest.approx(later, rel=1e-5)


def test_looking_on_does_not_change_the_training(runs):
    watched, model = runs.training(1, 0), runs.training(1, 0).model
    model._forward_hooks.clear()
    plain = module.Training(model, watched.data, watched.held_out, watched.recipe)
    for _ in range(3):
        row, other = watched.take_step(), plain.take_step()
        assert row["loss"] == other["loss"] and "main" not in other
    for a, b in zip(watched.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_log_is_thinned_to_means():
    log = [
        {"step": i + 1, "loss": 2.0 * i, "main": 1.0 * i, "grad_norm": 1.0}
        for i in range(7)
    ]
    rows = study.thinned(log, 3)  # of three steps each, and what is left
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert [row["main"] for row in rows] == [1, 4, 6]
    assert [row["loss"] for row in rows] == [2, 8, 12]


def test_loss_and_agreement_of_the_depths(model):
    tokens = torch.randint(31, (3, 13))
    data_ = type("Data", (), {"all": lambda self: iter(tokens.split(2))})()
    found = study.held_out_ahead(model, data_)
    with torch.no_grad():
        logits, ahead = model(tokens[:, :-1]), model.predict_ahead(tokens[:, :-1])
    for k in range(2):
        nats, agree = [], []
        for b in range(3):
            for t in range(11 - k):
                row = ahead[k][b, t]
                nats.append(F.cross_entropy(row, tokens[b, t + 2 + k]).item())
                agree.append(row.argmax() == logits[b, t + 1 + k].argmax())
        assert found[k]["nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        assert found[k]["agree"] == pytest.approx(sum(agree).item() / len(agree))
        assert 0 < found[k]["agree"] < 1


# ---------------------------------------------------------------------------
# drafts
# ---------------------------------------------------------------------------

PROMPTS = [torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2, 6]])]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_drafts_are_counted_over_all_prompts(model, temperature):
    found = study.count_drafts(model, PROMPTS, 17, temperature)
    stats = [
        module.speculate(model, prompt, 17, **study.drawing(temperature, i))[1]
        for i, prompt in enumerate(PROMPTS)
    ]
    for name in ("drafted", "accepted", "passes"):
        assert found[name] == sum(getattr(each, name) for each in stats)
    assert found["rate"] == found["accepted"] / found["drafted"]
    assert found["tokens_per_pass"] == 34 / found["passes"]
    # Only near the end of a text does a round have room for fewer than two drafts.
    full = sum(found["kept"])
    rest = found["drafted"] - 2 * full
    assert 0 <= rest <= 2 and 0 < full < found["passes"]
    kept = found["kept"][1] + 2 * found["kept"][2]
    assert kept <= found["accepted"] <= kept + rest


def test_each_opening_has_random_numbers_of_its_own():
    seeds = [study.drawing(0.8, i)["generator"].initial_seed() for i in range(4)]
    assert seeds == [0, 1, 2, 3]


def test_drafts_that_are_always_right_are_all_kept(model):
    model.head.weight.data.zero_()
    found = study.count_drafts(model, PROMPTS, 16, 0.0)
    assert found["rate"] == 1 and found["kept"][:2] == [0, 0]
    assert found["passes"] == 2 * 6  # one, then three at a time


def test_equal_rows_are_counted(model, monkeypatch):
    assert study.count_equal(model.double(), PROMPTS, 17) == 2
    speculate = module.speculate

    def wrong(model, prompt, new):
        tokens, stats = speculate(model, prompt, new)
        tokens = tokens.clone()
        tokens[0, -1] += prompt.shape[1] == 3  # in the second row, the last token
        return tokens, stats

    monkeypatch.setattr(module, "speculate", wrong)
    assert study.count_equal(model, PROMPTS, 17) == 1


def test_openings_are_first_sentences_of_held_out_stories(runs):
    prompts = study.openings(runs)
    assert len(prompts) == 3
    for prompt, story in zip(prompts, runs.held_out, strict=False):
        text = runs.tokenizer.decode(prompt[0].tolist())
        assert story.startswith(text) and text.endswith(".") and text.count(".") == 1
        assert story not in runs.seen


# ---------------------------------------------------------------------------
# speed
# ---------------------------------------------------------------------------


def test_the_parts_are_those_of_a_round_and_can_be_repeated(model, monkeypatch):
    def turns(sides, rounds, device):
        found.append([])
        for side in sides:
            met.clear()
            first = side.run()
            side.undo()
            n = len(met)
            found[-1].append((first, side.run()))
            side.undo()
            pairs = zip(met[:n], met[n:], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        return [[2.0, 1.0], [9.0, 3.0, 4.0], [5.0, 2.0]]

    found, met, prompt = [], [], PROMPTS[0]
    for mtp in model.mtp:  # what they go on from is the same each time
        mtp.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    monkeypatch.setattr(study.bench, "take_turns", turns)
    for dtype in (torch.float64, torch.float32):
        row = study.time_parts(model.to(dtype), prompt, 2)
    assert row == {"ms": {"step": 1e3, "verify": 3e3, "draft": 2e3}, "cost": 5}
    known = module.generate(model.double(), prompt, 41)
    (step, again), (kept, kept_again), (drafts, drafts_again) = found[0]
    assert step.tolist() == again.tolist() == known[0, -1:].tolist()
    # Both drafts and one more, the tokens that `generate` writes after them.
    assert kept == kept_again == known[0, -3:].tolist()
    assert torch.equal(drafts[0], drafts_again[0]) and drafts[0].shape == (1, 2)
    # The same drafts as from nothing kept.
    drafter = module.Drafter(model, 60)
    with torch.inference_mode():
        hidden = model.hidden(known[:, :-2])
        chances = study.partial(module.distribution, temperature=0.0)
        fresh, _ = drafter.draft(known[:, :-1], hidden, 2, chances, None)
    assert torch.equal(fresh, drafts[0])


def test_speeds_are_ratios_of_medians(model, monkeypatch):
    times = iter([[[2.0, 4.0, 9.0], [1.0, 2.0, 3.0]], [[6.0] * 3, [6.0] * 3]])

    def turns(sides, rounds, device):
        plain, (ahead, stats) = (side.run() for side in sides)
        assert plain.shape == ahead.shape and stats.drafted and rounds == 2
        return next(times)

    monkeypatch.setattr(study.bench, "take_turns", turns)
    sizes = replace(study.quick(), new=12)
    row = study.time_decoding(model, PROMPTS, sizes, 0.8)
    # Medians of 2 4 6 6 6 9, and of 1 2 3 6 6 6.
    assert (row["generate"], row["speculate"]) == (12 / 6, 12 / 4.5)
    assert row["speedup"] == 6 / 4.5
    assert row["rate"] == study.count_drafts(model, PROMPTS, 12, 0.8)["rate"]


def test_the_bound():
    assert study.bound(0.5, 1, 1.5) == 1
    assert study.bound(0.25, 2, 1.5) == 1


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------


def test_a_quick_run_writes_record_and_figure(done):
    path = done / "quick.json"
    found = results.read(path)
    assert found["command"] == "python tests/studies/look_ahead.py --quick"
    assert found["files"] == {"quick.png": results.file_digest(done / "quick.png")}
    assert list(found["data"]) == ["trained", "drafts", "speed"]
    assert all(part["machine"] and part["date"] for part in found["data"].values())
    for n_mtp in DEPTHS:
        (row,) = found["data"]["trained"][str(n_mtp)]
        assert [step for step, _ in row["curve"]] == [10, 20]
        assert row["curve"][-1][1] == row["held_out"] < row["curve"][0][1]
        assert row["log"][-1]["step"] == row["steps"] == 20
        assert len(row["log"]) == 4
        assert [*row["parameters"]] == ["total", "active", "mtp"]
        assert len(row["ahead"]) == n_mtp


def test_a_second_run_trains_nothing_again(out, monkeypatch):
    def train(*_):
        raise AssertionError("this was trained already")

    monkeypatch.setattr(module, "train", train)
    before = data(out / "quick.json")
    assert run(out) == 0
    after = data(out / "quick.json")
    assert after["trained"] == before["trained"]
    assert after["drafts"] == before["drafts"]


def test_the_speed_is_measured_again_and_the_rest_stays(out, monkeypatch):
    path = out / "quick.json"
    before = results.read(path)
    assert run(out, "--speed") == 0
    after = results.read(path)
    assert after["data"].pop("speed") != before["data"].pop("speed")
    assert after["files"] == {"quick.png": results.file_digest(out / "quick.png")}
    del before["files"], after["files"]
    assert after == before


def test_models_that_are_gone_are_trained_again_for_the_speed(out, capsys):
    for folder in out.glob("*/mtp2_seed0"):
        shutil.rmtree(folder)
    before = data(out / "quick.json")["drafts"]
    assert run(out, "--speed") == 0
    assert "2 modules, seed 0, from step 0" in capsys.readouterr().out
    runs = study.Runs(study.quick(), out, next(out.glob("*/mtp2_seed0")).parent.name)
    found = study.measure_drafts(runs)
    assert found == {name: before[name] for name in found}


def test_the_figure_is_drawn_again(out):
    path, figure = out / "quick.json", out / "quick.png"
    before, drawn = results.read(path), figure.read_bytes()
    figure.unlink()
    assert run(out, "--plot") == 0
    assert figure.read_bytes() == drawn and results.read(path) == before
    assert struct.unpack(">II", drawn[16:24]) == (960, 480)


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path, monkeypatch, capsys):
    sizes, train = study.quick(), module.train
    whole = study.Runs(sizes, tmp_path, "whole").train(1, 0)

    def stop(training, tokenizer, out):
        """As if Ctrl-C came during the evaluation of step 10."""
        for _ in range(10):
            row = training.take_step()
        row["held_out"] = module.held_out_loss(training)
        training.save(out, tokenizer)
        return False

    monkeypatch.setattr(module, "train", stop)
    stopped = study.Runs(sizes, tmp_path, "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.train(1, 0)
    monkeypatch.setattr(module, "train", train)
    after = stopped.train(1, 0)
    assert "from step 10\n" in capsys.readouterr().out
    for name in ("curve", "log", "weights", "tokens", "ahead"):
        assert after[name] == whole[name]


def test_trainings_of_another_version_are_not_taken():
    sources = {source: "0" for source in study.SOURCES}
    sizes = study.quick()
    same = study.version(sizes, sources)
    assert same == study.version(replace(sizes, rounds=99, seeds=(7,)), sources)
    longer = replace(sizes, recipe=replace(sizes.recipe, steps=21))
    chapter = f"{study.CHAPTER.path}::after_step"
    for other in (
        study.version(longer, sources),
        study.version(sizes, sources | {"data/stories.txt": "1"}),
        study.version(sizes, sources | {chapter: "1"}),
    ):
        assert other != same


def test_steps_and_seeds_are_flags():
    args = study.parser().parse_args(["--quick", "--steps", "7", "--seeds", "3", "5"])
    sizes = study.asked_sizes(args)
    assert (sizes.recipe.steps, sizes.seeds) == (7, (3, 5))
    assert [study.trained_seeds(n, sizes) for n in DEPTHS] == [(3, 5), (3, 5), (3,)]
    line = study.command_line(args, ["quick", "steps", "seeds"])
    assert line.endswith("look_ahead.py --quick --steps 7 --seeds 3 5")


def test_a_part_is_not_joined_to_another_record(out, capsys):
    path = out / "quick.json"
    before = path.read_bytes()
    for flags in (["--steps", "7"], ["--seeds", "1"]):
        assert run(out, "--speed", *flags) == 2
        assert "another recipe or of other seeds" in capsys.readouterr().err
    assert path.read_bytes() == before
    stale = results.read(path)
    stale["sources"]["data/stories.txt"] = "0" * 64
    results.save(path, stale)
    assert run(out, "--speed") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another data/stories.txt" in error


@pytest.mark.parametrize("flags", [[], ["--speed"]])
def test_nothing_is_recorded_when_a_source_changes_meanwhile(
    out, flags, monkeypatch, capsys
):
    path, digest = out / "quick.json", results.digest
    before = path.read_bytes()

    def speed(runs):
        monkeypatch.setattr(results, "digest", changed)
        return {}

    def changed(source, root=study.ROOT):
        return "0" * 64 if source == "data/stories.txt" else digest(source, root)

    for name in study.PARTS:
        monkeypatch.setitem(study.PARTS, name, speed)
    assert run(out, *flags) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert path.read_bytes() == before and not list(out.glob("*.partial"))


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    record = ["--record", str(tmp_path / "record.json")]
    for flags, said in (
        (["--out", str(tmp_path / "file"), *record], "--out names a folder"),
        (["--record", str(tmp_path)], "--record names a file"),
        (["--speed", *record], "run all of it first"),
        (["--plot", *record], "run all of it first"),
        ([], "name a --record"),
    ):
        assert study.main(["--quick", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("look_ahead.py: ") and error.count("\n") == 1
        assert said in error
    for flags in (["--speed", "--plot"], ["--steps", "many"]):
        with pytest.raises(SystemExit) as stop:
            study.main(flags)
        assert stop.value.code == 2


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_: False)
    assert run(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "quick.json").exists()


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return data(study.RECORD)


def test_the_record_has_what_a_quick_run_has(recorded, done):
    assert keys(recorded) == keys(data(done / "quick.json"))


def test_the_record_is_of_the_chapters_recipe(recorded):
    trained, sizes = recorded["trained"], study.full()
    assert trained["recipe"] == asdict(module.Recipe()) | {"steps": 1200}
    assert trained["depths"] == list(DEPTHS) and trained["seeds"] == list(sizes.seeds)
    assert recorded["drafts"]["openings"] == 20 and recorded["drafts"]["new"] == 100


@pytest.mark.parametrize("n_mtp", DEPTHS)
def test_what_is_recorded_of_each_training(recorded, n_mtp):
    sizes, trained = study.full(), recorded["trained"]
    with torch.device("meta"):
        model = module.Transformer(replace(module.TINY, n_mtp=n_mtp))
    seeds, rows = study.trained_seeds(n_mtp, sizes), trained[str(n_mtp)]
    plain = trained["0"][: len(seeds)]
    for row, without in zip(rows, plain, strict=True):
        assert row["weights"] == without["weights"]
        assert row["tokens"] == without["tokens"]
        assert row["parameters"] == module.parameter_counts(model)
        steps, losses = zip(*row["curve"], strict=True)
        assert steps == tuple(range(60, 1201, 60))
        assert losses[-1] == row["held_out"] and all(0.3 < x < 6 for x in losses)
        assert [each["step"] for each in row["log"]] == list(range(20, 1201, 20))
        assert all(each["loss"] > each["main"] for each in row["log"])
        assert len(row["ahead"]) == n_mtp
        for depth in row["ahead"]:
            assert depth["nats"] > row["held_out"] and 0 < depth["agree"] < 1
    assert len({row["weights"] for row in rows}) == len(rows) == len(seeds)


def test_the_recorded_initial_weights_are_those_of_now(recorded):
    for i, seed in enumerate(recorded["trained"]["seeds"]):
        digest = study.weights_digest(study.new_model(module.TINY, 1, seed))
        assert digest == recorded["trained"]["1"][i]["weights"]


@pytest.mark.parametrize("n_mtp", DEPTHS[1:])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_is_recorded_of_drafts_and_speed(recorded, n_mtp, temperature):
    drafts, speed = recorded["drafts"], recorded["speed"]
    texts = drafts["openings"]
    made = texts * drafts["new"]
    for row in drafts[str(n_mtp)]:
        counts = row[study.HOW[temperature]]
        assert counts["rate"] == counts["accepted"] / counts["drafted"]
        assert counts["tokens_per_pass"] == made / counts["passes"]
        # Each pass makes one token beside the drafts that it accepts.
        assert counts["passes"] + counts["accepted"] == made
        full = sum(counts["kept"])
        assert 0 <= counts["drafted"] - n_mtp * full <= n_mtp * texts
        # Fewer drafts than modules are asked for in a first pass and in the last two.
        assert texts <= counts["passes"] - full <= (1 + n_mtp) * texts
        assert 0 <= row["equal"] <= texts and row["equal_float64"] == texts
    timed = speed[str(n_mtp)]
    ms = timed["ms"]
    assert timed["cost"] == pytest.approx((ms["verify"] + ms["draft"]) / ms["step"])
    row = timed[study.HOW[temperature]]
    assert row["rate"] == drafts[str(n_mtp)][0][study.HOW[temperature]]["rate"]
    assert row["speedup"] == pytest.approx(row["speculate"] / row["generate"])
    assert row["bound"] == pytest.approx((1 + n_mtp * row["rate"]) / timed["cost"])
    low, high = row["speedup_quartiles"]
    assert low <= high and 0.5 < low / row["speedup"] < high / row["speedup"] < 2


def test_what_is_recorded_of_the_speed_of_training(recorded):
    rows = recorded["speed"]["training"]
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(4 * 256 / row["ms"] * 1e3)
        assert row["ratio"] == pytest.approx(rows["0"]["ms"] / row["ms"])
    assert 1 == rows["0"]["ratio"] > rows["1"]["ratio"] > rows["2"]["ratio"]
