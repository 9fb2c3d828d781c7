# SPDX-License-Identifier: MIT
"""The study of experts compares what it says it does, and its record is whole."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
import results
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import experts as study  # noqa: E402
from experts import ARMS, BALANCING, SEGMENTS, moe  # noqa: E402

MIXED = [arm for arm in SEGMENTS if arm != "dense"]


@pytest.fixture(scope="module", autouse=True)
def digests():
    """The sources do not change while they are tested, and hashing them takes long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "digest", lru_cache(maxsize=None)(results.digest))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick run: its record, its figures, and in `out` its runs."""
    folder = tmp_path_factory.mktemp("quick")
    flags = ["--out", str(folder / "out"), "--record", str(folder / "quick.json")]
    assert study.main(["--quick", *flags]) == 0
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """A copy of that folder, and the flags that name it."""
    folder = shutil.copytree(done, tmp_path / "quick")
    out, record = str(folder / "out"), str(folder / "quick.json")
    return folder, ["--quick", "--out", out, "--record", record]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A quick study of which nothing was run."""
    sources = dict.fromkeys(study.TRAINED, "")
    return study.Runs(study.quick(), tmp_path_factory.mktemp("runs"), sources)


@pytest.fixture(scope="module")
def recorded():
    return results.read(study.RECORD)["data"]


def config(arm):
    return study.arm_config(arm, moe.TINY)


def data(path):
    return results.read(path)["data"]


def rows_of(part):
    """All runs of a part of a record."""
    return [run for row in part.values() for run in row["runs"]]


# ---------------------------------------------------------------------------
# the arms
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("arm", MIXED)
def test_mixtures_are_of_equal_width(arm):
    model, widths = moe.Transformer(config(arm)), []
    routed = model(torch.zeros(1, 1, dtype=torch.long), detail=True).routed
    for block, routing in zip(model.blocks[1:], routed, strict=True):
        E, _, F = block.ffn.experts.w_down.shape
        shared = block.ffn.shared.w_down.in_features if block.ffn.shared else 0
        widths.append((E * F + shared, routing.chosen.shape[2] * F + shared))
    assert widths == [(1408, 352)] * 2
    assert study.widths(config(arm)) == {"total": 1408, "active": 352}


def test_the_dense_model_is_as_wide_as_what_is_active():
    model = moe.Transformer(config("dense"))
    assert not model.routers()
    assert [block.ffn.w_down.in_features for block in model.blocks] == [352] * 3
    assert study.widths(config("dense")) == {"total": 352, "active": 352}


def test_the_names_say_what_the_arms_are():
    for arm in MIXED:
        c = config(arm)
        shared = f"_{c.n_shared}" if c.n_shared else ""
        assert arm == f"{c.n_experts}_{c.n_active}{shared}"
        label = f"{c.n_experts} experts, {c.n_active} active"
        label += f", {c.n_shared} shared" if shared else ""
        assert study.LABELS[arm].replace("\n", " ") == label
    assert set(study.LABELS) == set(ARMS)


def test_arms_are_tiny_but_for_what_they_are_about():
    base = asdict(replace(moe.TINY, n_mtp=0))
    about = {"n_experts", "n_active", "n_shared", "expert_ffn_dim"}
    for arm in ARMS:
        found = asdict(config(arm))
        rules = ("balance_rate", "balance_loss", "balance_per_sequence")
        allowed = rules if arm in BALANCING else about
        assert {k for k in base if found[k] != base[k]} <= set(allowed)
    assert config("bias_sequence") == replace(moe.TINY, n_mtp=0)


def test_each_rule_does_what_it_is_called_for(runs):
    moved, added = {}, {}
    for arm in BALANCING:
        training = runs.training(arm, 0)
        router = training.model.routers()[0]
        _, _, routed = training.model(training.data.batch(0)[:, :-1], detail=True)
        added[arm] = router.balance_loss(routed[0]).item()
        training.take_step()
        moved[arm] = router.bias.abs().max().item()
    assert moved == pytest.approx(
        {"none": 0, "bias": 0.001, "bias_sequence": 0.001, "auxiliary": 0}
    )
    assert added["none"] == added["bias"] == 0
    # f · P sums to about 1 while all scores are about alike.
    assert added["bias_sequence"] == pytest.approx(1e-4, rel=0.1)
    assert added["auxiliary"] == pytest.approx(1e-2, rel=0.1)


