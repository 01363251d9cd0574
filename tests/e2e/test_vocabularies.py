"""Real servers of models whose tokens are pieces of text: killed, loaded, asked in the terminal."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest

from concertina.client import Client
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from server.ops.ports import free_ports
from server.snapshots.sealer import KEY_VARIABLE
from tests.e2e.servers import START_SECONDS, Server, concertina, serving, stop
from tests.model.pretrained.folders import tensors
from tests.model.pretrained.test_gguf import write_gguf
from tests.model.pretrained.test_vocabulary import fields
from tests.pretrained_bundles import FOLDED_LLAMA, LLAMA, make_pretrained_bundle
from tests.tokenizers_made import BYTE_LEVEL, trained

pytestmark = pytest.mark.slow

CONTEXT, AFTER, LIMIT_S = 768, 100, 120.0
TOKENS = CONTEXT - 20


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Path) -> Path:
    return make_pretrained_bundle(tiny_bundles, LLAMA, CONTEXT)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of servers that share a store."""
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(bytes(range(32))).decode())
    store = f"file://{tmp_path / 'store'}"
    return ["--local", "--threads", "1", "--snapshots", store, "--snapshot-interval", "32"]


@contextmanager
def doomed(*arguments: str) -> Iterator[tuple[str, psutil.Popen]]:
    """A server that a test kills."""
    (port,) = free_ports(1)
    ports = ("--port", str(port), "--metrics-port", "0")
    with concertina("serve", *arguments, *ports, stdout=subprocess.PIPE) as process:
        try:
            channel = grpc.insecure_channel(f"127.0.0.1:{port}")
            grpc.channel_ready_future(channel).result(START_SECONDS)
            channel.close()
            yield f"127.0.0.1:{port}", process
        finally:
            stop(process)


@dataclass
class Reader:
    """What has come of a stream."""

    stream_id: str = ""
    sequence: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False

    def read(self, events: Iterator[pb.GenerateResponse], tokens: int = TOKENS) -> None:
        """Read on until there are so many tokens, or to the end."""
        for event in events:
            assert event.sequence == self.sequence + 1
            self.sequence += 1
            self.stream_id = self.stream_id or event.accepted.stream_id
            self.ids += event.tokens.ids
            self.text += event.tokens.text
            assert not event.HasField("error"), event.error
            self.finished = event.HasField("finished")
            if len(self.ids) >= tokens and tokens < TOKENS:
                return

    def resumed(self, with_ids: bool) -> pb.ResumeRequest:
        """The request for the rest."""
        cursor = pb.ResumeCursor(tokens=len(self.ids), characters=len(self.text))
        if with_ids:
            cursor.last_ids.extend(self.ids[-100:])
        return pb.ResumeRequest(
            stream_id=self.stream_id, after_sequence=self.sequence, cursors=[cursor]
        )


def wanted(seed: int) -> pb.GenerateRequest:
    """A stream of tokens of one byte each, most of them parts of characters."""
    tokenizer = trained(BYTE_LEVEL)
    letters = tokenizer.encode("ñ字a", add_special_tokens=False)
    allowed = sorted({*letters.ids, *(tokenizer.token_to_id(each) for each in "Ãåabcd")} - {None})
    request = pb.GenerateRequest(
        prompt={"text": "the quick brown"},
        sampling={"seed": seed, "allowed_token_ids": allowed, "repetition_penalty": 1.1},
        stopping={"max_tokens": TOKENS, "ignore_eos": True},
        output={"stream_interval": 1},
    )
    request.keep.FromSeconds(120)
    return request


@pytest.mark.parametrize("kind", [LLAMA, FOLDED_LLAMA])
def test_streams_of_a_killed_server_go_on_at_another(
    kind: str, tiny_bundles: Path, options: list[str]
) -> None:
    """Both run from the beginning on. Tokens and text are those of streams without a break."""
    bundle = make_pretrained_bundle(tiny_bundles, kind, CONTEXT)
    seeds = range(4)
    readers = [Reader() for _ in seeds]
    with serving(str(bundle), *options) as last:
        with doomed(str(bundle), *options) as (address, process):
            channel = grpc.insecure_channel(address)
            stub = generation_grpc.GenerationServiceStub(channel)
            calls = [stub.Generate(wanted(seed), timeout=LIMIT_S) for seed in seeds]
            for seed, (reader, call) in enumerate(zip(readers, calls, strict=True)):
                reader.read(call, AFTER + 3 * seed)
            process.kill()
            process.wait(LIMIT_S)
            channel.close()
        assert not any(reader.finished for reader in readers)
        with grpc.insecure_channel(last.address) as channel:
            stub = generation_grpc.GenerationServiceStub(channel)
            for seed, reader in enumerate(readers):
                reader.read(stub.Resume(reader.resumed(bool(seed % 2)), timeout=LIMIT_S))
                assert reader.finished and len(reader.ids) == TOKENS
                twin = Reader()
                twin.read(stub.Generate(wanted(seed), timeout=LIMIT_S))
                assert (reader.ids, reader.text) == (twin.ids, twin.text)
                assert len({*reader.text}) > 3
        assert last.metric("concertina_streams_resumed_total", source="store") == len(seeds)
        name = f"tiny-{kind}"
        generated = last.metric("concertina_generation_tokens_total", model_name=name)
        assert generated >= len(seeds) * TOKENS
        prompts = last.metric("concertina_prompt_tokens_total", model_name=name)
        assert prompts >= len(seeds) * len(trained(BYTE_LEVEL).encode("the quick brown").ids)


