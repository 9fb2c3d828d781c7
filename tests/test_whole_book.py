# SPDX-License-Identifier: MIT
"""The picture of the whole book compares like with like; its record is whole."""

import hashlib
import json
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

import whole_book as study  # noqa: E402
from whole_book import MODELS  # noqa: E402

WITH_MTP = ["moe_mtp", "fp8"]


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
def runs(done):
    """The trainings of that quick run."""
    return made_in(done)


@pytest.fixture
def no_training(monkeypatch):
    """Any training is an error."""

    def train(*_):
        raise AssertionError("this was trained already")

    for entry in MODELS.values():
        monkeypatch.setattr(entry.module, "train", train)


def run(out, *flags):
    path = out / "quick.json"
    return study.main(["--quick", "--record", str(path), "--out", str(out), *flags])


def made_in(folder, **changes):
    digests = {source: results.digest(source) for source in study.SOURCES}
    return study.Runs(replace(study.quick(), **changes), folder, digests)


def data(path):
    return results.read(path)["data"]


def keys(value):
    """The names in nested dicts; of a list, those in its first."""
    if isinstance(value, dict):
        return {name: keys(each) for name, each in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


# ---------------------------------------------------------------------------
# sizes
# ---------------------------------------------------------------------------


def counted(name, c):
    """Parameters in all and in a decoding step, by hand from the shape."""
    D, L, V, H = c.dim, c.n_layers, c.vocab_size, c.n_heads
    if name == "gpt2":  # with biases, and a table of positions
        attention, ffn = 4 * D * D + 4 * D, 2 * D * c.ffn_dim + c.ffn_dim + D
        total = V * D + c.max_seq_len * D + L * (attention + ffn + 4 * D) + 2 * D
        return total, total
    if name == "llama":
        attention = 2 * D * D + 2 * D * c.n_kv_heads * c.head_dim
    else:
        C, Q, P, R = c.latent_dim, c.q_latent_dim, c.value_dim, c.rope_dim
        K = c.head_dim
        attention = D * Q + Q + Q * H * (K + R) + D * (C + R) + C
        attention += C * H * (K + P) + H * P * D
    if name in ("llama", "mla"):
        total = V * D + L * (attention + 3 * D * c.ffn_dim + 2 * D) + D
        return total, total
    one = 3 * D * c.expert_ffn_dim
    router, idle = c.n_experts * D, (c.n_experts - c.n_active) * one
    block = attention + router + (c.n_shared + c.n_experts) * one + 2 * D
    main = V * D + L * block + D
    ahead = c.n_mtp * (block + 2 * D * D + 3 * D)
    return main + ahead, main - L * idle


@pytest.mark.parametrize("sizes", [study.full(), study.quick()], ids=["full", "quick"])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_shape(name, sizes):
    config = sizes.configs[name]
    with torch.device("meta"):
        found = study.parameters(MODELS[name].module.Transformer(config))
    assert (found["total"], found["active"]) == counted(name, config)


def test_as_many_parameters_are_active_in_all():
    for sizes, bound in ((study.full(), 0.01), (study.quick(), 0.1)):
        active = [counted(name, sizes.configs[name])[1] for name in MODELS]
        assert max(active) - min(active) < bound * min(active)


def test_what_all_have_in_common():
    configs = study.full().configs
    for field in ("dim", "n_layers", "n_heads", "max_seq_len", "vocab_size", "eos_id"):
        assert len({getattr(config, field) for config in configs.values()}) == 1
    assert all(config.tie_embeddings for config in configs.values())
    assert configs["gpt2"].n_kv_heads == configs["gpt2"].n_heads
    assert configs["gpt2"].dropout == 0
    fp8 = asdict(configs["fp8"])
    assert fp8.pop("fp8") and fp8 == asdict(configs["moe_mtp"]) | {
        "fp8_power_of_two": False,
        "fp8_codes": False,
    }
    assert configs["moe"] == replace(configs["moe_mtp"], n_mtp=0)


def test_products_in_fp8_have_two_blocks_or_more_each_way():
    module = MODELS["fp8"].module
    with torch.device("meta"):
        model = module.Transformer(study.full().configs["fp8"])
    coded = [m.weight for m in model.modules() if isinstance(m, module.FP8Linear)]
    for experts in (m for m in model.modules() if isinstance(m, module.Experts)):
        coded += [experts.w_gate_up, experts.w_down]
    # Of a block of the model: five of attention, three shared, the experts' two.
    assert len(coded) == 3 * 10
    for weight in coded:
        assert all(size >= 2 * module.BLOCK for size in weight.shape[-2:])


@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes_are_those_of_the_formula(name):
    for sizes in (study.full(), study.quick()):
        c = sizes.configs[name]
        if name in ("gpt2", "llama"):
            numbers = 2 * c.n_kv_heads * c.dim // c.n_heads
        else:
            numbers = c.latent_dim + c.rope_dim
        with torch.device("meta"):
            model = MODELS[name].module.Transformer(c)
        assert study.cache_bytes(model) == 4 * c.n_layers * numbers


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [study.full(), study.quick()], ids=["full", "quick"])
def test_the_last_three_begin_with_the_same_weights(sizes):
    moe, ahead, fp8 = (study.new_model(n, sizes, 3) for n in ("moe", *WITH_MTP))
    digest = study.weights_digest(moe)
    assert study.weights_digest(ahead) == study.weights_digest(fp8) == digest
    state = fp8.state_dict()
    assert state.keys() == ahead.state_dict().keys()
    for name, tensor in ahead.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert study.weights_digest(study.new_model("moe", sizes, 4)) != digest
    moe.blocks[1].ffn.router.bias[0] += 1
    assert study.weights_digest(moe) != digest


