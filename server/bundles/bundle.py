"""A verified bundle, and the size of its state."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from concertina.bundle import resources
from concertina.bundle.manifest import ManifestError, read_manifest
from concertina.bundle.resources import ELEMENT_BYTES, KIND_NAMES, Count
from concertina.codecs.chat_template import TEMPLATE, ChatTemplate, ChatTemplateError, compiled
from concertina.codecs.choosing import CodecError, codec_of
from concertina.codecs.codec import Codec
from concertina.codecs.tokenizer_file import TOKENIZER, TokenizerError
from concertina.v1 import bundle_pb2 as pb
from server.bundles.grammars import Grammars
from server.bundles.state import StateKind, StateTensor, state_tensors
from server.errors import BundleError

_SUMMING = (":mean", ":tangent", ":fitted")
"""Ends of the names of patterns whose folds depend on sums over tokens."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check, ready to be loaded."""

    folder: Path
    manifest: pb.Manifest
    template: str = field(default="", repr=False)
    """A chat template in place of its own."""

    @property
    def name(self) -> str:
        """Name of the model in requests."""
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
        """Largest number of tokens in one stream, prompt included."""
        return self.manifest.context

    @cached_property
    def codec(self) -> Codec:
        """What the tokens stand for. Raises CodecError; for what `load_bundle` gave, never."""
        return codec_of(self.manifest, self.folder)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """What turns messages into text; None if it has nothing. Raises ChatTemplateError."""
        tokens = dict(self.manifest.tokenizer.template_tokens)
        if self.template:
            return compiled(self.template, tokens)
        if TEMPLATE not in {file.path for file in self.manifest.files}:
            return None
        try:
            source = (self.folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"cannot be read: {error}") from None
        return compiled(source, tokens)

    def with_template(self, template: str) -> Bundle:
        """The same with another chat template; with an empty one, with its own."""
        if template == self.template:
            return self
        made = replace(self, template=template)
        vars(made)["codec"] = self.codec  # which takes a second to be made of a large file
        return made

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a stream."""
        first = [self.manifest.end_token] if self.manifest.HasField("end_token") else []
        return frozenset((*first, *self.manifest.tokenizer.end_tokens))

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles what outputs must be."""
        return Grammars(self.codec, self.end_tokens)

    @cached_property
    def span(self) -> int | None:
        """Tokens between two folds; no step crosses a fold. None if the state never folds."""
        return self.manifest.fold.span if self.manifest.HasField("fold") else None

    @property
    def shares_blocks(self) -> bool:
        """Whether streams with the same prefix can share its folded blocks."""
        return self.manifest.fold.resets and not self.manifest.fold.binary

    @property
    def pairs_rows(self) -> bool:
        """Whether every pass needs an even number of rows.

        The kernels of matrices in few bits sum the last of an odd number of rows in another order.
        They round what comes of it to 8 bits, so that the difference does not stay small. Of caches
        in int8 this is only true where it matters which tokens are added up in one pass.
        """
        return self.manifest.HasField("quantisation") or self.rounds_sums

    @property
    def rounds_sums(self) -> bool:
        """Whether the caches are int8 and depend on sums over the tokens of a pass."""
        return self.rounds_state and self.manifest.attention.endswith(_SUMMING)

    @property
    def rounds_state(self) -> bool:
        """Whether the caches are int8."""
        return any(t.data_type == pb.DATA_TYPE_INT8 for t in self.manifest.state)

    @property
    def cache_type(self) -> str:
        """Name of the smallest type of the state tensors, which is that of the caches."""
        return min((np.dtype(t.element) for t in self.state), key=lambda e: e.itemsize).name

    @property
    def typecode(self) -> str:
        """Type code of `array.array` that holds a token in the fewest bytes."""
        return next(c for c in "BHI" if self.manifest.vocabulary <= 1 << 8 * array(c).itemsize)

    @property
    def step_path(self) -> Path:
        """The graph that pushes and attends."""
        return self.folder / "step.onnx"

    @property
    def fold_path(self) -> Path:
        """The graph that folds. Exists only if `span` is set."""
        return self.folder / "fold.onnx"

    @property
    def take_path(self) -> Path:
        """The graph that copies parts of rows out of a device's memory."""
        return self.folder / "take.onnx"

    @property
    def put_path(self) -> Path:
        """The graph that copies such parts into rows."""
        return self.folder / "put.onnx"

    @property
    def moves_on_devices(self) -> bool:
        """Whether the bundle has both graphs: only if its state has a type that devices support."""
        listed = {file.path for file in self.manifest.files}
        return {self.take_path.name, self.put_path.name} <= listed

    def entries(self, pushed: Count, kept: int = 1) -> Count:
        """Valid entries after `pushed` tokens and their folds, of stacks that keep so many of a
        folded block; see `StateTensor`.
        """
        return resources.entries(self.manifest, pushed, kept)

    @cached_property
    def other_lengths(self) -> tuple[int, ...]:
        """What stacks keep of a folded block, other than one entry: they have other lengths."""
        stacks = (tensor for tensor in self.state if tensor.name in self.stacks)
        return tuple(sorted({tensor.kept for tensor in stacks} - {1}))

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
        """Names of the state tensors that are recurrent."""
        return frozenset(t.name for t in self.state if t.kind is StateKind.RECURRENT)

    def folded_blocks(self, pushed: int, kept: int = 1) -> range:
        """The blocks that are folded after `pushed` tokens, in stacks that keep so many entries of
        one. Only for a fold that is not binary.
        """
        fold, span = self.manifest.fold, self.span or 1
        if kept == span:
            return range(0)
        behind = pushed // span - fold.keep_newest
        return range(fold.keep_first, max(fold.keep_first, behind))

    def fold_size(self, pushed: int) -> tuple[int, int]:
        """Entries of each stack and rows of each history that the fold after `pushed` takes."""
        return resources.fold_size(self.manifest, pushed)

    def state_bytes(self, pushed: int) -> dict[str, int]:
        """Bytes of state that one stream needs after `pushed` tokens, by kind."""
        units = self._unit_bytes
        return {
            "stack": sum(n * self.entries(pushed, kept) for kept, n in self._entry_bytes.items()),
            "history": units["history"] * pushed,
            "recurrent": units["recurrent"],
        }

    def total_state_bytes(self, pushed: npt.NDArray[np.int64]) -> dict[str, int]:
        """The same, summed over streams with `pushed[B]` tokens."""
        units = self._unit_bytes
        return {
            "stack": sum(
                n * int(self.entries(pushed, kept).sum()) for kept, n in self._entry_bytes.items()
            ),
            "history": units["history"] * int(pushed.sum()),
            "recurrent": units["recurrent"] * len(pushed),
        }

    @cached_property
    def _unit_bytes(self) -> dict[str, int]:
        return resources.unit_bytes(self.manifest)

    @cached_property
    def _entry_bytes(self) -> dict[int, int]:
        return resources.entry_bytes(self.manifest)

    @property
    def max_state_bytes(self) -> int:
        """Bytes reserved for each slot."""
        return sum(tensor.nbytes for tensor in self.state)

    def peak_state_bytes(self, pushed: int) -> int:
        """The most bytes of state that a stream needs on its way to `pushed` tokens."""
        return resources.peak_state_bytes(self.manifest, pushed)


