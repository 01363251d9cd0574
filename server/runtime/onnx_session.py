"""Sessions of onnxruntime, and the passes over state that is bound to them.

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
from server.bundles.state import StateTensor
from server.config import ConfigError, Provider
from server.errors import BundleError
from server.runtime.device_state import DeviceRows
from server.runtime.host_state import EMPTY, NEXT, HostRows, StateLength

_LOGITS = "logits"

# Between the nodes of a step a thread that sleeps costs more to wake than the node takes; an engine
# that waits, though, must not burn the cores that its clients need.
_THREADING = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    "session.force_spinning_stop": "1",
}

PROVIDERS: dict[Provider, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    # The CPU computes the few shapes that the graphs ask for.
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
DEVICES: dict[Provider, str] = {"cpu": "cpu", "cuda": "cuda"}


class Runtime:
    """Runs the graphs of one bundle over `rows` streams' state. Rows are plain indices.

    Raises ConfigError for a `provider` that is not installed or does not start, BundleError for a
    bundle that it cannot run.
    """

    def __init__(
        self, bundle: Bundle, rows: int, threads: int = 0, provider: Provider = "cpu"
    ) -> None:
        _require(provider)
        if provider != "cpu" and not bundle.moves_on_devices:
            raise BundleError(
                f"{bundle.folder} keeps its state in float32, and the provider {provider} takes "
                "float16: export the checkpoint again with --state float16"
            )
        self._tensors = bundle.state
        self._step_session = _load(bundle.step_path, threads, provider)
        self._fold_session = _load(bundle.fold_path, 1, provider) if bundle.span else None
        self.rows: HostRows | DeviceRows
        if provider == "cpu":
            self.rows = HostRows(self._tensors, rows)
        else:
            moves = (_load(path, 1, provider) for path in (bundle.take_path, bundle.put_path))
            self.rows = DeviceRows(self._tensors, rows, DEVICES[provider], *moves)
        self._steps: dict[tuple[int, int], _Binding] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all state buffers."""
        return self.rows.nbytes

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        """One token for each of the first B rows: `[B]`, `[B]`, `[B]` to logits `[B, vocabulary]`.

        `lengths` counts the valid entries before the push. The result is only valid until the next
        call.
        """
        batch = len(tokens)
        binding = self._steps.get((0, batch))
        if binding is None:
            binding = self._steps[0, batch] = self._bind(0, batch)
        return binding.run(tokens[:, None], positions[:, None], lengths + 1, np.arange(batch))

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        """Push `tokens[T]` onto one row, beginning at absolute `position`, behind `length` entries.

        They must not reach beyond the open block. Returns `[T, vocabulary]` if `logits` are asked
        for, else `[0, vocabulary]`.
        """
        binding = self._steps.get((row, 1))
        if binding is None:
            binding = self._steps[row, 1] = self._bind(row, 1)
        time = len(tokens)
        return binding.run(
            tokens[None],
            np.arange(position, position + time)[None],
            np.array([length + time]),
            np.arange(time if logits else 0),
        )

    def fold(
        self, rows: Sequence[int], begins: Sequence[StateLength], ends: Sequence[StateLength]
    ) -> None:
        """Fold what each of `rows` holds between two lengths; all take parts of the same size."""
        self.rows.fold(self._fold_session, rows, begins, ends)

    def reset(self, row: int) -> None:
        """Give `row` the state of a stream that has not begun. What may not be read may stay."""
        self.rows.reset(row)

    def move(self, source: int, target: int, length: StateLength) -> None:
        """Copy a stream's state, which is as long as `length`, to another row."""
        self.rows.move(source, target, length)

    def read(self, row: int, end: StateLength, begin: StateLength = EMPTY) -> State:
        """A copy of a stream's state, which is as long as `end`, from `begin` on."""
        return self.rows.read(row, end, begin)

    def write(self, row: int, end: StateLength, state: State) -> None:
        """Put those tensors of a state that is as long as `end` into `row`."""
        self.rows.write(row, end, state)

    def _bind(self, first: int, batch: int) -> _Binding:
        return _Binding(self._step_session, self._tensors, self.rows, first, batch)


class _Binding:
    """The step graph bound to the state of some rows; state goes in and out through one buffer.

    Inputs and logits lie in buffers that stay bound until their shape changes: a step of the same
    batch binds nothing.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        tensors: Sequence[StateTensor],
        rows: HostRows | DeviceRows,
        first: int,
        batch: int,
    ) -> None:
        self._session = session
        self._rows = rows  # keeps the memory that the binding points to alive
        self._io = session.io_binding()
        self._taken = {value.name for value in session.get_inputs()}
        given = {value.name: value for value in session.get_outputs()}
        self._vocabulary: int = given[_LOGITS].shape[1]
        self._logits: Floats | None = None
        self._bound: dict[str, npt.NDArray[np.generic]] = {}
        for tensor in tensors:
            element, shape = tensor.element, [batch, *tensor.shape]
            place = (rows.device, 0, element, shape, rows.address(tensor.name, first))
            if tensor.name in self._taken:
                self._io.bind_input(tensor.name, *place)
            if NEXT + tensor.name in given:
                self._io.bind_output(NEXT + tensor.name, *place)

    def run(self, tokens: Ints, positions: Ints, lengths: Ints, rows: Ints) -> Floats:
        """`tokens[B, T]`, `positions[B, T]`, `lengths[B]` after the push, `rows[R]` to logits."""
        feeds = {"tokens": tokens, "positions": positions, "rows": rows}
        if "longest" in self._taken:
            feeds["longest"] = np.array(lengths.max(), np.int32)
        if "lengths" in self._taken:
            feeds["lengths"] = lengths.astype(np.int32)
        for name, values in feeds.items():
            bound = self._bound.get(name)
            if bound is None or bound.shape != values.shape:
                bound = self._bound[name] = np.empty_like(values, order="C")
                self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(bound))
            bound[...] = values
        if self._logits is None or len(self._logits) != len(rows):
            self._logits = np.empty((len(rows), self._vocabulary), np.float32)
            self._io.bind_ortvalue_output(_LOGITS, ort.OrtValue.ortvalue_from_numpy(self._logits))
        self._session.run_with_iobinding(self._io)
        return self._logits


def _require(provider: Provider) -> None:
    wanted, installed = PROVIDERS[provider][0], ort.get_available_providers()
    if wanted not in installed:
        raise ConfigError(
            f"provider is {provider}, which needs {wanted}; the onnxruntime that is installed has "
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
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BundleError(f"{path} cannot be loaded: {error}") from None
    if wanted[0] not in session.get_providers():  # onnxruntime goes on without it
        raise ConfigError(
            f"provider is {provider}, and {wanted[0]} did not start: look above for what "
            "onnxruntime says, and whether nvidia-smi shows a GPU"
        )
    return session
