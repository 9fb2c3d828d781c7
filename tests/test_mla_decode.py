# SPDX-License-Identifier: MIT
"""The study of decoded tokens counts what torch counts, and its record is whole."""

import math
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import pytest
import results
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "studies"))

import mla_decode as study  # noqa: E402

module = study.module
# P = K + R, so that no value is padded: the counter would count the zeros too.
EVEN = replace(
    study.quick().config,
    **{"n_layers": 1, "dim": 20, "n_heads": 3, "latent_dim": 14},
    **{"head_dim": 10, "rope_dim": 6, "value_dim": 16},
)


@pytest.fixture(scope="module", autouse=True)
def digests():
    """The sources do not change while they are tested, and hashing them takes long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "digest", lru_cache(maxsize=None)(results.digest))
        yield


@pytest.fixture(scope="module")
def recorded():
    return results.read(study.RECORD)["data"]


@pytest.mark.parametrize("rank", [None, 11])
@pytest.mark.parametrize(("B", "T", "S"), [(1, 1, 9), (2, 1, 30), (2, 5, 12)])
@pytest.mark.parametrize("form", study.FORMS)
def test_operations_are_those_that_torch_counts(form, B, T, S, rank):
    config = replace(EVEN, q_latent_dim=rank)
    with torch.device("meta"):
        attention = module.Transformer(config).blocks[0].attention
        cache = module.LayerCache(torch.zeros(B, S, 14 + 6))
        rope = torch.zeros(2, T, 3)
        x, seen = torch.zeros(B, T, 20), torch.ones(1, 1, T, S, dtype=torch.bool)
    cache.length = S - T
    pays = patch.object(module, "absorption_pays", lambda *_: form == "absorbed")
    with FlopCounterMode(display=False) as counter, pays, torch.no_grad():
        attention(x, rope, seen, cache)
    assert study.cost(config, form, B, T, S)["flops"] == counter.get_total_flops()


def test_bytes_are_weights_cache_and_what_is_expanded():
    with torch.device("meta"):
        model = module.Transformer(EVEN)
        cache = model.new_cache(2, 9)
    parts = model.blocks[0].attention.named_parameters()
    weights = sum(p.nbytes for name, p in parts if "norm" not in name)
    absorbed, naive = (
        study.cost(EVEN, form, 2, 1, 9)["bytes"] for form in ("absorbed", "naive")
    )
    assert absorbed == weights + cache.nbytes
    expanded = 2 * 9 * 3 * (10 + 6 + 16) * 4  # B, S, H, K + R + P
    assert naive == absorbed + 2 * expanded


def test_the_crossing_is_where_the_chapter_changes_its_form():
    config = study.full().config
    for S in (0, 16, 256, 4096):
        T = study.predicted_crossing(config, S)
        assert not module.absorption_pays(T, S + T, config)
        assert T == 1 or module.absorption_pays(T - 1, S + T - 1, config)
    assert study.predicted_crossing(config, 4096, most=100) is None


def test_the_measured_crossing_lies_between_its_neighbours():
    new = (1, 10, 100, 1000)
    assert study.measured_crossing(new, (8.0, 2.0, 0.5, 0.1)) == pytest.approx(
        10 * math.sqrt(10)
    )
    assert study.measured_crossing(new, (0.9, 2.0, 1.0, 0.1)) == pytest.approx(100)
    assert study.measured_crossing(new, (8.0, 4.0, 2.0, 1.5)) is None


def test_all_three_ways_give_the_same():
    place = study.Bench(study.quick().config)
    sides = [place.form(form, 2, 3, 8) for form in study.FORMS]
    sides.append(place.reference(2, 3, 8))
    first, *others = [side.run() for side in sides]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)
    for side in sides:  # and again, from where they began
        side.undo()
        torch.testing.assert_close(side.run(), first, atol=1e-4, rtol=1e-4)


def test_a_quick_run_writes_record_and_figure(tmp_path, capsys):
    path = tmp_path / "quick.json"
    assert study.main(["--quick", "--record", str(path)]) == 0
    found = results.read(path)
    assert found["command"].endswith("mla_decode.py --quick")
    assert found["files"] == {"quick.png": results.file_digest(tmp_path / "quick.png")}
    rows = found["data"]["steps"]
    assert [(row["batch"], row["cached"]) for row in rows] == [(1, 8), (2, 8)]
    assert set(rows[0]) == {"batch", "cached", *study.WAYS}
    assert f"written: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--record", "."]], ids=["nowhere", "folder"])
def test_a_mistake_is_one_line(more, capsys):
    before = study.RECORD.read_bytes()
    assert study.main(["--quick", *more]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert study.RECORD.read_bytes() == before


def test_the_record_holds_what_was_asked(recorded):
    sizes = study.full()
    asked = [(row["batch"], row["cached"]) for row in recorded["steps"]]
    assert asked == list(sizes.steps)
    for row in recorded["steps"]:
        B, S = row["batch"], row["cached"]
        for way in study.WAYS:
            form = "absorbed" if way == "absorbed" else "naive"
            for name, n in study.cost(sizes.config, form, B, 1, S + 1).items():
                assert row[way][name] == sizes.config.n_layers * n
    for row in recorded["chunks"]:
        assert row["new"] == list(sizes.new)
        predicted = study.predicted_crossing(sizes.config, row["cached"])
        assert row["cross"]["predicted"] == predicted
        measured = study.measured_crossing(row["new"], row["time"])
        assert row["cross"]["measured"] == pytest.approx(measured)


def test_what_the_notebook_says_of_the_record(recorded):
    long = [row for row in recorded["steps"] if row["cached"] >= 1024]
    for way in ("naive", "reference"):
        assert all(row[way]["over_absorbed"] > 5 for row in long)
    for row in recorded["chunks"]:
        assert 1 / 2 < row["cross"]["measured"] / row["cross"]["predicted"] < 2
