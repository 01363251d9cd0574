"""Training: one loop for all datasets and patterns, seeded; a resumed run gives the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.data import IGNORED, Dataset, draw_batch, heldout_batches, mask
from model.decoder import Decoder
from model.fit import check_fit, check_room
from model.initial import Initial, read_initial
from model.run import (
    CHECKPOINT,
    Progress,
    TrainConfig,
    append_log,
    claimed,
    load_checkpoint,
    restore,
    save,
)

SAVE_EVERY_S = 300.0
"""Time between checkpoints, unless an evaluation writes one earlier."""


class Stopped(Exception):
    """The run was asked to stop, and has saved what it has done."""


class Diverged(Exception):
    """The loss or a gradient is no longer a number."""


def train(
    folder: Path,
    model_config: ModelConfig,
    train_config: TrainConfig,
    dataset: Dataset,
    on_step: Callable[[Progress], None] = lambda progress: None,
    *,
    on_start: Callable[[int, Initial | None], None] = lambda step, initial: None,
    stop: Callable[[], bool] = lambda: False,
    save_every_s: float = SAVE_EVERY_S,
    init: Path | None = None,
) -> float:
    """Train, with checkpoints in `folder`, and return held-out bits per token.

    Continues from the checkpoint in `folder`, if there is one; an interrupted run ends with the
    same weights as one without a break. Before it writes anything, it raises RunError if `folder`
    has a run with another configuration, if the model does not fit the data, or if the data is too
    short. What fails before the first checkpoint leaves nothing in `folder`.

    on_start: called with the number of steps that are done already, and the `init` of a new run.
    init: a run or bundle whose weights a new run begins with; one that is resumed does not read it.
    stop: asked before every step, and while evaluating; if true, the run is saved, and raises
    Stopped. Raises Diverged, and keeps the last checkpoint, if the loss is not finite.
    """
    check_fit(model_config, dataset)
    initial = None
    if init is not None and not (folder / CHECKPOINT).exists():
        initial = read_initial(init, model_config, dataset.info)
    origin = None if initial is None else initial.origin
    with claimed(folder, model_config, train_config, dataset.info, origin):
        torch.manual_seed(train_config.seed)
        model = Decoder(model_config, train_config.dropout)
        if initial is not None:
            model.load_state_dict(initial.model.state_dict())
        check_room(folder, model)
        run = _Run(folder, model, train_config, dataset, stop)
        on_start(run.resume(), initial)
        saved_at = time.monotonic()
        while run.step < run.steps:
            run.obey()
            run.advance()
            if run.due or time.monotonic() - saved_at >= save_every_s:
                run.settle()
                saved_at = time.monotonic()
            assert run.done is not None
            on_step(run.done)
    return next(iter(load_checkpoint(folder).metrics.values()))


class _Run:
    """A run between two steps: the model, the optimisers, and the last step that is done."""

    def __init__(
        self,
        folder: Path,
        model: Decoder,
        config: TrainConfig,
        dataset: Dataset,
        stop: Callable[[], bool],
    ) -> None:
        self.folder, self.model, self.config, self.dataset = folder, model, config, dataset
        self.stop = stop
        self.optimisers = _optimisers(model, config)
        self.steps = config.steps(model.config.context)
        self.done: Progress | None = None
        self.saved = 0

    @property
    def step(self) -> int:
        """Number of steps that are done."""
        return self.done.step if self.done else 0

    @property
    def due(self) -> bool:
        """Whether the model is evaluated after the last step."""
        return self.step % self.config.evaluate_every == 0 or self.step == self.steps

    def resume(self) -> int:
        """Read the checkpoint, if there is one, and return the number of its steps."""
        self.done = restore(self.folder, self.model, self.optimisers)
        self.saved = self.step
        if self.done and self.due and self.done.heldout is None:
            self.settle()  # it was stopped while it evaluated
        return self.step

    def obey(self) -> None:
        """Save the run and raise Stopped, if it is asked to stop."""
        if not self.stop():
            return
        if self.done is None:
            raise Stopped("stopped before the first step was done: nothing is saved")
        if self.saved != self.step:
            self._save()
        raise Stopped(
            f"stopped at step {self.step} of {self.steps}, saved in {self.folder}: the same "
            "command goes on from there"
        )

    def advance(self) -> None:
        """One step of the optimisers."""
        began, step, config = time.monotonic(), self.step, self.config
        context, model = self.model.config.context, self.model
        torch.manual_seed(
            config.seed * 1_000_003 + step
        )  # so that dropout depends on the step only
        inputs, targets = draw_batch(self.dataset, context, config.rows, config.seed, step)
        if model.config.masked:
            inputs, targets = mask(targets, model.config.vocabulary, (config.seed, step))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _schedule(step, self.steps, config.warmup)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            logits = model(torch.from_numpy(inputs))
        loss = F.cross_entropy(logits.float().flatten(0, 1), torch.from_numpy(targets).flatten())
        self._check("the loss", loss.item())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        self._check("the norm of the gradient", norm.item())
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        self.done = Progress(
            step + 1,
            self.steps,
            loss.item() / math.log(2),
            inputs.size / seconds,
            None,
            seconds + (self.done.seconds if self.done else 0.0),
        )

    def settle(self) -> None:
        """Write a checkpoint after the last step; evaluate before that, if it is due."""
        if self.due:
            limit = None if self.step == self.steps else self.config.evaluate_rows
            heldout = evaluate(self.model, self.dataset, limit, on_batch=self.obey)
            self._check("the loss on held-out data", heldout)
            assert self.done is not None
            self.done = replace(self.done, heldout=heldout)
            # The line comes first: after a crash in between, the steps are repeated and it is
            # written again.
            append_log(self.folder, self.done)
        self._save()

    def _save(self) -> None:
        assert self.done is not None
        for name, weight in self.model.named_parameters():
            self._check(f"a weight of {name}", weight.sum().item())
        metrics = {"tokens": float(self.step * self.config.rows * self.model.config.context)}
        if self.done.heldout is not None:
            metrics = {self.dataset.info.unit: self.done.heldout, **metrics}
        save(self.folder, self.model, self.optimisers, self.done, metrics)
        self.saved = self.step

    def _check(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        rate = self.config.rate
        lower = min(rate / 10, TrainConfig.rate)
        way_out = (
            f"the checkpoint of step {self.saved} is kept in {self.folder}; a new run goes on from "
            f"its weights with --init {self.folder} --rate {lower:g}"
            if self.saved
            else f"there is no checkpoint yet; start again with --rate {lower:g}"
        )
        raise Diverged(
            f"{what} is {value} after {self.step} of {self.steps} steps, so the run stops. The "
            f"rate of {rate:g} is too high, or the warm-up of {self.config.warmup} steps too "
            f"short: {way_out}"
        )


@torch.no_grad()
def evaluate(
    model: Decoder,
    dataset: Dataset,
    limit: int | None = None,
    rows: int = 8,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Bits per token on at most `limit` windows of the held-out data, in float32.

    For a masked model: bits per masked token. `on_batch` is called before every batch.
    """
    model.eval()
    total = count = 0.0
    batches = heldout_batches(dataset, model.config.context, rows, limit)
    for number, (inputs, targets) in enumerate(batches):
        on_batch()
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
