"""Models whose tokens are pieces of text, over a real gRPC channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.convert import response_message
from server.api.prompt import prompt_tokens
from server.api.servicers import make_servicers
from server.bundles.bundle import load_bundle
from server.checkpoint import TokenLogprobs
from server.config import EngineConfig
from server.errors import BundleError, InvalidRequest
from server.request import Request, prompt_of
from server.sessions.served_model import ServedModel, serve_bundles
from server.sessions.subscriber import PromptLogprobs
from tests.server.engines import LIMIT_S, script
from tests.server.tokenizer_bundles import CONTEXT, NAME, make_tokenizer_bundle
from tests.tokenizers_made import BYTE_FALLBACK, BYTE_LEVEL, trained


class Served:
    """A server of one model, and its clients."""

    def __init__(self, model: ServedModel, channel: grpc.aio.Channel) -> None:
        self.model = model
        self.generation = generation_grpc.GenerationServiceStub(channel)
        self.models = model_grpc.ModelServiceStub(channel)

    async def generate(self, **request: Any) -> tuple[list[int], str, pb.Finished]:
        """The ids and the text of a stream, and how it ended."""
        ids, text, finished = list[int](), "", pb.Finished()
        async for event in self.generation.Generate(pb.GenerateRequest(**request), timeout=LIMIT_S):
            ids += event.tokens.ids
            text += event.tokens.text
            finished = event.finished
        return ids, text, finished


@pytest.fixture(params=[BYTE_LEVEL, BYTE_FALLBACK])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def served(kind: str, tiny_bundles: Path) -> AsyncIterator[Served]:
    end = trained(kind).token_to_id("</s>")
    begin = trained(kind).token_to_id("<s>")
    fields = {"begin_token": begin} if kind == BYTE_FALLBACK else {}
    folder = make_tokenizer_bundle(
        tiny_bundles / f"tokens-{kind}", kind, end_tokens=[end, 3], **fields
    )
    served = serve_bundles([folder], EngineConfig(threads=1))
    servicers = make_servicers(None, served)
    server = grpc.aio.server()
    generation_grpc.add_GenerationServiceServicer_to_server(servicers.generation, server)
    model_grpc.add_ModelServiceServicer_to_server(servicers.models, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(served[NAME], channel)
    finally:
        await server.stop(None)
        served[NAME].close()


_PROMPT = pb.Prompt(text="the quick brown")


async def test_what_is_generated_is_the_library_s_text(served: Served, kind: str) -> None:
    tokenizer = trained(kind)
    for seed in range(3):
        ids, text, _ = await served.generate(
            prompt=_PROMPT,
            sampling=pb.SamplingParameters(seed=seed),
            stopping=pb.StoppingCriteria(max_tokens=40, ignore_eos=True),
        )
        assert len(ids) == 40
        prompt = tokenizer.encode(_PROMPT.text, add_special_tokens=False).ids
        whole = tokenizer.decode([*prompt, *ids])
        stray = "\ufffd" in whole and kind == BYTE_FALLBACK
        assert stray or whole == tokenizer.decode(prompt) + text


async def test_any_of_the_end_tokens_ends_a_stream(served: Served, kind: str) -> None:
    for end in (trained(kind).token_to_id("</s>"), 3):
        allowed = pb.SamplingParameters(allowed_token_ids=[end])
        ids, text, finished = await served.generate(prompt=_PROMPT, sampling=allowed)
        assert (ids, text, finished.reason) == ([], "", pb.FINISH_REASON_END)
        stopping = pb.StoppingCriteria(max_tokens=2, ignore_eos=True)
        ids, text, _ = await served.generate(prompt=_PROMPT, sampling=allowed, stopping=stopping)
        assert (ids, text) == ([end, end], "")  # special tokens are no text


async def test_a_stop_string_may_begin_and_end_inside_tokens(served: Served, kind: str) -> None:
    tokenizer = trained(kind)
    said = tokenizer.encode("hello the quick fox", add_special_tokens=False).ids
    before = len(tokenizer.encode(_PROMPT.text, add_special_tokens=False).ids)
    script(served.model, [0] * (before - (kind == BYTE_LEVEL)) + said * 4)
    stopping = pb.StoppingCriteria(max_tokens=20, stop=["e qui"])
    greedy = pb.SamplingParameters(temperature=0)
    ids, text, finished = await served.generate(prompt=_PROMPT, sampling=greedy, stopping=stopping)
    assert (finished.reason, finished.stop) == (pb.FINISH_REASON_STOP, "e qui")
    assert text.lstrip() == "hello th"
    assert ids == said[: len(ids)] and len(tokenizer.decode(ids)) > len("hello th")


async def test_no_bad_word_is_generated_whatever_its_tokens(served: Served, kind: str) -> None:
    letters = [trained(kind).token_to_id(each) for each in ("a", "b", "th", "e")]
    allowed = [each for each in letters if each is not None]
    for seed in range(4):
        sampling = pb.SamplingParameters(
            seed=seed, allowed_token_ids=allowed, bad_words=["ba", "eb"]
        )
        stopping = pb.StoppingCriteria(max_tokens=40)
        _, text, _ = await served.generate(prompt=_PROMPT, sampling=sampling, stopping=stopping)
        assert len(text) >= 40 and "ba" not in text and "eb" not in text


async def test_log_probabilities_of_the_end_of_a_prompt_name_its_tokens(
    served: Served, kind: str
) -> None:
    bundle = served.model.bundle
    request = Request(prompt_of(bundle.manifest.vocabulary, [50, 60, 70], "L"))
    event = PromptLogprobs(1, (TokenLogprobs(-1.0, (), ()), TokenLogprobs(-1.0, (), ())))
    told = response_message(bundle, request, event, 1).prompt_logprobs.logprobs
    assert [one.piece for one in told] == [bundle.codec.text.pieces[token] for token in (60, 70)]


async def test_log_probabilities_name_their_tokens(served: Served, kind: str) -> None:
    """As strings and bytes, for the prompt and what follows; special tokens by their names."""
    tokenizer, codec = trained(kind), served.model.bundle.codec
    prompt = pb.Prompt(text="the é fox<|im_end|>")
    asked = tokenizer.encode(prompt.text, add_special_tokens=False).ids
    asked = asked[kind == BYTE_LEVEL :]  # without a begin token, the first takes its place
    end, size = tokenizer.token_to_id("</s>"), tokenizer.get_vocab_size()
    script(served.model, [0] * len(asked) + [end, asked[0], size] * 4)
    request = pb.GenerateRequest(
        prompt=prompt,
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_tokens=6, ignore_eos=True),
        output=pb.OutputOptions(logprobs=20, prompt_logprobs=3),
    )
    ids, told = list(asked), list[pb.TokenLogprobs]()
    async for event in served.generation.Generate(request, timeout=LIMIT_S):
        ids += event.tokens.ids
        told += [*event.prompt_logprobs.logprobs, *event.tokens.logprobs]
    assert len(ids) == len(told) == len(asked) + 6
    texts, special = list[str](), tokenizer.get_added_tokens_decoder()
    for token, one in zip(ids, told, strict=True):
        for each, name, piece in (
            (token, one.token, one.piece),
            *zip(one.top_ids, one.top_tokens, one.top_pieces, strict=True),
        ):
            assert piece == codec.text.pieces[each]
            assert name == (piece.decode(errors="replace") or tokenizer.id_to_token(each) or "")
            assert bool(piece) == (each < size and not (each in special and special[each].special))
        texts.append(one.token)
    assert "é" in b"".join(one.piece for one in told).decode(errors="replace")
    assert {"<|im_end|>", "</s>", ""} <= {*texts} and any(" " in text for text in texts)
    assert len(told[-1].top_tokens) == 20


async def test_a_score_says_how_many_bytes_its_tokens_are(served: Served, kind: str) -> None:
    text = "the quick brown fox — é"
    count = len(trained(kind).encode(text, add_special_tokens=False).ids)
    score = await served.generation.Score(pb.ScoreRequest(prompt=pb.Prompt(text=text)))
    if kind == BYTE_FALLBACK:  # it has a begin token, from which the first one is predicted
        assert (len(score.bits), score.text_bytes) == (count, len(text.encode()))
    else:
        first = trained(kind).encode(text, add_special_tokens=False).ids[0]
        rest = len(text.encode()) - len(served.model.bundle.codec.text.pieces[first])
        assert (len(score.bits), score.text_bytes) == (count - 1, rest)


async def test_a_text_that_fills_the_context_is_scored_and_a_longer_one_refused(
    served: Served, kind: str
) -> None:
    """Its tokens count: with the space that the tokenizer adds, without the begin token."""
    text = "the quick brown fox"
    while len(ids := trained(kind).encode(text, add_special_tokens=False).ids) < CONTEXT:
        text += "qz"[len(text) % 2]
    assert len(ids) == CONTEXT
    first = 0 if kind == BYTE_FALLBACK else 1  # without a begin token, it is not predicted
    score = await served.generation.Score(pb.ScoreRequest(prompt=pb.Prompt(text=text)))
    assert len(score.bits) == CONTEXT - first
    told = pb.Prompt(tokens=pb.TokenIds(ids=ids))
    assert (await served.generation.Score(pb.ScoreRequest(prompt=told))).bits == score.bits
    refusal = f"prompt has {CONTEXT + 1} tokens, the limit is {CONTEXT}"
    with pytest.raises(grpc.aio.AioRpcError, match=refusal) as refused:
        longer = text + "qz"[len(text) % 2]
        await served.generation.Score(pb.ScoreRequest(prompt=pb.Prompt(text=longer)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    short = pb.Prompt(tokens=pb.TokenIds(ids=ids[:-1]))
    before = await served.generation.Score(pb.ScoreRequest(prompt=short))
    assert before.bits == pytest.approx(score.bits[:-1], abs=1e-4)


async def test_log_probabilities_say_which_bytes_each_token_is(served: Served, kind: str) -> None:
    said = trained(kind).encode("the café 你好", add_special_tokens=False).ids  # split characters
    end, room = trained(kind).token_to_id("</s>"), CONTEXT // 2
    script(served.model, [*said, end] * (CONTEXT // len(said)))
    request = pb.GenerateRequest(
        prompt=_PROMPT,
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_tokens=room, ignore_eos=True),
        output=pb.OutputOptions(logprobs=2, prompt_logprobs=1),
    )
    pieces = served.model.bundle.codec.text.pieces
    prompt, text, told = b"", "", list[bytes]()
    async for event in served.generation.Generate(request, timeout=LIMIT_S):
        both = (*event.prompt_logprobs.logprobs, *event.tokens.logprobs)
        for one in both:
            assert [*one.top_pieces] == [pieces[each] for each in one.top_ids]
        prompt += b"".join(one.piece for one in event.prompt_logprobs.logprobs)
        told += [one.piece for one in event.tokens.logprobs]
        text += event.tokens.text
        assert [one.piece for one in event.tokens.logprobs] == [
            pieces[each] for each in event.tokens.ids
        ]
    assert len(told) == room and b"" in told  # an end token is no text
    whole = text.rstrip("\ufffd")  # the limit may tear the last character
    assert b"".join(told).startswith(whole.encode()) and "你好" in whole
    start = b"" if kind == BYTE_FALLBACK else b"the"
    assert (start + prompt).decode().strip() == _PROMPT.text


async def test_tokens_of_a_prompt_and_back(served: Served, kind: str) -> None:
    text = "Hello world, naïve café 👩‍👩‍👧‍👦" * 20  # longer than the context
    told = await served.models.Tokenize(model_pb.TokenizeRequest(prompt=pb.Prompt(text=text)))
    assert list(told.ids) == trained(kind).encode(text, add_special_tokens=False).ids
    assert len(told.ids) > CONTEXT
    assert b"".join(told.pieces).decode().lstrip() == text
    assert told.fingerprint == served.model.bundle.fingerprint
    back = await served.models.Detokenize(model_pb.DetokenizeRequest(ids=told.ids))
    assert (back.text, back.rgb, back.pieces) == (text, b"", told.pieces)
    wrong = model_pb.DetokenizeRequest(ids=[1, served.model.bundle.vocabulary])
    with pytest.raises(grpc.aio.AioRpcError, match=r"ids\[1\] is .* must be below") as refused:
        await served.models.Detokenize(wrong)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_without_a_begin_token_needs_a_prompt(served: Served, kind: str) -> None:
    if kind == BYTE_FALLBACK:
        ids, _, _ = await served.generate(stopping=pb.StoppingCriteria(max_tokens=3))
        assert len(ids) <= 3
        return
    with pytest.raises(grpc.aio.AioRpcError, match="has no begin token: give at least 1 token"):
        await served.generate()
    one = pb.Prompt(tokens=pb.TokenIds(ids=[7]))
    with pytest.raises(grpc.aio.AioRpcError, match="give at least 2 tokens to score"):
        await served.generation.Score(pb.ScoreRequest(prompt=one))


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"{}", r"tokenizer.json is no tokenizer"), (b"[" * 10**6, r"tokenizer.json is not JSON")],
)
def test_a_bundle_with_a_broken_tokenizer_is_refused(
    content: bytes, named: str, tmp_path: Path
) -> None:
    from concertina.bundle.manifest import read_manifest, write_manifest

    folder = make_tokenizer_bundle(tmp_path / "broken", BYTE_LEVEL)
    manifest = read_manifest(folder)
    (folder / "tokenizer.json").write_bytes(content)
    write_manifest(folder, manifest, [file.path for file in manifest.files])
    with pytest.raises(BundleError, match=named):
        load_bundle(folder)


_TEMPLATE = (
    "{% for message in messages %}{{ bos + message.role + ':' + message.content + '\n' }}"
    "{% endfor %}{{ bos + 'model:' }}"
)


def _messages(*contents: str) -> pb.Prompt:
    said = [pb.Message(role="user", content=content) for content in contents]
    return pb.Prompt(messages=pb.Messages(messages=said))


async def test_messages_become_a_prompt_by_the_bundle_s_template(tmp_path: Path) -> None:
    """A template of its own, another one that the server is started with, and none."""
    plain = load_bundle(make_tokenizer_bundle(tmp_path / "plain", BYTE_LEVEL))
    own = load_bundle(
        make_tokenizer_bundle(
            tmp_path / "own", BYTE_LEVEL, _TEMPLATE, template_tokens={"bos": "<|im_start|>"}
        )
    )
    prompt = _messages("hello", "the quick fox")
    ids = prompt_tokens(own, prompt, room=1)
    text = "<|im_start|>user:hello\n<|im_start|>user:the quick fox\n<|im_start|>model:"
    start, *rest = trained(BYTE_LEVEL).encode(text, add_special_tokens=False).ids
    assert (ids.start, ids.tokens.tolist()) == (start, rest)
    assert own.chat_template is not None and plain.chat_template is None
    other = plain.with_template("{{ messages[-1].content }}!")
    assert other.codec is plain.codec
    ids = prompt_tokens(other, prompt, room=1)
    text = "the quick fox!"
    assert [ids.start, *ids.tokens] == trained(BYTE_LEVEL).encode(text).ids
    long = plain.with_template("{{ messages | length }} {{ messages[-1].content }}")
    ids = prompt_tokens(long, _messages(*["x"] * 1023, "y"), room=1)
    assert [ids.start, *ids.tokens] == trained(BYTE_LEVEL).encode("1024 y").ids
    for bundle, given, named in (
        (plain, prompt, "has no chat template: give text, or have it served with --chat-template"),
        (own, _messages(), "prompt.messages is empty: give at least 1 message"),
        (plain.with_template("{{ x.y.z }}"), prompt, "the chat template fails on them"),
    ):
        with pytest.raises(InvalidRequest, match=named) as refused:
            prompt_tokens(bundle, given, room=1)
        assert refused.value.field == "prompt.messages"


def test_a_bundle_with_a_broken_template_is_refused(tmp_path: Path) -> None:
    folder = make_tokenizer_bundle(tmp_path / "broken", BYTE_LEVEL, "{% for")
    with pytest.raises(BundleError, match=r"chat_template.jinja is no template"):
        load_bundle(folder)


async def test_a_server_s_template_takes_the_place_of_the_bundle_s(text_bundle: Path) -> None:
    served = serve_bundles([text_bundle], EngineConfig(threads=1, chat_template="{{ 'abc' }}"))
    (model,) = served.values()
    try:
        ids = prompt_tokens(model.bundle, _messages("x"), room=1)
        assert bytes(ids.tokens.tolist()) == b"abc"  # bytes are a vocabulary like any other
    finally:
        model.close()
