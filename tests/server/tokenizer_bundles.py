"""A tiny bundle whose tokens are those of a trained tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from concertina.bundle.manifest import read_manifest, write_manifest
from concertina.v1 import bundle_pb2 as pb
from export.bundle import export_bundle
from model.config import ModelConfig
from model.data import DatasetInfo
from tests.checkpoints import write_checkpoint
from tests.once import one_at_a_time
from tests.tokenizers_made import content_of, trained

NAME, CONTEXT = "tiny-tokens", 96


def make_tokenizer_bundle(
    folder: Path, kind: str, template: str = "", context: int = CONTEXT, **tokenizer: Any
) -> Path:
    """A model of random weights, with `tokenizer` as the fields of its manifest's tokenizer.

    template: its chat template; empty for none.
    """
    size = trained(kind).get_vocab_size() + 3  # models often have more rows than tokens
    info = DatasetInfo("text", size, source="random tokens", license="CC0-1.0")
    config = ModelConfig(size, context, width=32, layers=1, heads=2, mlp=64, span=8)
    with one_at_a_time(folder):
        if not folder.exists():
            checkpoint = folder.with_name(folder.name + "-checkpoint")
            export_bundle(write_checkpoint(checkpoint, config, info), folder, name=NAME)
            manifest = read_manifest(folder)
            (folder / "tokenizer.json").write_bytes(content_of(kind))
            manifest.ClearField("end_token")
            manifest.tokenizer.CopyFrom(pb.Tokenizer(**tokenizer))
            listed = [file.path for file in manifest.files]
            if template:
                (folder / "chat_template.jinja").write_text(template)
                listed.append("chat_template.jinja")
            write_manifest(folder, manifest, [*listed, "tokenizer.json"])
    return folder
