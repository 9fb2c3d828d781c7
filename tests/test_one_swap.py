# SPDX-License-Identifier: MIT
"""The ladder from GPT-2 to Llama 3 has both at its ends, and its record is whole."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import results
import torch
from chapters import ROOT

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import bench  # noqa: E402
import one_swap  # noqa: E402
from one_swap import RUNGS, gpt2, llama3  # noqa: E402

FIRST = replace(gpt2.TINY, vocab_size=31, dim=24, n_layers=2, ffn_dim=20)
LAST = replace(
    llama3.TINY, vocab_size=31, dim=24, n_layers=2, head_dim=6, ffn_dim=14, eos_id=30
)
ENDS = {"gpt2": (gpt2, FIRST), "gqa": (llama3, LAST)}


@pytest.fixture(scope="module", autouse=True)
def digests():
    """The sources do not change while they are tested, and hashing them takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "digest", lru_cache(maxsize=None)(results.digest))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick run, its record in it."""
    out = tmp_path_factory.mktemp("quick")
    assert one_swap.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done, tmp_path / "out")


@pytest.fixture(params=RUNGS)
def model(request):
    """A small model of each rung, every parameter random."""
    return random_model(request.param)


def config(rung):
    return one_swap.rung_config(rung, FIRST, LAST)


def random_model(rung):
    model = one_swap.Transformer(config(rung))
    llama3.randomise(model)
    return model.eval()


def data(path):
    return results.read(path)["data"]


# ---------------------------------------------------------------------------
# the models
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("rung", ENDS)
def test_the_ends_compute_what_the_chapters_do(rung):
    module, theirs_config = ENDS[rung]
    theirs = module.Transformer(theirs_config).eval()
    module.randomise(theirs)
    ours = one_swap.Transformer(config(rung)).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(31, (3, 200))
    assert torch.equal(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("rung", ENDS)
def test_the_ends_train_as_the_chapters_do(rung):
    module, theirs_config = ENDS[rung]
    recipe = llama3.Recipe(steps=3, warmup=1, batch_size=2, seq_len=50)
    stream = torch.randint(30, (3, 2, 51))
    batches = SimpleNamespace(batch=lambda index: stream[index])
    models, losses = [], []
    for make in (
        lambda: module.Transformer(theirs_config),
        lambda: one_swap.Transformer(config(rung)),
    ):
        torch.manual_seed(5)
        training = llama3.Training(make(), batches, batches, recipe)
        losses.append([training.take_step()["loss"] for _ in range(3)])
        models.append(training.model.state_dict())
    assert losses[0] == losses[1]
    theirs, ours = models
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_data_and_the_recipe_are_both_chapters_own():
    sizes = one_swap.full()
    assert (sizes.first, sizes.last) == (gpt2.TINY, llama3.TINY)
    assert sizes.first.dropout == 0
    # Chapter 4 names the length that chapter 2 takes from the model, and no dropout.
    theirs = asdict(gpt2.Recipe()) | {"seq_len": gpt2.TINY.max_seq_len}
    assert theirs.pop("dropout") == 0
    assert theirs == asdict(llama3.Recipe()) == asdict(sizes.recipe)
    tokenizer = gpt2.byte_tokenizer()
    documents = [f"{i} " * (3 + i) for i in range(9)]
    rows = [
        [batches.batch(i) for i in range(9)]
        for batches in (
            module.Batches(documents, tokenizer, 20, 4, 0) for module in (gpt2, llama3)
        )
    ]
    assert all(map(torch.equal, *rows))


def test_each_rung_is_the_one_below_with_one_part_exchanged():
    learned, chapter2, chapter4 = "Embedding", "gpt2", "llama3"
    found = {}
    for rung in RUNGS:
        block = random_model(rung).blocks[0]
        model = random_model(rung)
        norms = {type(n).__module__ for n in (block.attention_norm, block.ffn_norm)}
        assert norms == {type(model.norm).__module__}
        assert {norms.pop()} <= {chapter2, chapter4}
        found[rung] = [
            type(model.norm).__name__,
            type(block.attention).__module__,
            type(getattr(model, "positions", None)).__name__,
            type(block.ffn).__module__,
            model.config.n_kv_heads,
        ]
    assert found == {
        "gpt2": ["LayerNorm", "one_swap", learned, chapter2, 4],
        "rmsnorm": ["RMSNorm", "one_swap", learned, chapter2, 4],
        "rope": ["RMSNorm", chapter4, "NoneType", chapter2, 4],
        "swiglu": ["RMSNorm", chapter4, "NoneType", chapter4, 4],
        "gqa": ["RMSNorm", chapter4, "NoneType", chapter4, 2],
    }


def test_a_bias_leaves_with_its_part():
    names = {
        rung: {
            name.split(".")[-2]
            for name, _ in random_model(rung).named_parameters()
            if name.endswith("bias")
        }
        for rung in RUNGS
    }
    norms, attention = {"attention_norm", "ffn_norm", "norm"}, {"wq", "wk", "wv", "wo"}
    assert names["gpt2"] - names["rmsnorm"] == norms
    assert names["rmsnorm"] - names["rope"] == attention
    assert names["rope"] - names["swiglu"] == names["rope"] == {"w_up", "w_down"}
    assert not names["gqa"]


def test_a_cache_changes_nothing(model):
    tokens = torch.randint(31, (2, 40))
    cache = model.new_cache(2, 40)
    pieces = [model(piece, cache=cache) for piece in tokens.split([17, 20, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-4)


def test_a_saved_model_is_read_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = one_swap.Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    tokens = torch.randint(31, (2, 9))
    assert torch.equal(again(tokens), model(tokens))


# ---------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------


def test_every_rung_sees_the_same_tokens(tmp_path):
    runs = one_swap.Runs(one_swap.quick(), tmp_path, "version")
    trainings = [runs.training(rung) for rung in RUNGS]
    for i in (0, 1, 400):
        first, *others = [training.data.batch(i) for training in trainings]
        assert all(torch.equal(first, batch) for batch in others)
    other = runs.training("gpt2", seed=1)
    assert not torch.equal(trainings[0].data.batch(0), other.data.batch(0))
    weights = [training.model.embed.weight for training in (trainings[0], other)]
    assert not torch.equal(*weights)


def test_a_decode_step_is_what_generate_does_and_is_taken_back(model):
    sizes = replace(one_swap.quick(), cached=7, decoded=5)
    side = one_swap.decoding(model, 2, sizes)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(31, (2, 7), generator=generator)
    # The last token of the prompt is read once more, as the first of the timed passes.
    expected = llama3.generate(model, torch.cat([prompt, prompt[:, -1:]], 1), 5)
    for _ in range(2):
        assert torch.equal(side.run()[:, 0], expected[:, -1])
        side.undo()


def test_speed_is_compared_round_by_round():
    # A load that comes makes both slower, in one round one of them before the other:
    # the medians of the times alone would differ 16-fold.
    first, taken = [1.0, 1.0, 8.0, 8.0, 8.0], [0.5, 0.5, 0.5, 4.0, 4.0]
    row = one_swap.speed_row(first, taken, tokens=100)
    assert row["ratio"] == 2 and row["ratio_quartiles"][0] == 2
    assert row["ms"] == 500 and row["tokens_per_second"] == 200


def test_the_sides_take_turns(monkeypatch):
    order = []
    sides = [bench.Side(lambda i=i: order.append(i)) for i in range(5)]
    found = {rung: {} for rung in RUNGS}
    one_swap.timed(found, "training", sides, 10, 4)
    assert order[5:] == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0] * 2
    assert all(found[rung]["training"]["tokens_per_second"] > 0 for rung in RUNGS)


def test_shares_have_their_errors():
    found = {"consistency": 0.36, "without_faults": 0.0}
    found |= {"distinct_sentences": 0.5, "example": "A text."}
    row = one_swap.shares(found, 100)
    assert row["consistency_error"] == pytest.approx(0.048)
    assert row["without_faults_error"] == 0
    # Both ends of Wilson's interval are 1.96 of their own standard errors away from p.
    for p, (low, high) in (
        (0.36, row["consistency_interval"]),
        (0.0, row["without_faults_interval"]),
        (1.0, one_swap.wilson(1.0, 100)),
    ):
        for end in (low, high):
            error = (end * (1 - end) / 100) ** 0.5
            assert abs(p - end) == pytest.approx(1.96 * error, abs=1e-6)
        assert 0 <= low <= p <= high <= 1 and high - low > 0.03
    assert row["distinct_sentences"] == 0.5 and row["example"] == "A text."


# ---------------------------------------------------------------------------
# a quick run
# ---------------------------------------------------------------------------


def keys(found):
    """The keys of a record at every depth."""
    if not isinstance(found, dict):
        return None
    return {key: keys(value) for key, value in found.items()}


def test_a_quick_run_writes_the_record_and_the_figure(done):
    found = data(done / "quick.json")
    assert list(found) == ["trained", "speed"]
    assert all(part["machine"] and part["date"] for part in found.values())
    assert results.read(done / "quick.json")["files"] == {
        "quick.png": results.file_digest(done / "quick.png")
    }
    for rung in RUNGS:
        row = found["trained"][rung]
        assert [step for step, _ in row["curve"]] == [10, 20]
        assert row["curve"][-1][1] == row["held_out"] < row["curve"][0][1]


def test_a_second_run_trains_nothing_again(out, monkeypatch):
    def train(*_):
        raise AssertionError("this was trained already")

    monkeypatch.setattr(llama3, "train", train)
    before = data(out / "quick.json")
    assert one_swap.main(["--quick", "--out", str(out)]) == 0
    assert data(out / "quick.json")["trained"] == before["trained"]


def test_the_speed_is_measured_again_and_the_rest_stays(out, monkeypatch):
    path = out / "quick.json"
    before = results.read(path) | {"accepted": [{"reason": "a reason"}]}
    results.save(path, before)
    monkeypatch.setitem(one_swap.PARTS, "speed", lambda runs: {"rounds": 0})
    assert one_swap.main(["--quick", "--speed", "--out", str(out)]) == 0
    after = results.read(path)
    assert after["data"].pop("speed")["rounds"] == 0
    del before["data"]["speed"]
    assert {k: v for k, v in after.items() if k != "files"} == {
        k: v for k, v in before.items() if k != "files"
    }
    assert after["files"] == {"quick.png": results.file_digest(out / "quick.png")}


def test_seeds_join_the_record(out):
    before = data(out / "quick.json")
    assert one_swap.main(["--quick", "--seeds", "--out", str(out)]) == 0
    after = data(out / "quick.json")
    assert list(after) == ["trained", "seeds", "speed"]
    seeds = after.pop("seeds")
    assert after == before
    assert seeds["seed"] == 1
    for rung in RUNGS:
        assert seeds[rung]["held_out"] != before["trained"][rung]["held_out"]
        assert seeds[rung].keys() < before["trained"][rung].keys()


def test_one_rung_is_trained_alone_and_taken_afterwards(tmp_path, monkeypatch):
    assert one_swap.main(["--quick", "--train", "rope", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "quick.json").exists()
    assert len(list(tmp_path.glob("*/rope_seed0/run.json"))) == 1
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path, monkeypatch, capsys):
    sizes, train = one_swap.quick(), llama3.train
    whole = one_swap.Runs(sizes, tmp_path, "whole").train("rope")

    def stop(training, tokenizer, out):
        """As if Ctrl-C came during the evaluation of step 10."""
        for _ in range(10):
            row = training.take_step()
        row["held_out"] = llama3.held_out_loss(training)
        training.save(out, tokenizer)
        return False

    monkeypatch.setattr(llama3, "train", stop)
    stopped = one_swap.Runs(sizes, tmp_path, "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.train("rope")
    monkeypatch.setattr(llama3, "train", train)
    capsys.readouterr()
    after = stopped.train("rope")
    assert "from step 10\n" in capsys.readouterr().out
    assert after["curve"] == whole["curve"] and len(after["curve"]) == 2
    assert after["example"] == whole["example"]


def test_trainings_of_another_version_are_not_taken():
    sources = {source: "0" for source in one_swap.SOURCES}
    sizes = one_swap.quick()
    same = one_swap.version(sizes, sources)
    assert same == one_swap.version(replace(sizes, rounds=99), sources)
    longer = replace(sizes, recipe=replace(sizes.recipe, steps=21))
    for other in (
        one_swap.version(longer, sources),
        one_swap.version(sizes, sources | {"data/stories.txt": "1"}),
        one_swap.version(sizes, sources | {"ch04_llama3/llama3.py::apply_rope": "1"}),
    ):
        assert other != same


# ---------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------


def test_a_part_is_not_joined_to_a_record_of_other_sources(out, capsys):
    path = out / "quick.json"
    stale = results.read(path)
    stale["sources"]["data/stories.txt"] = "0" * 64
    results.save(path, stale)
    before = path.read_bytes()
    assert one_swap.main(["--quick", "--speed", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another data/stories.txt" in error
    assert path.read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--speed"]])
def test_nothing_is_recorded_when_a_source_changes_meanwhile(
    out, flags, monkeypatch, capsys
):
    path, digest = out / "quick.json", results.digest
    before = path.read_bytes()

    def speed(runs):
        monkeypatch.setattr(results, "digest", changed)
        return {}

    def changed(source, root=ROOT):
        return "0" * 64 if source == "data/stories.txt" else digest(source, root)

    monkeypatch.setitem(one_swap.PARTS, "speed", speed)
    assert one_swap.main(["--quick", *flags, "--out", str(out)]) == 2
    assert "data/stories.txt changed meanwhile" in capsys.readouterr().err
    assert path.read_bytes() == before and not list(out.glob("*.partial"))


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for flags, said in (
        (["--out", str(tmp_path / "file")], "--out names a folder"),
        (["--record", str(tmp_path / "folder")], "--record names a file"),
        (["--speed", "--out", str(tmp_path)], "run all of it first"),
    ):
        assert one_swap.main(["--quick", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("one_swap.py: ") and error.count("\n") == 1
        assert said in error
    for flags in (["--train", "gpt3"], ["--speed", "--seeds"]):
        with pytest.raises(SystemExit) as stop:
            one_swap.main(flags)
        assert stop.value.code == 2


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama3, "train", lambda *_: False)
    assert one_swap.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "quick.json").exists()


# ---------------------------------------------------------------------------
# the record
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return data(one_swap.RECORD)


def test_the_record_has_what_a_quick_run_has(recorded, done):
    quick = json.loads(json.dumps(data(done / "quick.json")))
    for rung in RUNGS:  # they decode other batches
        quick["speed"][rung]["decode_32"] = quick["speed"][rung].pop("decode_2")
    assert keys(quick) == keys({k: v for k, v in recorded.items() if k != "seeds"})


def test_the_record_is_of_the_chapters_recipe(recorded):
    trained = recorded["trained"]
    assert trained["recipe"] == asdict(llama3.Recipe())
    assert trained["stories"] == 200 and trained["rungs"] == list(RUNGS)
    assert trained["real"]["consistency"] == trained["real"]["without_faults"] == 1


@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_recorded_of_each_rung(recorded, rung):
    row = recorded["trained"][rung]
    shape = one_swap.rung_config(rung, gpt2.TINY, llama3.TINY)
    model = one_swap.Transformer(shape)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["biases"] == sum(
        p.numel() for name, p in model.named_parameters() if name.endswith("bias")
    )
    assert (row["ffn_dim"], row["n_kv_heads"]) == (shape.ffn_dim, shape.n_kv_heads)
    assert row["cache_bytes_per_token"] == 2 * 3 * shape.n_kv_heads * 32 * 4
    assert row["steps"] == 5000 and row["tokens"] == 5000 * 4 * 256
    steps, losses = zip(*row["curve"], strict=True)
    assert steps == tuple(range(250, 5001, 250))
    assert losses[-1] == row["held_out"] < 0.6 and all(0.3 < x < 6 for x in losses)
    for name in ("consistency", "without_faults"):
        low, high = row[f"{name}_interval"]
        assert 0 <= low <= row[name] <= high <= 1
        assert row[name] * 200 == pytest.approx(round(row[name] * 200))


def test_what_is_recorded_of_other_seeds(recorded):
    seeds = recorded["seeds"]
    for rung in RUNGS:
        assert seeds[rung]["held_out"] != recorded["trained"][rung]["held_out"]
        assert seeds[rung]["curve"][-1] == [5000, seeds[rung]["held_out"]]


def test_the_recorded_speeds(recorded):
    speed = recorded["speed"]
    assert speed["training_tokens"] == 4 * 256 and speed["batches"] == [1, 32]
    for what, tokens in (("training", 1024), ("decode_1", 32), ("decode_32", 1024)):
        assert speed["gpt2"][what]["ratio"] == 1
        for rung in RUNGS:
            row = speed[rung][what]
            assert row["tokens_per_second"] == pytest.approx(tokens / row["ms"] * 1e3)
            low, high = row["ratio_quartiles"]
            assert low <= row["ratio"] <= high
