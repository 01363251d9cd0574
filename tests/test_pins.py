"""What the audit of dependencies finds, and what it does where it cannot look."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tools import audit

ROOT = Path(__file__).parents[1]


def test_only_exact_pins_pass() -> None:
    assert audit.pins("# why\nFoo_bar==1.0\n\nbaz==2.0.post1\n") == {
        "foo-bar": "1.0",
        "baz": "2.0.post1",
    }
    for line in ("foo", "foo>=1", "foo==1.*", "foo==1,!=2", "-e .", "foo @ https://example.com"):
        with pytest.raises(ValueError, match="does not pin one version"):
            audit.pins(line)


def test_what_is_not_pinned_is_found_however_deep() -> None:
    own = version("pytest")
    assert list(audit.faults(["no-such-package>1; python_version < '3'"], {})) == []
    assert list(audit.faults(["no-such-package"], {})) == ["no-such-package is not installed here"]
    found = list(audit.faults(["pytest"], {"pytest": own}))
    assert any(fault.startswith("pluggy ") and "not pinned" in fault for fault in found)
    assert not any(fault.startswith("pytest ") for fault in found)
    (fault,) = audit.faults(["iniconfig"], {"iniconfig": "0.1"})
    assert fault == f"iniconfig is pinned to 0.1, and {version('iniconfig')} is installed"


def test_extras_are_followed() -> None:
    plain, extra = (list(audit.faults([each], {})) for each in ("ray", "ray[serve]"))
    assert not any(fault.startswith("uvicorn ") for fault in plain)
    assert any(fault.startswith("uvicorn ") for fault in extra)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    extras = "".join(f"{extra} = []\n" for extra in audit.EXTRAS)
    pyproject, constraints = tmp_path / "pyproject.toml", tmp_path / "constraints.txt"
    head = '[project]\ndependencies = ["iniconfig"]\n[project.optional-dependencies]\n'
    pyproject.write_text(head + extras)
    constraints.write_text(f"iniconfig=={version('iniconfig')}\n")
    return pyproject, constraints


def test_offline_it_passes_on_pins_alone(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(audit.urllib.request, "urlopen", unreachable)
    assert audit.main(*files) == 0
    assert "cannot be reached" in capsys.readouterr().out
    files[1].write_text("iniconfig==0.1\n")
    assert audit.main(*files) == 1
    assert "iniconfig is pinned to 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
def test_online_the_verdict_is_that_of_pip_audit(
    status: int, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], timeout: float) -> Any:
        ran.append(command)
        return type("Ran", (), {"returncode": status})

    monkeypatch.setattr(audit, "knows_vulnerabilities", lambda: True)
    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.main(*files) == status
    assert "pip_audit" in ran[0] and str(files[1]) in ran[0]
