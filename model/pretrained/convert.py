"""Converts a pretrained model: its folder or file becomes a run, which can be exported."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from concertina.machine import memory_bytes
from concertina.shown import cut, shown
from model.config import ModelConfig
from model.data import DatasetInfo
from model.pretrained.folder import open_folder
from model.pretrained.gguf_file import SUFFIX, open_gguf
from model.pretrained.settings import configure
from model.pretrained.source import PretrainedError, Source
from model.pretrained.vocabulary import require_usable
from model.pretrained.weights import Recipe, find_parameters
from model.run import CHECKPOINT, CONFIG, Origin, TrainConfig

_CHUNK = 1 << 22
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

OnTensor = Callable[[str, int, int], None]
"""Called with the name of a parameter, and how many of how many are read."""


def convert(
    source: Path,
    run: Path,
    *,
    license: str | None = None,
    on_tensor: OnTensor = lambda name, done, count: None,
) -> Origin:
    """Write the model at `source` to the folder `run`, as `concertina train` leaves a run.

    license: what the licence is where the source does not say it. In memory are at most the
    weights, in the type that they are stored in, and one layer. Raises PretrainedError if the model
    cannot be converted, and FileExistsError if `run` exists; after an error nothing is left.
    """
    if run.exists():
        raise FileExistsError(f"{run} exists: choose another folder, or remove it")
    with open_source(source) as opened:
        config = configure(opened.settings, opened.divisors)
        recipes = find_parameters(opened.tensors, config, opened.settings["model_type"])
        _require_room(recipes)
        require_usable(opened.vocabulary, config.vocabulary)
        origin = _origin(opened, license)
        run.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{run.name}.", dir=run.parent))
        try:
            _write(partial, opened, recipes, config, origin, on_tensor)
            partial.chmod(0o755)
            partial.rename(run)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return origin


def open_source(path: Path) -> AbstractContextManager[Source]:
    """The model at `path`, whatever it is. Raises PretrainedError if it is none."""
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix == SUFFIX:
        return open_gguf(path)
    if path.is_file() and path.suffix in _PICKLED:
        raise PretrainedError(
            f"{path} has pickled weights, which can run code: save the model as safetensors, and "
            "name its folder"
        )
    raise PretrainedError(f"{path} is neither the folder of a model nor a {SUFFIX} file")


def _require_room(recipes: Mapping[str, Recipe]) -> None:
    """Raise PretrainedError if the weights, in two bytes each, are more than there is memory."""
    count = sum(math.prod(shape) for recipe in recipes.values() for _, shape in recipe.parts)
    if 2 * count > (room := memory_bytes()):
        raise PretrainedError(
            f"the model has {count:,} weights, and {room / 1e9:.0f} GB of memory are too little "
            "for them: convert it on a larger machine"
        )


def _write(
    folder: Path,
    source: Source,
    recipes: Mapping[str, Recipe],
    config: ModelConfig,
    origin: Origin,
    on_tensor: OnTensor,
) -> None:
    weights = {}
    for name, recipe in recipes.items():
        weight = recipe.read(source.tensors)
        if not all(map(math.isfinite, torch.aminmax(weight))):
            names = " or ".join(name for name, _ in recipe.parts)
            raise PretrainedError(f"{names} has values that are no finite numbers")
        weights[f"model.{name}"] = weight
        on_tensor(name, len(weights), len(recipes))
    save_file(weights, folder / CHECKPOINT, {"step": "0", "metrics": json.dumps({"tokens": 0})})
    data = DatasetInfo("text", config.vocabulary, origin.source, origin.license)
    content = {
        "model": config.stored(),
        "train": asdict(TrainConfig()),
        "data": asdict(data),
        "origin": asdict(origin),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1, allow_nan=False))
    for name, written in source.vocabulary.files.items():
        (folder / name).write_bytes(written)


def _origin(source: Source, license: str | None) -> Origin:
    settings, name = source.settings, source.settings.get("_name_or_path")
    _token(settings, "bos_token_id", settings.get("bos_token_id"))  # wrong, even if it is not used
    ends = settings.get("eos_token_id")
    digest = hashlib.sha256()
    for file in source.files:
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    return Origin(
        source=cut(name) if isinstance(name, str) and name else source.path.resolve().name,
        architecture=settings["model_type"],
        license=license or source.license,
        weights_sha256=digest.hexdigest(),
        begin_token=_token(settings, "the begin token", source.vocabulary.begin_token),
        end_tokens=tuple(
            token
            for each in (ends if isinstance(ends, list) else [ends])
            if (token := _token(settings, "eos_token_id", each)) is not None
        ),
        template_tokens=dict(source.vocabulary.template_tokens),
    )


def _token(settings: Any, name: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < settings["vocab_size"]:
        raise PretrainedError(
            f"{name} is {shown(value)}; tokens of the model are below {settings['vocab_size']}"
        )
    return value
