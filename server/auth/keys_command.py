"""The commands `keys add`, `keys list` and `keys remove`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from server.auth.api_keys import Caller, new_key, read_keys, write_keys
from server.errors import KeysError

KeysFile: TypeAlias = Annotated[
    Path, typer.Option("--keys", envvar="CONCERTINA_KEYS", help="File with the keys.")
]
_FILE = Path("keys.json")

keys = typer.Typer(
    help="Manage the API keys of a server that runs with --keys.\n\n"
    "A running server applies every change at once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the key, used in logs and to remove it.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model that the key may use; default: all models."),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(min=1, help="Most streams at the same time in each replica."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", dir_okay=False, help="File for the secret, which only you can read."
        ),
    ] = None,
    file: KeysFile = _FILE,
) -> None:
    """Create a key and print its secret. The secret is not stored and cannot be shown again.

    Examples:
    concertina keys add alice --model python-4k --streams 8 --out alice.key
    concertina generate "def " --key-file alice.key
    """
    held = read_keys(file) if file.exists() else ()
    if name in {key.caller.name for key in held}:
        raise KeysError(f"{file} already has a key named {name}: remove it or choose another name")
    key, secret = new_key(Caller(name, tuple(model) if model else None, streams))
    if out is None:
        write_keys(file, [*held, key])
        print(f"added {name} to {file}. The secret, which is not shown again:", file=sys.stderr)
        print(secret)
        return
    _write_secret(out, secret)
    try:
        write_keys(file, [*held, key])
    except OSError:
        out.unlink()  # of no use
        raise
    print(f"added {name} to {file}; its secret is in {out}", file=sys.stderr)


def _write_secret(path: Path, secret: str) -> None:
    """Raises KeysError for a file that is there: it may hold a secret that is still in use."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeysError(f"{path} is there already: remove it, or name another file") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")


@keys.command("list")
def list_keys(
    file: KeysFile = _FILE,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON, one key per line.")
    ] = False,
) -> None:
    """List the keys, without their secrets."""
    for caller in (key.caller for key in read_keys(file)):
        models, streams = caller.models, caller.max_streams
        if json_output:
            print(json.dumps({"name": caller.name, "models": models, "max_streams": streams}))
            continue
        for_models = "every model" if models is None else ", ".join(models) or "no model"
        limit = "any number of streams" if streams is None else f"{streams} streams"
        print(f"{caller.name}: {for_models}, {limit}")


@keys.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the key.")], file: KeysFile = _FILE
) -> None:
    """Remove a key. Its running streams continue to their end, but it starts no new ones."""
    held = read_keys(file)
    left = [key for key in held if key.caller.name != name]
    if len(left) == len(held):
        names = ", ".join(key.caller.name for key in held) or "none"
        raise KeysError(f"{file} has no key named {name}; it has: {names}")
    write_keys(file, left)