def test_the_auxiliary_loss_is_over_the_batch():
    router = moe.Router(replace(config("auxiliary"), n_experts=2, n_active=1))
    # Two rows, each all to one expert: even over the batch, not over a row.
    scores = torch.tensor([[[0.9, 0.1]] * 3, [[0.1, 0.9]] * 3])
    routing = moe.Routing(scores, scores.topk(1).indices)
    assert router.balance_loss(routing).item() == pytest.approx(0.01)


def test_the_same_seed_is_the_same_start_and_the_same_batches(runs):
    trainings = {arm: runs.training(arm, 1) for arm in ARMS}
    for i in (0, 1, 50):
        first, *others = [t.data.batch(i) for t in trainings.values()]
        assert all(torch.equal(first, batch) for batch in others)
    first, *others = [trainings[arm].model.state_dict() for arm in BALANCING]
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    other = runs.training("none", 0)
    assert not torch.equal(other.data.batch(0), trainings["none"].data.batch(0))
    assert not torch.equal(other.model.embed.weight, first["embed.weight"])


@pytest.mark.parametrize("arm", ARMS)
def test_multiplications_are_those_that_torch_counts(arm):
    # Torch counts no grouped product, which float64 does without, nor attention to
    # other tokens on the CPU.
    model, c, T = moe.Transformer(config(arm)).double().eval(), config(arm), 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(T)[None])
    assert counter.get_total_flops() == 2 * T * study.multiplications(c)
    names = ("embed.weight", "norm.weight")
    aside = sum(p.numel() for n, p in model.named_parameters() if n.endswith(names))
    counts = study.described(c)["parameters"]
    assert study.multiplications(c) == counts["active"] - aside


def test_combinations():
    found = {arm: study.described(config(arm))["combinations"] for arm in SEGMENTS}
    assert found == {"dense": 1, "8_2": 28, "16_4": 1820, "32_8": 10518300} | {
        "15_3_1": 455,  # 15 · 14 · 13 / 6
        "31_7_1": 2629575,
    }


# ---------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "violation"),
    [([3, 3, 3], 0), ([1, 2, 3, 6], 1), ([0, 0, 0, 8], 3), ([0, 5], 1), ([4, 6], 0.2)],
)
def test_the_violation_by_hand(loads, violation):
    assert study.max_violation(loads) == pytest.approx(violation)


def test_watching_changes_nothing_and_sees_what_was_trained_on(runs):
    plain, watched = (runs.training("bias", 0) for _ in range(2))
    rows, seen = study.watch_loads(watched, 2), {}
    for step in range(1, 6):
        tokens = watched.data.batch(step - 1)[:, :-1]
        with torch.no_grad():
            routed = watched.model(tokens, detail=True).routed
        seen[step] = [
            [int((routing.chosen == i).sum()) for i in range(16)] for routing in routed
        ]
        assert plain.take_step()["loss"] == watched.take_step()["loss"]
    assert rows == [{"step": step, "loads": seen[step]} for step in (1, 2, 4)]
    ours, theirs = watched.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_held_out_loads_are_of_every_held_out_token(runs):
    training = runs.training("none", 0)
    moe.randomise(training.model)
    found = study.held_out_loads(training)
    assert all(router.load == 0 for router in training.model.routers())
    expected = torch.zeros(2, 16, dtype=torch.long)
    for start in training.held_out.starts.tolist():
        tokens = training.held_out.stream[start : start + 32]
        for i, routing in enumerate(training.model(tokens[None], detail=True).routed):
            for expert in routing.chosen.flatten().tolist():
                expected[i, expert] += 1
    assert (torch.tensor(found) - expected).abs().sum() <= 4  # ties in another batch
    assert torch.tensor(found).sum(1).tolist() == expected.sum(1).tolist()
    assert study.held_out_loads(runs.training("dense", 0)) == []


# ---------------------------------------------------------------------------
# a quick run
# ---------------------------------------------------------------------------


def keys(found):
    """The keys of a record at every depth; of lists, those of the first entry."""
    if isinstance(found, list):
        return [keys(found[0])] if found else []
    return {k: keys(v) for k, v in found.items()} if isinstance(found, dict) else None


