"""A pretrained model as each engine takes it: a run for ours, a folder for the others.

python -m loadtest.bench.adapters.sources SOURCE FOLDER

What is made of SOURCE (a run, a Hugging Face folder or a GGUF file) lies in FOLDER afterwards, with
`source.json`, which says what lies where.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from concertina.codecs.tokenizer_file import TOKENIZER
from loadtest.bench.contestants import SOURCE, Source
from loadtest.bench.plan import Shape
from model.config import ModelConfig
from model.layers.architecture import Activation, Rope
from model.pretrained.convert import convert
from model.pretrained.gguf_file import SUFFIX
from model.pretrained.rope import make_rope
from model.pretrained.source import PretrainedError
from model.pretrained.weights import PREFIXES, recipes
from model.run import CHECKPOINT, CONFIG, Origin, read_origin

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ACTIVATIONS: dict[Activation, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu-tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared-relu": "relu2",
}
_REMEDY = "give the Hugging Face folder that it was made of"


def prepare(path: Path, folder: Path) -> Source:
    """Make of the model at `path` what the engines take, below `folder`, and describe it.

    Raises PretrainedError if it is none that can be converted.
    """
    if (path / CHECKPOINT).exists():
        run = path
    else:
        run = folder / "run"
        if not run.exists():
            convert(path, run)
    raw = json.loads((run / CONFIG).read_text())
    config, origin = ModelConfig.read(raw["model"]), read_origin(run)
    theirs, unable = path, ""
    if not path.is_dir() or run is path:
        theirs = folder / "transformers"
        try:
            if not theirs.exists():
                write_transformers(run, theirs)
        except PretrainedError as error:
            unable = f"{error}: {_REMEDY}"
    source = Source(
        name=origin.source if origin is not None else path.name,
        shape=_shape(config),
        context=config.context,
        span=None if config.attention == "full" else config.span,
        run=str(run),
        transformers="" if unable else str(theirs),
        unable=unable,
        gguf=str(path) if path.suffix == SUFFIX else "",
    )
    (folder / SOURCE).write_text(json.dumps(asdict(source), indent=1))
    return source


def _shape(config: ModelConfig) -> Shape:
    return Shape(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        mlp=config.mlp,
        vocabulary=config.vocabulary,
        kv_heads=config.kv_heads,
        channels=config.head_dim,
        gated=config.architecture.gated,
        tied=config.architecture.tied,
    )


def write_transformers(run: Path, folder: Path) -> None:
    """Write a run as a Hugging Face folder in float32, which must not exist yet.

    Raises PretrainedError for what this does not know how to write.
    """
    raw = json.loads((run / CONFIG).read_text())
    config, origin = ModelConfig.read(raw["model"]), read_origin(run)
    if origin is None or config.attention != "full":
        raise PretrainedError(f"{run} is a model of our own, which no other engine can run")
    settings = _settings(config, origin)
    tensors: dict[str, Tensor] = {}
    with safe_open(run / CHECKPOINT, framework="pt") as file:
        found = recipes(config, origin.architecture, PREFIXES[origin.architecture])
        for name, recipe in found.items():
            rows = [shape[0] for _, shape in recipe.parts]
            parts = file.get_tensor(f"model.{name}").split(rows)
            for (theirs, _), part in zip(recipe.parts, parts, strict=True):
                tensors[theirs] = part.float().contiguous()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    (partial / CONFIG).write_text(json.dumps(settings, indent=1))
    if (run / TOKENIZER).exists():
        shutil.copyfile(run / TOKENIZER, partial / TOKENIZER)
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **origin.template_tokens}
        (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    partial.rename(folder)


def _settings(config: ModelConfig, origin: Origin) -> dict[str, Any]:
    """The config.json of transformers. Raises PretrainedError."""
    built, family = config.architecture, origin.architecture
    if family not in _CLASSES:
        raise PretrainedError(f"a run of {family} is not written for transformers")
    if built.windows or built.unturned or built.rope is None:
        raise PretrainedError("layers that differ are not written for transformers")
    ends = list(origin.end_tokens)
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": built.epsilon,
        "hidden_act": _ACTIVATIONS[built.activation],
        "attention_bias": "qkv" in built.biases,
        "mlp_bias": "mlp" in built.biases,
        "tie_word_embeddings": built.tied,
        "rope_theta": _theta(built.rope, config.head_dim),
        "sliding_window": None,
        "bos_token_id": origin.begin_token,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "dtype": "float32",
    }


def _theta(rope: Rope, head_dim: int) -> float:
    """The base of plain rotary positions. Raises PretrainedError for others."""
    found = rope.frequencies[1] ** -len(rope.frequencies) if len(rope.frequencies) > 1 else 1e4
    for theta in (float(f"{found:.{digits}g}") for digits in (1, 2, 3, 4, 5, 6)):
        if make_rope({"rope_theta": theta}, head_dim) == rope:
            return theta
    raise PretrainedError("scaled rotary positions are not written for transformers")


def main() -> None:
    """Prepare what the arguments name; an error is one line."""
    path, folder = (Path(argument).resolve() for argument in sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        prepare(path, folder)
    except PretrainedError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
