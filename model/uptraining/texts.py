"""Windows of tokens, as a model sees them, from the text of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from concertina.codecs.starts import TokenStarts
from concertina.codecs.tokenizer_codec import tokenizer_codec
from concertina.codecs.tokenizer_file import TOKENIZER
from model.data import END_OF_TEXT
from model.run import Checkpoint, RunError

Encode = Callable[[str], npt.NDArray[np.int64]]
_BYTES_A_TOKEN = 6  # more than most texts have; where it is too little, more is read


def encoder(folder: Path, checkpoint: Checkpoint) -> tuple[Encode, int | None]:
    """What turns text into the tokens of the run in `folder`, and the token before every text."""
    config = checkpoint.config
    if checkpoint.data.modality != "text":
        raise RunError(f"{folder} has a model of images: only models of text can be folded")
    if checkpoint.origin is None:
        return (lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int64)), (
            config.vocabulary if config.starts else None
        )
    if not (folder / TOKENIZER).exists():
        raise RunError(f"{folder} has no {TOKENIZER}: convert the model with its tokenizer")
    begin = checkpoint.origin.begin_token
    starts = TokenStarts("", config.vocabulary, begin)
    return tokenizer_codec(starts, (folder / TOKENIZER).read_bytes()).from_text, begin


def windows(
    content: npt.NDArray[np.uint8],
    encode: Encode,
    first: int | None,
    *,
    count: int,
    length: int,
    seed: int | None = None,
) -> Tensor:
    """`[count, length]` tokens, each row from another place of `content`, the text of a dataset.

    first: token at the beginning of each. seed: places at random; None: evenly spread ones.
    Raises RunError if the text is too short.
    """
    room, made = _BYTES_A_TOKEN * length, []
    if len(content) < 2 * length:
        raise RunError(
            f"the text has {len(content):,} bytes, too few for windows of {length:,} tokens: use "
            "more text, or a smaller --window-tokens"
        )
    last = max(1, len(content) - room)
    if seed is None:
        places = np.linspace(0, last - 1, count).astype(np.int64)
    else:
        places = np.random.default_rng(seed).integers(last, size=count)
    for place in places.tolist():
        tokens, taken = np.zeros(0, np.int64), room
        while len(tokens) < length:
            part = content[place : place + taken].tobytes().replace(bytes([END_OF_TEXT]), b"\n")
            tokens = encode(part.decode(errors="ignore"))
            if place + taken >= len(content) and len(tokens) < length:
                if not place:
                    raise RunError(f"the text has fewer than {length:,} tokens: use more text")
                place = max(0, place - taken)
            taken *= 2
        tokens = tokens[:length]
        if first is not None:
            tokens = np.concatenate(([first], tokens[:-1]))
        made.append(torch.from_numpy(tokens))
    return torch.stack(made)
