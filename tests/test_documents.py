"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.write_limits import DOCUMENT, written

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = "server|protos|concertina|model|export|loadtest|tests|tools|helm|docs"
PATHS = re.compile(rf"(?<![\w./:-])((?:{FOLDERS})/[\w./-]*[\w/])")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_is_there(document: Path) -> None:
    for path in sorted(set(PATHS.findall(document.read_text()))):
        assert (ROOT / path).exists() or (ROOT / "protos" / path).exists(), path


def test_the_documents_name_paths() -> None:
    assert sum(len(PATHS.findall(document.read_text())) for document in DOCUMENTS) > 50


def test_the_table_of_limits_is_that_of_the_protos() -> None:
    document = DOCUMENT.read_text()
    assert document == written(document), "run make protos"
    for kind in ("GenerateRequest", "ResumeCursor", "DeleteRequest", "ImageRows"):
        assert f"| `{kind}` | " in document
