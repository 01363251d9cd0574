"""What is compared: one model, the cells of a table, and the engines measured in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

PROMPT = 16_384
"""Tokens of the prompt whose first token is timed."""
ROOM = 512
"""Tokens that a stream may decode beyond its context; a multiple of every span."""
MAKE_UP = 1 << 31
"""Streams times squared context from which computing a context takes minutes to hours."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_MATRICES = {**_BYTES, "q8_0": 1, "int4": 0.5, "q4_0": 0.5, "gguf": 4}
"""Bytes of a weight; of a GGUF file as it is, at most."""
_MEBIBYTE = 1 << 20
_ACTIVATIONS = 12
"""Vectors of the model's width that a prompt's token takes while it is computed."""
_BYTES_PER_S, _PROMPT_TOKENS_PER_S, _OPENING_S, _FEWEST_STEPS = 10e9, 2000, 15.0, 4
"""Of a usual machine, to tell how long a cell takes."""


@dataclass(frozen=True)
class Shape:
    """The decoder that every contestant runs."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    mlp: int = 2048
    vocabulary: int = 256
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as heads."""
    channels: int = 0
    """Of a head; 0: the width divided by the heads."""
    gated: bool = False
    """Whether its MLP has three matrices."""
    tied: bool = False
    """Whether the embeddings are the head's matrix."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.channels or self.width // self.heads

    @property
    def cached_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def gated_mlp(self) -> int:
        """Width of a Llama's MLP, three matrices for our two, with no more weights than ours.

        A multiple of 32, which quantised rows need.
        """
        return max(32, 2 * self.mlp // 3 // 32 * 32)

    def entry_bytes(self, state: str = "float32") -> int:
        """Bytes of one token's keys and values on all layers, in elements of type `state`."""
        return 2 * self.layers * self.cached_heads * self.head_dim * _BYTES[state]

    def matrix_bytes(self, weights: str) -> int:
        """About the bytes of all matrices, in elements of type `weights`."""
        attention = 2 * (self.heads + self.cached_heads) * self.head_dim
        layer = self.width * (attention + (3 if self.gated else 2) * self.mlp)
        count = self.layers * layer + (1 if self.tied else 2) * self.width * self.vocabulary
        return int(count * _MATRICES[weights])


@dataclass(frozen=True, order=True)
class Cell:
    """Streams that decode at once, each of them at this context; or the first token of a prompt."""

    context: int
    streams: int
    first_token: bool = False

    def __str__(self) -> str:
        label = tokens_label(self.context)
        return f"first token of {label}" if self.first_token else f"{label} x {self.streams}"

    @property
    def key(self) -> str:
        """The beginning of the names of its ratios."""
        label = tokens_label(self.context)
        return f"first_token_{label}" if self.first_token else f"decode_{label}_{self.streams}"


Role = Literal["ours", "rival", "part"]
"""Ours: a setting to compare. Rival: what it is compared with. Part: measured beside them alone."""


@dataclass(frozen=True)
class Contestant:
    """An engine in one of its settings."""

    name: str
    title: str
    adapter: str
    """One of `loadtest.bench.worker.ADAPTERS`."""
    mode: str = ""
    """For the adapter."""
    weights: str = "float32"
    state: str = "float32"
    """Types of what is stored; float32 stands beside float32."""
    role: Role = "rival"
    folds: bool = False
    span: int | None = None
    """Fixed whatever the context; otherwise near its square root."""
    at: int | None = None
    """The context that it decodes at, whatever the cell's."""
    cells: tuple[Cell, ...] = ()
    """The only ones that it takes part in without being asked for; empty for all that it can do."""
    first_token: bool = True
    """Whether the first token of a long prompt is timed."""
    made_up: bool | None = None
    """Whether it runs only at contexts that take too long to compute, or only at others."""
    extra_rows: int = 0
    """Rows of state that it holds besides those of the streams."""
    process_mib: int = 150
    """About what its process takes besides weights and state."""
    folder: str = ""
    """Where its model is, if that is ready; a file, for an engine that takes one."""
    source: str = ""
    """What its model is made of; empty: random weights."""
    state_bytes: int = 0
    """Held for a stream if the model is ready; 0: by arithmetic."""
    unable: str = ""
    """Why it cannot take the model."""

    @property
    def is_ours(self) -> bool:
        """Whether it is our own engine, in whatever setting."""
        return self.adapter == "ours"

    @property
    def is_float32(self) -> bool:
        """Whether it computes with all that it is compared with in float32."""
        return self.weights == self.state == "float32"


CHECK = Cell(4096, 8)
"""Where a bare graph with a made-up cache is held against the engine that the graph belongs to."""
CELLS = (
    *(Cell(256, streams) for streams in (1, 8, 32)),
    *(Cell(context, 8) for context in (4096, 16_384, 65_536)),
)
FIRST_TOKEN = Cell(PROMPT, 1, first_token=True)
QUICK_CELLS = (Cell(16_384, 8),)
DRY_RUN = Shape(layers=1, width=128, heads=2, mlp=256)
DRY_RUN_CELLS = (Cell(64, 2),)


