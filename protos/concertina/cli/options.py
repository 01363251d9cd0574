"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from google.protobuf.message import Message

from concertina.bounds import bounds
from concertina.client.channel import Access, Tls
from concertina.shown import shown
from concertina.v1.generation_service_pb2 import (
    GenerateRequest,
    OutputOptions,
    SamplingParameters,
    StoppingCriteria,
)
from concertina.v1.session_service_pb2 import ForkRequest


def number(kind: type[Message], field: str, *names: str, help: str) -> Any:
    """An option for a number of a request, with the bounds that its message gives it."""
    allowed = bounds(kind, field)
    return typer.Option(*names, min=allowed.lowest, max=allowed.highest, help=help)


def png_file(path: Path | None) -> Path | None:
    """A callback: the path, if a PNG can be written to it. Raises BadParameter."""
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} does not end in .png, the only format written")
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a folder")
    return path


def readable_file(path: Path) -> Path:
    """A callback: the path of a file, or `-`. Raises BadParameter."""
    if path != Path("-") and not path.is_file():
        raise typer.BadParameter(f"{path} is not a file")
    return path


def file_or_dataset(path: Path) -> Path:
    """A callback: the path of a file or of a dataset, or `-`. Raises BadParameter."""
    if (path / "dataset.json").is_file():
        return path
    if path.is_dir():
        raise typer.BadParameter(f"{path} is not a file, and dataset.json is not in it")
    return readable_file(path)


def optional_file(path: Path | None) -> Path | None:
    """A callback: the path of a file, if one was given. Raises BadParameter."""
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"{path} is not a file")
    return path


def access(
    key_file: Path | None, tls: bool, ca: Path | None, cert: Path | None, cert_key: Path | None
) -> Access:
    """The key and the TLS settings from these options. Raises BadParameter."""
    if (cert is None) != (cert_key is None):
        raise typer.BadParameter("a certificate needs its key: give both --cert and --cert-key")
    key = None if key_file is None else key_file.read_text().strip()
    return Access(key, Tls(ca, cert, cert_key) if tls or ca or cert else None)


def logit_biases(pairs: list[str] | None) -> dict[int, float] | None:
    """Biases by token id from `ID=BIAS`. Raises BadParameter."""
    if pairs is None:
        return None
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{shown(pair)} is not ID=BIAS, for example 10=-5", param_hint="--logit-bias"
            ) from None
    return biases


Address: TypeAlias = Annotated[
    str, typer.Option(envvar="CONCERTINA_ADDRESS", help="Where the server listens.")
]
KeyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="CONCERTINA_KEY_FILE",
        callback=optional_file,
        help="File with the API key, if the server needs one; or put it in CONCERTINA_KEY.",
    ),
]
UseTls: TypeAlias = Annotated[
    bool,
    typer.Option("--tls", envvar="CONCERTINA_TLS", help="Use TLS, as the next three options do."),
]
Ca: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="CONCERTINA_CA",
        callback=optional_file,
        help="Authority (PEM) of the server's certificate.",
    ),
]
Cert: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="CONCERTINA_CERT",
        callback=optional_file,
        help="Certificate (PEM) to show to the server.",
    ),
]
CertKey: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="CONCERTINA_CERT_KEY", callback=optional_file, help="Private key (PEM) of --cert."
    ),
]
ModelName: TypeAlias = Annotated[
    str,
    typer.Option("--model", "-m", help="Name of the model; not needed if only one is served."),
]
Label: TypeAlias = Annotated[
    str | None, typer.Option(help="One of the model's labels. Without one: unconditional.")
]
MaxTokens: TypeAlias = Annotated[
    int | None,
    number(StoppingCriteria, "max_tokens", "--max-tokens", "-n", help="Most tokens to generate."),
]
Temperature: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters,
        "temperature",
        "--temperature",
        "-t",
        help="0 always takes the likeliest token.",
    ),
]
TopK: TypeAlias = Annotated[
    int | None,
    number(
        SamplingParameters, "top_k", help="Keep this many of the likeliest tokens; 0 keeps all."
    ),
]
TopP: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters, "top_p", help="Keep the likeliest tokens that reach this probability."
    ),
]
MinP: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters, "min_p", help="Keep tokens this probable relative to the likeliest."
    ),
]
TypicalP: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters, "typical_p", help="Keep the tokens of typical surprise that reach this."
    ),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters,
        "repetition_penalty",
        help="Above 1: tokens in the prompt or output become less likely.",
    ),
]
PresencePenalty: TypeAlias = Annotated[
    float | None,
    number(
        SamplingParameters,
        "presence_penalty",
        help="Subtracted from the logits of tokens in the output.",
    ),
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None,
    number(SamplingParameters, "frequency_penalty", help="The same, once per occurrence."),
]
LogitBias: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=BIAS", help="Added to the logit of a token id. Repeatable."),
]
AllowedTokenIds: TypeAlias = Annotated[
    list[int] | None,
    number(SamplingParameters, "allowed_token_ids", help="Draw only these token ids. Repeatable."),
]
BadWords: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="Text that the output never contains. Repeatable.")
]
JsonSchema: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        callback=optional_file,
        metavar="FILE",
        help="JSON Schema of the output, which is JSON then; {} for any.",
    ),
]
Regex: TypeAlias = Annotated[
    str | None, typer.Option(help="Regular expression that the whole output matches.")
]
Choice: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="Text that the output may be. Repeatable.")
]
Stop: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="End before this text. Repeatable.")
]
StopTokenIds: TypeAlias = Annotated[
    list[int] | None,
    number(StoppingCriteria, "stop_token_ids", help="End before this token id. Repeatable."),
]
IncludeStop: TypeAlias = Annotated[
    bool | None, typer.Option("--include-stop", help="Send the stop text or token too.")
]
MinTokens: TypeAlias = Annotated[
    int | None,
    number(StoppingCriteria, "min_tokens", help="Fewest tokens to generate before a stop counts."),
]
IgnoreEos: TypeAlias = Annotated[
    bool | None, typer.Option("--ignore-eos", help="Go on past the model's end token.")
]
Outputs: TypeAlias = Annotated[
    int | None, number(OutputOptions, "n", "--n", help="Outputs to generate side by side.")
]
Logprobs: TypeAlias = Annotated[
    int | None,
    number(
        OutputOptions,
        "logprobs",
        help="Log-probabilities of tokens, and of this many of the likeliest.",
    ),
]
PromptLogprobs: TypeAlias = Annotated[
    int | None,
    number(OutputOptions, "prompt_logprobs", help="The same for the tokens of the prompt."),
]
StreamInterval: TypeAlias = Annotated[
    int | None,
    number(OutputOptions, "stream_interval", help="Fewest tokens that the server sends at once."),
]
Priority: TypeAlias = Annotated[
    int | None, number(GenerateRequest, "priority", help="Streams with a higher priority go first.")
]
Keep: TypeAlias = Annotated[
    float | None,
    number(
        GenerateRequest,
        "keep",
        help="Seconds to keep the stream while nobody reads it, and after its end for "
        "`concertina sessions`. Default: 60, but not after its end. 0: do not resume it.",
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    number(SamplingParameters, "seed", help="The same seed and prompt give the same stream."),
]
TimeLimit: TypeAlias = Annotated[
    float | None,
    number(
        StoppingCriteria,
        "time_limit",
        help="Seconds after which the stream ends early, without an error.",
    ),
]
Timeout: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="Seconds after which to give up and fail.")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON, one object per line; errors to stderr.")
]
Copies: TypeAlias = Annotated[int, number(ForkRequest, "n", "--n", help="Copies to make.")]
