"""Folded blocks that streams with the same beginning share: a radix tree over blocks of tokens.

A folded entry depends on the tokens before it alone and never changes, so it is kept once, and a
prompt that begins alike begins behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.arrays import Ints, State


@dataclass(eq=False)
class _Node:
    """A block behind the blocks of its parents."""

    parent: _Node | None = None
    key: bytes = b""
    state: State = field(default_factory=dict)
    children: dict[bytes, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return len(self.key) + sum(values.nbytes for values in self.state.values())


class PrefixCache:
    """What the blocks of `span` tokens left on the stacks, up to `limit` bytes of it.

    It follows one prompt at a time: `match` begins it, and `insert` extends it by a block, which
    costs the same wherever in the prompt that block lies.
    """

    def __init__(self, span: int, limit: int) -> None:
        self._span = span
        self._limit = limit
        self._root = _Node()
        # Oldest use first. A block counts as used after those behind it, so the first is a leaf;
        # but for blocks of the prompt that is followed, which are put in order when it matters.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self._path: list[_Node] = []
        self._whole = True
        """Whether every block of the prompt so far is on the path."""
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._by_use)

    def match(self, tokens: Ints) -> list[State]:
        """What the longest known run of blocks that `tokens[T]` begin with left, block by block."""
        self._use_path()
        self._path, self._whole = self._walk(tokens), True
        self._use_path()
        return [node.state for node in self._path]

    def follow(self, tokens: Ints, blocks: int) -> None:
        """Go on behind `tokens[T]`, so many blocks and a rest, which were pushed elsewhere."""
        self._whole = len(self.match(tokens)) == blocks

    def insert(self, block: Ints, state: State) -> None:
        """Keep what the prompt's next block, `block[span]`, left.

        Does nothing when a block before it could not be kept.
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
