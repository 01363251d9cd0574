"""Options for numbers of requests: a value beyond its bound is refused before it is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from concertina.bounds import bounds
from concertina.cli.main import main
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from tests.concertina.conftest import Fake

Refused = Callable[..., str]

OPTIONS: Final[dict[str, tuple[Any, str]]] = {
    "max-tokens": (pb.StoppingCriteria, "max_tokens"),
    "min-tokens": (pb.StoppingCriteria, "min_tokens"),
    "stop-token-id": (pb.StoppingCriteria, "stop_token_ids"),
    "time-limit": (pb.StoppingCriteria, "time_limit"),
    "temperature": (pb.SamplingParameters, "temperature"),
    "top-k": (pb.SamplingParameters, "top_k"),
    "top-p": (pb.SamplingParameters, "top_p"),
    "min-p": (pb.SamplingParameters, "min_p"),
    "typical-p": (pb.SamplingParameters, "typical_p"),
    "repetition-penalty": (pb.SamplingParameters, "repetition_penalty"),
    "presence-penalty": (pb.SamplingParameters, "presence_penalty"),
    "frequency-penalty": (pb.SamplingParameters, "frequency_penalty"),
    "allowed-token-id": (pb.SamplingParameters, "allowed_token_ids"),
    "seed": (pb.SamplingParameters, "seed"),
    "n": (pb.OutputOptions, "n"),
    "logprobs": (pb.OutputOptions, "logprobs"),
    "prompt-logprobs": (pb.OutputOptions, "prompt_logprobs"),
    "stream-interval": (pb.OutputOptions, "stream_interval"),
    "priority": (pb.GenerateRequest, "priority"),
    "keep": (pb.GenerateRequest, "keep"),
}


@pytest.fixture
def refused(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs a command that refuses its arguments, and returns what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["concertina", *arguments, "--address", fake.address])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert not fake.requests
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_has_the_bounds_of_its_field(refused: Refused, option: str) -> None:
    allowed = bounds(*OPTIONS[option])
    assert allowed.lowest is not None
    for beyond, word in ((-1, "greater"), (1, "less")):
        bound = allowed.lowest if beyond < 0 else allowed.highest
        if bound is not None:
            printed = refused("generate", "x", f"--{option}={bound + beyond}")
            assert f"--{option}" in printed
            shown = bound if isinstance(bound, int) else f"{bound:.17g}"
            assert f"{word} than or equal to {shown}" in printed


def test_copies_have_the_bounds_of_their_field(refused: Refused) -> None:
    assert bounds(session_pb.ForkRequest, "n").highest == 128
    for copies in ("0", "129"):
        assert "--n" in refused("sessions", "fork", "x", "--n", copies)
