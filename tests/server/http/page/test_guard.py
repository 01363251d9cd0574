"""Who may call what the page calls, and what its headers forbid."""

from __future__ import annotations

import pytest

from tests.server.http.conftest import front as front
from tests.server.http.gateways import Front

ASKED = {"model": "tiny-text", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "", "Sec_Fetch_Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
    ids=str,
)
def test_only_its_own_page_may_call(headers: dict[str, str], status: int, front: Front) -> None:
    assert front.post("/c/streams", ASKED, **headers).status == status
    assert front.call("GET", "/c/models", **headers).status == status
    own = headers | {"Origin": f"http://127.0.0.1:{front.port}"} if status == 200 else headers
    assert front.post("/c/streams", ASKED, **own).status == status


def test_no_other_site_is_ever_allowed(front: Front) -> None:
    asked = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}
    for path in ("/", "/c/models", "/c/streams", "/v1/completions"):
        for method in ("OPTIONS", "GET"):
            reply = front.call(method, path, **asked)
            assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_page_comes_with_a_policy_and_names_no_other_address(front: Front) -> None:
    page = front.call("GET", "/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/c/page.js", "/c/page.css"):
        text = front.call("GET", path).raw.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    script = front.call("GET", "/c/page.js").raw.decode()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/c/streams", {**ASKED, "pace": -1}, "pace"),
        ("/c/streams", {**ASKED, "seed": "x"}, "seed"),
        ("/c/streams", {"model": "tiny-image", "rows": "!"}, "rows"),
        ("/c/streams", {**ASKED, "messages": [{"role": "user"}]}, "messages"),
        ("/c/streams", {**ASKED, "temperature": -1}, "temperature"),
        ("/c/streams/x/fork", {"n": 9}, "n"),
        ("/c/streams/x/pace", {"pace": "fast"}, "pace"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(
    path: str, body: dict[str, object], param: str, front: Front
) -> None:
    reply = front.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, param), reply.raw


def test_what_is_not_there(front: Front) -> None:
    for method, path in (
        ("GET", "/c/streams/x"),
        ("GET", "/c/sessions/x"),
        ("POST", "/c/streams/x/pause"),
        ("POST", "/c/streams/x/continue"),
    ):
        body = {} if method == "POST" else None
        assert front.call(method, path, body).error["code"] == "stream_not_found", path
    assert front.call("DELETE", "/c/streams/x").json == {"deleted": True}
    assert front.call("POST", "/c/sessions", b"", Content_Type="text/plain").status == 415


def test_a_stream_is_kept_for_its_page_and_its_events_come_whole_again(front: Front) -> None:
    asked = {**ASKED, "max_tokens": 9, "seed": str(2**63 + 1)}
    first = front.post("/c/streams", asked).events
    assert [each["type"] for each in (first[0], first[-1])] == ["accepted", "finished"]
    assert first[0]["seed"] == asked["seed"]
    again = front.call("GET", f"/c/streams/{first[0]['id']}").events
    names = ("ids", "bits", "top", "pieces")
    told = [
        {name: [each for event in events for each in event.get(name, ())] for name in names}
        for events in (first, again)
    ]
    assert told[0] == told[1] and len(told[0]["ids"]) == 9
    assert [len(each) for each in told[0]["top"]] == [5] * 9