def load_bundle(folder: Path) -> Bundle:
    """Read and verify the bundle in `folder`. Raises BundleError, which names the wrong file."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise BundleError(str(error)) from None
    bundle = Bundle(folder, manifest)
    listed = {file.path for file in manifest.files}
    for path in (bundle.step_path, bundle.fold_path) if bundle.span else (bundle.step_path,):
        if path.name not in listed:
            raise BundleError(f"{folder / 'manifest.json'} does not list {path.name}")
    if manifest.HasField("tokenizer") and TOKENIZER not in listed:
        raise BundleError(
            f"{folder / 'manifest.json'} lists no {TOKENIZER}, so that nobody knows what the "
            "model's tokens are: save the tokenizer beside the weights that were converted, with "
            "transformers' save_pretrained, and convert and export the model again"
        )
    for tensor in manifest.state:
        if tensor.data_type not in ELEMENT_BYTES:
            raise BundleError(f"{folder}: state {tensor.name} has an unknown data type")
        if tensor.kind not in KIND_NAMES:
            raise BundleError(f"{folder}: state {tensor.name} has an unknown kind")
    if flaw := _flaw(bundle):
        raise BundleError(f"{folder / 'manifest.json'} contradicts itself: {flaw}")
    return bundle


def _flaw(bundle: Bundle) -> str:
    """The first impossible number in the manifest; empty if there is none."""
    manifest, context = bundle.manifest, bundle.context
    if not (0 < context <= 2**24 and 0 < manifest.vocabulary < 2**31):
        return f"context {context}, vocabulary {manifest.vocabulary}"
    if bundle.span is not None and not 1 < bundle.span <= context:
        return f"a fold every {bundle.span} of {context} tokens"
    if max(bundle.end_tokens, default=0) >= manifest.vocabulary:
        return f"end token {max(bundle.end_tokens)} of {manifest.vocabulary}"
    try:
        _ = bundle.codec
    except CodecError as error:
        return str(error)
    except TokenizerError as error:
        raise BundleError(f"{bundle.folder / TOKENIZER} {error}") from None
    try:
        _ = bundle.chat_template
    except ChatTemplateError as error:
        raise BundleError(f"{bundle.folder / TEMPLATE} {error}") from None
    fold = manifest.fold
    if (fold.keep_first or fold.keep_newest) and (fold.binary or not fold.span):
        return "a fold that keeps blocks, and is binary or has no span"
    for tensor in manifest.state:
        shape, kept = list(tensor.shape), resources.kept_entries(tensor)
        if kept not in (0, 1, fold.span) or (kept != 1 and fold.binary):
            return f"state {tensor.name} keeps {kept} entries of a block"
        most = int(np.max(bundle.entries(np.arange(context), kept))) + 1
        along = {pb.STATE_KIND_STACK: (1, most), pb.STATE_KIND_HISTORY: (0, context)}
        axis, least = along.get(tensor.kind, (-1, 0))
        if tensor.data_type == pb.DATA_TYPE_INT8 and tensor.initial:
            return f"state {tensor.name} is int8 and begins with {tensor.initial:g}"
        if min(shape, default=0) < 1 or len(shape) <= axis or shape[axis] < least:
            return f"state {tensor.name} has shape {shape}"
    return ""
