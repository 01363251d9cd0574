"""Caches folded blocks for prompts with the same beginning: a radix tree over blocks of tokens.

A folded entry depends only on the tokens before it and never changes. So it is stored once, and
later prompts with these tokens copy it instead of pushing them. Where a fold keeps blocks as they
are, a block also has its entries of single tokens, as a prompt may end where they are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.arrays import Ints, State

Entries = npt.NDArray[np.generic]
"""Part of a stack, `[heads, entries, head_dim]`."""


def added(stack: Entries, span: int, folded: bool) -> Entries:
    """What a block adds to a stack, out of its newest part: an entry, or `span`, or both in turn.

    folded: whether the part begins with the summary that the block's fold made, of the block or of
    an older one. Behind it are blocks as they are, the newest one last, if any are.
    """
    if not folded:
        return stack
    return np.concatenate((stack[:, :1], stack[:, 1:][:, -span:]), axis=1)


def joined(parts: Sequence[Entries], span: int, folded: range) -> Entries:
    """The stack after blocks that added `parts`, of which those `folded` left only summaries."""
    summaries = [part[:, :1] for part in parts if part.shape[1] % span]
    blocks = [part[:, part.shape[1] % span :] for part in parts]
    left = [*blocks[: folded.start], *summaries, *blocks[folded.stop :]]
    return np.concatenate((parts[0][:, :0], *left), axis=1)


@dataclass(eq=False)
class _Node:
    """A block that follows the blocks of its ancestors."""

    parent: _Node | None = None
    key: bytes = b""
    state: State = field(default_factory=dict)
    children: dict[bytes, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return len(self.key) + sum(values.nbytes for values in self.state.values())


class PrefixCache:
    """What blocks of `span` tokens add to stacks, see `added`.

    Above `limit` bytes, drops the least recently used.

    It works on one prompt at a time: `match` begins a prompt, and `insert` adds its next block. An
    insert costs the same at any position of the prompt.
    """

    def __init__(self, span: int, limit: int) -> None:
        self._span = span
        self._limit = limit
        self._root = _Node()
        # Oldest use first. A block counts as used after its children, so that the first is a leaf.
        # Blocks of the current prompt break this order; `_use_path` restores it when needed.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self._path: list[_Node] = []
        self._whole = True
        """Whether the path has every block of the current prompt so far."""
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._by_use)

    def match(self, tokens: Ints) -> list[State]:
        """Begin a prompt. Returns what the cached blocks have that `tokens[T]` begin with."""
        self._use_path()
        self._path, self._whole = self._walk(tokens), True
        self._use_path()
        return [node.state for node in self._path]

    def resume(self, tokens: Ints, blocks: int) -> None:
        """Begin a prompt whose first `tokens[T]` are pushed already: `blocks` blocks and a rest."""
        self._whole = len(self.match(tokens)) == blocks

    def insert(self, block: Ints, state: State) -> None:
        """Cache the `state` that the prompt's next block adds, `block[span]`.

        Does nothing if an earlier block of the prompt is not cached.
        """
        if not self._whole:
            return
        key, parent = block.tobytes(), self._path[-1] if self._path else self._root
        if key not in parent.children:
            parent.children[key] = node = _Node(parent, key, state)
            self.nbytes += node.nbytes
        self._path.append(parent.children[key])
        self._by_use[self._path[-1]] = None
        while self.nbytes > self._limit:
            oldest = next(iter(self._by_use))
            if oldest.children:
                self._use_path()
            else:
                self._drop(oldest)

    def _walk(self, tokens: Ints) -> list[_Node]:
        path, node = [], self._root
        for at in range(0, len(tokens) - self._span + 1, self._span):
            key = tokens[at : at + self._span].tobytes()
            if key not in node.children:
                break
            node = node.children[key]
            path.append(node)
        return path

    def _use_path(self) -> None:
        for node in reversed(self._path):
            self._by_use.move_to_end(node)

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None and not leaf.children
        del leaf.parent.children[leaf.key], self._by_use[leaf]
        self.nbytes -= leaf.nbytes
        if self._path and leaf is self._path[-1]:
            self._path.pop()
            self._whole = False
