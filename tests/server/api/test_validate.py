from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from concertina.v1 import bundle_pb2
from concertina.v1 import generation_service_pb2 as pb
from server.api.limits import require_within_limits
from server.api.validate import generate_request as generate_requests
from server.api.validate import score_request
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.errors import InvalidRequest
from server.request import LogitsProcessors, Request, SamplingParameters, prompt_of

CONFIG = EngineConfig(slots=4, queue_limit=6, stream_buffer=32)


def generate_request(bundle: Bundle, request: pb.GenerateRequest) -> Request:
    """The only output of a request, checked as a call is."""
    require_within_limits(request)
    (only,) = generate_requests(bundle, request, CONFIG)
    return only


def test_every_default_is_filled_in(text: Bundle) -> None:
    request = generate_request(text, pb.GenerateRequest())
    assert request.prompt == prompt_of(256, [], "B")
    assert replace(request.sampling, seed=0) == SamplingParameters(1.0, 0, 1.0, 0.0, 0)
    assert (request.max_tokens, request.stop, request.stop_tokens) == (96, (), frozenset())
    assert (request.end_tokens, request.time_limit_s, request.complete_at) == ({0}, None, None)
    assert not request.score


def test_an_image_is_complete_when_its_context_is_full(image: Bundle) -> None:
    request = generate_request(image, pb.GenerateRequest(prompt=pb.Prompt(label="star")))
    assert request.prompt == prompt_of(19, [], "B")
    assert (request.max_tokens, request.complete_at, request.end_tokens) == (64, 64, set())


def test_a_seed_is_drawn_if_the_request_has_none(text: Bundle) -> None:
    seeds = {generate_request(text, pb.GenerateRequest()).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_all_given_fields_are_used(text: Bundle) -> None:
    request = generate_request(
        text,
        pb.GenerateRequest(
            prompt=pb.Prompt(text="abc"),
            sampling=pb.SamplingParameters(
                temperature=0.5,
                top_k=3,
                top_p=0.25,
                min_p=0.125,
                seed=(1 << 64) - 1,
                typical_p=0.75,
                repetition_penalty=1.5,
                presence_penalty=-2,
                frequency_penalty=2,
                logit_bias={255: -100, 0: 100},
                allowed_token_ids=[9, 8, 9],
                bad_words=["é", "x" * 64],
            ),
            output=pb.OutputOptions(n=1, logprobs=0, prompt_logprobs=20, stream_interval=32),
            priority=-100,
            stopping=pb.StoppingCriteria(
                max_tokens=93,
                min_tokens=93,
                include_stop=True,
                stop=["\n", "x" * 256],
                stop_token_ids=[7, 255, 7],
                ignore_eos=True,
                time_limit=Duration(seconds=1, nanos=500_000_000),
            ),
        ),
    )
    processors = LogitsProcessors(
        bias=((0, 100), (255, -100)),
        allowed=(8, 9),
        bad_words=((0xC3, 0xA9), (ord("x"),) * 64),
        min_tokens=93,
        withheld=(7, 255),
        repetition_penalty=1.5,
        frequency_penalty=2,
        presence_penalty=-2,
    )
    assert request.sampling == SamplingParameters(
        0.5, 3, 0.25, 0.125, (1 << 64) - 1, typical_p=0.75, logprobs=0, processors=processors
    )
    assert (request.min_tokens, request.include_stop) == (93, True)
    assert (request.prompt_logprobs, request.stream_interval) == (20, 32)
    assert request.priority == -100
    assert request.prompt == prompt_of(256, [97, 98, 99], "B")
    assert (request.max_tokens, request.stop) == (93, ("\n", "x" * 256))
    assert (request.stop_tokens, request.end_tokens) == ({7, 255}, set())
    assert request.time_limit_s == 1.5


def test_zero_is_not_the_same_as_absent(text: Bundle) -> None:
    sampling = pb.SamplingParameters(temperature=0, seed=0)
    request = generate_request(text, pb.GenerateRequest(sampling=sampling))
    assert (request.sampling.temperature, request.sampling.seed) == (0, 0)


def _sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(sampling=pb.SamplingParameters(**fields))  # type: ignore[arg-type]


def test_outputs_differ_only_in_their_index(text: Bundle) -> None:
    sampling = pb.SamplingParameters(presence_penalty=1)
    options = pb.OutputOptions(n=3, prompt_logprobs=1, logprobs=2)
    asked = pb.GenerateRequest(prompt=pb.Prompt(text="a"), sampling=sampling, output=options)
    first, *others = generate_requests(text, asked, CONFIG)
    assert first.prompt_logprobs == 1
    assert [r.sampling.output for r in (first, *others)] == [0, 1, 2]
    for number, other in enumerate(others, 1):
        assert other.prompt is first.prompt
        assert other.prompt_logprobs is None  # only the first output reports them
        assert other.sampling == replace(first.sampling, output=number)


def test_tokens_that_end_the_stream_are_withheld_before_min_tokens(text: Bundle) -> None:
    for ignore_eos, stop, withheld in [(False, [], (0,)), (False, [9, 3], (0, 3, 9)),
                                       (True, [9, 3], (3, 9))]:  # fmt: skip
        asked = _stopping(min_tokens=2, ignore_eos=ignore_eos, stop_token_ids=stop)
        processors = generate_request(text, asked).sampling.processors
        assert processors == LogitsProcessors(min_tokens=2, withheld=withheld)
    endless = generate_request(text, _stopping(min_tokens=2, ignore_eos=True))
    assert endless.sampling.processors is None


def test_a_stream_without_options_has_no_processors(text: Bundle) -> None:
    neutral = pb.SamplingParameters(
        repetition_penalty=1, presence_penalty=0, frequency_penalty=0, top_k=5
    )
    for sampling in (pb.SamplingParameters(), neutral):
        asked = pb.GenerateRequest(sampling=sampling)
        assert generate_request(text, asked).sampling.processors is None


def _output(**fields: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(output=pb.OutputOptions(**fields))


def _stopping(**fields: object) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(**fields)  # type: ignore[arg-type]
    return pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1, 2])), stopping=stopping)


