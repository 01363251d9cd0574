"""A verified bundle, and the arithmetic of its state."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from concertina.bundle import resources
from concertina.bundle.manifest import ManifestError, read_manifest
from concertina.bundle.resources import ELEMENT_BYTES, KIND_NAMES, Count
from concertina.v1 import bundle_pb2 as pb
from server.bundles.state import StateKind, StateTensor, state_tensors
from server.errors import BundleError


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check, ready to be loaded."""

    folder: Path
    manifest: pb.Manifest

    @property
    def name(self) -> str:
        """Name by which requests choose it."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """Identifies the very files of the bundle."""
        return self.manifest.fingerprint

    @property
    def vocabulary(self) -> int:
        """Number of tokens; ids are below it."""
        return self.manifest.vocabulary

    @property
    def context(self) -> int:
        """Most tokens of one stream, prompt included."""
        return self.manifest.context

    @property
    def is_image(self) -> bool:
        """Whether tokens are pixels; otherwise they are bytes of text."""
        return self.manifest.modality == pb.MODALITY_IMAGE

    @cached_property
    def span(self) -> int | None:
        """Tokens between two folds, which no step crosses; None for a family that never folds."""
        return self.manifest.fold.span if self.manifest.HasField("fold") else None

    @property
    def shares_blocks(self) -> bool:
        """Whether the entries of folded blocks are all there is to a prefix."""
        return self.manifest.fold.resets and not self.manifest.fold.binary

    @property
    def typecode(self) -> str:
        """How `array.array` keeps tokens of this bundle, in as few bytes as they need."""
        return next(c for c in "BHI" if self.manifest.vocabulary <= 1 << 8 * array(c).itemsize)

    def label_of(self, start_token: int) -> str | None:
        """The label that a start token stands for; None for the one without."""
        index = start_token - self.manifest.vocabulary - 1
        return self.manifest.labels[index] if index >= 0 else None

    @property
    def step_path(self) -> Path:
        """The graph that pushes and attends."""
        return self.folder / "step.onnx"

    @property
    def fold_path(self) -> Path:
        """The graph that folds. Only there when `span` is set."""
        return self.folder / "fold.onnx"

    @property
    def take_path(self) -> Path:
        """The graph that copies out what rows on a device hold."""
        return self.folder / "take.onnx"

    @property
    def put_path(self) -> Path:
        """The graph that writes such parts into rows."""
        return self.folder / "put.onnx"

    @property
    def moves_on_devices(self) -> bool:
        """Whether both are there: only in bundles whose state has the type that devices take."""
        listed = {file.path for file in self.manifest.files}
        return {self.take_path.name, self.put_path.name} <= listed

    def entries(self, pushed: Count) -> Count:
        """Valid entries of every stack after `pushed` tokens and the folds they made due."""
        return resources.entries(self.manifest, pushed)

    @cached_property
    def state(self) -> tuple[StateTensor, ...]:
        """What a stream keeps."""
        return state_tensors(self.manifest)

    @cached_property
    def stacks(self) -> frozenset[str]:
        """Names of the state tensors that are stacks."""
        return frozenset(t.name for t in self.state if t.kind is StateKind.STACK)

    @cached_property
    def recurrent(self) -> frozenset[str]:
        """Names of the state tensors that every step replaces."""
        return frozenset(t.name for t in self.state if t.kind is StateKind.RECURRENT)

    def fold_size(self, pushed: int) -> tuple[int, int]:
        """Entries of every stack and rows of every history that the fold due now takes."""
        return resources.fold_size(self.manifest, pushed)

    def state_bytes(self, pushed: int) -> dict[str, int]:
        """Bytes of state that one stream needs after `pushed` tokens, by kind."""
        units = self._unit_bytes
        return {
            "stack": units["stack"] * self.entries(pushed),
            "history": units["history"] * pushed,
            "recurrent": units["recurrent"],
        }

    def total_state_bytes(self, pushed: npt.NDArray[np.int64]) -> dict[str, int]:
        """The same, summed over streams that have seen `pushed[B]` tokens."""
        units = self._unit_bytes
        return {
            "stack": units["stack"] * int(self.entries(pushed).sum()),
            "history": units["history"] * int(pushed.sum()),
            "recurrent": units["recurrent"] * len(pushed),
        }

    @cached_property
    def _unit_bytes(self) -> dict[str, int]:
        return resources.unit_bytes(self.manifest)

    @property
    def max_state_bytes(self) -> int:
        """Bytes reserved for each slot."""
        return sum(tensor.nbytes for tensor in self.state)

    def peak_state_bytes(self, pushed: int) -> int:
        """The most bytes of state that a stream needs on its way to `pushed` tokens."""
        return resources.peak_state_bytes(self.manifest, pushed)


def load_bundle(folder: Path) -> Bundle:
    """Read and verify the bundle in `folder`. Raises BundleError naming the file that is wrong."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise BundleError(str(error)) from None
    bundle = Bundle(folder, manifest)
    listed = {file.path for file in manifest.files}
    for path in (bundle.step_path, bundle.fold_path) if bundle.span else (bundle.step_path,):
        if path.name not in listed:
            raise BundleError(f"{folder / 'manifest.json'} does not list {path.name}")
    for tensor in manifest.state:
        if tensor.data_type not in ELEMENT_BYTES:
            raise BundleError(f"{folder}: state {tensor.name} has an unknown data type")
        if tensor.kind not in KIND_NAMES:
            raise BundleError(f"{folder}: state {tensor.name} is of a kind this server cannot keep")
    if flaw := _flaw(bundle):
        raise BundleError(f"{folder / 'manifest.json'} contradicts itself: {flaw}")
    return bundle


def _flaw(bundle: Bundle) -> str:
    """What of a manifest's numbers cannot be; empty if all can."""
    manifest, context = bundle.manifest, bundle.context
    if not (0 < context <= 2**24 and 0 < manifest.vocabulary < 2**31):
        return f"context {context}, vocabulary {manifest.vocabulary}"
    if bundle.span is not None and not 1 < bundle.span <= context:
        return f"a fold every {bundle.span} of {context} tokens"
    if manifest.HasField("end_token") and manifest.end_token >= manifest.vocabulary:
        return f"end token {manifest.end_token} of {manifest.vocabulary}"
    form = manifest.image
    if bundle.is_image and (
        form.width * form.height != context or len(form.palette) != 3 * manifest.vocabulary
    ):
        return f"{form.width}x{form.height} pixels of {len(form.palette)} bytes of colours"
    if not bundle.is_image and manifest.vocabulary > 256:
        return f"{manifest.vocabulary} tokens, which are bytes"
    most = int(np.max(bundle.entries(np.arange(context)))) + 1 if bundle.stacks else 0
    for tensor in manifest.state:
        shape = list(tensor.shape)
        along = {pb.STATE_KIND_STACK: (1, most), pb.STATE_KIND_HISTORY: (0, context)}
        axis, least = along.get(tensor.kind, (-1, 0))
        if min(shape, default=0) < 1 or len(shape) <= axis or shape[axis] < least:
            return f"state {tensor.name} has shape {shape}"
    return ""
