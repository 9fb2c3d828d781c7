# SPDX-License-Identifier: MIT
"""`make bench` measures what it says: the same step on both sides, at one place."""

import json
from dataclasses import replace

import bench
import pytest
import results
import torch
from chapters import ROOT, discover, load

CACHED = [c for c in discover() if hasattr(load(c).Transformer, "new_cache")]
PLAIN = [c for c in discover() if c not in CACHED and hasattr(load(c), "reference")]
EXPERT = [c for c in discover() if hasattr(load(c), "Experts")]
MEMORY = {"cached", "tokens_per_second", "bytes", "gb_per_second", "of_memory"}


@pytest.fixture(params=CACHED, ids=str)
def module(request):
    return load(request.param)


@pytest.fixture
def saved(request, module, tmp_path):
    """A case whose two sides have the same weights, all of them random."""
    chapter = next(c for c in CACHED if load(c) is module)
    config = module.small_config()
    model = module.Transformer(config)
    module.randomise(model)
    model.save_pretrained(tmp_path)
    return bench.Case(chapter, "small decode", config, (2, 1), "decode", 7, tmp_path)


def prompt_and_token(case):
    (ids,) = bench.inputs(load(case.chapter), case.config, (2, case.cached + 1))
    return ids.split([case.cached, 1], dim=1)


def test_both_sides_take_the_same_step_again_and_again(saved):
    ours, theirs = bench.pair(saved, "cpu")
    prompt, token = prompt_and_token(saved)
    with torch.inference_mode():
        expected = ours(torch.cat([prompt, token], dim=1))[:, -1:]
    mine, cache = bench.decode(ours, prompt, token)
    other, their_cache = bench.their_decode(theirs, prompt, token)
    for _ in range(3):
        torch.testing.assert_close(mine.run(), expected)
        torch.testing.assert_close(other.run().logits, expected)
        for side in (mine, other):
            side.undo()
        assert cache.length == their_cache.get_seq_length() == saved.cached


def test_a_growing_cache_is_an_error(saved):
    ours, theirs = bench.pair(saved, "cpu")
    prompt, token = prompt_and_token(saved)
    for start, model in ((bench.decode, ours), (bench.their_decode, theirs)):
        side, _ = start(model, prompt, token)
        bench.take_turns([side], 2, "cpu")
        side.undo = lambda: None
        with pytest.raises(RuntimeError, match="at 7 went from 8 to 9 tokens"):
            bench.take_turns([side], 2, "cpu")