@dataclass(frozen=True)
class Plan:
    """A run of the bench."""

    cells: tuple[Cell, ...]
    contestants: tuple[Contestant, ...]
    asked_for: bool = False
    """Whether the user named the contestants."""
    shape: Shape = field(default_factory=Shape)
    source: str = ""
    """Name of the pretrained model that all run; empty: random weights."""
    longest: int = 0
    """Its context; 0: none."""
    rounds: int = 9
    first_token_rounds: int = 3
    window_s: float = 0.5
    """About how long a window lasts; the whole cycle of a fold at least."""
    settle_s: float = 0.05
    """Between two windows, for the threads of the last one to fall asleep."""
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all of them compute."""
    memory_bytes: int = 8 << 30
    """Most memory of all contestants that are open at once."""
    open_s: float = 900.0
    """Most seconds until a contestant stands at its context."""
    window_limit_s: float = 300.0
    """Most seconds of one window."""

    def rounds_of(self, cell: Cell) -> int:
        """Rounds in a cell."""
        return self.first_token_rounds if cell.first_token else self.rounds


def entrants(plan: Plan, cell: Cell) -> tuple[Contestant, ...]:
    """Who takes part in a cell, in the plan's order."""
    return tuple(each for each in plan.contestants if _takes_part(plan, each, cell))


def _takes_part(plan: Plan, contestant: Contestant, cell: Cell) -> bool:
    if cell.first_token:
        return contestant.first_token
    if contestant.cells and cell not in contestant.cells and not plan.asked_for:
        return False
    if contestant.made_up is None:
        return True
    takes_too_long = cell.streams * cell.context**2 >= MAKE_UP
    if is_check(contestant, cell):
        return True
    return contestant.made_up == takes_too_long


def is_check(contestant: Contestant, cell: Cell) -> bool:
    """Whether it only shows here that its made-up figure is that of the engine itself."""
    return bool(contestant.made_up) and cell == CHECK


def span_of(contestant: Contestant, context: int) -> int | None:
    """Tokens of a block: near the square root of `context`, a power of two; None without folds."""
    if not contestant.folds:
        return None
    return contestant.span or max(2, 2 ** round(math.log2(context) / 2))


def cache_bytes(shape: Shape, contestant: Contestant, context: int) -> int:
    """Bytes of state reserved for a stream at `context`, with its room, by arithmetic."""
    if contestant.state_bytes:
        return contestant.state_bytes
    context = contestant.at or context
    span, tokens = span_of(contestant, context), context + ROOM
    entry = shape.entry_bytes(contestant.state)
    if span is None:
        return entry * tokens
    entries, pooled_query = -(-tokens // span) - 1 + span, shape.entry_bytes() // 2
    return entry * entries + pooled_query


def needed_bytes(shape: Shape, contestant: Contestant, cell: Cell) -> int:
    """About what a process of `contestant` takes in `cell`."""
    rows = cell.streams + contestant.extra_rows
    weights = 2 * shape.matrix_bytes(contestant.weights)  # as stored, and as packed for the kernels
    state = rows * cache_bytes(shape, contestant, cell.context)
    computes_at_once = contestant.made_up is False  # the whole prompts of all streams
    prompts = cell.streams * cell.context * computes_at_once
    activations = prompts * shape.width * _ACTIVATIONS * _BYTES["float32"]
    return contestant.process_mib * _MEBIBYTE + weights + state + activations


def expected_s(plan: Plan, cell: Cell) -> float:
    """About how long a cell takes; right in proportion to the other cells."""
    seconds = 0.0
    for contestant in entrants(plan, cell):
        span = span_of(contestant, contestant.at or cell.context)
        state = cell.streams * cache_bytes(plan.shape, contestant, cell.context)
        step_s = (plan.shape.matrix_bytes(contestant.weights) + state) / _BYTES_PER_S
        if cell.first_token:
            window_s = cell.context / _PROMPT_TOKENS_PER_S
        else:
            window_s = max(plan.window_s, (span or _FEWEST_STEPS) * step_s)
        seconds += _OPENING_S + 2 * plan.rounds_of(cell) * window_s
    return seconds


def fits(plan: Plan, cell: Cell, contestants: Iterable[Contestant]) -> bool:
    """Whether all of them may be open at once."""
    return sum(needed_bytes(plan.shape, c, cell) for c in contestants) <= plan.memory_bytes


def pack(
    plan: Plan, cell: Cell, contestants: Sequence[Contestant], anchors: Sequence[Contestant]
) -> list[list[Contestant]]:
    """Groups that fit into memory, each with all `anchors`, or where that is tight with the last.

    Contestants keep their order; each goes into the first group with room. One that fits nowhere
    is alone with the last anchor.
    """
    groups: list[list[Contestant]] = []
    for contestant in contestants:
        for group in groups:
            if fits(plan, cell, [*group, contestant]):
                group.append(contestant)
                break
        else:
            beside = list(anchors)
            while len(beside) > 1 and not fits(plan, cell, [*beside, contestant]):
                beside.pop(0)
            groups.append([*beside, contestant])
    return groups


def tokens_label(tokens: int) -> str:
    """`16k` for 16,384."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def parse_cell(text: str) -> Cell:
    """The cell of `16k x 8`, `16kx8` or `16384x8`. Raises ValueError."""
    context, _, streams = text.lower().replace(" ", "").partition("x")
    scale = 1024 if context.endswith("k") else 1
    cell = Cell(int(context.removesuffix("k")) * scale, int(streams))
    if min(cell.context, cell.streams) < 1:
        raise ValueError(f"{text!r} has a number below 1")
    return cell
