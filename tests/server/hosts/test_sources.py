"""Pretrained models that `serve` is given: converted once, kept, and fetched from a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from concertina.bundle.manifest import read_manifest, write_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle
from model.pretrained.convert import convert
from model.pretrained.source import PretrainedError
from server.errors import BundleError
from server.hosts import sources
from server.hosts.sources import SourceError, bundle_of, is_pretrained, prepared
from tests.model.pretrained.folders import tensors, write
from tests.tokenizers_made import BYTE_LEVEL, content_of, trained


def model_folder(path: Path) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    size = trained(BYTE_LEVEL).get_vocab_size()
    weights = tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(size, 16, generator=torch.Generator().manual_seed(1))
    write(path, weights, vocab_size=size)
    (path / "tokenizer.json").write_bytes(content_of(BYTE_LEVEL))
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model; the cache is beside it."""
    monkeypatch.setenv("CONCERTINA_CACHE", str(tmp_path / "cache"))
    return model_folder(tmp_path / "tiny")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are run, in this process, which has torch already."""
    run: list[str] = []

    def concertina(source: Path, command: str, *arguments: Any) -> None:
        run.append(command)
        if command == "convert":
            convert(arguments[0], arguments[1])
        else:
            _, name, *options = arguments[2:]
            data_type = pb.DATA_TYPE_FLOAT16 if "float16" in options else pb.DATA_TYPE_FLOAT32
            export_bundle(arguments[0], arguments[1], name=name, data_type=data_type)

    monkeypatch.setattr(sources, "run_command", concertina)
    return run


def test_a_model_is_converted_once(source: Path, commands: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    bundle = bundle_of(source, said.append)
    assert commands == ["convert", "export"]
    assert bundle.name == "tiny" and bundle.folder.parent == tmp_path / "cache"
    assert any("this once" in line and str(bundle.folder) in line for line in said)
    assert bundle.chat_template is not None
    assert bundle.chat_template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert [*bundle.folder.parent.iterdir()] == [bundle.folder]
    assert bundle_of(source, said.append).fingerprint == bundle.fingerprint
    assert len(commands) == 2 and len(said) == 1


def test_two_that_want_the_same_model_convert_it_once(source: Path, commands: list[str]) -> None:
    with ThreadPoolExecutor(3) as threads:
        bundles = [*threads.map(lambda _: bundle_of(source, str), range(3))]
    assert commands == ["convert", "export"]
    assert {bundle.fingerprint for bundle in bundles} == {bundles[0].fingerprint}
    assert [*bundles[0].folder.parent.iterdir()] == [bundles[0].folder]


def test_a_changed_model_is_another(source: Path, commands: list[str]) -> None:
    first = bundle_of(source, str)
    os.utime(source / "model.safetensors", (1, 1))
    assert bundle_of(source, str).folder != first.folder
    assert len(commands) == 4


def test_a_damaged_bundle_is_made_again(source: Path, commands: list[str]) -> None:
    bundle, said = bundle_of(source, str), list[str]()
    content = bytearray((bundle.folder / "step.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.folder / "step.onnx").write_bytes(content)
    assert bundle_of(source, said.append).fingerprint == bundle.fingerprint
    assert len(commands) == 4
    assert "step.onnx" in said[0] and "made again" in said[0]


def test_a_bundle_that_was_put_into_the_cache_has_the_name_of_its_source(
    source: Path, commands: list[str]
) -> None:
    bundle = bundle_of(source, str)
    manifest = read_manifest(bundle.folder)
    manifest.name = "bundle"  # as `concertina export` calls it after its folder
    write_manifest(bundle.folder, manifest, [file.path for file in manifest.files])
    found = bundle_of(source, str)
    assert (found.name, found.folder, len(commands)) == ("tiny", bundle.folder, 2)
    assert found.fingerprint == bundle.fingerprint


def test_what_a_killed_process_left_is_removed(source: Path, commands: list[str]) -> None:
    bundle = bundle_of(source, str)
    left = bundle.folder.with_name(f".{bundle.folder.name}.abc")
    other = bundle.folder.with_name(".another-model.abc")
    left.mkdir(), other.mkdir()
    (bundle.folder / "manifest.json").unlink()
    bundle_of(source, str)
    assert not left.exists() and other.exists()


def test_a_bundle_is_prepared_where_it_is_wanted(
    source: Path, commands: list[str], tmp_path: Path
) -> None:
    folder, said = tmp_path / "volume" / "mine", list[str]()
    bundle = prepared(source, folder, "float16", said.append)
    assert (bundle.folder, bundle.name, bundle.cache_type) == (folder, "mine", "float16")
    assert any(str(folder) in line for line in said)
    assert [*folder.parent.iterdir()] == [folder]
    assert prepared(source, folder, "float16", said.append).fingerprint == bundle.fingerprint
    assert commands == ["convert", "export"] and len(said) == 1
    assert bundle_of(folder, str).fingerprint == bundle.fingerprint
    assert len(commands) == 2


def _touch(source: Path, folder: Path) -> str:
    os.utime(source / "model.safetensors", (1, 1))
    return "was not made of"


def _flip(source: Path, folder: Path) -> str:
    content = bytearray((folder / "step.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "step.onnx").write_bytes(content)
    return "step.onnx"


def _copy_another(source: Path, folder: Path) -> str:
    (folder / ".source").unlink()  # as of a bundle that somebody exported here
    return "was not made of"


@pytest.mark.parametrize("change", [_touch, _flip, _copy_another])
def test_a_bundle_that_is_not_what_was_prepared_is_made_again(
    change: Callable[[Path, Path], str], source: Path, commands: list[str], tmp_path: Path
) -> None:
    folder, said = tmp_path / "volume" / "mine", list[str]()
    before = prepared(source, folder, "float32", str)
    reason = change(source, folder)
    assert prepared(source, folder, "float32", said.append).fingerprint == before.fingerprint
    assert len(commands) == 4 and reason in said[0] and said[0].endswith("it is made again")
    assert [*folder.parent.iterdir()] == [folder]
    prepared(source, folder, "float32", str)
    assert len(commands) == 4


def test_a_bundle_with_caches_of_another_type_is_made_again(
    source: Path, commands: list[str], tmp_path: Path
) -> None:
    for state in ("float32", "float16"):
        bundle = prepared(source, tmp_path / "mine", state, str)
        assert bundle.cache_type == state
    assert len(commands) == 4


def test_a_hub_is_asked_once(
    source: Path, commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def fetched(name: str, say: Callable[[str], None]) -> Path:
        asked.append(name)
        return source

    monkeypatch.setattr(sources, "fetched", fetched)
    folder = tmp_path / "mine"
    for name in ("them/tiny", "them/tiny", "them/other"):
        assert prepared(Path(name), folder, "float32", str).name == "mine"
    assert asked == ["them/tiny", "them/other"]


def test_what_stands_in_the_way_of_a_bundle_stays(
    source: Path, commands: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(SourceError, match="mine exists and is not a bundle: choose another"):
        prepared(source, tmp_path / "mine", "float32", str)
    with pytest.raises(SourceError, match="nothing is neither a Hugging Face folder, nor a GGUF"):
        prepared(tmp_path / "nothing", tmp_path / "mine", "float32", str)
    assert (tmp_path / "mine" / "letter").read_text() == "dear" and not commands


def test_what_cannot_be_converted_leaves_the_bundle_that_was_there(
    source: Path, commands: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "volume" / "mine"
    before = prepared(source, folder, "float32", str)
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PretrainedError):
        prepared(source, folder, "float32", str)
    assert bundle_of(folder, str).fingerprint == before.fingerprint
    assert [*folder.parent.iterdir()] == [folder]


@pytest.mark.slow
def test_the_command_that_prepares(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "concertina.cli.main", "prepare", str(source)]
    for _ in range(2):
        done = subprocess.run(
            [*command, str(tmp_path / "mine")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "ready, fingerprint" in done.stdout
    assert "converting" not in done.stderr


def test_tokens_that_nobody_knows_are_refused(source: Path, commands: list[str]) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json.*save_pretrained"):
        bundle_of(source, str)
    assert commands == ["convert"]


def test_a_link_that_leads_nowhere_is_refused_in_words(source: Path, commands: list[str]) -> None:
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to("/nowhere/at/all")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(PretrainedError, match=r"tokenizer\.json is a link that leads out"):
        bundle_of(source, str)


def test_a_missing_extra_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(SourceError, match=r"needs torch: pip install 'concertina\[cpu,train\]'"):
        bundle_of(source, str)


@pytest.mark.slow
def test_processes_of_their_own_convert(source: Path) -> None:
    bundle = bundle_of(source, str)
    assert bundle.codec.from_text("Hello world").tolist() == (
        trained(BYTE_LEVEL).encode("Hello world").ids
    )
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SourceError, match="could not be converted, see above"):
        bundle_of(source, str)


def test_what_is_a_pretrained_model(
    source: Path, image_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert all(map(is_pretrained, (source, tmp_path / "a.gguf", Path("them/their-model.v1"))))
    (tmp_path / "bundles").mkdir()
    for other in (image_bundle, tmp_path, Path("bundles/typo"), Path("typo"), tmp_path / "no/no"):
        assert not is_pretrained(other), other
    with pytest.raises(BundleError):
        bundle_of(Path("bundles/typo"), str)


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a hub that has `folder` as the model them/tiny."""
    commit = "1" * 40

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            headers = {"X-Repo-Commit": commit}
            status, body = 404, b"{}"
            if path.startswith("/api/models/them/tiny/tree/"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in folder.iterdir()
                ]
                status, body = 200, json.dumps(files).encode()
            elif path.startswith("/api/models/them/tiny"):
                siblings = [{"rfilename": f.name} for f in folder.iterdir()]
                told = {"id": "them/tiny", "sha": commit, "siblings": siblings}
                status, body = 200, json.dumps(told).encode()
            elif path.startswith("/them/tiny/resolve/"):
                name = path.rpartition("/")[2]
                if (folder / name).is_file():
                    status, body = 200, (folder / name).read_bytes()
                    headers["ETag"] = f'"{name}"'
            else:
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def fetch(name: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Fetches a model in a process of its own: the library reads its settings at its import."""
    code = f"from server.hosts.sources import fetched; print(fetched({name!r}, str))"
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_is_fetched_from_a_hub(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    folder = model_folder(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    with hub(folder) as address:
        done = fetch("them/tiny", address, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        fetched = Path(done.stdout.strip())
        wanted = {file.name for file in folder.iterdir()} - {"pytorch_model.bin"}
        assert {file.name for file in fetched.iterdir()} == wanted
        for name in wanted:
            assert (fetched / name).read_bytes() == (folder / name).read_bytes()
        assert (
            "them/none is no folder here" in fetch("them/none", address, tmp_path / "home").stderr
        )
    again = fetch("them/tiny", address, tmp_path / "home")  # the hub cannot be reached any more
    assert Path(again.stdout.strip()) == fetched, again.stderr
