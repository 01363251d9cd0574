"""What the documents tell readers to type: it runs, or it can at least be parsed.

Python snippets, and the lines of `RUN`, run against a real server. The others have the reason here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from concertina.cli.main import COMMANDS, command_line
from tests.e2e.servers import ROOT, Server, serving
from tests.server.tokenizer_bundles import make_tokenizer_bundle
from tests.tokenizers_made import BYTE_LEVEL

NAMES = ("README.md", "CONTRIBUTING.md", "protos/README.md")
DOCUMENTS = sorted([*(ROOT / name for name in NAMES), *ROOT.glob("docs/*.md")])
WAIT = 120.0
CHAT = "bring-your-own.md"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
BUNDLES = [str(ROOT / "bundles" / name) for name in ("python-4k", "emoji-32")]

# Lines of a document that run here begin with one of these.
RUN = (
    "concertina chat",
    "concertina generate",
    "concertina paint",
    "concertina score",
    "concertina keys",
    "curl",
)
# The others, by their beginnings, and why they do not.
NOT_RUN = {
    'concertina generate "def " -m python-4k --address HOST': "needs a host and a certificate",
    "concertina score data/notes": "needs a dataset; tests/concertina/cli",
    "concertina score book.txt": "needs a book; tests/concertina/cli",
    "concertina demo": "does not end; tests/server/http/page/test_chaos.py",
    "concertina serve": "does not end; tests/e2e and tests/server/hosts start servers",
    "concertina gateway": "does not end; tests/server/http starts gateways",
    "concertina loadtest": "takes a minute; tests/loadtest",
    "concertina data": "needs data, or takes minutes; tests/model",
    "concertina train": "takes hours; tests/model",
    "concertina convert": "needs a pretrained model; tests/model/pretrained",
    "concertina uptrain": "needs a pretrained model; tests/model/uptraining",
    "concertina export": "needs a trained model; tests/export",
    "concertina prepare": "needs a pretrained model; tests/server/hosts",
    "concertina compare": "takes hours; tests/export",
    "concertina bench": "takes minutes to hours; tests/loadtest/bench",
    "python -m": "takes minutes; the modules have tests of their own",
    "make": "CI runs it",
    "make demo-chat": "takes minutes; tests/server/hosts/test_demo_chat.py",
    "bash .ci/run": "is what runs this",
    "bash loadtest/bench/gpu.sh": "needs a GPU; tests/loadtest/bench/test_gpu_script.py",
    "source .venv": "there is none where the tools lie elsewhere",
    "pip install": "installs; CI does so by make",
    "apt-get": "installs; CI does so where it may",
    "cp -r": "changes a folder that is watched; tests/server/hosts/test_watcher.py",
    "mv bundles": "the same",
    "rm -r": "the same",
    "cd examples/node && npm ci": "installs; tests/examples does so, too",
    "node": "tests/examples runs it",
    "export CONCERTINA_SNAPSHOT_KEY": "the fixture sets it",
    "grpcurl": "is not ours",
    "llm": "is not ours; tests/clients",
    "helm install": "needs a cluster; tests/helm",
}
PARSED = (
    *("serve", "gateway", "loadtest", "data", "train", "uptrain", "export", "compare", "bench"),
    *("generate", "prepare"),
)


def _lines(document: Path) -> Iterator[str]:
    """The lines that are indented as code, without their remarks; a long one is put together."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    text = re.sub(r" \\\n +", " ", text)
    for line in re.findall(r"^ {4}([a-z.][^→\n]*)$", text, re.MULTILINE):  # arrows are pictures
        yield re.split(r" {2,}|\t| # ", line)[0].strip()


def _python(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


SNIPPETS = [
    pytest.param(document.name, code, id=f"{document.name}-{index}")
    for document in DOCUMENTS
    for index, code in enumerate(_python(document))
]
LINES = [(document.name, line) for document in DOCUMENTS for line in _lines(document)]


def _reason(line: str) -> str:
    """Why a line does not run; empty if it does."""
    fitting = [start for start in NOT_RUN if line.startswith(start)]
    return NOT_RUN[max(fitting, key=len)] if fitting else ""


def _here(text: str, server: Server) -> str:
    """A snippet, whose addresses are those of a server of the test."""
    here = text.replace("127.0.0.1:9000", server.address)
    return here.replace("127.0.0.1:8000", server.http_address or "127.0.0.1:8000")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the demo bundles, with a store, a chat template and an HTTP API."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCERTINA_SNAPSHOT_KEY", "A" * 43 + "=")
        options = ["--snapshots", "memory://snippets", "--threads", "1"]
        template = tmp_path_factory.mktemp("served") / "template.jinja"
        template.write_text(TEMPLATE)
        options += ["--chat-template", str(template)]
        with serving(*BUNDLES, "--local", *options, http=True) as server:
            yield server


@pytest.fixture(scope="module")
def chatting(tiny_bundles: Path) -> Iterator[Server]:
    """A server of one model with a chat template."""
    bundle = make_tokenizer_bundle(tiny_bundles / "chatting", BYTE_LEVEL, TEMPLATE, context=256)
    with serving(str(bundle), "--local", "--threads", "1") as server:
        yield server


@pytest.fixture
def server(document: str, request: pytest.FixtureRequest) -> Server:
    """The server of the models that a document writes about."""
    server: Server = request.getfixturevalue("chatting" if document == CHAT else "served")
    return server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the root of a checkout, where `concertina` is a command."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    program = tmp_path / ".bin" / "concertina"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m concertina.cli.main "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'protos'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 6
    assert len(LINES) > 50


def test_every_line_runs_or_has_a_reason() -> None:
    unknown = [
        (document, line)
        for document, line in LINES
        if not _reason(line) and not line.startswith(RUN)
    ]
    assert not unknown
    assert [start for start in NOT_RUN if not any(x.startswith(start) for _, x in LINES)] == []


@pytest.mark.parametrize(("document", "code"), SNIPPETS)
def test_python_runs_as_it_is_printed(
    document: str, code: str, home: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    here = _here(code, server)
    assert here != code
    exec(compile(here, "snippet", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("document", sorted({name for name, line in LINES if not _reason(line)}))
def test_shell_runs_as_it_is_printed(
    document: str, home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCERTINA_ADDRESS", server.address)
    monkeypatch.setenv("CURL_HOME", str(home))
    (home / ".curlrc").write_text("fail-with-body\nnoproxy = *\n")
    for line in (line for name, line in LINES if name == document and not _reason(line)):
        ran = subprocess.run(
            _here(line, server),
            shell=True,
            input="Hello\n",
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert ran.returncode == 0, (line, ran.stdout, ran.stderr)
        assert not line.startswith("curl") or ran.stdout.strip() or "cake.png" in line


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if _reason(line)}))
def test_a_line_that_does_not_run_can_be_parsed(line: str, home: Path) -> None:
    words = shlex.split(line.removesuffix("&").partition(" && ")[2] or line.removesuffix("&"))
    if words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None
    if words[0] == "make" and "=" not in words[1]:
        targets = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", targets, re.MULTILINE)
    if words[0] == "concertina" and words[1] in PARSED:
        for name in ("alice.key", "ca.pem"):
            (home / name).write_text("x")
        group = command_line(COMMANDS)
        command = group.commands[words[1]]
        command.make_context(words[1], words[2:]).close()