def test_stories_are_split_as_the_chapters_split_them(runs, tmp_path):
    module = MODELS["gpt2"].module
    seen, held_out = module.split_documents(module.read_text(module.DEFAULT_DATA))
    n = study.quick().documents
    assert (runs.seen, runs.held_out) == (seen[:n], held_out[:n])
    sources = dict.fromkeys(study.SOURCES, "")
    everything = study.Runs(study.full(), tmp_path, sources)
    assert (everything.seen, everything.held_out) == (seen, held_out)


def test_all_see_the_same_tokens_in_the_same_order(runs):
    first = runs.training("gpt2", 0)
    batches = [first.data.batch(i) for i in range(9)]
    for name in MODELS:
        training = runs.training(name, 0)
        for i, batch in enumerate(batches):
            assert torch.equal(training.data.batch(i), batch)
        assert torch.equal(training.held_out.stream, first.held_out.stream)
    digest = study.tokens_digest(first.data, 9)
    trained_on = b"".join(batch.numpy().tobytes() for batch in batches)
    assert digest == hashlib.sha256(trained_on).hexdigest()
    assert digest != study.tokens_digest(runs.training("gpt2", 1).data, 9)


def test_all_have_one_recipe(runs):
    recipes = [asdict(runs.training(name, 1).recipe) for name in MODELS]
    ours = {name: recipes[1].pop(name) for name in ("seq_len",)}
    assert all(ours.items() <= each.items() for each in recipes[2:])
    assert all(recipes[1].items() <= each.items() for each in recipes)
    assert recipes[0]["seed"] == 1 and recipes[0]["eval_every"] == 2


def test_digests_of_the_record(done):
    models = data(done / "quick.json")["models"]
    for name, row in models.items():
        n = len(row["seeds"])
        assert row["tokens"] == models["gpt2"]["tokens"][:n]
        assert len(set(row["weights"])) == n
        if name in WITH_MTP:
            assert row["weights"] == models["moe"]["weights"][:n]
    assert len(set(models["gpt2"]["tokens"])) == 2


