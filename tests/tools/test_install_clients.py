"""Which clients `make clients` installs, and when it does so again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import install_clients
from tools.install_clients import main, versions, what_is_missing

ROOT = Path(__file__).parents[2]
CLIENTS = {name: wanted for kind in versions().values() for name, wanted in kind.items()}


def test_every_version_is_exact_and_every_client_has_its_tests() -> None:
    assert all("==" in each for kind in versions()["pip"].values() for each in kind)
    assert all(each.count("@") == 1 for kind in versions()["npm"].values() for each in kind)
    tests = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/clients/test_*.py")}
    assert tests == CLIENTS.keys()


def test_the_document_names_the_versions() -> None:
    table = (ROOT / "docs" / "http.md").read_text().partition("## Tools that work")[2]
    listed = [row.split("|")[1:3] for row in table.partition("\n## ")[0].splitlines() if "|" in row]
    for wanted in CLIENTS.values():
        name, _, version = wanted[0].replace("@", "==").partition("==")
        word = name.partition("[")[0].removesuffix("-cpu")
        assert any(
            word.lower() in row[0].lower() and version.startswith(row[1].strip()) for row in listed
        ), wanted[0]


def test_what_is_installed_is_known_by_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_clients, "INSTALLED", tmp_path)
    assert what_is_missing("llm") == "llm is not installed: make clients CLIENTS=llm"
    mark = tmp_path / "llm.installed"
    mark.write_text("llm==0.1\n")
    assert what_is_missing("llm").startswith("another version of llm is installed")
    mark.write_text("\n".join(CLIENTS["llm"]) + "\n")
    assert what_is_missing("llm") == ""
    main(["llm"])  # installs nothing
    assert [*tmp_path.iterdir()] == [mark]


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no client is called 'curl': choose from llm, langchain"):
        main(["curl"])
