"""Attention patterns by name."""

from __future__ import annotations

from collections.abc import Callable

from model.config import Attention, ModelConfig
from model.patterns.axial import AxialRowMajor
from model.patterns.fixed import BidirectionalFixed, Fixed, SparseFixed
from model.patterns.folded import Folded, Windowed
from model.patterns.full import Full
from model.patterns.horizontal import AxialHorizontal
from model.patterns.logsparse import HierarchicalLogsparse, Logsparse
from model.patterns.mixture import Mixture
from model.patterns.pattern import Pattern
from model.patterns.sparse import SparseAxial, SparseLogsparse, SparseStrided
from model.patterns.vertical import AxialVertical

PATTERNS: dict[Attention, Callable[[ModelConfig], Pattern]] = {
    "full": Full,
    "fixed": Fixed,
    "fixed-bidirectional": BidirectionalFixed,
    "logsparse": Logsparse,
    "logsparse-hierarchical": HierarchicalLogsparse,
    "axial-rowmajor": AxialRowMajor,
    "axial-vertical": AxialVertical,
    "axial-horizontal": AxialHorizontal,
    "mixture": Mixture,
    "mixture-averaged": Mixture,
    "sparse-fixed": SparseFixed,
    "sparse-strided": SparseStrided,
    "sparse-logsparse": SparseLogsparse,
    "sparse-axial": SparseAxial,
}


def make_pattern(config: ModelConfig, layer: int = 0) -> Pattern:
    """The attention pattern of one layer, chosen by `config.attention` and the architecture."""
    built = config.architecture
    if built.folding is not None and built.folding.layers[layer] != "full":
        return (Folded if built.folding.layers[layer] == "fold" else Windowed)(config)
    if built.windows:
        return Full(config, built.windows[layer])
    return PATTERNS[config.attention](config)
