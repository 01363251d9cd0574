"""Runs the step and fold graphs in onnxruntime sessions, over the state that is bound to them.

Shapes: `B` streams, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from server.arrays import Floats, Ints, State
from server.bundles.bundle import Bundle
from server.config import ConfigError, Provider
from server.errors import BundleError
from server.runtime.device_state import DeviceRows
from server.runtime.host_state import EMPTY, NEXT, HostRows, StateLength

_LOGITS = "logits"

# Within a step, waking a sleeping thread takes longer than a node, so threads spin. Between steps
# they must not spin: clients on this machine need the cores.
_THREADING = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    "session.force_spinning_stop": "1",
}

PROVIDERS: dict[Provider, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    # The CPU runs the few nodes that compute shapes.
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
DEVICES: dict[Provider, str] = {"cpu": "cpu", "cuda": "cuda"}


class Runtime:
    """Runs the graphs of one bundle over the state of `rows` streams.

    If the bundle pairs rows, a step of an odd number of rows also changes the row after them, and
    so does `prefill`: that row must be in no use.

    Raises ConfigError if the `provider` is not installed or does not start, and BundleError if it
    cannot run the bundle.
    """

    def __init__(
        self, bundle: Bundle, rows: int, threads: int = 0, provider: Provider = "cpu"
    ) -> None:
        _require(provider)
        # Of int8 caches, the CPU's kernel takes float32 queries and CUDA's float16. The CPU would
        # compute attention then, and every step would copy all state to it and back.
        if provider != "cpu" and (bundle.rounds_state or not bundle.moves_on_devices):
            raise BundleError(
                f"{bundle.folder} has its state in {bundle.cache_type}, but the provider "
                f"{provider} needs float16: export the checkpoint again with --state float16"
            )
        self._tensors = bundle.state
        self._bundle = bundle
        self._pairs = bundle.pairs_rows
        self._step_session = _load(bundle.step_path, threads, provider)
        self._fold_session = _load(bundle.fold_path, 1, provider) if bundle.span else None
        self.rows: HostRows | DeviceRows
        if provider == "cpu":
            self.rows = HostRows(self._tensors, rows)
        else:
            moves = (_load(path, 1, provider) for path in (bundle.take_path, bundle.put_path))
            self.rows = DeviceRows(self._tensors, rows, DEVICES[provider], *moves)
        self._steps: dict[tuple[int, int], _Binding] = {}
        # One for all batches: with a large vocabulary, one for each would take much memory.
        vocabulary = {v.name: v for v in self._step_session.get_outputs()}[_LOGITS].shape[1]
        self._logits: Floats = np.empty((rows, vocabulary), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all state buffers."""
        return self.rows.nbytes

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        """Push `tokens[B]` at `positions[B]`, one for each of the first B rows.

        lengths: valid entries before the push, `[B]`. Returns logits `[B, vocabulary]`, which are
        valid only until the next call.
        """
        batch = len(tokens)
        if self._pairs and batch % 2:
            tokens, positions, lengths = (_with_one(n) for n in (tokens, positions, lengths))
        columns = tokens[:, None], positions[:, None]
        return self._run(0, *columns, lengths + 1, len(tokens))[:batch]

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        """Push `tokens[T]` into one row, from absolute `position` on, after `length` entries.

        All must fit into the open block. Returns `[T, vocabulary]` if `logits` is true, else
        `[0, vocabulary]`; valid only until the next call.
        """
        time = len(tokens)
        if not (self._pairs and time % 2):
            return self._push(row, tokens, position, length, logits)
        if time == 1:
            return self._push_one(row, tokens, position, length, logits)
        before = self._push(row, tokens[:-1], position, length, logits).copy()
        position, length = position + time - 1, length + time - 1
        last = self._push_one(row, tokens[-1:], position, length, logits)
        return np.concatenate((before, last))

    def _push(self, row: int, tokens: Ints, position: int, length: int, logits: bool) -> Floats:
        time = len(tokens)
        return self._run(
            row,
            tokens[None],
            np.arange(position, position + time)[None],
            np.array([length + time]),
            time if logits else 0,
        )

    def _push_one(self, row: int, token: Ints, position: int, length: int, logits: bool) -> Floats:
        """Push `token[1]` into `row`, together with any token into the row after it."""
        out = self._run(
            row,
            _with_one(token)[:, None],
            np.array([[position], [0]]),
            np.array([length + 1, 1]),
            2 if logits else 0,
        )
        return out[:1]

    def fold(
        self, rows: Sequence[int], begins: Sequence[StateLength], ends: Sequence[StateLength]
    ) -> None:
        """Fold the state of each of `rows` between two lengths. All parts have the same size."""
        self.rows.fold(self._fold_session, rows, begins, ends)

    def reset(self, row: int) -> None:
        """Give `row` the state of a new stream. Values that no graph reads may stay."""
        self.rows.reset(row)

    def move(self, source: int, target: int, length: StateLength) -> None:
        """Copy a state of the given length to another row."""
        self.rows.move(source, target, length)

    def read(self, row: int, end: StateLength, begin: StateLength = EMPTY) -> State:
        """A copy of a row's state, from length `begin` to length `end`."""
        return self.rows.read(row, end, begin)

    def write(self, row: int, end: StateLength, state: State) -> None:
        """Write tensors of a state of length `end` into `row`."""
        self.rows.write(row, end, state)

    def _run(self, first: int, tokens: Ints, positions: Ints, lengths: Ints, wanted: int) -> Floats:
        """Run the step graph over the rows from `first` on; see `_Binding.run`.

        Returns the logits of the first `wanted` tokens.
        """
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self._logits.shape[1]), np.float32)
            self._steps.clear()  # they are bound to the old one
        place = first, len(tokens)
        if place not in self._steps:
            self._steps[place] = _Binding(self._step_session, self._bundle, self.rows, *place)
        logits = self._logits[:wanted]
        self._steps[place].run(tokens, positions, lengths, logits)
        return logits


