# SPDX-License-Identifier: MIT
"""The study of a large checkpoint: what it makes, measures and refuses."""

import copy
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import results
import torch
from chapters import ROOT, find, load

SCRIPT = ROOT / "tests" / "studies" / "load_large.py"
study = load(SCRIPT)
llama = load(find("ch04"))

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads /proc, as Linux has it"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole study at the tiny size: the folder of its checkpoints, its record."""
    folder = tmp_path_factory.mktemp("large")
    flags = ["--size", "tiny", "--repeats", "1", "--keep", str(folder)]
    path = folder / "record.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--json", str(path)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return folder, results.read(path)


def count(config):
    return sum(torch.Size(shape).numel() for shape in study.shapes(config).values())


# ------------------------------------------------------------------ the checkpoint


def test_the_large_checkpoint_has_the_published_names_shapes_and_shards():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**study.LLAMA_3B))
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert study.shapes(study.LLAMA_3B) == expected
    assert count(study.LLAMA_3B) == 3_212_749_824
    shards = study.plan_shards(study.shapes(study.LLAMA_3B), study.SIZES["3b"][1])
    assert len(shards) == 2
    assert sum(shards, []) == list(study.shapes(study.LLAMA_3B))


def test_its_config_is_the_preset():
    assert llama.Config.from_hf(study.LLAMA_3B) == llama.LLAMA_3_2_3B


def test_a_shard_ends_where_the_next_tensor_would_be_too_much():
    wanted = {"a": (3, 5), "b": (2, 5), "c": (7,), "d": (100,)}  # 30, 20, 14, 200 bytes
    assert study.plan_shards(wanted, 50) == [["a", "b"], ["c"], ["d"]]


@needs_proc
def test_the_tiny_one_is_sharded_random_and_whole(tiny):
    from safetensors.torch import load_file

    folder = tiny[0] / "tiny-hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    state = {}
    for file in files:
        found = load_file(folder / file)
        assert {index["weight_map"][name] for name in found} == {file}
        state |= found
    assert {n: tuple(t.shape) for n, t in state.items()} == study.shapes(study.TINY)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for name, tensor in state.items():  # every one drawn for itself, norms too
        assert tensor.float().std() > 0.03, name
        same = [n for n, t in state.items() if t.shape == tensor.shape and n != name]
        assert not any(torch.equal(state[n], tensor) for n in same), name
    made = [torch.cat(list(study.pieces(n, tuple(state[n].shape)))) for n in state]
    assert all(map(torch.equal, made, state.values()))


