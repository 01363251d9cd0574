"""The commands that talk to a server: `generate`, `paint`, `score` and `models`."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image, UnidentifiedImageError
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table

from concertina.cli.printing import Follower, event_json, own_line, write_outputs
from concertina.cli.options import (
    Address,
    AllowedTokenIds,
    BadWords,
    Ca,
    Cert,
    CertKey,
    FrequencyPenalty,
    IgnoreEos,
    IncludeStop,
    Json,
    Keep,
    KeyFile,
    Label,
    LogitBias,
    Logprobs,
    MaxTokens,
    MinP,
    MinTokens,
    ModelName,
    Outputs,
    PresencePenalty,
    Priority,
    PromptLogprobs,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    StreamInterval,
    Temperature,
    TimeLimit,
    Timeout,
    TopK,
    TopP,
    TypicalP,
    UseTls,
    access,
    logit_biases,
    png_file,
    readable_file,
)
from concertina.cli.canvas import Canvas, Easel, in_palette, read_rows
from concertina.client import (
    DEFAULT_ADDRESS,
    Client,
    ConcertinaError,
    ImageFormat,
    InvalidRequest,
    Model,
    ModelNotFound,
)

if TYPE_CHECKING:
    from concertina.client.channel import Access
    from concertina.client.requests import PromptLike

_LOOKUP_TIMEOUT = 30.0
_FRAMES_PER_SECOND = 12


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads it from standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", exists=True, dir_okay=False, help="Text to continue."),
    ] = None,
    label: Label = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    allowed_token_id: AllowedTokenIds = None,
    bad_word: BadWords = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: StopTokenIds = None,
    include_stop: IncludeStop = None,
    min_tokens: MinTokens = None,
    ignore_eos: IgnoreEos = None,
    time_limit: TimeLimit = None,
    priority: Priority = None,
    outputs: Outputs = None,
    logprobs: Logprobs = None,
    prompt_logprobs: PromptLogprobs = None,
    stream_interval: StreamInterval = None,
    keep: Keep = None,
    timeout: Timeout = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    json_output: Json = False,
) -> None:
    """Write text to standard output as it is generated.

    Of several outputs, the first is written as it comes, the others when all are complete.

    Log-probabilities are shown with --json. A stream that is lost goes on when the server is back.

    Examples:
    concertina generate "def fibonacci(n):"
    concertina generate "import " -n 400 --temperature 0.7 --seed 7
    concertina generate --prompt-file main.py --stop "def " --stop "class "
    concertina generate "def " --keep 3600
    concertina generate "x = " --n 3 --logprobs 5 --json
    git diff | concertina generate - --json
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give the prompt as an argument or as --prompt-file, not both")
    text = _read_text(prompt_file or Path("-")) if prompt_file or prompt == "-" else prompt
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        chosen = _choose(client, model, "text")
        stream = client.generate(
            text or None,
            model=chosen.name,
            label=label,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_biases(logit_bias),
            allowed_token_ids=allowed_token_id,
            bad_words=bad_word,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_id,
            include_stop=include_stop,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            time_limit=time_limit,
            priority=priority,
            n=outputs,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stream_interval=stream_interval,
            timeout=timeout,
            keep=keep,
        )
        follower = Follower(json_output)
        with stream, nullcontext() if json_output else own_line():
            tokens = follower.tokens(stream)
            if json_output:
                deque(tokens, maxlen=0)  # they are printed as they pass
            else:
                write_outputs(tokens, outputs or 1)
    follower.summarise()


def paint(
    label: Label = None,
    complete: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Image to complete: its upper rows, or one whose lower rows are transparent.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, callback=png_file, help="PNG to write."),
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Pixels of the PNG per pixel painted.")] = 8,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    time_limit: TimeLimit = None,
    priority: Priority = None,
    timeout: Timeout = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    json_output: Json = False,
) -> None:
    """Paint an image in the terminal as it is generated.

    If standard output is no terminal, the finished picture is printed, unless --out keeps it.

    Examples:
    concertina paint --label "Food & Drink" --seed 7
    concertina paint --out image.png --scale 16
    concertina paint --complete half.png --out whole.png
    """
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        chosen = _choose(client, model, "image")
        size = _image_format(chosen)
        canvas = Canvas(size.width, size.height)
        rows = read_rows(complete, size.width, size.height) if complete else None
        if rows is not None:
            canvas.paint(0, in_palette(rows, size.palette))
        stream = client.generate(
            rows,
            model=chosen.name,
            label=label,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            time_limit=time_limit,
            priority=priority,
            timeout=timeout,
        )
        console = Console()
        live = console.is_terminal and not json_output
        easel = Easel(canvas, " · ".join(filter(None, (chosen.name, label))))
        easel.fit(console)
        view = Live(easel, console=console, refresh_per_second=_FRAMES_PER_SECOND)
        follower = Follower(json_output)
        with stream, view if live else nullcontext():
            for tokens in follower.tokens(stream):
                canvas.paint(tokens.first_position, tokens.rgb)
    if out is not None:
        canvas.image(scale).save(out, format="PNG")
    elif not live and not json_output:
        canvas.zoom = 1
        Console(force_terminal=True, color_system="truecolor").print(canvas, end="")
    follower.summarise()