class _Binding:
    """The step graph, bound to the state of `batch` rows from `first` on; changes it in place.

    The buffers of inputs and logits stay bound until their shape changes, so that a step of the
    same batch binds nothing.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        rows: HostRows | DeviceRows,
        first: int,
        batch: int,
    ) -> None:
        self._session = session
        self._bundle = bundle
        self._rows = rows  # keeps the memory that the binding points to alive
        self._io = session.io_binding()
        self._inputs = {value.name for value in session.get_inputs()}
        self._kept: dict[str, npt.NDArray[np.generic]] = {}
        outputs = {value.name: value for value in session.get_outputs()}
        self._wanted = -1
        self._tokens = self._positions = np.empty((0, 0), np.int64)
        self._lengths, self._longest = np.empty(batch, np.int32), np.empty((), np.int32)
        self._bind_input("lengths", self._lengths)
        self._bind_input("longest", self._longest)
        self._others = {
            kept: (np.empty(batch, np.int32), np.empty((), np.int32))
            for kept in bundle.other_lengths
        }
        for kept, (entries, most) in self._others.items():
            self._bind_input(f"lengths.{kept}", entries)
            self._bind_input(f"longest.{kept}", most)
        for tensor in bundle.state:
            element, shape = tensor.element, [batch, *tensor.shape]
            buffer = (rows.device, 0, element, shape, rows.address(tensor.name, first))
            if tensor.name in self._inputs:
                self._io.bind_input(tensor.name, *buffer)
            if NEXT + tensor.name in outputs:
                self._io.bind_output(NEXT + tensor.name, *buffer)

    def run(self, tokens: Ints, positions: Ints, lengths: Ints, logits: Floats) -> None:
        """Push `tokens[B, T]` at `positions[B, T]`; `lengths[B]` are those after the push.

        The logits of the first R of the B * T tokens go to `logits[R, vocabulary]`, which begins at
        the same address in each call.
        """
        if self._tokens.shape != tokens.shape:
            self._tokens, self._positions = np.empty((2, *tokens.shape), np.int64)
            self._bind_input("tokens", self._tokens)
            self._bind_input("positions", self._positions)
        if self._wanted != len(logits):
            self._wanted = len(logits)
            self._bind_input("rows", np.arange(self._wanted))
            self._io.bind_ortvalue_output(_LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        self._tokens[...], self._positions[...] = tokens, positions
        self._lengths[...], self._longest[...] = lengths, lengths.max()
        for kept, (entries, most) in self._others.items():
            entries[...] = self._bundle.entries(positions[:, 0], kept) + tokens.shape[1]
            most[...] = entries.max()
        self._session.run_with_iobinding(self._io)

    def _bind_input(self, name: str, values: npt.NDArray[np.generic]) -> None:
        """Bind an input to the memory of `values`, if the graph has it."""
        if name in self._inputs:
            self._kept[name] = values
            self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))


def _with_one(values: Ints) -> Ints:
    """`values` and a 0: a token, a position and a length that every graph takes."""
    return np.append(values, 0)


def _require(provider: Provider) -> None:
    wanted, installed = PROVIDERS[provider][0], ort.get_available_providers()
    if wanted not in installed:
        raise ConfigError(
            f"provider is {provider}, which needs {wanted}; the installed onnxruntime has "
            f"{', '.join(installed)}: remove it, and install concertina with the extra `gpu` in "
            "place of `cpu`"
        )


def _load(path: Path, threads: int, provider: Provider) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for entry, value in _THREADING.items():
        options.add_session_config_entry(entry, value)
    wanted = PROVIDERS[provider]
    try:
        session = ort.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # onnxruntime raises many unrelated types
        raise BundleError(f"{path} cannot be loaded: {error}") from None
    if wanted[0] not in session.get_providers():  # onnxruntime only warns, and uses the CPU
        raise ConfigError(
            f"provider is {provider}, but {wanted[0]} did not start: see what onnxruntime says "
            "above, and check that nvidia-smi shows a GPU"
        )
    return session
