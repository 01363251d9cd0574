"""A trained decoder as two ONNX graphs: one that pushes and attends, one that folds.

Shapes: `B` streams, `T` new tokens, `H` heads, `E` entries a stack has room for, `D` head_dim,
`s` span. State tensors are named per layer; the graphs take them in the manifest's order.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from concertina.v1 import bundle_pb2 as pb
from model.attention import summarise
from model.config import ModelConfig
from model.decoder import Decoder

_OPSET = 18
_HALF = ".half"
_CONFIG_PROP = "concertina.model_config"
_WEIGHTS_PROP = "concertina.weights"
_NEVER = float(torch.finfo(torch.float32).min)  # stands for -infinity in the running query maximum


def state_tensors(model: Decoder) -> list[pb.StateTensor]:
    """The state of one stream, in the order in which the graphs take it."""
    config = model.config
    stack = [config.heads, config.entries, config.head_dim]
    tensors = []
    for layer in range(config.layers):
        for name in ("keys", "values"):
            tensors.append(
                pb.StateTensor(
                    name=f"{name}.{layer}",
                    kind=pb.STATE_KIND_STACK,
                    shape=stack,
                    data_type=pb.DATA_TYPE_FLOAT32,
                )
            )
        if config.attention == "fixed":
            tensors.append(
                pb.StateTensor(
                    name=f"query_max.{layer}",
                    kind=pb.STATE_KIND_RECURRENT,
                    shape=[config.heads, config.head_dim],
                    data_type=pb.DATA_TYPE_FLOAT32,
                    initial=_NEVER,
                )
            )
    return tensors


class StepGraph(nn.Module):
    """Pushes T tokens a stream, attends, and gives logits for the chosen tokens.

    Inputs: `tokens[B, T]`, `positions[B, T]`, `lengths[B]` (entries after the push, int32),
    `longest` (their largest possible value, int32 scalar, in host memory), `rows[R]` (which of the
    B*T tokens need logits), then the state. Outputs: `logits[R, vocabulary]`, then the next state.
    B > 1 with T > 1 is only for empty stacks; T tokens must not reach beyond the open block.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        longest: Tensor,
        rows: Tensor,
        state: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """See the class."""
        config = self.model.config
        remaining = iter(state)
        following: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = next(remaining), next(remaining)
            out, next_keys, next_values = _push_and_attend(
                q, k, v, keys, values, lengths, longest, config.heads
            )
            following.extend((next_keys, next_values))
            if config.attention == "fixed":
                following.append(torch.maximum(next(remaining), q.amax(dim=2)))
            return out

        x = self.model.embed_at(tokens, positions)
        for block in self.model.blocks:
            x = block(x, attend)
        chosen = x.flatten(0, 1)[rows]
        return self.model.head(self.model.norm(chosen)), following


class FoldGraph(nn.Module):
    """Turns the open block of every stack into one summary.

    Inputs, per state tensor: a stack's open block `[B, H, s, D]`; a recurrent tensor as it is.
    Outputs, in the same order: a stack's new entry `[B, H, 1, D]`; the recurrent tensor after.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        """See the class."""
        following: list[Tensor] = []
        for layer in range(self.layers):
            keys, values, query_max = state[3 * layer : 3 * layer + 3]
            key, value = summarise(query_max, keys, values)
            following += [key.unsqueeze(2), value.unsqueeze(2)]
            following.append(torch.full_like(query_max, _NEVER))
        return following


def export_step(model: Decoder, path: Path) -> None:
    """Write the step graph of `model` to `path`, weights inside, stored as float16."""
    config, state = model.config, state_tensors(model)
    batch, time, chosen = Dim("batch"), Dim("time"), Dim("chosen")
    # Example sizes differ from each other and from 1, or they would be taken for constants.
    example_state = [torch.full((2, *t.shape), t.initial) for t in state]
    inputs = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.full((2,), 3, dtype=torch.int32),
        torch.tensor(3, dtype=torch.int32),
        torch.arange(5, dtype=torch.int64),
        example_state,
    )
    shapes = (
        {0: batch, 1: time},
        {0: batch, 1: time},
        {0: batch},
        None,
        {0: chosen},
        [{0: batch} for _ in state],
    )
    names = ["tokens", "positions", "lengths", "longest", "rows", *(t.name for t in state)]
    outputs = ["logits", *(f"next.{t.name}" for t in state)]
    proto = _export(StepGraph(model), inputs, shapes, names, outputs)
    onnx.helper.set_model_props(
        proto,
        {
            _CONFIG_PROP: json.dumps(asdict(config)),
            _WEIGHTS_PROP: json.dumps(_find_weights(proto, model)),
        },
    )
    _store_half(proto)
    onnx.save(proto, path)


def load_decoder(path: Path) -> Decoder:
    """The decoder whose step graph lies at `path`, as it was exported. Raises ValueError if none.

    What is served can so be checked, or trained on, without the checkpoint it came from.
    """
    proto = onnx.load(path)
    props = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
    if _CONFIG_PROP not in props:
        raise ValueError(f"{path} was not exported by Concertina: it names no {_CONFIG_PROP}")
    stored = {i.name.removesuffix(_HALF): i for i in proto.graph.initializer}
    model = Decoder(ModelConfig(**props[_CONFIG_PROP]))
    weights = {}
    for name, (initializer, transposed) in props[_WEIGHTS_PROP].items():
        values = torch.from_numpy(numpy_helper.to_array(stored[initializer]).astype("float32"))
        weights[name] = values.T if transposed else values
    model.load_state_dict(weights)
    return model.eval()


def round_weights(model: Decoder) -> None:
    """Round the matrices of `model` to float16 in place: the weights that are stored and served."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(parameter.half().float())


