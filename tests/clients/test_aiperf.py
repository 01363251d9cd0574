"""NVIDIA's aiperf: what it sent, what it read, and what it counted."""

from __future__ import annotations

import json
from pathlib import Path

from concertina.client import Client
from tests.clients.environments import Environment
from tests.e2e.servers import Server

REQUESTS, TOKENS = 6, 20
# Offline, it takes a folder for a name; so it may ask a hub, but there is none.
HUB = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:1"}


def profile(
    client: Environment, server: Server, model: str, kind: str, tokenizer: Path
) -> list[tuple[dict[str, object], str]]:
    """The bodies that it sent, and the texts that it read for them."""
    client.run(
        *("aiperf", "profile", "--model", model, "--url", f"http://{server.http_address}"),
        *("--endpoint-type", kind, "--streaming", "--tokenizer", tokenizer),
        *("--request-count", str(REQUESTS), "--concurrency", "2", "--isl", "60"),
        *("--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"),
        *("--extra-inputs", "temperature:0", "--export-level", "raw", "--ui", "none"),
        *("--output-artifact-dir", client.home / "out"),
        **HUB,
    )
    (summary,) = (client.home / "out").rglob("profile_export_aiperf.json")
    told = json.loads(summary.read_text())
    assert told["request_count"]["avg"] == REQUESTS
    assert told["time_to_first_token"]["min"] > 0
    (records,) = (client.home / "out").rglob("profile_export_raw.jsonl")
    found = []
    for line in records.read_text().splitlines():
        record = json.loads(line)
        assert record["status"] == 200 and not record.get("error")
        packets = [packet for each in record["responses"] for packet in each["packets"]]
        events = [each["value"] for each in packets if each["name"] == "data"]
        assert events[-1] == "[DONE]"
        choices = [choice for each in events[:-1] for choice in json.loads(each)["choices"]]
        parts = (each.get("text") or each.get("delta", {}).get("content") for each in choices)
        found.append((record["payload"], "".join(each or "" for each in parts)))
    assert len(found) == REQUESTS
    return found


def test_it_measures_completions(
    client: Environment, texts: Server, tokenizer_folders: Path
) -> None:
    read = profile(client, texts, "python-4k", "completions", tokenizer_folders / "bytes")
    with Client(texts.address) as own:
        for sent, text in read:
            prompt = str(sent["prompt"])
            wanted = own.complete(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            assert (sent["max_tokens"], text) == (TOKENS, wanted.text)


def test_it_measures_chats(client: Environment, chats: Server, tokenizer_folders: Path) -> None:
    read = profile(client, chats, "tiny-llama", "chat", tokenizer_folders / "tiny-llama")
    with Client(chats.address) as own:
        for sent, text in read:
            assert sent["max_completion_tokens"] == TOKENS
            said = [
                {"role": each["role"], "content": each["content"]}
                for each in sent["messages"]  # type: ignore[attr-defined]
            ]
            wanted = own.complete(said, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            assert text == wanted.text