def score(
    file: Annotated[
        Path,
        typer.Argument(callback=readable_file, help="Text or image; - is text from stdin."),
    ],
    label: Label = None,
    timeout: Timeout = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    json_output: Json = False,
) -> None:
    """Measure how well a model predicts a text (bits per byte) or an image (bits per dimension).

    Nothing is generated. Fewer bits are better; a model that knows nothing needs 8 for a byte.

    Examples:
    concertina score main.py
    concertina score image.png --label "Food & Drink" --json
    """
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        if _is_image(file):
            chosen, unit = _choose(client, model, "image"), "bits/dim"
            size = _image_format(chosen)
            prompt: PromptLike = read_rows(file, size.width, size.height)
        else:
            chosen, unit = _choose(client, model, "text"), "bits/byte"
            prompt = _read_text(file)
        result = client.score(prompt, model=chosen.name, label=label, timeout=timeout)
    if json_output:
        print(json.dumps(asdict(result)))
    else:
        tokens = f"{len(result.bits):,} tokens"
        print(f"{result.bits_per_token:.4f} {unit} over {tokens} ({result.model})")


def models(
    address: Address = DEFAULT_ADDRESS,
    key_file: KeyFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    json_output: Json = False,
) -> None:
    """List what a server serves.

    Examples:
    concertina models
    concertina models --json | jq .name
    CONCERTINA_ADDRESS=127.0.0.1:9001 concertina models
    """
    with connected(address, access(key_file, tls, ca, cert, cert_key), json_output) as client:
        served = client.models(timeout=_LOOKUP_TIMEOUT)
    if json_output:
        for model in served:
            print(event_json(asdict(model)))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("model", "writes", "attention"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parameters", "context", "state", "held-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in served:
        table.add_row(
            model.name,
            model.modality,
            model.attention,
            f"{model.parameters / 1e6:.1f} M",
            f"{model.context:,}",
            decimal(model.max_state_bytes),
            "\n".join(_heldout(model)),
        )
    Console().print(table)


@contextmanager
def connected(address: str, access: Access, json_output: bool) -> Iterator[Client]:
    """A client; what it raises is told as JSON, if JSON is asked for."""
    try:
        with Client(address, key=access.key, tls=access.tls) as client:
            yield client
    except ConcertinaError as error:
        if not json_output:
            raise
        report = {
            "type": type(error).__name__,
            "message": str(error),
            "code": error.code,
            "retryable": error.retryable,
            "retry_after": error.retry_after,
        }
        print(json.dumps({"error": report}), file=sys.stderr)
        raise typer.Exit(1) from None


def _choose(client: Client, name: str, modality: str) -> Model:
    """The model of this name; without a name, the only one that writes this modality."""
    if name:
        model = client.model(name, timeout=_LOOKUP_TIMEOUT)
        if model.modality != modality:
            raise InvalidRequest(f"{name} writes {model.modality}, this needs {modality}")
        return model
    served = client.models(timeout=_LOOKUP_TIMEOUT)
    able = [model for model in served if model.modality == modality]
    if len(able) == 1:
        return able[0]
    if not able:
        names = ", ".join(f"{model.name} ({model.modality})" for model in served) or "nothing"
        raise ModelNotFound(f"no {modality} model is served at {client.address}, only {names}")
    names = ", ".join(model.name for model in able)
    raise InvalidRequest(f"several {modality} models are served: choose with --model: {names}")


def _image_format(model: Model) -> ImageFormat:
    if model.image is None:
        raise InvalidRequest(f"{model.name} does not say what size its images have")
    return model.image


def _read_text(path: Path) -> str:
    source = "standard input" if path == Path("-") else str(path)
    data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{source} is not UTF-8 text: see byte {error.start}") from None


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (FileNotFoundError, UnidentifiedImageError):
        return False


def _heldout(model: Model) -> Iterator[str]:
    for name, value in model.metrics.items():
        yield f"{value:.3f} {name}"
    if model.weights != "float16":
        yield f"{model.weights_loss:+.3f} as {model.weights}"
