"""Training: one loop for all datasets and patterns, seeded; a resumed run gives the same bits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from model.config import ROWS, ModelConfig
from model.data import IGNORED, Dataset, DatasetInfo, draw_batch, heldout_batches, mask
from model.decoder import Decoder
from model.run import (
    CHECKPOINT,
    LOG,
    Progress,
    TrainConfig,
    claim,
    load_checkpoint,
    read_log,
    restore,
    save,
)


def train(
    folder: Path,
    model_config: ModelConfig,
    train_config: TrainConfig,
    dataset: Dataset,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> float:
    """Train, with checkpoints in `folder`, and return held-out bits per token.

    Continues from the checkpoint in `folder`, if there is one; an interrupted run ends with the
    same weights as one without a break. Raises ValueError if `folder` has a run with another
    configuration, or if the model does not fit the data.
    """
    _check_fit(model_config, dataset.info)
    claim(folder, model_config, train_config, dataset.info)
    torch.manual_seed(train_config.seed)
    model = Decoder(model_config, train_config.dropout)
    optimisers = _optimisers(model, train_config)
    steps = train_config.steps(model_config.context)
    first = restore(folder, model, optimisers) if (folder / CHECKPOINT).exists() else 0
    total_s = next((p.seconds for p in read_log(folder) if p.step == first), 0.0) if first else 0.0
    rows, context, seed = train_config.rows, model_config.context, train_config.seed

    for step in range(first, steps):
        began = time.monotonic()
        torch.manual_seed(seed * 1_000_003 + step)  # so that dropout depends only on the step
        inputs, targets = draw_batch(dataset, context, rows, seed, step)
        if model_config.masked:
            inputs, targets = mask(targets, model_config.vocabulary, (seed, step))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _schedule(step, steps, train_config.warmup)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=train_config.bfloat16):
            logits = model(torch.from_numpy(inputs))
        loss = F.cross_entropy(logits.float().flatten(0, 1), torch.from_numpy(targets).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train_config.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        total_s += seconds

        heldout = None
        if (step + 1) % train_config.evaluate_every == 0 or step + 1 == steps:
            last = step + 1 == steps
            heldout = evaluate(model, dataset, None if last else train_config.evaluate_rows)
        progress = Progress(
            step + 1, steps, loss.item() / math.log(2), inputs.size / seconds, heldout, total_s
        )
        if heldout is not None:
            # The line comes first: after a crash in between, the steps are repeated and it is
            # written again.
            with (folder / LOG).open("a") as log:
                log.write(json.dumps(asdict(progress)) + "\n")
            metrics = {dataset.info.unit: heldout, "tokens": float((step + 1) * rows * context)}
            save(folder, model, optimisers, step + 1, metrics)
        on_step(progress)
    return next(iter(load_checkpoint(folder).metrics.values()))


@torch.no_grad()
def evaluate(model: Decoder, dataset: Dataset, limit: int | None = None, rows: int = 8) -> float:
    """Bits per token on at most `limit` windows of the held-out data, in float32.

    For a masked model: bits per masked token.
    """
    model.eval()
    total = count = 0.0
    batches = heldout_batches(dataset, model.config.context, rows, limit)
    for number, (inputs, targets) in enumerate(batches):
        if model.config.masked:
            inputs, targets = mask(targets, model.config.vocabulary, (number,))
        logits = model(torch.from_numpy(inputs))
        flat = torch.from_numpy(targets).flatten()
        total += F.cross_entropy(logits.flatten(0, 1), flat, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    if not count:
        raise ValueError(
            f"the held-out data is shorter than one window of {model.config.context} tokens"
        )
    return total / count / math.log(2)


def _check_fit(model: ModelConfig, data: DatasetInfo) -> None:
    if data.modality == "image" and model.attention in ROWS and model.span != data.image_width:
        raise ValueError(
            f"{model.attention} has rows of {model.span} tokens, but the images have rows of "
            f"{data.image_width} pixels: set the span to the width of the images"
        )
    wanted = {"vocabulary": data.vocabulary, "starts": data.starts}
    if data.modality == "image":
        wanted["context"] = data.image_width * data.image_height
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise ValueError(
                f"the model's {name} is {getattr(model, name)}, but this data needs {value}"
            )


def _optimisers(model: Decoder, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embeddings, norms and the output head."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices,
        lr=config.rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(others, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = config.rate
    return [muon, adam]


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))
