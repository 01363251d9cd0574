"""Chats, streams that break, readers that leave, and streams that are taken up again."""

from __future__ import annotations

import http.client
import json
import time

from concertina.v1 import generation_service_pb2 as pb
from tests.concertina.conftest import WAIT, Fake
from tests.e2e.servers import until
from tests.server.http.gateways import TEMPLATE, Front

PROSE = {"model": "prose", "prompt": "a"}


def _asked(fake: Fake, kind: type) -> list[object]:
    return [each for each in fake.requests if isinstance(each, kind)]


def test_a_chat_is_what_follows_its_messages(front: Front) -> None:
    assert "role" in TEMPLATE
    body = {"model": "tiny-text", "max_tokens": 9, "seed": 4}
    rendered = front.post("/v1/completions", {**body, "prompt": "uhisb"}).json["choices"][0]["text"]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    chat = {**body, "messages": [{"role": "user", "content": parts}]}
    chat["messages"].append({"role": "system", "content": "b"})
    whole = front.post("/v1/chat/completions", chat).json
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["content"] == rendered
    streamed = front.post("/v1/chat/completions", {**chat, "stream": True})
    assert streamed.text == rendered
    assert streamed.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    asked = {**chat, "logprobs": True, "top_logprobs": 2}
    (choice,) = front.post("/v1/chat/completions", asked).json["choices"]
    assert len(choice["logprobs"]["content"]) == 9
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_a_stream_that_fails_is_cut(told: Front, fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.error(3)]
    reply = told.post("/v1/completions", {**PROSE, "stream": True})
    assert reply.status == 200
    assert not reply.is_whole
    assert reply.text == "ab"
    assert reply.events[-1]["error"]["message"] == "it broke"
    assert "[DONE]" not in reply.events


def test_a_stream_whose_call_breaks_goes_on(told: Front, fake: Fake) -> None:
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "ab")]
    fake.scripts = [[fake.text(3, 2, "cd"), fake.finished(4)]]
    reply = told.post("/v1/completions", {**PROSE, "stream": True})
    assert reply.is_whole
    assert reply.text == "abcd"


def test_a_silent_stream_sends_empty_lines(told: Front, fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never, fake.text(2, 0, "ab"), fake.finished(3)]
    connection = http.client.HTTPConnection("127.0.0.1", told.port, timeout=WAIT)
    body = json.dumps({**PROSE, "stream": True}).encode()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline() == b"\n"
    fake.never.set()
    assert answer.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def _leave(told: Front, fake: Fake, body: dict[str, object]) -> None:
    """Asks, and goes once the server has heard of it, without waiting for the end."""
    connection = http.client.HTTPConnection("127.0.0.1", told.port, timeout=WAIT)
    sent = json.dumps(body).encode()
    connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
    if body.get("stream"):
        answer = connection.getresponse()
        while not answer.readline().startswith(b"data: "):
            pass
        answer.close()
    while not fake.requests:
        time.sleep(0.02)
    connection.close()


def test_whoever_leaves_ends_the_stream(told: Front, fake: Fake) -> None:
    for stream in (True, False):
        fake.cancelled.clear()
        fake.requests.clear()
        fake.releases.clear()
        fake.script = [fake.accepted(keep=60), fake.text(2, 0, "ab"), fake.never]
        _leave(told, fake, {**PROSE, "stream": stream})
        assert fake.cancelled.wait(WAIT), stream
        until(lambda: len(fake.releases) == 1)  # else the server would go on for a minute


def test_a_kept_stream_outlives_its_reader_and_is_taken_up(told: Front, fake: Fake) -> None:
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "ab"), fake.never]
    _leave(told, fake, {**PROSE, "stream": True, "keep": 60})
    assert fake.cancelled.wait(WAIT)
    assert fake.releases == []
    fake.scripts = [[fake.accepted(keep=60), fake.text(2, 2, "cd"), fake.finished(3)]]
    reply = told.call("GET", "/v1/streams/cmpl-s1?after=2.2")
    assert reply.text == "cd"
    assert b"id: 4.4\n" in reply.raw
    (asked,) = _asked(fake, pb.ResumeRequest)
    assert isinstance(asked, pb.ResumeRequest)
    assert (asked.stream_id, asked.cursors[0].tokens, asked.cursors[0].characters) == ("s1", 2, 2)
    again = told.call("GET", "/v1/streams/cmpl-s1", Last_Event_ID="2.2")
    assert again.text == "cd"
    assert told.call("GET", "/v1/streams/cmpl-s1?after=x").status == 400
    assert told.call("DELETE", "/v1/streams/cmpl-s1").json["deleted"]
    assert [each.stream_id for each in fake.releases] == ["s1"]  # type: ignore[attr-defined]
