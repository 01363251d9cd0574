"""The commands `sessions list`, `pause`, `continue`, `fork`, `export`, `import` and `delete`."""

from __future__ import annotations

import json
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from concertina.cli.connection import Server, connected
from concertina.cli.options import (
    Copies,
    IgnoreEos,
    Json,
    MaxTokens,
    Seed,
    Stop,
    Temperature,
    TimeLimit,
    Timeout,
    TopK,
    TopP,
    readable_file,
)
from concertina.cli.output import print_whole
from concertina.cli.printing import EventPrinter, own_line, write_outputs
from concertina.client import Session

Name: TypeAlias = Annotated[str, typer.Argument(metavar="ID", help="Name of the stream.")]
_TIMEOUT_S = 60.0

sessions = typer.Typer(
    help="Pause kept streams, continue them, copy them, and move them to other servers.\n\n"
    "`concertina generate --keep SECONDS` keeps one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@sessions.command("list")
def list_sessions(
    server: Server,
    json_output: Json = False,
) -> None:
    """List your sessions: those in the replica that answers, and those in the store.

    Examples:
    concertina sessions list
    concertina sessions list --json | jq .stream_id
    """
    with connected(server, json_output) as client:
        found = client.sessions.list(timeout=_TIMEOUT_S)
    if json_output:
        for session in found:
            print(_json(session))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("stream", no_wrap=True, min_width=32)  # a name that is cut is of no use
    for heading in ("model", "phase"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens", "state", "kept for"):
        table.add_column(heading, justify="right", no_wrap=True)
    for session in found:
        table.add_row(
            session.stream_id,
            session.model,
            session.phase,
            f"{session.prompt_tokens + session.generated_tokens:,}",
            decimal(session.state_bytes),
            _left(session),
        )
    print_whole(table)


@sessions.command()
def pause(
    name: Name,
    server: Server,
    json_output: Json = False,
) -> None:
    """Stop a stream where it is and keep its state. Its reader sees it end with `paused`.

    Example:
    concertina sessions pause 3aT0wXzKq9mJ2b7c
    """
    with connected(server, json_output) as client:
        session = client.sessions.pause(name, timeout=_TIMEOUT_S)
    _print(session, json_output)


@sessions.command("continue")
def continue_(
    name: Name,
    prompt: Annotated[str | None, typer.Argument(help="Text to append before going on.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = None,
    time_limit: TimeLimit = None,
    timeout: Timeout = None,
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Continue a paused or finished stream, and write the text as it is generated.

    Options that are not given keep their values. An interrupt pauses the stream again.

    Examples:
    concertina sessions continue 3aT0wXzKq9mJ2b7c
    concertina sessions continue 3aT0wXzKq9mJ2b7c "def main():" -n 200
    """
    with connected(server, json_output) as client:
        stream = client.sessions.continue_(
            name,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            time_limit=time_limit,
            timeout=timeout,
        )
        printer = EventPrinter(json_output)
        with stream, nullcontext() if json_output else own_line():
            tokens = printer.tokens(stream)
            if json_output:
                deque(tokens, maxlen=0)  # reading them prints them
            else:
                write_outputs(tokens, 1)
    printer.summarise()


@sessions.command()
def fork(
    name: Name,
    copies: Copies = 1,
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Make paused copies of a session, each with its own seed. Prints their names.

    Examples:
    concertina sessions fork 3aT0wXzKq9mJ2b7c --n 4
    concertina sessions continue $(concertina sessions fork 3aT0wXzKq9mJ2b7c)
    """
    with connected(server, json_output) as client:
        for copy in client.sessions.fork(name, copies, timeout=_TIMEOUT_S):
            print(json.dumps({"stream_id": copy}) if json_output else copy)


@sessions.command()
def export(
    name: Name,
    out: Annotated[
        Path, typer.Option("--out", "-o", dir_okay=False, help="File to write; - is stdout.")
    ],
    server: Server,
    json_output: Json = False,
) -> None:
    """Write the snapshot of a session to a file. Only servers with the same key can open it.

    Example:
    concertina sessions export 3aT0wXzKq9mJ2b7c -o story.snapshot
    """
    with connected(server, json_output) as client:
        snapshot = client.sessions.export(name, timeout=_TIMEOUT_S)
    if out == Path("-"):
        sys.stdout.buffer.write(snapshot)
        return
    out.write_bytes(snapshot)
    if json_output:
        print(json.dumps({"stream_id": name, "file": str(out), "bytes": len(snapshot)}))
    else:
        print(f"{out}: {decimal(len(snapshot))}")


@sessions.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(callback=readable_file, help="What `export` wrote; - is stdin.")
    ],
    server: Server,
    json_output: Json = False,
) -> None:
    """Make a session from a snapshot. Prints its name.

    Examples:
    concertina sessions import story.snapshot
    concertina sessions continue $(concertina sessions import story.snapshot)
    """
    snapshot = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
    with connected(server, json_output) as client:
        session = client.sessions.import_(snapshot, timeout=_TIMEOUT_S)
    print(_json(session) if json_output else session.stream_id)


@sessions.command()
def delete(
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Names of streams.")],
    server: Server,
    json_output: Json = False,
) -> None:
    """End streams that run, and forget their sessions. An unknown name is no error.

    Examples:
    concertina sessions delete 3aT0wXzKq9mJ2b7c
    concertina sessions list --json | jq -r .stream_id | xargs concertina sessions delete
    """
    with connected(server, json_output) as client:
        for name in names:
            client.sessions.delete(name, timeout=_TIMEOUT_S)
            if json_output:
                print(json.dumps({"deleted": name}))


def _print(session: Session, json_output: bool) -> None:
    if json_output:
        print(_json(session))
    else:
        tokens = f"{session.prompt_tokens + session.generated_tokens:,} tokens"
        print(f"{session.stream_id}: {session.phase}, {tokens}, {decimal(session.state_bytes)}")


def _json(session: Session) -> str:
    return json.dumps(asdict(session), default=datetime.isoformat)


def _left(session: Session) -> str:
    if session.expires is None:
        return ""
    return f"{max(0.0, (session.expires - datetime.now(UTC)).total_seconds()):,.0f} s"
