"""Nothing reaches into what another module keeps to itself; tests and the bench neither."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "protos", "model", "export", "loadtest", "tests", "tools")
OURS = r"(server|concertina|model|export|loadtest|tests)\b"
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
ALLOWED = {
    ("loadtest/bench/worker.py", "_exit"),  # the standard library's
    ("tests/mutants/warm.py", "_exit"),  # the same
    ("server/api/wire.py", "_replace"),  # a named tuple's, of gRPC
    # Ray Serve has no hook for what happens before a replica drains.
    ("server/hosts/ray_app.py", "_perform_graceful_shutdown"),
}


def reaches(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every private thing of others that a file touches."""
    tree = ast.parse(path.read_text())
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and _is_own(node) and isinstance(node.ctx, ast.Store)
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute() if not _is_own(node) and node.attr not in own:
                names = [node.attr]
            case ast.ImportFrom(module=str(module)) if re.match(OURS, module):
                names = [alias.name for alias in node.names]
            case ast.Constant(value=str(text)) if re.fullmatch(rf"{OURS}(\.\w+)+", text):
                names = [text.rpartition(".")[2]]
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[_, ast.Constant(), *_]):
                names = [str(node.args[1].value)]  # type: ignore[attr-defined]
        yield from ((node.lineno, name) for name in names if PRIVATE.fullmatch(name))


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_nobody_touches_what_is_private() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = {path: path.relative_to(ROOT).as_posix() for path in files if "_pb2" not in path.name}
    assert len(names) > 200
    found = {
        f"{name}:{line}: {private}"
        for path, name in names.items()
        for line, private in reaches(path)
        if (name, private) not in ALLOWED
    }
    assert not found


def test_a_reach_is_found(tmp_path: Path) -> None:
    file = tmp_path / "reaching.py"
    file.write_text(
        "from server.engine import _inside\n"
        "engine._wake.set()\n"
        'monkeypatch.setattr("server.engine.loop._IDLE", 1)\n'
        'monkeypatch.setattr(loop, "_IDLE", 1)\n'
        "self._mine = other._mine\n"
    )
    assert [line for line, _ in sorted(reaches(file))] == [1, 2, 3, 4]
