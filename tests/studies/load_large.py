# SPDX-License-Identifier: MIT
"""What loading a checkpoint of the size of Llama 3.2-3B takes, in time and in memory.

    python tests/studies/load_large.py [--keep DIR]

The checkpoint has the shapes, the names and the files of the published one, and random
weights: bfloat16 in two safetensors shards, and the same weights again as Meta ships
them, consolidated.00.pth and params.json, with the query and key rows in Meta's order
and the tied head written out. Both are made tensor by tensor.

Each is then loaded by chapter 4 and, where it can read the format, by Hugging Face, in
bfloat16 and in float32, every time in a process of its own. Measured are

    the seconds of `from_pretrained`, imports left out; the files are read once before
    each, so that all of them come from the page cache, and the median of --repeats
    loads is reported, the two sides taking turns;

    the peak of the process's memory (VmHWM of /proc/self/status), which counts the
    pages of mapped files too, and its excess over the weights in the asked type, after
    loading and after generating. Chapter 4 promises at most 1 GiB, of which Python and
    torch take a part;

    a few tokens generated greedily, and the logits of a short prompt on both sides. In
    bfloat16 every pass is of one token, by way of the cache: on processors without
    bfloat16 arithmetic, products of many rows are hundreds of times slower.

Where the file has the asked type, Hugging Face's model keeps the file mapped and reads
a weight when it is first used, so that it loads in a moment and its first pass is the
slower for it. "ready" is the time from the call of `from_pretrained` to the first
token, which is the same work on both sides, and the excess in use is the one to
compare.

The whole study is written to tests/studies/results/load_large.json, and a part of it,
or the tiny one, where --json says. It ends with exit code 1 where a bound does not
hold, and then writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import results  # noqa: E402
from chapters import find, load  # noqa: E402

RECORD = Path(__file__).resolve().parent / "results" / "load_large.json"
# The loader is in the model part, and reads files with the functions named after it.
SOURCES = [
    "ch04_llama3/llama3.py::model",
    "ch04_llama3/llama3.py::read_tensors",
    "ch04_llama3/llama3.py::read_safetensors",
    "ch04_llama3/llama3.py::read_torch",
    "tests/studies/load_large.py",
]
GiB = 2**30
BOUND = 1.0  # GiB over the weights
FORMATS = ("hf", "meta")
DTYPES = ("bfloat16", "float32")
PROMPT = [128000, 791, 4996, 14198, 39935, 35308, 927, 279]
NEW_TOKENS = 16
# Rows of a matrix are drawn and written this many numbers at a time.
CHUNK = 2**23


# As published for Llama-3.2-3B, in the spelling of its time.
LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
# The same at a size that a test makes and loads in a moment.
TINY = LLAMA_3B | {
    "bos_token_id": 1000,
    "eos_token_id": 1001,
    "head_dim": 24,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "vocab_size": 1003,
}
# Configuration and the most bytes of a shard.
SIZES = {"3b": (LLAMA_3B, 5_000_000_000), "tiny": (TINY, 800_000)}


# ------------------------------------------------------------ making the checkpoint


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published files, by name, in their order."""
    D, ffn = config["hidden_size"], config["intermediate_size"]
    K = config["head_dim"]
    queries = config["num_attention_heads"] * K
    keys = config["num_key_value_heads"] * K
    layer = {
        "input_layernorm": (D,),
        "mlp.down_proj": (D, ffn),
        "mlp.gate_proj": (ffn, D),
        "mlp.up_proj": (ffn, D),
        "post_attention_layernorm": (D,),
        "self_attn.k_proj": (keys, D),
        "self_attn.o_proj": (D, queries),
        "self_attn.q_proj": (queries, D),
        "self_attn.v_proj": (keys, D),
    }
    found = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            found[f"model.layers.{i}.{name}.weight"] = shape
    return found | {"model.norm.weight": (D,)}


