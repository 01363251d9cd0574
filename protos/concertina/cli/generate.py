"""The command `generate`: writes text to standard output as it is generated."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from concertina.cli.connection import Server, choose_model, connected
from concertina.cli.inputs import read_text
from concertina.cli.options import (
    AllowedTokenIds,
    BadWords,
    Choice,
    FrequencyPenalty,
    IgnoreEos,
    IncludeStop,
    Json,
    JsonSchema,
    Keep,
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
    Regex,
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
    logit_biases,
)
from concertina.cli.printing import EventPrinter, own_line, write_outputs


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
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
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
    *,
    server: Server,
    json_output: Json = False,
) -> None:
    """Write text to standard output as it is generated.

    With several outputs, the first is written as it arrives, the others when all are complete.

    Log-probabilities are shown with --json. A stream whose server is lost goes on when it is back.

    Examples:
    concertina generate "def fibonacci(n):"
    concertina generate "import " -n 400 --temperature 0.7 --seed 7
    concertina generate --prompt-file main.py --stop "def " --stop "class "
    concertina generate "def " --keep 3600
    concertina generate "x = " --n 3 --logprobs 5 --json
    concertina generate "Is it true? " --choice yes --choice no
    git diff | concertina generate - --json
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give the prompt as an argument or as --prompt-file, not both")
    biases = logit_biases(logit_bias)
    text = read_text(prompt_file or Path("-")) if prompt_file or prompt == "-" else prompt
    with connected(server, json_output) as client:
        chosen = choose_model(client, model, "text")
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
            logit_bias=biases,
            allowed_token_ids=allowed_token_id,
            bad_words=bad_word,
            json_schema=None if json_schema is None else read_text(json_schema),
            regex=regex,
            choice=choice,
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
        printer = EventPrinter(json_output, names_stream=bool(keep))
        with stream, nullcontext() if json_output else own_line():
            tokens = printer.tokens(stream)
            if json_output:
                deque(tokens, maxlen=0)  # reading them prints them
            else:
                write_outputs(tokens, outputs or 1)
    printer.summarise()