LONGEST = 315_576_000_000  # largest number of seconds in a Duration


@pytest.mark.parametrize(
    ("kind", "request_", "named"),
    [
        (
            "text",
            _sampling(temperature=np.nan),
            ["sampling.temperature is nan", "at least 0"],
        ),
        ("text", _sampling(temperature=np.inf), ["sampling.temperature is inf", "finite"]),
        (
            "text",
            _sampling(temperature=-0.5),
            ["sampling.temperature is -0.5", "at least 0"],
        ),
        ("text", _sampling(top_p=0), ["sampling.top_p is 0.0", "above 0 and at most 1"]),
        ("text", _sampling(top_p=1.5), ["sampling.top_p is 1.5", "at most 1"]),
        ("text", _sampling(top_p=-1), ["sampling.top_p is -1.0", "above 0"]),
        ("text", _sampling(top_p=np.nan), ["sampling.top_p is nan", "above 0"]),
        ("text", _sampling(min_p=-0.25), ["sampling.min_p is -0.25", "between 0 and 1"]),
        ("text", _sampling(min_p=1.25), ["sampling.min_p is 1.25", "between 0 and 1"]),
        ("text", _sampling(min_p=np.nan), ["sampling.min_p is nan", "between 0 and 1"]),
        ("text", _sampling(typical_p=0), ["sampling.typical_p is 0.0", "above 0 and at most 1"]),
        ("text", _sampling(typical_p=np.nan), ["sampling.typical_p is nan", "above 0"]),
        ("text", _sampling(repetition_penalty=0), ["sampling.repetition_penalty is 0", "above 0"]),
        ("text", _sampling(repetition_penalty=-1), ["sampling.repetition_penalty is -1"]),
        ("text", _sampling(repetition_penalty=np.inf), ["repetition_penalty is inf", "finite"]),
        ("text", _sampling(repetition_penalty=np.nan), ["repetition_penalty is nan", "finite"]),
        ("text", _sampling(presence_penalty=2.5), ["presence_penalty is 2.5", "between -2 and 2"]),
        ("text", _sampling(presence_penalty=np.nan), ["sampling.presence_penalty is nan"]),
        ("text", _sampling(frequency_penalty=-2.5), ["frequency_penalty is -2.5", "-2 and 2"]),
        ("text", _sampling(frequency_penalty=np.nan), ["sampling.frequency_penalty is nan"]),
        ("text", _sampling(logit_bias={256: 0}), ["sampling.logit_bias has id 256", "below 256"]),
        ("text", _sampling(logit_bias={7: 101}), ["sampling.logit_bias[7] is 101", "-100 and 100"]),
        ("text", _sampling(logit_bias={7: np.nan}), ["sampling.logit_bias[7] is nan"]),
        (
            "image",
            _sampling(allowed_token_ids=[3, 16]),
            ["sampling.allowed_token_ids[1] is 16", "below 16"],
        ),
        ("text", _sampling(bad_words=["x"] * 129), ["bad_words has 129 strings", "limit is 128"]),
        ("text", _sampling(bad_words=["x", ""]), ["sampling.bad_words[1] has 0 bytes", "1 to 64"]),
        ("text", _sampling(bad_words=["€" * 22]), ["bad_words[0] has 66 bytes", "1 to 64"]),
        ("image", _sampling(bad_words=["x"]), ["bad_words", "tiny-image makes images"]),
        (
            "text",
            _sampling(allowed_token_ids=[97, 98], bad_words=["a", "b", "abc"]),
            ["allowed_token_ids has 2 ids", "forbid them all", "at least 1 token"],
        ),
        (
            "text",
            pb.GenerateRequest(
                sampling=pb.SamplingParameters(allowed_token_ids=[0]),
                stopping=pb.StoppingCriteria(min_tokens=1),
            ),
            ["allowed_token_ids has 1 ids", "min_tokens"],
        ),
        ("text", _stopping(min_tokens=6, max_tokens=5), ["min_tokens is 6", "at most 5"]),
        ("text", _stopping(min_tokens=95), ["stopping.min_tokens is 95", "at most 94"]),
        ("text", _output(n=0), ["output.n is 0", "between 1 and 128"]),
        ("text", _output(n=11), ["output.n is 11", "between 1 and 10"]),
        ("text", _output(logprobs=21), ["output.logprobs is 21", "at most 20"]),
        ("text", _output(prompt_logprobs=21), ["output.prompt_logprobs is 21", "at most 20"]),
        ("text", pb.GenerateRequest(priority=101), ["priority is 101", "between -100 and 100"]),
        ("text", pb.GenerateRequest(priority=-101), ["priority is -101", "between -100 and 100"]),
        (
            "text",
            _output(stream_interval=0),
            ["output.stream_interval is 0", "1 and 1000000"],
        ),
        ("text", _output(stream_interval=33), ["output.stream_interval is 33", "1 and 32"]),
        ("text", _stopping(max_tokens=0), ["stopping.max_tokens is 0", "at least 1"]),
        ("text", _stopping(max_tokens=95), ["stopping.max_tokens is 95", "prompt takes 2"]),
        (
            "image",
            _stopping(max_tokens=(1 << 32) - 1),
            ["stopping.max_tokens is 4294967295", "between 1 and 62", "context of 64"],
        ),
        ("text", _stopping(stop=["x"] * 17), ["stopping.stop has 17", "limit is 16"]),
        ("text", _stopping(stop=["x", ""]), ["stopping.stop[1] has 0 bytes", "1 to 256"]),
        ("text", _stopping(stop=["€" * 86]), ["stopping.stop[0] has 258 bytes", "1 to 256"]),
        ("image", _stopping(stop=["x"]), ["stopping.stop", "tiny-image makes images"]),
        (
            "text",
            _stopping(stop_token_ids=[1, 256]),
            ["stopping.stop_token_ids[1] is 256", "below 256"],
        ),
        ("image", _sampling(allowed_token_ids=[3] * 17), ["has 17 ids; tiny-image has 16"]),
        (
            "image",
            _stopping(stop_token_ids=[16]),
            ["stopping.stop_token_ids[0] is 16", "below 16"],
        ),
        ("text", _stopping(time_limit=Duration()), ["stopping.time_limit is 0", "above 0"]),
        ("text", _stopping(time_limit=Duration(seconds=-1)), ["stopping.time_limit is -1"]),
        (
            "text",
            _stopping(time_limit=Duration(seconds=LONGEST + 1)),
            ["stopping.time_limit is 315576000001.0 s", "at most 315576000000"],
        ),
        (
            "text",
            _stopping(time_limit=Duration(seconds=(1 << 63) - 1)),
            ["stopping.time_limit is 9", "at most"],
        ),
        ("text", pb.GenerateRequest(prompt=pb.Prompt()), ["prompt is empty"]),
        ("text", pb.GenerateRequest(prompt=pb.Prompt(text="x" * 96)), ["limit is 95"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, pb.GenerateRequest) else None,
)
def test_an_invalid_request_is_refused(
    request: pytest.FixtureRequest, kind: str, request_: pb.GenerateRequest, named: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request(request.getfixturevalue(kind), request_)
    message = caught.value.message
    assert [part for part in named if part not in message] == [], message


def test_the_longest_time_limit(text: Bundle) -> None:
    request = generate_request(text, _stopping(time_limit=Duration(seconds=LONGEST)))
    assert request.time_limit_s == LONGEST


def test_scoring_takes_the_whole_context(text: Bundle, image: Bundle) -> None:
    request = score_request(text, pb.ScoreRequest(prompt=pb.Prompt(text="x" * 96)))
    assert request.score
    assert len(request.prompt) == 96
    rows = pb.ImageRows(rgb=bytes(192))
    whole = score_request(image, pb.ScoreRequest(prompt=pb.Prompt(image=rows, label="star")))
    assert (len(whole.prompt), whole.prompt.start) == (64, 19)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (pb.Prompt(), "prompt is empty"),
        (pb.Prompt(label="star"), "prompt is empty"),
        (pb.Prompt(text="x" * 97), "limit is 96"),
    ],
)
def test_scoring_nothing_or_too_much_is_refused(
    text: Bundle, prompt: pb.Prompt, named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        score_request(text, pb.ScoreRequest(prompt=prompt))


def test_a_bundle_without_an_end_token_has_none(text: Bundle) -> None:
    manifest = bundle_pb2.Manifest()
    manifest.CopyFrom(text.manifest)
    manifest.ClearField("end_token")
    request = generate_request(replace(text, manifest=manifest), pb.GenerateRequest())
    assert not request.end_tokens
