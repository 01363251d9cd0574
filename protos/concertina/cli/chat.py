"""The command `chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from concertina.cli.connection import Server, choose_model, connected
from concertina.cli.options import (
    MaxTokens,
    MinP,
    ModelName,
    Seed,
    Stop,
    Temperature,
    Timeout,
    TopK,
    TopP,
)
from concertina.cli.printing import own_line, write_text
from concertina.client import Tokens


def chat(
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Timeout = None,
    model: ModelName = "",
    *,
    server: Server,
) -> None:
    """Talk with a model: it answers each line that you write, until Ctrl-D.

    The model needs a chat template: its bundle's own, or one that the server was started with.

    Examples:
    concertina chat
    concertina chat --system "Answer in one sentence." --temperature 0.2
    echo "What is a concertina?" | concertina chat
    """
    messages = [{"role": "system", "content": system}] if system else []
    with connected(server) as client:
        chosen = choose_model(client, model, "text")
        for line in _lines():
            messages.append({"role": "user", "content": line})
            stream = client.generate(
                messages,
                model=chosen.name,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                stop=stop,
                timeout=timeout,
            )
            answer = ""
            with stream, own_line():
                for event in stream:
                    if isinstance(event, Tokens):
                        answer += event.text
                        write_text(event.text)
            if not sys.stdout.isatty():
                print(flush=True)
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What the user says, line by line, without empty ones."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