def pieces(name: str, shape: tuple[int, ...]) -> Iterator:
    """The random rows of a tensor in bfloat16, some at a time.

    The same name has the same values in both formats. Norms are drawn too, around 1, so
    that a norm that is missing or swapped shows.
    """
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        yield (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
        return
    rows, width = shape
    for start in range(0, rows, max(1, CHUNK // width)):
        n = min(rows - start, max(1, CHUNK // width))
        drawn = torch.randn((n, width), generator=generator)
        yield drawn.mul_(width**-0.5).bfloat16()


def n_bytes(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


def raw(tensor) -> memoryview:
    """The bytes of a tensor as a file holds them."""
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy())


def plan_shards(wanted: dict[str, tuple], most: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would make a shard too large."""
    shards, size = [[]], 0
    for name, shape in wanted.items():
        if shards[-1] and size + n_bytes(shape) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes(shape)
    return shards


def make_hf(config: dict, most: int, folder: Path) -> None:
    """`config.json`, the shards and `model.safetensors.index.json`."""
    wanted = shapes(config)
    shards, places = plan_shards(wanted, most), {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            start, end = end, end + n_bytes(wanted[name])
            shape, offsets = list(wanted[name]), [start, end]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            places[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in pieces(name, wanted[name]):
                    out.write(raw(piece))
    total = sum(n_bytes(shape) for shape in wanted.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


# Hugging Face's names of a layer's tensors, and Meta's.
META_NAMES = {
    "input_layernorm": "attention_norm",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_proj": "attention.wk",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_proj": "attention.wq",
    "self_attn.v_proj": "attention.wv",
}


def meta_sources(config: dict) -> dict[str, str]:
    """Meta's tensor names, in its order, each with Hugging Face's.

    The head is tied, and written out all the same.
    """
    found = {"tok_embeddings.weight": "model.embed_tokens.weight"}
    for i in range(config["num_hidden_layers"]):
        for theirs, metas in META_NAMES.items():
            found[f"layers.{i}.{metas}.weight"] = f"model.layers.{i}.{theirs}.weight"
    found["norm.weight"] = "model.norm.weight"
    return found | {"output.weight": "model.embed_tokens.weight"}


def interleaved(rows, K: int):
    """Rows of query or key heads, from Hugging Face's order into Meta's.

    A head's K rows are K/2 pairs that are rotated together: Hugging Face keeps all the
    first ones, then all the second ones; Meta keeps each pair together.
    """
    heads = rows.unflatten(0, (-1, 2, K // 2))  # (H, 2, K/2, D)
    return heads.transpose(1, 2).flatten(0, 2)  # (H·K, D)


def make_meta(config: dict, folder: Path) -> None:
    """`consolidated.00.pth` and `params.json`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    wanted, sources = shapes(config), meta_sources(config)
    path = folder / "consolidated.00.pth"
    # torch.save wants everything in memory; so it lays the file out for tensors without
    # storage, and their bytes are written into the gaps afterwards.
    with FakeTensorMode():
        state = {
            name: torch.empty(wanted[theirs], dtype=torch.bfloat16)
            for name, theirs in sources.items()
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
        state = torch.load(path, weights_only=True)
        start = {n: t.untyped_storage()._checkpoint_offset for n, t in state.items()}
    with open(path, "rb+") as out:
        for name, theirs in sources.items():
            out.seek(start[name])
            drawn = pieces(theirs, wanted[theirs])
            if name.endswith((".wq.weight", ".wk.weight")):
                drawn = [interleaved(torch.cat(list(drawn)), config["head_dim"])]
            for piece in drawn:
                out.write(raw(piece))
    params = {
        "dim": config["hidden_size"],
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 256,
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": True,
        "vocab_size": config["vocab_size"],
    }
    write_json(folder / "params.json", params)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def needed_bytes(config: dict, kind: str) -> int:
    """The bytes of the weights on disk."""
    wanted = shapes(config)
    total = sum(n_bytes(shape) for shape in wanted.values())
    repeated = n_bytes(wanted["model.embed_tokens.weight"])
    return total + repeated if kind == "meta" else total


def make(size: str, kind: str, where: Path) -> Path:
    """The checkpoint's folder below `where`, made there unless an earlier run left it.

    It is made aside and moved into place when it is whole. ValueError where the disk
    has too little room.
    """
    config, most = SIZES[size]
    folder = where / f"{size}-{kind}"
    if folder.exists():
        print(f"{folder} is there already.", flush=True)
        return folder
    where.mkdir(parents=True, exist_ok=True)
    needed, free = needed_bytes(config, kind), shutil.disk_usage(where).free
    if free < needed + 2**26:
        raise ValueError(
            f"the checkpoint takes {needed / GiB:.1f} GiB, and {where} has "
            f"{free / GiB:.1f} GiB free; --keep DIR names another place"
        )
    print(f"Making {folder.name}, {needed / GiB:.2f} GiB.", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        if kind == "hf":
            make_hf(config, most, partial)
        else:
            make_meta(config, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# ---------------------------------------------------- loading it, in its own process


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def load_ours(job: dict, dtype):
    import safetensors  # noqa: F401  so that its import is not in the time

    module = load(find("ch04"))
    started = time.perf_counter()
    model = module.Transformer.from_pretrained(job["folder"], dtype=dtype)
    return model, time.perf_counter() - started


def load_theirs(job: dict, dtype):
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    return model, time.perf_counter() - started


def our_logits(model, tokens, at_once: int):
    """The logits (T, V) after each token, `at_once` tokens in a pass."""
    import torch

    cache = model.new_cache(1, tokens.shape[1])
    parts = [model(part, cache=cache) for part in tokens.split(at_once, dim=1)]
    return torch.cat(parts, dim=1)[0]


def their_logits(model, tokens, at_once: int):
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    parts = [
        model(part, past_key_values=cache, use_cache=True).logits
        for part in tokens.split(at_once, dim=1)
    ]
    return torch.cat(parts, dim=1)[0]


def our_tokens(model, tokens, n: int) -> tuple[list[int], list[float]]:
    """`n` greedy tokens after a prompt, and the seconds after which each was there."""
    module = load(find("ch04"))
    started, new, seconds = time.perf_counter(), [], []
    for step in module.stream(model, tokens, n):
        new.append(int(step[0]))
        seconds.append(time.perf_counter() - started)
    return new, seconds


def their_tokens(model, tokens, n: int) -> tuple[list[int], list[float]]:
    class Clock:
        """What `generate` hands its prompt, and then each token, to."""

        def __init__(self) -> None:
            self.seconds = []

        def put(self, value) -> None:
            self.seconds.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    model.generation_config.eos_token_id = None
    started = time.perf_counter()
    out = model.generate(
        tokens, max_new_tokens=n, do_sample=False, streamer=clock, pad_token_id=0
    )
    new = out[0, tokens.shape[1] :].tolist()
    return new, [moment - started for moment in clock.seconds[1:]]


SIDES = {
    "ours": (load_ours, our_logits, our_tokens),
    "theirs": (load_theirs, their_logits, their_tokens),
}


def measure(job: dict) -> None:
    """What a child process does: load, note time and memory, write, leave results."""
    import torch

    load_model, logits, tokens = SIDES[job["side"]]
    dtype = getattr(torch, job["dtype"])
    model, seconds = load_model(job, dtype)
    found = {
        "seconds": seconds,
        "peak": status("VmHWM"),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }
    if job["generate"]:
        V = model.config.vocab_size
        prompt = torch.tensor([[token % V for token in PROMPT]])
        few_rows = job["dtype"] == "bfloat16"
        at_once = 1 if few_rows else prompt.shape[1]
        with torch.inference_mode():
            new, times = tokens(model, prompt[:, :at_once], NEW_TOKENS)
            result = logits(model, prompt, at_once)
        torch.save(result.clone(), Path(job["out"]) / "logits.pt")
        found |= {
            "new": new,
            "first_seconds": times[0],
            "tokens_per_second": (len(new) - 1) / (times[-1] - times[0]),
            "peak_generating": status("VmHWM"),
        }
    write_json(Path(job["out"]) / "found.json", found)


# ------------------------------------------------------------------- the whole study


def read_once(folder: Path) -> None:
    """Read every file, so that the next load finds it in the page cache."""
    buffer = bytearray(2**24)
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def available() -> int:
    """The memory that a new process can have, in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable")


def run_child(job: dict) -> dict:
    """`measure` in a process of its own; ValueError with its last words if it fails."""
    read_once(Path(job["folder"]))
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        if done.returncode < 0:
            words = [f"ended by signal {-done.returncode}; too little memory?"]
        raise ValueError(f"{job['side']} in {job['dtype']}: {words[0]}")
    text = (Path(job["out"]) / "found.json").read_text(encoding="utf-8")
    return json.loads(text)


def cases(kinds: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple]:
    """(format, type, side), the sides that are compared next to each other."""
    for kind in kinds:
        for dtype in dtypes:
            yield kind, dtype, "ours"
            if kind == "hf":
                yield kind, dtype, "theirs"


def summarise(kind: str, dtype: str, side: str, loads: list[dict]) -> dict:
    """A row of the record, from the repeated loads of one case."""
    first = loads[0]
    weights, used = first["weights"], first["peak_generating"]
    peak = max(found["peak"] for found in loads)
    if first["dtypes"] != [f"torch.{dtype}"]:
        raise ValueError(f"{side} loaded {first['dtypes']}, not {dtype}")
    return {
        "format": kind,
        "dtype": dtype,
        "side": side,
        "parameters": first["parameters"],
        "seconds": round(statistics.median(f["seconds"] for f in loads), 2),
        "all_seconds": [round(found["seconds"], 2) for found in loads],
        "ready_seconds": round(first["seconds"] + first["first_seconds"], 2),
        "weights_gib": round(weights / GiB, 3),
        "peak_gib": round(peak / GiB, 3),
        "excess_gib": round((peak - weights) / GiB, 3),
        "peak_in_use_gib": round(used / GiB, 3),
        "excess_in_use_gib": round((used - weights) / GiB, 3),
        "first_token_seconds": round(first["first_seconds"], 3),
        "tokens_per_second": round(first["tokens_per_second"], 2),
        "new_tokens": first["new"],
    }


def run_cases(args: argparse.Namespace, where: Path, scratch: Path) -> dict:
    """Every case of one study: rows of the record, and what was left out."""
    rows, skipped = [], []
    for kind in args.formats:
        folder = make(args.size, kind, where)
        print(HEADER, flush=True)
        for dtype in args.dtypes:
            sides = [c[2] for c in cases([kind], [dtype])]
            width = 4 if dtype == "float32" else 2
            needed = needed_bytes(SIZES[args.size][0], "hf") // 2 * width + 1.5 * GiB
            if available() < needed:
                reason = (
                    f"{dtype} needs {needed / GiB:.1f} GiB of memory, and "
                    f"{available() / GiB:.1f} GiB are free"
                )
                print(f"Left out, {kind}: {reason}.", flush=True)
                skipped.append({"format": kind, "dtype": dtype, "reason": reason})
                continue
            loads = {side: [] for side in sides}
            for turn in range(args.repeats):
                for side in sides:
                    out = scratch / f"{kind}-{dtype}-{side}"
                    out.mkdir(exist_ok=True)
                    job = {"folder": str(folder), "dtype": dtype, "side": side}
                    job |= {"out": str(out), "generate": turn == 0}
                    loads[side].append(run_child(job))
            rows += [summarise(kind, dtype, side, loads[side]) for side in sides]
            for row in rows[-len(sides) :]:
                print(line(row), flush=True)
        if not args.keep:
            shutil.rmtree(folder)
    return {"loads": rows, "left_out": skipped}


HEADER = (
    "format dtype     side    load s  ready s  weights GiB"
    "  excess, loading  in use  tokens/s"
)


def line(row: dict) -> str:
    """A row of the record, below HEADER."""
    return (
        f"{row['format']:<6} {row['dtype']:<9} {row['side']:<6}"
        f"{row['seconds']:>8.1f} {row['ready_seconds']:>8.1f}"
        f"{row['weights_gib']:>13.2f} {row['excess_gib']:>16.2f}"
        f"{row['excess_in_use_gib']:>8.2f} {row['tokens_per_second']:>9.2f}"
    )


def compare(module: ModuleType, rows: list[dict], scratch: Path) -> list[dict]:
    """Logits and tokens of what belongs together: same weights, same type."""
    import torch

    def logits(kind: str, dtype: str, side: str):
        return torch.load(scratch / f"{kind}-{dtype}-{side}" / "logits.pt")

    by = {(row["format"], row["dtype"], row["side"]): row for row in rows}
    found = []
    for dtype in DTYPES:
        ours = ("hf", dtype, "ours")
        for other in [("hf", dtype, "theirs"), ("meta", dtype, "ours")]:
            if ours not in by or other not in by:
                continue
            row = module.distance(" ".join(other), logits(*ours), logits(*other))
            same = by[ours]["new_tokens"] == by[other]["new_tokens"]
            tolerance = module.TOLERANCE[getattr(torch, dtype)]
            found.append(
                {"dtype": dtype, "with": f"{other[2]}, {other[0]}"}
                | {key: row[key] for key in ("max_abs", "relative", "argmax")}
                | {"tolerance": 0.0 if other[0] == "meta" else tolerance}
                | {"same_tokens": same}
            )
    return found


def faults(data: dict) -> list[str]:
    """What does not hold that should, in words."""
    found = []
    for row in data["loads"]:
        excess = max(row["excess_gib"], row["excess_in_use_gib"])
        if row["side"] == "ours" and excess > BOUND:
            found.append(
                f"{row['format']} in {row['dtype']} peaks at {excess} GiB over the "
                f"weights; the bound is {BOUND} GiB"
            )
    for row in data["agreement"]:
        what = f"{row['dtype']} logits and those of {row['with']}"
        if not row["relative"] <= row["tolerance"]:
            found.append(
                f"{what} differ by {row['relative']:.1e} of the largest; at most "
                f"{row['tolerance']:.0e} is right"
            )
        # In bfloat16 two logits are often equal, and either may be chosen.
        if not row["same_tokens"] and row["dtype"] == "float32":
            found.append(f"{what}: other tokens are generated")
    return found


@contextmanager
def places(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where checkpoints go, and a folder for what the processes hand over."""
    with tempfile.TemporaryDirectory(prefix="load_large-") as temporary:
        scratch = Path(temporary) / "handed-over"
        scratch.mkdir()
        yield keep or Path(temporary), scratch


def study(args: argparse.Namespace) -> dict:
    """Make, load, measure and compare; returns the record's data."""
    if not Path("/proc/self/status").exists():
        raise ValueError("peak memory is read from /proc/self/status: this needs Linux")
    module, (config, most) = load(find("ch04")), SIZES[args.size]
    with places(args.keep) as (where, scratch):
        data = run_cases(args, where, scratch)
        data["agreement"] = compare(module, data["loads"], scratch)
    return {
        "size": args.size,
        "checkpoint_gib": round(needed_bytes(config, "hf") / GiB, 3),
        "shards": len(plan_shards(shapes(config), most)),
        "bound_gib": BOUND,
        "prompt_tokens": len(PROMPT),
        "repeats": args.repeats,
        "page_cache": "the files were read once before each load",
        **data,
    }


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    command = CommandLine(
        description=__doc__.split("\n")[0],
        epilog="The whole study takes 7 GiB of disk (TMPDIR or --keep says where) and, "
        "for float32, 14 GiB of memory. It is written to "
        "tests/studies/results/load_large.json. Let the machine do nothing else "
        "meanwhile.",
    )
    command.add_argument(
        "--size", choices=list(SIZES), default="3b", help="default: 3b"
    )
    command.add_argument(
        "--format",
        dest="formats",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help="Hugging Face's files, Meta's, or (the default) one after the other",
    )
    command.add_argument(
        "--dtype",
        dest="dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="the types to load into; default: both",
    )
    command.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="loads a case; default: 3"
    )
    command.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="make the checkpoints in DIR, or take them from there, and leave them",
    )
    command.add_argument(
        "--json", type=Path, metavar="PATH", help="write the record here"
    )
    command.add_argument("--measure", metavar="JOB", help=argparse.SUPPRESS)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if args.measure:
        measure(json.loads(args.measure))
        return 0
    if args.repeats < 1:
        command.error(f"--repeats is {args.repeats}; at least 1 is needed")
    usual = command.parse_args([])
    varied = [n for n in vars(usual) if getattr(args, n) != getattr(usual, n)]
    path = args.json or (None if set(varied) - {"keep", "repeats"} else RECORD)
    try:
        data = study(args)
        wrong = faults(data)
        if wrong:
            print(f"{command.prog}: {'; '.join(wrong)}", file=sys.stderr)
            return 1
        if path is not None:
            results.write(
                path,
                " ".join(["python tests/studies/load_large.py", *recorded(args)]),
                data,
                SOURCES,
            )
            print(f"Written: {os.path.relpath(path)}")
    except (OSError, ValueError) as error:
        print(f"{command.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def recorded(args: argparse.Namespace) -> list[str]:
    """The flags that the numbers depend on, as they would be typed."""
    usual, flags = parser().parse_args([]), []
    for flag, name in [("size", "size"), ("format", "formats"), ("dtype", "dtypes")]:
        value = getattr(args, name)
        if value != getattr(usual, name):
            flags += [f"--{flag}", *([value] if isinstance(value, str) else value)]
    if args.repeats != usual.repeats:
        flags += ["--repeats", str(args.repeats)]
    return flags


if __name__ == "__main__":
    sys.exit(main())
