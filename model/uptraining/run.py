"""A run becomes another one that remembers less: text, errors, choice, and the files of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors.torch import save_file

from concertina.codecs.chat_template import TEMPLATE
from concertina.codecs.tokenizer_file import TOKENIZER
from model.config import ModelConfig
from model.data import Dataset
from model.decoder import Decoder
from model.layers.architecture import Folding
from model.run import (
    CHECKPOINT,
    CONFIG,
    PARTIAL,
    Checkpoint,
    RunError,
    load_checkpoint,
    write_whole,
)
from model.uptraining.choose import LayerErrors, choose, share, with_layers
from model.uptraining.compared import Comparison, compare, metrics_of
from model.uptraining.report import write_report
from model.uptraining.summaries import PASS, FitConfig, Fitted, fit_layers
from model.uptraining.texts import encoder, windows
from model.uptraining.weights import given_weights, summary_numbers

_HEAD = "head.weight"
_SHORTEST = 256


@dataclass(frozen=True)
class Settings:
    """What is folded, and on how much text the summaries are fitted."""

    budget: float = 0.25
    """Share of the state that full attention has in the whole context."""
    span: int = 32
    sink: int = 1
    window: int = 3
    tokens: int = 16_384
    window_tokens: int = 2048
    """Tokens of a window of text."""
    fit: FitConfig = field(default_factory=FitConfig)
    measured: tuple[int, ...] = ()
    """Lengths of held-out texts on which to compare; none are compared on none."""
    texts: int = 4
    """How many texts of each length."""

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise ValueError(f"budget must be above 0 and below 1, got {self.budget}")
        least = (self.sink + self.window + 3) * self.span
        if self.window_tokens < least:
            raise ValueError(
                f"window_tokens is {self.window_tokens}: with this span, sink and window it must "
                f"be at least {least}, or hardly a token reads a summary"
            )
        if self.tokens < 2 * self.window_tokens:
            raise ValueError(
                f"tokens is {self.tokens}: it must be at least {2 * self.window_tokens}, two "
                "windows, as the last one is not fitted on"
            )
        if self.texts < 1:
            raise ValueError(f"texts must be at least 1, got {self.texts}")
        if min(self.measured, default=_SHORTEST) < _SHORTEST:
            raise ValueError(
                f"measured is {min(self.measured)}: a text needs at least {_SHORTEST} tokens, to "
                "have room for a pass key"
            )
        for name in ("steps", "rate"):
            if getattr(self.fit, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self.fit, name)}")


@dataclass(frozen=True)
class Uptrained:
    """What came of it."""

    config: ModelConfig
    errors: tuple[LayerErrors, ...]
    seconds: float
    comparison: Comparison | None = None
    """With full attention and with windows; None if nothing was measured."""

    @property
    def share(self) -> float:
        """How much of the state of full attention is left in the whole context."""
        return share(self.config)


def uptrain(
    run: Path,
    out: Path,
    dataset: Dataset,
    settings: Settings,
    *,
    on_layer: Callable[[Fitted, int], None] = lambda done, layers: None,
    on_variant: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
) -> Uptrained:
    """Write the run `out`: the model of `run` with layers that fold, chosen within the budget.

    The training part of `dataset` is what summaries are fitted on; the held-out part is what the
    model is measured on, and if sliding windows that keep as much lose less, these it gets. A pass
    that was interrupted goes on if everything is as before. Raises RunError if the model cannot be
    folded or `out` is in use, BudgetError if the budget is too small, and Interrupted if `stop`
    says so.
    """
    began = time.monotonic()
    if (out / CHECKPOINT).exists() or (out.exists() and not out.is_dir()):
        raise RunError(f"{out} exists: choose another folder, or remove it")
    checkpoint = load_checkpoint(run)
    config = _every_layer_folded(run, checkpoint, settings)
    encode, first = encoder(run, checkpoint)
    tokens = windows(
        dataset.train,
        encode,
        first,
        count=settings.tokens // settings.window_tokens,
        length=settings.window_tokens,
        seed=settings.fit.seed,
    )
    model = given_weights(config, checkpoint.model)
    key = _key(run, dataset, settings)
    errors = fit_layers(
        model,
        tokens,
        settings.fit,
        out,
        key,
        lambda done: on_layer(done, config.layers),
        stop,
    )
    chosen, found = with_layers(config, choose(config, errors, settings.budget)), None
    if settings.measured:
        hays = [
            windows(dataset.heldout, encode, first, count=settings.texts, length=length)
            for length in sorted(settings.measured)
        ]
        numbers = summary_numbers(model)
        found = compare(checkpoint, chosen, numbers, hays, encode, on_variant)
        chosen = chosen if found.folds_win else found.window
    done = Uptrained(chosen, tuple(errors), time.monotonic() - began, found)
    _write(run, out, checkpoint, model, done, settings)
    return done


def _every_layer_folded(run: Path, checkpoint: Checkpoint, settings: Settings) -> ModelConfig:
    config, built = checkpoint.config, checkpoint.config.architecture
    if config.attention != "full":
        raise RunError(f"{run} has {config.attention} attention: only full attention can be folded")
    if built.folding is not None:
        raise RunError(f"{run} is folded already: begin with the run that it was made of")
    for option, length in (
        ("--window-tokens", settings.window_tokens),
        ("--measure", max(settings.measured, default=0)),
    ):
        if length > config.context:
            raise RunError(
                f"{option} is {length:,}, and the model's context is {config.context:,}: lower it"
            )
    layers = tuple("full" if width else "fold" for width in built.windows or (0,) * config.layers)
    try:
        folding = Folding(layers, settings.sink, settings.window, "fitted")  # type: ignore[arg-type]
        return replace(config, span=settings.span, architecture=replace(built, folding=folding))
    except ValueError as error:
        raise RunError(str(error)) from None


def _key(run: Path, dataset: Dataset, settings: Settings) -> str:
    """Stands for everything that a fit depends on; the budget and what is measured do not."""
    file = (run / CHECKPOINT).stat()
    fields = asdict(replace(settings, budget=0.5, measured=(), texts=1))
    content = json.dumps([fields, file.st_size, file.st_mtime_ns, asdict(dataset.info)])
    digest = hashlib.sha256(content.encode())
    digest.update(dataset.train.tobytes())
    return digest.hexdigest()


def _write(
    run: Path,
    out: Path,
    checkpoint: Checkpoint,
    model: Decoder,
    done: Uptrained,
    settings: Settings,
) -> None:
    """The files of a run; the checkpoint comes last, and the saved pass goes."""
    chosen = given_weights(done.config, checkpoint.model, summary_numbers(model))
    raw = json.loads((run / CONFIG).read_text())
    raw["model"] = done.config.stored()
    raw["uptraining"] = {
        **asdict(settings),
        "share": done.share,
        "seconds": round(done.seconds, 1),
        "errors": [asdict(each) for each in done.errors],
    }
    write_whole(out / CONFIG, json.dumps(raw, indent=1, allow_nan=False))
    for name in (TOKENIZER, TEMPLATE):
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    tied = done.config.architecture.tied
    weights = {
        f"model.{name}": weight.contiguous()
        for name, weight in chosen.state_dict().items()
        if not (tied and name == _HEAD)
    }
    metrics = {**checkpoint.metrics, "state_share": done.share}
    if done.comparison is not None:
        folding = done.config.architecture.folding
        assert folding is not None
        write_report(out, folding.layers, done.errors, done.comparison)
        metrics |= metrics_of(done.comparison)
    partial = out / (CHECKPOINT + PARTIAL)
    save_file(weights, partial, {"step": str(checkpoint.step), "metrics": json.dumps(metrics)})
    os.replace(partial, out / CHECKPOINT)
    with suppress(FileNotFoundError):
        (out / PASS).unlink()
