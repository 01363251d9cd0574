"""Names of what is stored of a stream, and what they tell.

A stream is a log. It changes its owner now and then, and each owner has an epoch. It claims the
stream by creating the origin of its epoch, which says what it goes on behind. After that it creates
parts of the outputs: tokens, states, and an end. What earlier owners still write is not read. A
tombstone is above all epochs: the stream is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

TOMBSTONE = "deleted"
_ORIGIN = re.compile(r"(\d{8,19})-origin")
_OUTPUT = re.compile(
    r"(\d{8,19})-(\d{1,5})(?:-(end)|-state-(\d{1,19})|-tokens-(\d{1,19})-(\d{1,19}))?"
)


@dataclass(frozen=True)
class Claim:
    """Who owns a stream: the owner of this epoch, or nobody any more."""

    epoch: int
    deleted: bool = False

    def is_above(self, epoch: int) -> bool:
        """Whether the owner of that epoch has lost the stream."""
        return self.deleted or self.epoch > epoch


@dataclass(frozen=True, order=True)
class TokensPart:
    """Generated tokens `first` to `end` of an output."""

    first: int
    end: int
    name: str


@dataclass(frozen=True)
class OutputParts:
    """What is stored of one output in one epoch.

    tokens: in order. states: the names by the number of tokens pushed. whole: the latest snapshot
    of all of it, as format 2 has it.
    """

    tokens: tuple[TokensPart, ...] = ()
    states: Mapping[int, str] = field(default_factory=dict)
    end: str = ""
    whole: str = ""


def origin_name(epoch: int) -> str:
    """The claim: what the owner of an epoch goes on behind."""
    return f"{epoch:08d}-origin"


def tokens_name(epoch: int, output: int, first: int, end: int) -> str:
    """Generated tokens `first` to `end` of an output."""
    return f"{epoch:08d}-{output}-tokens-{first}-{end}"


def state_name(epoch: int, output: int, pushed: int) -> str:
    """The state of an output after `pushed` tokens."""
    return f"{epoch:08d}-{output}-state-{pushed}"


def end_name(epoch: int, output: int) -> str:
    """How an output ended."""
    return f"{epoch:08d}-{output}-end"


def claim_in(names: Iterable[str]) -> Claim | None:
    """The highest claim; None where nobody has claimed anything."""
    names = set(names)
    origins = [int(found[1]) for found in map(_ORIGIN.fullmatch, names) if found]
    if not origins and TOMBSTONE not in names:
        return None
    return Claim(max(origins, default=0), TOMBSTONE in names)


def is_live(names: Iterable[str]) -> bool:
    """Whether that is a stream which is not deleted."""
    claim = claim_in(names)
    return claim is not None and not claim.deleted


def parts_of(names: Iterable[str], epoch: int, output: int) -> OutputParts:
    """What is stored of an output in an epoch."""
    tokens, states, end, whole = [], {}, "", ""
    for name in names:
        found = _OUTPUT.fullmatch(name)
        if found is None or (int(found[1]), int(found[2])) != (epoch, output):
            continue
        _, _, ended, pushed, first, last = found.groups()
        if ended:
            end = name
        elif pushed:
            states[int(pushed)] = name
        elif first:
            tokens.append(TokensPart(int(first), int(last), name))
        else:
            whole = name
    return OutputParts(tuple(sorted(tokens)), states, end, whole)


def chain(parts: Sequence[TokensPart], begin: int, end: int | None = None) -> list[TokensPart]:
    """As few of the parts as hold all tokens from `begin` to `end`, or to the first gap.

    Without an `end`, to the last token.
    """
    found: list[TokensPart] = []
    best, at = None, 0
    while end is None or begin < end:
        while at < len(parts) and parts[at].first <= begin:
            if best is None or parts[at].end > best.end:
                best = parts[at]
            at += 1
        if best is None or best.end <= begin:
            break
        found.append(best)
        begin = best.end
    return found


def replaced(parts: OutputParts, kept_states: int) -> list[str]:
    """Names of what nobody needs: tokens that another part holds, and all but the last states."""
    names, longest = [], -1
    for part in sorted(parts.tokens, key=lambda part: (part.first, -part.end)):
        if part.end <= longest:
            names.append(part.name)
        longest = max(longest, part.end)
    return names + [parts.states[pushed] for pushed in sorted(parts.states)[:-kept_states]]


def epoch_of(name: str) -> int:
    """The epoch of what has that name; -1 for what has none."""
    found = _ORIGIN.fullmatch(name) or _OUTPUT.fullmatch(name)
    return int(found[1]) if found else -1