@needs_proc
def test_metas_file_holds_the_same_weights_in_its_own_order(tiny):
    from safetensors.torch import load_file

    hf = {}
    for path in (tiny[0] / "tiny-hf").glob("*.safetensors"):
        hf |= load_file(path)
    meta = torch.load(tiny[0] / "tiny-meta" / "consolidated.00.pth", weights_only=True)
    sources = study.meta_sources(study.TINY)
    assert list(meta) == list(sources)
    assert set(sources.values()) == set(hf)
    K = study.TINY["head_dim"]
    for name, theirs in sources.items():
        expected = hf[theirs]
        if "wq" in name or "wk" in name:
            assert not torch.equal(meta[name], expected), name
            expected = torch.cat(
                [
                    expected[head * K + part * K // 2 + pair].unsqueeze(0)
                    for head in range(len(expected) // K)
                    for pair in range(K // 2)
                    for part in range(2)
                ]
            )
        assert torch.equal(meta[name], expected), name
    params = json.loads((tiny[0] / "tiny-meta" / "params.json").read_text())
    config = llama.Config.from_meta(params, tied=True)
    published = llama.Config.from_hf(study.TINY)
    different = {"bos_id", "eos_id", "pad_id"}
    for field in vars(published).keys() - different:
        assert getattr(config, field) == getattr(published, field), field


def test_a_large_matrix_is_drawn_in_slices_of_rows(monkeypatch):
    monkeypatch.setattr(study, "CHUNK", 60)
    parts = list(study.pieces("some.weight", (7, 29)))
    assert [tuple(part.shape) for part in parts] == [(2, 29), (2, 29), (2, 29), (1, 29)]


# --------------------------------------------------------------------- the record


@needs_proc
def test_the_record_says_what_was_measured(tiny):
    record = tiny[1]
    assert record["command"] == (
        "python tests/studies/load_large.py --size tiny --repeats 1"
    )
    assert list(record["sources"]) == [
        "ch04_llama3/llama3.py::model",
        "ch04_llama3/llama3.py::read_tensors",
        "ch04_llama3/llama3.py::read_safetensors",
        "ch04_llama3/llama3.py::read_torch",
        "tests/studies/load_large.py",
    ]
    data = record["data"]
    assert data["left_out"] == [] and data["shards"] == 2
    cases = {(row["format"], row["dtype"], row["side"]) for row in data["loads"]}
    assert len(data["loads"]) == len(cases) == 6
    assert cases == set(study.cases(study.FORMATS, study.DTYPES))
    for row in data["loads"]:
        width = 4 if row["dtype"] == "float32" else 2
        assert row["parameters"] == count(study.TINY)
        assert row["weights_gib"] == round(width * count(study.TINY) / 2**30, 3)
        # Python and torch alone take about a fifth of a GiB.
        assert 0.1 < row["excess_gib"] < 1
        assert row["peak_gib"] == pytest.approx(
            row["weights_gib"] + row["excess_gib"], abs=0.002
        )
        assert row["peak_in_use_gib"] >= row["peak_gib"]
        assert row["excess_in_use_gib"] < 1
        assert row["seconds"] == row["all_seconds"][0] > 0
        assert row["ready_seconds"] == pytest.approx(
            row["seconds"] + row["first_token_seconds"], abs=0.02
        )
        assert row["tokens_per_second"] > 0
        assert len(row["new_tokens"]) == study.NEW_TOKENS


@needs_proc
def test_both_sides_and_both_formats_agree(tiny):
    data = tiny[1]["data"]
    rows = {(row["dtype"], row["with"]): row for row in data["agreement"]}
    assert len(rows) == 4
    for dtype in study.DTYPES:
        assert rows[dtype, "ours, meta"]["relative"] == 0
        assert rows[dtype, "ours, meta"]["same_tokens"]
        assert (
            rows[dtype, "theirs, hf"]["relative"]
            < (llama.TOLERANCE[getattr(torch, dtype)])
        )
    assert rows["float32", "theirs, hf"]["same_tokens"]
    assert study.faults(data) == []


@needs_proc
def test_the_numbers_of_status_are_bytes():
    # In a process of its own: what earlier tests leave may be given back meanwhile.
    code = (
        f"import sys; sys.path.insert(0, {str(Path(study.__file__).parent)!r});"
        "import load_large as study;"
        "before = study.status('VmRSS'); block = bytearray(b'x') * 2**28;"
        "print(study.status('VmRSS') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 0.9 * 2**28 < int(done.stdout) < 1.5 * 2**28
    with pytest.raises(OSError, match="no VmNothing"):
        study.status("VmNothing")


GOOD = {
    "loads": [
        {
            "side": "ours",
            "format": "hf",
            "dtype": "float32",
            "excess_gib": 0.4,
            "excess_in_use_gib": 0.4,
        },
        {
            "side": "theirs",
            "format": "hf",
            "dtype": "float32",
            "excess_gib": 6.0,
            "excess_in_use_gib": 6.0,
        },
    ],
    "agreement": [
        {
            "dtype": "float32",
            "with": "theirs, hf",
            "relative": 1e-6,
            "tolerance": 1e-5,
            "same_tokens": True,
        }
    ],
}


def changed(part, **values):
    data = copy.deepcopy(GOOD)
    data[part][0] |= values
    return data


FAULTY = {
    "peaks at 1.001 GiB over": changed("loads", excess_gib=1.001),
    "peaks at 1.002 GiB over": changed("loads", excess_in_use_gib=1.002),
    "differ by 1.0e-03 of the largest": changed("agreement", relative=1e-3),
    "differ by nan": changed("agreement", relative=float("nan")),
    "other tokens": changed("agreement", same_tokens=False),
}


@pytest.mark.parametrize("words", FAULTY)
def test_what_does_not_hold_ends_the_command_and_is_not_recorded(
    words, monkeypatch, tmp_path, capsys
):
    assert study.faults(GOOD) == []
    monkeypatch.setattr(study, "study", lambda args: FAULTY[words])
    path = tmp_path / "record.json"
    assert study.main(["--json", str(path)]) == 1
    assert words in capsys.readouterr().err
    assert not path.exists()


def test_in_bfloat16_near_ties_may_fall_either_way():
    assert study.faults(changed("agreement", same_tokens=False, dtype="bfloat16")) == []


def test_only_the_whole_study_writes_the_committed_record(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(study, "study", lambda args: GOOD)
    monkeypatch.setattr(study.results, "write", lambda path, *_: written.append(path))
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--keep", "x", "--repeats", "1"]):
        assert study.main(flags) == 0
    assert written == [study.RECORD] * 2
    for flags in (["--size", "tiny"], ["--dtype", "float32"], ["--format", "hf"]):
        assert study.main(flags) == 0
    assert len(written) == 2
    assert study.main(["--format", "meta", "--json", "y.json"]) == 0
    assert written[2:] == [Path("y.json")]


@pytest.mark.parametrize(
    "flags",
    [[], ["--size", "tiny", "--format", "meta"], ["--dtype", "float32", "bfloat16"]],
    ids=str,
)
def test_the_recorded_command_is_what_would_be_typed(flags):
    args = study.parser().parse_args([*flags, "--keep", "x", "--json", "y"])
    again = study.parser().parse_args(study.recorded(args))
    for name in ("size", "formats", "dtypes", "repeats"):
        assert getattr(again, name) == getattr(args, name)


def test_the_committed_record_keeps_the_bound():
    record = results.read(study.RECORD)
    data = record["data"]
    assert data["size"] == "3b" and data["left_out"] == []
    assert study.faults(data) == []
    rows = {(r["format"], r["dtype"], r["side"]): r for r in data["loads"]}
    assert set(rows) == set(study.cases(study.FORMATS, study.DTYPES))
    for (_, dtype, side), row in rows.items():
        assert row["parameters"] == 3_212_749_824
        width = 4 if dtype == "float32" else 2
        assert row["weights_gib"] == round(width * row["parameters"] / 2**30, 3)
        assert row["peak_in_use_gib"] <= row["weights_gib"] + 1 or side == "theirs"
    assert len(data["agreement"]) == 4


# ------------------------------------------------------------------------- mistakes


def only_line(capsys):
    """What went to stderr: one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@needs_proc
def test_a_disk_without_room_is_named_before_anything_is_written(
    monkeypatch, tmp_path, capsys
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(study.shutil, "disk_usage", lambda _: usage(0, 0, 3 * 2**30))
    monkeypatch.setattr(study, "make_hf", lambda *_: pytest.fail("it is made"))
    assert study.main(["--keep", str(tmp_path / "kept")]) == 2
    line = only_line(capsys)
    assert "takes 6.0 GiB" in line and "has 3.0 GiB free" in line
    assert list((tmp_path / "kept").iterdir()) == []


@needs_proc
def test_too_little_memory_leaves_a_type_out_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "available", lambda: 8 * 2**30)
    monkeypatch.setattr(study, "make", lambda *_: tmp_path)
    ran = []

    def child(job):
        ran.append((job["dtype"], job["side"], job["generate"]))
        return {
            "seconds": 2.0,
            "peak": 7 * 2**30,
            "weights": 6 * 2**30,
            "parameters": 1,
            "dtypes": ["torch.bfloat16"],
            "peak_generating": 7 * 2**30,
            "first_seconds": 0.5,
            "tokens_per_second": 3.0,
            "new": [1, 2],
        }

    monkeypatch.setattr(study, "run_child", child)
    flags = ["--format", "hf", "--keep", str(tmp_path), "--repeats", "2"]
    args = study.parser().parse_args(flags)
    found = study.run_cases(args, tmp_path, tmp_path)
    # The sides take turns, and generate in the first of them.
    turns = [(side, first) for first in (True, False) for side in ("ours", "theirs")]
    assert ran == [("bfloat16", *turn) for turn in turns]
    (left_out,) = found["left_out"]
    assert left_out["dtype"] == "float32"
    assert "needs 13.5 GiB of memory, and 8.0 GiB are free" in left_out["reason"]
    assert "Left out, hf: float32 needs 13.5 GiB" in capsys.readouterr().out
    assert [row["excess_gib"] for row in found["loads"]] == [1.0, 1.0]


def test_a_checkpoint_cut_short_while_it_is_made_leaves_nothing(monkeypatch, tmp_path):
    def fail(config, most, folder):
        (folder / "half").write_text("x")
        raise OSError("no space left")

    monkeypatch.setattr(study, "make_hf", fail)
    with pytest.raises(OSError, match="no space"):
        study.make("tiny", "hf", tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_a_load_that_fails_is_one_line(tiny, tmp_path, capsys):
    broken = tmp_path / "tiny-hf"
    shutil.copytree(tiny[0] / "tiny-hf", broken)
    shard = broken / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    flags = ["--size", "tiny", "--format", "hf", "--dtype", "float32"]
    assert study.main([*flags, "--keep", str(tmp_path)]) == 2
    line = only_line(capsys)
    assert "ours in float32" in line and "damaged or cut short" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--repeats", "0"], "at least 1"),
        (["--size", "70b"], "invalid choice"),
        (["--format", "gguf"], "invalid choice"),
    ],
    ids=str,
)
def test_a_flag_that_makes_no_sense_is_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(study, "study", lambda _: pytest.fail("it goes on"))
    with pytest.raises(SystemExit) as caught:
        study.main(flags)
    assert caught.value.code == 2
    assert words in only_line(capsys)


def test_without_proc_the_command_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(study.Path, "exists", lambda self: False)
    monkeypatch.setattr(study, "run_cases", lambda *_: pytest.fail("it goes on"))
    assert study.main(["--size", "tiny"]) == 2
    assert "needs Linux" in only_line(capsys)