def test_a_quick_run_writes_record_and_figures(done):
    found = results.read(done / "quick.json")
    assert found["command"] == "python tests/studies/experts.py --quick"
    names = ("quick_balance.png", "quick_segments.png")
    assert found["files"] == {name: results.file_digest(done / name) for name in names}
    for part, arms in (("balancing", BALANCING), ("segmentation", SEGMENTS)):
        rows = found["data"][part]
        assert list(rows) == list(arms)
        for row in rows.values():
            assert [run["seed"] for run in row["runs"]] == [0, 1]
        watched = [run.get("training") for run in rows_of(rows)]
        if part == "balancing":
            steps = [[row["step"] for row in told] for told in watched]
            assert steps == [[1, 2, 4, 6]] * 8
        else:
            assert watched == [None] * 12
    assert len(list((done / "out").iterdir())) == len(ARMS) * 2


def test_a_loss_in_the_record_is_that_of_the_trained_model(done, runs):
    training = runs.training("15_3_1", 1)
    moe.train(training, runs.tokenizer)
    run = data(done / "quick.json")["segmentation"]["15_3_1"]["runs"][1]
    assert run["held_out"] == pytest.approx(moe.held_out_loss(training), rel=1e-6)
    assert run["loads"] == study.held_out_loads(training)


def test_a_second_run_trains_only_what_is_missing(copy, monkeypatch, capsys):
    folder, flags = copy
    before, trained, train = data(folder / "quick.json"), [], moe.train

    def counted(training, tokenizer):
        trained.append(training.recipe.seed)
        return train(training, tokenizer)

    monkeypatch.setattr(moe, "train", counted)
    assert study.main(flags) == 0 and trained == []
    assert data(folder / "quick.json") == before
    (lost,) = (folder / "out").glob("16_4_seed1_*.json")
    lost.unlink()
    assert study.main(flags) == 0 and trained == [1]
    again = data(folder / "quick.json")
    for rows in (before, again):
        for run in rows_of(rows["segmentation"]):
            del run["seconds"]
    assert again == before


def test_another_length_shape_or_source_is_another_run(runs, tmp_path):
    names = {runs.path(arm, seed).name for arm in ARMS for seed in (0, 1)}
    assert len(names) == 20
    same, sizes = dict.fromkeys(study.TRAINED, ""), study.quick()
    for other, sources in (
        (sizes, same | {study.TRAINED[0]: "changed"}),
        (replace(sizes, config=replace(sizes.config, dim=18)), same),
        (replace(sizes, recipe=replace(sizes.recipe, steps=7)), same),
        (replace(sizes, every=3), same),
        (replace(sizes, documents=21), same),
    ):
        changed = study.Runs(other, tmp_path, sources)
        assert not names & {changed.path(arm, 0).name for arm in ARMS}


def test_asked_arms_and_seeds_are_trained_and_nothing_recorded(tmp_path):
    out, record = tmp_path / "out", tmp_path / "quick.json"
    flags = ["--quick", "--out", str(out), "--record", str(record)]
    assert study.main([*flags, "--arms", "bias", "8_2", "--seeds", "1"]) == 0
    names = sorted(path.name.rpartition("_")[0] for path in out.iterdir())
    assert names == ["8_2_seed1", "bias_seed1"] and not record.exists()


