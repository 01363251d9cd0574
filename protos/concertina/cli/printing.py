"""Prints a stream: its text, or its events as JSON, and a summary at the end."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from concertina.cli.output import plain_console
from concertina.client import Accepted, Event, Finished, Tokens

_HEADING = "--- output {} ---\n"
# A model's output must not control the terminal: escape sequences are made visible.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {
    code: 0xFFFD for code in range(0x7F, 0xA0)
}


class EventPrinter:
    """Passes the tokens of a stream on, prints its events as JSON, or sums them up in one line.

    names_stream: whether to say on standard error, once, what the stream is called.
    """

    def __init__(self, json_output: bool, names_stream: bool = False) -> None:
        self._json_output = json_output
        self._names_stream = names_stream and not json_output
        self._accepted: Accepted | None = None
        self._finished: list[Finished] = []

    def tokens(self, stream: Iterable[Event]) -> Iterator[Tokens]:
        """The token events. With JSON, each event of any kind is printed as it arrives."""
        for event in stream:
            if self._json_output:
                name = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
                print(event_json({"event": name, **asdict(event)}), flush=True)
            match event:
                case Accepted():
                    self._accepted = event
                    if self._names_stream:
                        _name(event)
                case Tokens():
                    yield event
                case Finished():
                    self._finished.append(event)

    def summarise(self) -> None:
        """Prints one line on standard error, if that is a terminal."""
        if self._json_output or not sys.stderr.isatty():
            return
        assert self._accepted is not None and self._finished
        usages = [event.usage for event in self._finished]
        generated = sum(usage.generated_tokens for usage in usages)
        total_time = max(usage.total_time for usage in usages)
        rate = generated / max(total_time, 1e-9)
        first = min(usage.time_to_first_token for usage in usages)
        reasons = ", ".join(dict.fromkeys(event.reason for event in self._finished))
        plain_console(stderr=True).print(
            f"{generated:,} tokens in {total_time:.2f} s ({rate:.0f} tokens/s, "
            f"first after {1000 * first:.0f} ms), "
            f"ended by {reasons}, seed {self._accepted.seed}",
            style="dim",
        )


def _name(accepted: Accepted) -> None:
    stream = accepted.stream_id
    apart = "-- " if stream.startswith("-") else ""  # it would be an option
    message = f"stream {stream} is kept for {accepted.keep:g} s: concertina sessions continue "
    plain_console(stderr=True).print(f"{message}{apart}{stream}", style="dim")


@contextmanager
def own_line() -> Iterator[None]:
    """Ends the last line in a terminal, also when the stream breaks."""
    try:
        yield
    finally:
        if sys.stdout.isatty():
            print(flush=True)


def write_outputs(tokens: Iterable[Tokens], outputs: int) -> None:
    """Writes the first output as it arrives, then the others; several get a heading each."""
    held = {output: "" for output in range(1, outputs)}
    begun = not held
    for delta in tokens:
        if not begun:  # not before: the server may refuse the request
            write_text(_HEADING.format(0))
            begun = True
        if delta.output:
            held[delta.output] += delta.text
        else:
            write_text(delta.text)
    for output, text in held.items():
        write_text("\n" + _HEADING.format(output) + text)


def write_text(text: str) -> None:
    """Writes text of a model; in a terminal, what would control it is made visible."""
    sys.stdout.write(text.translate(_CONTROL_PICTURES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def event_json(value: object) -> str:
    """One line of JSON, with bytes in hexadecimal."""
    return json.dumps(value, default=bytes.hex)