@pytest.mark.parametrize("name", MODELS)
def test_the_held_out_loss_is_that_of_the_saved_model(runs, done, name):
    row = data(done / "quick.json")["models"][name]
    for seed, recorded in zip(row["seeds"], row["held_out"]["seeds"], strict=True):
        model, held_out = runs.model(name, seed), runs.training(name, seed).held_out
        nats, n = 0.0, 0
        for start in held_out.starts:
            window = held_out.stream[start : start + runs.sizes.window + 1]
            with torch.no_grad():
                logits = model(window[None, :-1])
            nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            n += len(window) - 1
        assert nats / n == pytest.approx(recorded, rel=1e-6)


def test_mean_and_ends_of_the_seeds():
    found = study.summary([3.0, 1.0, 2.5])
    assert found == {
        "mean": 6.5 / 3,
        "low": 1.0,
        "high": 3.0,
        "seeds": [3.0, 1.0, 2.5],
    }


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path, monkeypatch, capsys):
    module = MODELS["moe_mtp"].module
    train = module.train
    whole = made_in(tmp_path / "whole").train("moe_mtp", 1)

    def stop(training, tokenizer, out):
        """As if Ctrl-C came during the evaluation of step 2."""
        for _ in range(2):
            row = training.take_step()
        row["held_out"] = module.held_out_loss(training)
        training.save(out, tokenizer)
        return False

    monkeypatch.setattr(module, "train", stop)
    stopped = made_in(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.train("moe_mtp", 1)
    monkeypatch.setattr(module, "train", train)
    assert stopped.train("moe_mtp", 1) == whole
    assert "MoE + MTP, seed 1, from step 2\n" in capsys.readouterr().out


def test_trainings_of_another_version_are_not_taken():
    sources = dict.fromkeys(study.SOURCES, "0")
    sizes = study.quick()
    same = {name: study.version(name, sizes, sources) for name in MODELS}
    other = replace(sizes, rounds=99, seeds=(7,), stories=3)
    assert {name: study.version(name, other, sources) for name in MODELS} == same
    longer = replace(sizes, recipe=sizes.recipe | {"steps": 5})
    stories = sources | {"data/stories.txt": "1"}
    for args in ((longer, sources), (sizes, stories)):
        assert all(study.version(name, *args) != same[name] for name in MODELS)
    wide = replace(sizes.configs["moe"], expert_ffn_dim=20)
    found = replace(sizes, configs=sizes.configs | {"moe": wide})
    for name in MODELS:
        differs = study.version(name, found, sources) != same[name]
        assert differs == (name in ("moe", *WITH_MTP))
    # A chapter's change is for its models, and for those that begin with its weights.
    for chapter, changed in (
        ("ch03", ["gpt2"]),
        ("ch06", ["moe", *WITH_MTP]),
        ("ch07", ["fp8"]),
    ):
        source = f"{study.find(chapter).path}::model"
        found = {n: study.version(n, sizes, sources | {source: "1"}) for n in MODELS}
        assert [name for name in MODELS if found[name] != same[name]] == changed


# ---------------------------------------------------------------------------
# stories and speed
# ---------------------------------------------------------------------------


def test_stories_are_measured_of_every_saved_model(runs, done):
    found = data(done / "quick.json")
    for name, seed in (("gpt2", 1), ("fp8", 0)):
        row = found["models"][name]
        measured = study.story_consistency.measure(
            MODELS[name].module, runs.place(name, seed), 4
        )
        for measure in study.MEASURES:
            assert row[measure]["seeds"][seed] == measured[measure]
            assert found["real"][measure] == measured[f"real_{measure}"]


def test_stories_are_measured_again_by_another_measure(out, no_training, monkeypatch):
    before, asked = made_in(out), []
    changed = before.sources | {"data/make_stories.py": "1"}

    def measure(module, folder, n):
        asked.append((module, folder, n))
        return {}

    monkeypatch.setattr(study.story_consistency, "measure", measure)
    assert before.stories("llama", 1)["stories"] == 4 and not asked
    after = study.Runs(study.quick(), out, changed)
    assert after.stories("llama", 1) == after.stories("llama", 1) == {}
    assert asked == [(MODELS["llama"].module, before.place("llama", 1), 4)]


def test_training_is_timed_by_medians_in_turns(runs, monkeypatch):
    def turns(sides, rounds, device):
        assert rounds == 3
        assert [side.run()["step"] for side in sides] == [1] * 6
        return [[1.0, 2.0, 9.0]] + [[8.0, 4.0, 1.0]] * 4 + [[20.0] * 3]

    monkeypatch.setattr(study.bench, "take_turns", turns)
    found = study.time_training(runs)
    assert found["gpt2"] == {"tokens_per_second": 2 * 48 / 2, "ratio": 1}
    assert found["moe"] == {"tokens_per_second": 2 * 48 / 4, "ratio": 0.5}
    assert found["fp8"]["ratio"] == pytest.approx(0.1)


def test_decoding_is_timed_opening_by_opening(runs, monkeypatch):
    times = iter([[1.0, 2.0, 2.0, 4.0, 5.0, 8.0, 2.0, 4.0], [3.0] * 8])

    def turns(sides, rounds, device):
        texts = [side.run() for side in sides]
        plain, ahead = texts[:6], [text for text, _ in texts[6:]]
        assert rounds == 2 and all(text.shape == (1, 6 + 10) for text in texts[:6])
        assert len({tuple(text[0, :6].tolist()) for text in plain}) == 1
        assert [text.shape for text in ahead] == [(1, 16)] * 2
        assert torch.equal(ahead[0], plain[4])
        return [[0.9 * t, t, 5 * t] for t in next(times)]

    monkeypatch.setattr(study.bench, "take_turns", turns)
    plain, ahead = study.time_decoding(runs)
    assert list(plain) == list(MODELS) and list(ahead) == WITH_MTP
    assert plain["gpt2"] == {"tokens_per_second": 20 / 4, "ratio": 1}
    assert plain["moe_mtp"]["tokens_per_second"] == 20 / 8
    row = ahead["moe_mtp"]
    assert row["tokens_per_second"] == 20 / 5
    assert (row["ratio"], row["speedup"]) == (4 / 5, pytest.approx(8 / 5))
    stats = [
        MODELS["fp8"].module.speculate(runs.model("fp8", 0), prompt, 10)[1]
        for prompt in study.prompts(runs)
    ]
    drafted = sum(each.drafted for each in stats)
    assert ahead["fp8"]["rate"] == sum(each.accepted for each in stats) / drafted


def test_openings_are_the_first_tokens_of_held_out_stories(runs):
    openings = study.prompts(runs)
    assert [prompt.shape for prompt in openings] == [(1, 6)] * 2
    for prompt, story in zip(openings, runs.held_out, strict=False):
        assert story.startswith(runs.tokenizer.decode(prompt[0].tolist()))
        assert story not in runs.seen


def test_speeds_are_of_one_thread_and_leave_the_others_as_they_were(runs, monkeypatch):
    threads, seen = [5], []

    def speed(runs):
        seen.append(threads[-1])
        return dict.fromkeys(MODELS, {})

    def decoding(runs):
        seen.append(threads[-1])
        raise FloatingPointError

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(study, "time_training", speed)
    monkeypatch.setattr(study, "time_decoding", decoding)
    with pytest.raises(FloatingPointError):
        study.measure_speed(runs)
    assert seen == [1, 1] and threads == [5, 1, 5]


# ---------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------


def test_a_quick_run_writes_record_and_figure(done):
    path = done / "quick.json"
    found = results.read(path)
    assert found["command"] == "python tests/studies/whole_book.py --quick"
    assert found["files"] == {"quick.png": results.file_digest(done / "quick.png")}
    assert set(found["sources"]) == set(study.SOURCES)
    assert list(found["data"]["models"]) == list(MODELS)
    assert "." not in "".join(names(found["data"]))
    for name, row in found["data"]["models"].items():
        assert (row["label"], row["chapter"]) == (
            MODELS[name].label,
            MODELS[name].chapter.name,
        )
        assert row["seeds"] == ([0] if name == "fp8" else [0, 1])
        for measure in ("held_out", *study.MEASURES):
            summary = row[measure]
            assert len(summary["seeds"]) == len(row["seeds"])
            assert summary == study.summary(summary["seeds"])
        for curve, last in zip(row["curve"], row["held_out"]["seeds"], strict=True):
            assert [step for step, _ in curve] == [2, 4]
            assert curve[0][1] > curve[1][1] == last
        assert ("speculation" in row) == (name in WITH_MTP)
        for part in ("training", "decoding"):
            base = found["data"]["models"]["gpt2"][part]["tokens_per_second"]
            speed = row[part]["tokens_per_second"]
            assert row[part]["ratio"] == pytest.approx(speed / base)
    for part in ("trained", "speed"):
        assert found["data"][part]["machine"] and found["data"][part]["date"]


def names(value):
    """All keys of nested dicts."""
    if isinstance(value, dict):
        return [*value, *(n for each in value.values() for n in names(each))]
    return []


def test_the_table_has_a_row_a_model(done):
    found = data(done / "quick.json")
    heading, *rows = study.table(found).splitlines()
    assert heading.split("  ")[-1].strip() == "active" and len(rows) == 6
    for line, row in zip(rows, found["models"].values(), strict=True):
        assert line.startswith(f"{row['label']} ")
        assert line.endswith(f" {row['parameters']['active']:,}")
        held_out = row["held_out"]
        ends = f" ({held_out['low']:.3f} to {held_out['high']:.3f})"
        assert f"{held_out['mean']:.3f}" in line
        assert (ends in line) == (len(held_out["seeds"]) > 1)
        assert ("drafts: " in line) == ("speculation" in row)


def test_a_second_run_trains_nothing_again(out, no_training):
    before = data(out / "quick.json")
    assert run(out) == 0
    after = data(out / "quick.json")
    assert keys(after) == keys(before)
    for name, row in after["models"].items():
        timed = {"training", "decoding", "speculation"}
        for part in row.keys() - timed:
            assert row[part] == before["models"][name][part]


def test_only_some_are_trained_and_nothing_is_recorded(tmp_path, done, capsys):
    assert run(tmp_path, "--only", "llama", "fp8") == 0
    assert "no record is written" in capsys.readouterr().out
    assert not list(tmp_path.glob("quick.*"))
    found = {p.relative_to(tmp_path) for p in tmp_path.glob("*/*/run.json")}
    all_ = {p.relative_to(done) for p in done.glob("*/*/run.json")}
    assert found == {p for p in all_ if p.parts[0].split("_")[0] in ("llama", "fp8")}
    assert len(found) == 3
    for path in found:
        assert json.loads((tmp_path / path).read_text()) == json.loads(
            (done / path).read_text()
        )
        assert list((tmp_path / path).parent.glob("stories_*.json"))


def test_the_speed_is_measured_again_and_the_rest_stays(out, no_training):
    path = out / "quick.json"
    before = results.read(path)
    before["data"]["models"]["fp8"]["training"]["ratio"] = 99
    results.save(path, before)
    assert run(out, "--speed") == 0
    after = results.read(path)
    assert after["files"] == {"quick.png": results.file_digest(out / "quick.png")}
    assert after["data"]["models"]["fp8"]["training"]["ratio"] < 99
    for each in (before, after):
        del each["files"], each["data"]["speed"]
        for row in each["data"]["models"].values():
            del row["training"], row["decoding"]
            row.pop("speculation", None)
    assert after == before


def test_the_figure_is_drawn_again(out):
    path, figure = out / "quick.json", out / "quick.png"
    before, drawn = results.read(path), figure.read_bytes()
    figure.unlink()
    assert run(out, "--plot") == 0
    assert figure.read_bytes() == drawn and results.read(path) == before
    assert struct.unpack(">II", drawn[16:24]) == (960, 672)


def test_steps_and_seeds_are_flags():
    args = study.parser().parse_args(["--quick", "--steps", "7", "--seeds", "3", "5"])
    sizes = study.asked_sizes(args)
    assert (sizes.recipe["steps"], sizes.seeds) == (7, (3, 5))
    seeds = {name: study.trained_seeds(name, sizes) for name in MODELS}
    assert seeds.pop("fp8") == (3,) and set(seeds.values()) == {(3, 5)}
    line = study.command_line(args)
    assert line.endswith("whole_book.py --quick --steps 7 --seeds 3 5")


def test_a_speed_is_not_joined_to_another_record(out, capsys):
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
    path, digest, measured = out / "quick.json", results.digest, study.measure_speed
    before = path.read_bytes()

    def speed(runs):
        monkeypatch.setattr(results, "digest", changed)
        return measured(runs)

    def changed(source, root=study.ROOT):
        return "0" * 64 if source == "data/stories.txt" else digest(source, root)

    monkeypatch.setattr(study, "measure_speed", speed)
    assert run(out, *flags) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert path.read_bytes() == before and not list(out.glob("*.partial"))


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    record = ["--record", str(tmp_path / "record.json")]
    only = ["--only", "gpt2", "--out", str(tmp_path)]
    for flags, said in (
        (["--out", str(tmp_path / "file"), *record], "--out names a folder"),
        (["--record", str(tmp_path)], "--record names a file"),
        (["--speed", *record], "run all of it first"),
        (["--plot", *record], "run all of it first"),
        ([*only, "--steps", "0"], "steps is 0"),
        ([*only, "--seeds", "-1"], "seed is -1"),
    ):
        assert study.main(["--quick", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("whole_book.py: ") and error.count("\n") == 1
        assert said in error
    assert study.main(["--steps", "3"]) == 2
    assert "name a --record" in capsys.readouterr().err
    for flags in (["--speed", "--plot"], ["--steps", "many"], ["--only", "bert"]):
        with pytest.raises(SystemExit) as stop:
            study.main(flags)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MODELS["gpt2"].module, "train", lambda *_: False)
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


def test_the_record_is_of_the_full_sizes(recorded):
    sizes = study.full()
    assert recorded["recipe"] == sizes.recipe and recorded["window"] == sizes.window
    assert recorded["seeds"] == list(sizes.seeds)
    assert recorded["stories"] == sizes.stories
    for name in ("openings", "prompt", "new", "rounds", "turns"):
        assert recorded["speed"][name] == getattr(sizes, name)
    assert list(recorded["models"]) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_of_each_model(recorded, name):
    sizes, row = study.full(), recorded["models"][name]
    assert row["config"] == json.loads(json.dumps(asdict(sizes.configs[name])))
    assert tuple(row["seeds"]) == study.trained_seeds(name, sizes)
    total, active = counted(name, sizes.configs[name])
    assert row["parameters"] == {"total": total, "active": active}
    assert row["tokens"] == recorded["models"]["gpt2"]["tokens"][: len(row["seeds"])]
    for measure in ("held_out", *study.MEASURES):
        assert row[measure] == study.summary(row[measure]["seeds"])
    for curve, last in zip(row["curve"], row["held_out"]["seeds"], strict=True):
        assert [step for step, _ in curve] == list(range(40, 801, 40))
        assert curve[0][1] > curve[-1][1] == last > 0.3
    for seed, digest in zip(row["seeds"], row["weights"], strict=True):
        assert study.weights_digest(study.new_model(name, sizes, seed)) == digest
    for part in ("training", "decoding"):
        base = recorded["models"]["gpt2"][part]["tokens_per_second"]
        speed = row[part]["tokens_per_second"]
        assert row[part]["ratio"] == pytest.approx(speed / base)