def export_fold(model: Decoder, path: Path) -> None:
    """Write the fold graph of `model` to `path`. Only for patterns that fold."""
    config, state = model.config, state_tensors(model)
    batch = Dim("batch")
    example = [
        torch.zeros(2, config.heads, config.span, config.head_dim)
        if t.kind == pb.STATE_KIND_STACK
        else torch.zeros(2, *t.shape)
        for t in state
    ]
    shapes = ([{0: batch} for _ in state],)
    outputs = [f"next.{t.name}" for t in state]
    graph = FoldGraph(config.layers)
    onnx.save(_export(graph, (example,), shapes, [t.name for t in state], outputs), path)


def _push_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    longest: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupQueryAttention: writes k and v behind the valid entries and attends, in place.

    The operator numbers entries from 0 and takes the index of the last valid one.
    """
    batch, time = q.shape[0], q.shape[2]

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # [B, T, H*D]

    out, next_keys, next_values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (flat(q), flat(k), flat(v), keys, values, lengths - 1, longest),
        {"num_heads": heads, "kv_num_heads": heads, "scale": 1.0},
        dtypes=(q.dtype, q.dtype, q.dtype),
        shapes=((batch, time, heads * q.shape[3]), keys.shape, values.shape),
        version=1,
    )
    return out.view(batch, time, heads, -1).transpose(1, 2), next_keys, next_values


def _export(
    graph: nn.Module, inputs: tuple[object, ...], shapes: object, names: list[str], out: list[str]
) -> onnx.ModelProto:
    graph.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            inputs,
            input_names=names,
            output_names=out,
            dynamic_shapes=shapes,  # type: ignore[arg-type]
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, and with them the paths of this machine
    return proto


def _find_weights(proto: onnx.ModelProto, model: Decoder) -> dict[str, tuple[str, bool]]:
    """Which initializer holds each parameter, and whether transposed; the exporter folds both."""
    found = {}
    for initializer in proto.graph.initializer:
        values = numpy_helper.to_array(initializer)
        found[values.shape, values.tobytes()] = initializer.name
    weights = {}
    for name, parameter in model.state_dict().items():
        values = parameter.numpy()
        flipped = np.ascontiguousarray(values.T)
        plain = found.get((values.shape, values.tobytes()))
        weights[name] = (plain or found[flipped.shape, flipped.tobytes()], plain is None)
    return weights


def _store_half(model: onnx.ModelProto) -> None:
    """Store matrices as float16 behind a cast, which the runtime folds when it loads them."""
    graph = model.graph
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT or len(initializer.dims) < 2:
            continue
        name = initializer.name
        values = numpy_helper.to_array(initializer).astype("float16")
        initializer.CopyFrom(numpy_helper.from_array(values, name + _HALF))
        casts.append(
            onnx.helper.make_node("Cast", [name + _HALF], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
