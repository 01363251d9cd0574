"""Two real servers, of a model of bytes and of one that chats, and what their clients ask for.

These tests run by `make clients`, which installs the clients first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import Environment, environment
from tests.e2e.servers import ROOT, Server, serving
from tests.pretrained_bundles import LLAMA, TEMPLATE, make_pretrained_bundle, tokenizer_with_begin
from tests.tokenizers_made import bytes_alone

BUNDLE = ROOT / "bundles" / "python-4k"
CONTEXT = 1024


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.clients)
            item.add_marker(pytest.mark.timeout(1200))  # some take a minute to be imported


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Environment:
    """The client that the file of the test is called after."""
    return environment(Path(request.path).stem.removeprefix("test_"), tmp_path)


@pytest.fixture(scope="package")
def texts() -> Iterator[Server]:
    """A server of `python-4k`, a model of bytes."""
    with serving(str(BUNDLE), "--local", "--threads", "1", http=True) as server:
        yield server


@pytest.fixture(scope="package")
def chats(tiny_bundles: Path) -> Iterator[Server]:
    """A server of `tiny-llama`: random weights, a tokenizer and a chat template."""
    bundle = make_pretrained_bundle(tiny_bundles, LLAMA, CONTEXT)
    with serving(str(bundle), "--local", "--threads", "1", http=True) as server:
        yield server


@pytest.fixture(scope="package")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as Hugging Face has them: `bytes`, the tokenizer of `python-4k`, and `tiny-llama`."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, content in (("bytes", bytes_alone()), ("tiny-llama", tokenizer_with_begin())):
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_bytes(content)
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
        told |= {"bos_token": "<s>", "eos_token": "</s>"} if name != "bytes" else {}
        (root / name / "tokenizer_config.json").write_text(json.dumps(told))
    return root
