"""What is compared: one architecture, the cells of a table, and the engines measured in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CONTEXTS = (256, 1024, 4096, 16_384, 65_536)
STREAMS = (1, 8, 32)
QUICK_CONTEXT, QUICK_STREAMS = 16_384, 8
PROMPT = 16_384
"""Tokens of the prompt whose first token is timed."""
ROOM = 512
"""Tokens that a measurement may decode beyond its context; a multiple of every span."""
LONG_PREFILL = 65_536
"""Tokens of all streams together that take minutes to compute."""
_FLOAT = 4
_PROCESS_BYTES = 800 << 20  # interpreter, libraries, weights and activations


@dataclass(frozen=True)
class Shape:
    """The decoder that every contestant runs, in float32 unless its name says otherwise."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    mlp: int = 2048
    vocabulary: int = 256

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def gated_mlp(self) -> int:
        """Width of a Llama's MLP, three matrices for our two, with no more weights than ours.

        A multiple of 32, which quantised rows need.
        """
        return max(32, 2 * self.mlp // 3 // 32 * 32)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's keys and values on all layers."""
        return 2 * self.layers * self.width * _FLOAT


@dataclass(frozen=True, order=True)
class Cell:
    """Streams that decode at once, each of them at this context."""

    context: int
    streams: int

    def __str__(self) -> str:
        return f"{tokens_label(self.context)} x {self.streams}"


@dataclass(frozen=True)
class Contestant:
    """An engine in one of its settings."""

    name: str
    title: str
    adapter: str
    """One of `loadtest.bench.worker.ADAPTERS`."""
    variant: str = ""
    """For the adapter."""
    packages: tuple[str, ...] = ()
    """Modules that have to be installed; empty for ours."""
    install: str = ""
    folds: bool = False
    span: int | None = None
    """Fixed whatever the context; otherwise near its square root."""
    contexts: tuple[int, ...] = ()
    """The only ones it runs at; empty for all."""
    first_token: bool = True
    """Whether the first token of a long prompt is timed."""
    prefills: bool = False
    """Whether it has to compute its context; a long one is then measured in one round only."""
    extra_rows: int = 0
    """Rows of state that it holds besides those of the streams."""
    float32: bool = True
    """Whether its weights are float32."""

    @property
    def is_peer(self) -> bool:
        """Whether it is another project's engine."""
        return bool(self.packages)


_LLAMA = ("llama_cpp", "gguf")
_LLAMA_PIP = "pip install llama-cpp-python gguf"
CONTESTANTS = (
    Contestant("fixed", "Concertina, Combiner-Fixed", "ours", "engine", folds=True, extra_rows=1),
    Contestant(
        "fixed-256",
        "the same, span 256",
        "ours",
        "engine",
        folds=True,
        span=256,
        contexts=(1024,),
        first_token=False,
        extra_rows=1,
    ),
    Contestant(
        "fixed-steps",
        "the same, its steps alone",
        "ours",
        "steps",
        folds=True,
        first_token=False,
    ),
    Contestant("full", "Concertina, full attention", "ours", "engine", extra_rows=1),
    Contestant(
        "genai",
        "onnxruntime-genai",
        "genai",
        packages=("onnxruntime_genai", "transformers", "torch"),
        install="pip install onnxruntime-genai transformers torch onnx onnxscript",
        prefills=True,
    ),
    Contestant(
        "transformers",
        "Transformers, static cache",
        "hugging_face",
        packages=("transformers", "torch"),
        install="pip install transformers torch",
    ),
    Contestant("llama-f32", "llama.cpp, f32", "llama", "f32", _LLAMA, _LLAMA_PIP),
    Contestant(
        "llama-q8_0",
        "llama.cpp, q8_0, cache f16",
        "llama",
        "q8_0",
        _LLAMA,
        _LLAMA_PIP,
        float32=False,
    ),
)
OURS, OURS_FLAT, OURS_FULL = "fixed", "fixed-256", "full"


@dataclass(frozen=True)
class Plan:
    """A run of the bench. Every cell is measured `rounds` times for each contestant, in turns."""

    cells: tuple[Cell, ...]
    first_token: bool = True
    prompt: int = PROMPT
    contestants: tuple[Contestant, ...] = CONTESTANTS
    shape: Shape = field(default_factory=Shape)
    rounds: int = 3
    windows: int = 3
    """Windows of each measurement, after a warm-up."""
    window_s: float = 1.0
    """About how long a window lasts; the whole cycle of a fold at least."""
    threads: int = 1
    memory_bytes: int = 8 << 30
    """Most memory of one contestant."""
    limit_s: float = 600.0
    """Most seconds of one measurement."""


def quick_cells() -> tuple[Cell, ...]:
    """The one cell that shows most."""
    return (Cell(QUICK_CONTEXT, QUICK_STREAMS),)


def all_cells(
    contexts: tuple[int, ...] = CONTEXTS, streams: tuple[int, ...] = STREAMS
) -> tuple[Cell, ...]:
    """Every context with every number of streams, the cheap ones first."""
    return tuple(sorted(Cell(context, count) for context in contexts for count in streams))


def span_of(contestant: Contestant, context: int) -> int | None:
    """Tokens of a block: near the square root of `context`, a power of two; None without folds."""
    if not contestant.folds:
        return None
    return contestant.span or max(2, 2 ** round(math.log2(context) / 2))


def rounds_of(plan: Plan, contestant: Contestant, cell: Cell) -> int:
    """How often a contestant is measured in `cell`."""
    long = cell.context * cell.streams >= LONG_PREFILL
    return 1 if contestant.prefills and long else plan.rounds


def takes_part(contestant: Contestant, context: int) -> bool:
    """Whether a contestant runs at `context`."""
    return not contestant.contexts or context in contestant.contexts


def cache_bytes(shape: Shape, contestant: Contestant, context: int) -> int:
    """Bytes of state reserved for a stream at `context`, with its room, by arithmetic."""
    span, tokens = span_of(contestant, context), context + ROOM
    if span is None:
        half = 2 if contestant.variant == "q8_0" else 1
        return shape.entry_bytes * tokens // half
    entries, pooled_query = -(-tokens // span) - 1 + span, shape.entry_bytes // 2
    return shape.entry_bytes * entries + pooled_query


def needed_bytes(shape: Shape, contestant: Contestant, cell: Cell) -> int:
    """About what a process of `contestant` takes in `cell`."""
    rows = cell.streams + contestant.extra_rows
    return _PROCESS_BYTES + rows * cache_bytes(shape, contestant, cell.context)


def tokens_label(tokens: int) -> str:
    """`16k` for 16,384."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
