from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.bundle.manifest import MANIFEST, write_manifest
from concertina.v1 import bundle_pb2 as pb
from server.bundles.bundle import Bundle, load_bundle
from server.errors import BundleError
from tests.fakes import bare_bundle


@given(st.none() | st.integers(2, 40), st.integers(1, 500))
def test_entries_are_what_pushing_and_folding_leave(span: int | None, tokens: int) -> None:
    stack, unfolded = 0, 0
    for _ in range(tokens):
        stack, unfolded = stack + 1, unfolded + 1
        if unfolded == span:
            stack, unfolded = stack - unfolded + 1, 0
    bundle = bare_bundle(span, context=500)
    assert bundle.entries(tokens) == stack
    assert bundle.entries(np.array([tokens, 0])).tolist() == [stack, 0]


def test_state_bytes_by_hand(text: Bundle) -> None:
    """2 layers, 2 heads of 16: 2 stacks of float32 each, and the running maximum of the queries."""
    entry, recurrent = 2 * 2 * 2 * 16 * 4, 2 * 2 * 16 * 4
    assert text.state_bytes(0) == {"stack": 0, "history": 0, "recurrent": recurrent}
    assert text.state_bytes(7) == {"stack": 7 * entry, "history": 0, "recurrent": recurrent}
    assert text.state_bytes(8) == {"stack": 1 * entry, "history": 0, "recurrent": recurrent}
    assert text.state_bytes(95) == {"stack": (11 + 7) * entry, "history": 0, "recurrent": recurrent}
    assert text.max_state_bytes == (11 + 8) * entry + recurrent


def test_properties_of_a_bundle(text: Bundle, image: Bundle) -> None:
    assert (text.name, text.context, text.span, text.codec.makes) == ("tiny-text", 96, 8, "text")
    assert (image.name, image.context, image.span, image.codec.makes) == (
        "tiny-image",
        64,
        8,
        "images",
    )


@pytest.fixture
def copied(text: Bundle, tmp_path: Path) -> Path:
    for path in text.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["step.onnx", "fold.onnx", MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "cut short", "one bit flipped"])
def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(
    copied: Path, name: str, harm: str
) -> None:
    path, content = copied / name, (copied / name).read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut short":
        path.write_bytes(content[:-3])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(BundleError, match=name):
        load_bundle(copied)


def _forget_the_step(manifest: pb.Manifest, files: list[str]) -> None:
    files.remove("step.onnx")


def _forget_the_fold(manifest: pb.Manifest, files: list[str]) -> None:
    files.remove("fold.onnx")


def _unknown_type(manifest: pb.Manifest, files: list[str]) -> None:
    manifest.state[0].data_type = 77  # type: ignore[assignment]


def _small_and_large(manifest: pb.Manifest, files: list[str]) -> None:
    manifest.state[2].data_type = pb.DATA_TYPE_INT8


def _forget_the_tokenizer(manifest: pb.Manifest, files: list[str]) -> None:
    manifest.tokenizer.SetInParent()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            _forget_the_tokenizer,
            r"manifest.json lists no tokenizer.json, .*save_pretrained, and convert and export",
        ),
        (_small_and_large, "pooled_query.0 is int8 and begins with -3"),
        (_forget_the_step, "step.onnx"),
        (_forget_the_fold, "fold.onnx"),
        (_unknown_type, "state keys.0 has an unknown data type"),
    ],
)
def test_a_manifest_beyond_the_limits_is_refused(
    copied: Path, text: Bundle, change: Callable[[pb.Manifest, list[str]], None], named: str
) -> None:
    manifest, files = pb.Manifest(), ["step.onnx", "fold.onnx"]
    manifest.CopyFrom(text.manifest)
    change(manifest, files)
    write_manifest(copied, manifest, files)
    with pytest.raises(BundleError, match=named):
        load_bundle(copied)
