"""Operations of one token of a model, counted by running its graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from concertina.v1 import bundle_pb2 as pb
from export.graphs import (
    FoldGraph,
    StepGraph,
    fold_example,
    schedule_of,
    state_tensors,
    step_example,
)
from model.attention import push_and_attend
from model.decoder import Decoder


@torch.no_grad()
def count_cost(model: Decoder) -> pb.Cost:
    """Floating-point operations of the matrix products of one stream's step and fold."""
    one, two = _count_step(model, 1), _count_step(model, 2)
    cost = pb.Cost(step=2 * one - two, step_entry=two - one)
    schedule = schedule_of(model)
    if schedule is None:
        return cost
    if not schedule.binary:
        cost.fold = _count_fold(model, schedule.taken, schedule.span)
        return cost
    sizes = [(1 + carries, 1 << carries) for carries in (1, 2, 3)]
    counted = [_count_fold(model, *size) for size in sizes]
    solved = np.linalg.solve([[1, *size] for size in sizes], counted).round().astype(int)
    cost.fold, cost.fold_entry, cost.fold_row = solved.tolist()
    return cost


@torch.no_grad()
def folds_reset(model: Decoder) -> bool:
    """Whether what follows a fold depends on stack entries only; see `FoldSchedule.resets`."""
    schedule, state = schedule_of(model), state_tensors(model)
    if schedule is None or any(t.kind == pb.STATE_KIND_HISTORY for t in state):
        return False
    if model.config.architecture.folding is not None:  # the first token of a block resets
        return True
    graph = FoldGraph(model)
    example, tokens = fold_example(model, schedule.span, schedule.span)
    after = graph([torch.randn_like(x) for x in example], tokens)
    given = dict(zip(graph.changed, after, strict=True))
    return all(
        t.name in given and bool((given[t.name] == t.initial).all())
        for t in state
        if t.kind == pb.STATE_KIND_RECURRENT
    )


def _count_step(model: Decoder, entries: int) -> int:
    """Operations of one token, with stacks of `entries`; the plain kernel reads all of them."""
    tokens, positions, lengths, longest, _, state, others = step_example(model, batch=1, time=1)
    assert isinstance(state, list)
    state = [
        values[:, :, :entries] if tensor.kind == pb.STATE_KIND_STACK else values
        for tensor, values in zip(state_tensors(model), state, strict=True)
    ]
    graph = StepGraph(model, _plain_kernel)
    with FlopCounterMode(display=False) as counter:
        graph(tokens, positions, lengths, longest, torch.zeros(1, dtype=torch.int64), state, others)
    return int(counter.get_total_flops())


def _plain_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    longest: Tensor,
    units: Sequence[Tensor],
    *,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return push_and_attend(q, k, v, keys, values, lengths, window)


def _count_fold(model: Decoder, entries: int, rows: int) -> int:
    with FlopCounterMode(display=False) as counter:
        FoldGraph(model)(*fold_example(model, entries, rows, batch=1))
    return int(counter.get_total_flops())
