"""A Hugging Face folder: config.json, and weights in one or several safetensors files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from concertina.shown import cut, shown
from model.pretrained.files import find_file, read_json
from model.pretrained.source import UNKNOWN_LICENSE, PretrainedError, Source
from model.pretrained.vocabulary import read_vocabulary

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_MOST_HEADER, _LONGEST_NAME = 32 << 20, 255
_LICENSE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)", re.MULTILINE)
_TOKENS = ("bos_token_id", "eos_token_id")


class _Shards:
    """Tensors in open safetensors files, by the file that has each."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files

    def names(self) -> list[str]:
        """See Tensors."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See Tensors."""
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """See Tensors."""
        tensor: Tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise PretrainedError(
                f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}: only float32, "
                "float16 and bfloat16 are supported; convert the checkpoint that it was made of"
            )
        return tensor


@contextmanager
def open_folder(path: Path) -> Iterator[Source]:
    """The model in the folder `path`, open for reading. Raises PretrainedError."""
    settings = read_json(path, CONFIG)
    if find_file(path, _GENERATION):
        generation = read_json(path, _GENERATION)
        settings |= {name: generation[name] for name in _TOKENS if generation.get(name) is not None}
    files = _weight_files(path)
    with ExitStack() as stack:
        by_name: dict[str, Any] = {}
        for file in files:
            opened = _open(stack, file)
            by_name |= dict.fromkeys(opened.keys(), opened)
        vocabulary = read_vocabulary(path)
        yield Source(path, settings, _Shards(by_name), files, _license(path), vocabulary=vocabulary)


def _weight_files(path: Path) -> tuple[Path, ...]:
    if whole := find_file(path, WEIGHTS):
        return (whole,)
    if not find_file(path, _INDEX):
        hint = ""
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            hint = "; it has pickled weights, which can run code: save it as safetensors"
        raise PretrainedError(f"{path} has neither {WEIGHTS} nor {_INDEX}{hint}")
    listed = read_json(path, _INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise PretrainedError(f"{path / _INDEX} has no weight_map")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if (
            Path(name).name != name
            or not name.endswith(".safetensors")
            or ("\0" in name or len(name) > _LONGEST_NAME)
        ):
            raise PretrainedError(
                f"{path / _INDEX} names {shown(name)}, which is no file of the folder"
            )
        if not find_file(path, name):
            raise PretrainedError(
                f"{path} has no {cut(name, 80)}, which {_INDEX} names: it is incomplete"
            )
    return tuple(path / name for name in names)


def _open(stack: ExitStack, file: Path) -> Any:
    with file.open("rb") as begin:
        size = int.from_bytes(begin.read(8), "little")
    if size > _MOST_HEADER:
        raise PretrainedError(
            f"{file} begins with a header of {size:,} bytes; the limit is {_MOST_HEADER:,}: it is "
            "damaged, or not a safetensors file"
        )
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{file} is damaged or incomplete: {error}") from None


def _license(path: Path) -> str:
    """What the front matter of the model card says."""
    card = find_file(path, "README.md")
    if card is None:
        return UNKNOWN_LICENSE
    with card.open(encoding="utf-8", errors="replace") as file:
        found = _LICENSE.search(file.read(1 << 16))
    return found.group(1) if found else UNKNOWN_LICENSE