def test_another_length(tmp_path):
    flags = ["--quick", "--steps", "3", "--arms", "dense", "--seeds", "0"]
    assert study.main([*flags, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["tokens"] == 3 * 2 * 32


def test_figures_are_drawn_again_from_the_record(copy):
    folder, flags = copy
    before = results.read(folder / "quick.json")
    for name in before["files"]:
        (folder / name).write_bytes(b"")
    shutil.rmtree(folder / "out")
    assert study.main(["--plot", *flags[3:]]) == 0
    assert results.read(folder / "quick.json") == before
    for name, hashed in before["files"].items():
        assert results.file_digest(folder / name) == hashed


def test_the_heat_map_shows_load_over_mean_by_the_last():
    loads = [[[9, 9, 9], [4, 1, 1]], [[9, 9, 9], [3, 0, 3]], [[0, 0, 9], [1, 3, 2]]]
    rows = [{"loads": row} for row in loads]
    assert study.shares(rows) == [[2, 1.5, 0.5], [0.5, 1.5, 1], [0.5, 0, 1.5]]


def test_a_source_that_changes_meanwhile_leaves_no_record(copy, monkeypatch, capsys):
    folder, flags = copy
    (folder / "quick.json").unlink()
    digest = results.digest
    seen = []

    def changed(source):
        seen.append(source)
        late = len(seen) > len(study.SOURCES) and source == "data/stories.txt"
        return "0" * 64 if late else digest(source)

    monkeypatch.setattr(results, "digest", changed)
    assert study.main(flags) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert not (folder / "quick.json").exists()


def test_a_mistake_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = study.RECORD.read_bytes()
    for flags, said in (
        (["--quick"], "name a --record"),
        (["--steps", "3"], "name a --record"),
        (["--record", str(tmp_path / "folder")], "--record names a file"),
        (["--out", str(tmp_path / "file")], "--out names a folder"),
        (["--plot", "--record", str(tmp_path / "none.json")], "No such file"),
        (["--arms", "dense", "--steps", "0", "--out", str(tmp_path)], "positive"),
    ):
        assert study.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("experts.py: ") and error.count("\n") == 1
        assert said in error
    assert study.RECORD.read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        study.main(["--arms", "64_16"])
    assert stop.value.code == 2


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moe, "train", lambda *_: False)
    record = tmp_path / "quick.json"
    flags = ["--quick", "--out", str(tmp_path / "out"), "--record", str(record)]
    assert study.main(flags) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not record.exists() and not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------


def test_the_record_has_what_a_quick_run_has(recorded, done):
    assert keys(recorded) == keys(data(done / "quick.json"))


def test_the_record_is_of_the_chapters_recipe(recorded):
    recipe = asdict(moe.Recipe(steps=600, eval_every=600))
    assert recorded["recipe"] | {"seed": 0} == recipe
    assert recorded["seeds"] == [0, 1] and recorded["every"] == 20


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_recorded_of_each_arm(recorded, arm):
    row = recorded["balancing" if arm in BALANCING else "segmentation"][arm]
    found = study.described(config(arm))
    assert {name: row[name] for name in found} == found
    first, second = row["runs"]
    assert first["held_out"] != second["held_out"]
    for run in (first, second):
        assert 0.5 < run["held_out"] < 4 and run["tokens"] == 600 * 4 * 256
        assert len(run["loads"]) == (2 if found["experts"] else 0)
        for loads, violation in zip(run["loads"], run["max_violation"], strict=True):
            assert len(loads) == found["experts"] and min(loads) >= 0
            assert sum(loads) == found["active"] * 228 * 256  # held-out windows
            assert violation == pytest.approx(max(loads) * len(loads) / sum(loads) - 1)


def test_the_loads_recorded_over_training(recorded):
    for run in rows_of(recorded["balancing"]):
        steps = [row["step"] for row in run["training"]]
        assert steps == [1, *range(20, 601, 20)]
        for row in run["training"]:
            assert [(len(x), sum(x)) for x in row["loads"]] == [(16, 3 * 4 * 256)] * 2
            assert row["max_violation"] == pytest.approx(
                [max(loads) / 192 - 1 for loads in row["loads"]]
            )


def test_all_rules_begin_alike_and_as_they_do_here(recorded, tmp_path):
    arms = recorded["balancing"].values()
    for seed in (0, 1):
        first, *others = [arm["runs"][seed]["training"][0]["loads"] for arm in arms]
        assert all(other == first for other in others)
    sources = dict.fromkeys(study.TRAINED, "")
    training = study.Runs(study.full(), tmp_path, sources).training("none", 1)
    rows = study.watch_loads(training, 20)
    training.take_step()
    # Another machine may round a score otherwise, and choose another expert by it.
    assert (torch.tensor(rows[0]["loads"]) - torch.tensor(first)).abs().sum() < 60


def test_the_recorded_figures_are_those_of_the_record(recorded, tmp_path):
    from matplotlib.image import imread

    names = []
    for path in study.draw(recorded, tmp_path / study.RECORD.name):
        names.append(path.name)
        ours, theirs = imread(path), imread(study.RECORD.with_name(path.name))
        assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 0.01
    assert list(results.read(study.RECORD)["files"]) == names