def repeating(seed: int) -> pb.GenerateRequest:
    """A stream that says much again, of which drafts guess a part."""
    request = wanted(seed)  # of a few tokens only
    request.sampling.ClearField("repetition_penalty")
    request.sampling.temperature = 0.3
    return request


def test_a_stream_with_drafts_goes_on_at_another(bundle: Path, options: list[str]) -> None:
    """Killed between guesses, some of which were right: its text is that without any."""
    reader, twin = Reader(), Reader()
    drafting = [str(bundle), *options, "--draft-tokens", "6"]
    with serving(*drafting) as last, serving(str(bundle), *options) as plain:
        with doomed(*drafting) as (address, process), grpc.insecure_channel(address) as channel:
            stub = generation_grpc.GenerationServiceStub(channel)
            reader.read(stub.Generate(repeating(3), timeout=LIMIT_S), AFTER)
            process.kill()
            process.wait(LIMIT_S)
        assert not reader.finished
        for server, found in ((plain, twin), (last, reader)):
            with grpc.insecure_channel(server.address) as channel:
                stub = generation_grpc.GenerationServiceStub(channel)
                call = (
                    stub.Resume(found.resumed(True), timeout=LIMIT_S)
                    if found.stream_id
                    else stub.Generate(repeating(3), timeout=LIMIT_S)
                )
                found.read(call)
        assert (reader.ids, reader.text) == (twin.ids, twin.text)
        assert reader.finished and len(reader.ids) == TOKENS and len({*reader.ids}) > 3
        name = f"tiny-{LLAMA}"
        assert (
            last.metric("concertina_draft_tokens_total", model_name=name, outcome="accepted") > 20
        )
        assert last.metric("concertina_streams_resumed_total", source="store") == 1


def run(server: Server, *arguments: str) -> str:
    """What a command prints."""
    process = concertina(
        *(*arguments, "--address", server.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err.decode()
    return str(out.decode())


def test_commands_take_pieces_of_text_for_tokens(
    bundle: Path, options: list[str], tmp_path: Path
) -> None:
    report, text = tmp_path / "report.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox — ñ字 " * 300)
    with serving(str(bundle), *options) as server, Client(server.address) as client:
        run(
            server,
            *("loadtest", "--streams", "4", "--requests", "12", "--warmup", "1"),
            *("--prompt-tokens", "1-20", "--output-tokens", "30", "--max-lag", "60"),
            *("--json", str(report)),
        )
        found = json.loads(report.read_text())["report"]
        assert (found["whole"], found["num_violations"]) == (12, 0)
        size = len(client.tokenize(text.read_text()).ids)
        assert size > 2 * CONTEXT
        told = json.loads(run(server, "score", str(text), "--json"))
        assert told["tokens"] == size and told["windows"] == -(-size // CONTEXT)
        bits = told["bits_per_token"] * size
        assert told["bits_per_byte"] == pytest.approx(bits / len(text.read_bytes()))
        shown = run(server, "score", str(text))
        assert re.match(rf"{told['bits_per_byte']:.4f} bits/byte over {size:,} tokens", shown)
        several = run(
            server, "generate", "the ", "-n", "5", "--n", "3", "--logprobs", "1", "--json"
        )
        events = [json.loads(line) for line in several.splitlines()]
        assert {event["output"] for event in events if event["event"] == "tokens"} == {0, 1, 2}
        pieces = trained(BYTE_LEVEL)
        for event in events:
            for one, token in zip(event.get("logprobs", ()), event.get("ids", ()), strict=True):
                said = pieces.decode([token]).encode()
                assert b"\xef\xbf\xbd" in said or bytes.fromhex(one["piece"]) == said


def test_a_gguf_file_is_served_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is converted into a cache that is not there yet, and found there the next time."""
    monkeypatch.setenv("CONCERTINA_CACHE", str(tmp_path / "cache"))
    file = write_gguf(
        tmp_path / "Tiny-Chat.gguf",
        weights=tensors(vocab_size=trained(BYTE_LEVEL).get_vocab_size()),
        vocabulary={**fields(pre="gpt-2"), "tokenizer.chat_template": "{{ messages[-1].content }}"},
    )
    for times in (1, 2):
        with serving(str(file), "--local", "--threads", "1") as server:
            assert ("this once" in server.output()) == (times == 1)
            assert "try: concertina chat -m Tiny-Chat" in server.output()
            with Client(server.address) as client:
                assert [model.name for model in client.models()] == ["Tiny-Chat"]
                said = [{"role": "user", "content": "the quick fox"}]
                asked = {"max_tokens": 8, "seed": 1, "ignore_eos": True, "timeout": LIMIT_S}
                answer = client.complete(said, **asked)
                assert answer.text == client.complete("the quick fox", **asked).text
        (folder,) = (each for each in (tmp_path / "cache").iterdir() if each.is_dir())
        assert folder.name.startswith("Tiny-Chat-")