def test_undoing_is_not_timed():
    clock = []
    side = bench.Side(lambda: clock.append("run"), lambda: clock.append("undo"))
    times = iter([1.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench.time, "perf_counter", lambda: clock.append("time") or next(times)
        )
        assert bench.seconds(side, "cpu") == 2.0
    assert clock == ["time", "run", "time", "undo"]


def test_a_prefill_ends_with_the_same_cache(saved):
    ours, theirs = bench.pair(saved, "cpu")
    prompt, _ = prompt_and_token(saved)
    heads = []
    for head in (ours.head, theirs.get_output_embeddings()):
        head.register_forward_hook(lambda module, _, out: heads.append(out))
    cache, their_cache = (
        bench.prefill(ours, prompt),
        bench.their_prefill(theirs, prompt),
    )
    assert cache.length == their_cache.get_seq_length() == prompt.shape[1]
    assert heads[0].shape == (2, 1, saved.config.vocab_size), "one position a row"
    torch.testing.assert_close(*heads)


def test_generate_uses_the_cache_that_is_measured(saved):
    from transformers import DynamicCache

    theirs = bench.pair(saved, "cpu")[1]
    prompt, _ = prompt_and_token(saved)
    flags = {"max_new_tokens": 2, "return_dict_in_generate": True, "pad_token_id": 0}
    made = theirs.generate(prompt, **flags).past_key_values
    assert type(made) is type(bench.their_prefill(theirs, prompt)) is DynamicCache


def test_the_bytes_of_a_step_by_hand(module):
    config = replace(module.small_config(), tie_embeddings=True)
    model = module.Transformer(config)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    unread = sum(t.weight.numel() for t in tables if t is not model.embed)
    weights = sum(p.numel() for p in model.parameters()) - unread
    if hasattr(model, "mtp"):  # which a step does without, as without most experts
        counts = module.parameter_counts(model)
        assert weights == counts["total"] + counts["mtp"]
        weights = counts["active"]
    B, S, L = 2, 7, config.n_layers
    room = min(config.max_seq_len, bench.ROOM)
    cache = model.new_cache(B, room)
    kept = cache.nbytes // 4 // room * S
    assert bench.bytes_read(model, cache, S) == 4 * (weights + kept)
    if hasattr(config, "n_kv_heads"):
        assert kept == 2 * B * L * S * config.n_kv_heads * config.head_dim
    else:
        assert kept == B * L * S * (config.latent_dim + config.rope_dim)
    untied = module.Transformer(replace(config, tie_embeddings=False))
    assert bench.bytes_read(untied, cache, S) == 4 * (weights + kept), (
        "an embedding table beside the head is not read through"
    )


def test_a_step_does_not_depend_on_the_room(saved, monkeypatch):
    """Only what is filled is read: the count of bytes must not see the rest."""
    ours, _ = bench.pair(saved, "cpu")
    found = set()
    for room in (16, 32):
        monkeypatch.setattr(bench, "ROOM", room)
        cache = bench.prefill(ours, prompt_and_token(saved)[0])
        found.add(bench.bytes_read(ours, cache, saved.cached))
    assert len(found) == 1


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The output and the rows of one quick run over a chapter of each kind."""
    path = tmp_path_factory.mktemp("bench") / "new" / "rows.json"
    names = [chapters[0].prefix for chapters in (PLAIN[1:], CACHED) if chapters]
    flags = ["--quick", "--rounds", "1", "--json", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *text, **_: said.append(*text))
        assert bench.main([*names, *flags]) == 0
    return "\n".join(said), json.loads(path.read_text(encoding="utf-8"))


def test_a_quick_run_has_every_row(quick):
    said, found = quick
    assert found["rounds"] == 1 and found["threads"] == torch.get_num_threads()
    for chapter in [*PLAIN[1:2], *CACHED[:1]]:
        rows = [r for r in found["rows"] if r["chapter"] == chapter.name]
        what = [(row["what"], row["batch"]) for row in rows]
        longest = load(chapter).TINY.max_seq_len
        expected = [
            ("TINY forward", [1, min(256, longest)]),
            ("TINY forward", [4, 128]),
            ("TINY step", [4, 64]),
        ]
        if chapter in CACHED:
            ends = [min(n, longest - 1) for n in (100, 1000)]
            expected += [("TINY prefill", [1, min(512, longest)])]
            expected += [(f"TINY decode at {n}", [b, 1]) for b in (1, 8) for n in ends]
        assert what == expected
        for row in rows:
            assert row["ratio"] == row["ours_ms"] / row["theirs_ms"] > 0
            decode = "decode" in row["what"]
            assert (row.keys() >= MEMORY) == decode
            assert ("of_gemm" in row) != decode
            share = row["of_memory"] if decode else row["of_gemm"]
            assert f"{share:.0%}" in said
            if decode:
                per_second = row["batch"][0] / row["ours_ms"] * 1e3
                assert row["tokens_per_second"] == pytest.approx(per_second)
                taken = row["bytes"] / row["ours_ms"] / 1e6
                assert row["gb_per_second"] == pytest.approx(taken)
                assert row["of_memory"] == taken / row["memory_gb_per_second"]


def test_the_table_lines_up(quick):
    head, *rows = [x for x in quick[0].splitlines() if x.startswith("ch")]
    ends = [head.index(name) + len(name) for name in ("ratio", "of GEMM", "of memory")]
    for row in rows:
        shares = [i + 1 for i, sign in enumerate(row) if sign == "%"]
        assert len(shares) == 1 and shares[0] in ends[1:], row
        assert len(row) == ends[2 if "decode" in row else 1]
        assert row[ends[0] - 3] == ".", row


def test_chapters_without_a_cache_keep_the_rows_of_their_records(quick):
    recorded = results.read(ROOT / "ch02_gpt2/results/bench.json")["data"]["rows"]
    rows = [row for row in quick[1]["rows"] if row["chapter"] == "ch02_gpt2"]
    assert [list(row) for row in rows] == [list(row) for row in recorded]
    assert [row["batch"] for row in rows][:2] == [r["batch"] for r in recorded][:2]


def test_a_real_model_stands_in_where_presets_are_too_large(
    saved, module, monkeypatch, tmp_path
):
    def labels(quick=False):
        cases = bench.cases(saved.chapter, quick)
        return [case.label for case in cases if case.kind != "experts"]

    monkeypatch.setattr(bench, "LARGEST", 0)
    monkeypatch.setattr(bench, "SMOLLM2", tmp_path / "none")
    assert all(label.startswith("TINY") for label in labels())
    monkeypatch.setattr(bench, "SMOLLM2", tmp_path)
    config = bench.plain(module.small_config())
    for case in bench.cases(saved.chapter, False):
        if "step" not in case.label and case.kind != "experts":
            assert case.label.startswith(tmp_path.name)
            assert (case.config, case.folder) == (config, tmp_path)
    assert all(label.startswith("TINY") for label in labels(quick=True))
    row = bench.measure(saved, 1, "cpu")
    assert row["cached"] == 7 and row["batch"] == [2, 1]
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "of another chapter"}', encoding="utf-8")
    assert all(label.startswith("TINY") for label in labels())


def test_the_wider_tiny_model_has_wider_heads(module):
    config = bench.widened(module.TINY)
    assert config.dim == 3 * module.TINY.dim
    widths = {"head_dim", "rope_dim", "value_dim", "expert_ffn_dim"}
    widths |= {"q_latent_dim", "latent_dim", "ffn_dim"}
    for name in widths:
        if hasattr(config, name):
            assert getattr(config, name) == 3 * getattr(module.TINY, name), name
    assert any(hasattr(config, name) for name in widths if "head_dim" in name)
    assert (config.n_heads, config.n_layers) == (
        module.TINY.n_heads,
        module.TINY.n_layers,
    )


@pytest.mark.parametrize("chapter", EXPERT, ids=str)
def test_the_experts_are_measured_alone(chapter, monkeypatch):
    cases = [case for case in bench.cases(chapter, True) if case.kind == "experts"]
    assert [case.label for case in cases] == [
        f"8 experts {kind}" for kind in ("forward", "step") for _ in range(2)
    ]
    assert [case.size for case in cases] == 2 * [(1, 1), (1024, 1)]
    row = bench.measure(cases[0], 1, "cpu")
    assert row["of_loop"] == row["ours_ms"] / row["loop_ms"] > 0
    assert bench.line(row).endswith(f"{row['of_loop']:.2f} of the loop")
    experts = load(chapter).Experts
    wrong = experts.one_by_one
    monkeypatch.setattr(experts, "one_by_one", lambda *a: 1.1 * wrong(*a))
    with pytest.raises(AssertionError):  # what is not equal is not compared in speed
        bench.measure(cases[0], 1, "cpu")


WRONG = {
    "no such chapter": (["ch99"], "no single chapter starts with 'ch99'"),
    "no rounds": (["--rounds", "0"], "'0' is not a positive number"),
    "no threads": (["--threads", "-1"], "'-1' is not a positive number"),
    "a folder": (["--json", "."], ". is a folder; --json names a file"),
    "a file as folder": (["--json", f"{__file__}/x.json"], "test_bench.py"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_exit_code_2(case, capsys, monkeypatch):
    flags, message = WRONG[case]
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it measured"))
    try:
        code = bench.main(flags)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert "no CUDA device was found" in capsys.readouterr().err
