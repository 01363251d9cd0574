"""vLLM's bench: its request functions, and `vllm bench serve` as its users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concertina.client import Client
from tests.clients.environments import Environment, url
from tests.e2e.servers import Server
from tests.server.http.gateways import fronting

PROMPTS = ["import ", "class A:\n    ", "def f(x):", "é = "]
TOKENS = 40


@pytest.mark.parametrize("ping_seconds", [15.0, 0.002])
def test_its_functions_read_completions(
    client: Environment, texts: Server, ping_seconds: float
) -> None:
    with fronting(texts.address, ping_seconds=ping_seconds) as front:
        printed = client.python(
            *("vllm_client.py", "completions", "python-4k", str(TOKENS)),
            PROMPTS=json.dumps(PROMPTS),
            **url(f"127.0.0.1:{front.port}"),
        )
    told = json.loads(printed.splitlines()[-1])
    with Client(texts.address) as own:
        for each, prompt in zip(told, PROMPTS, strict=True):
            wanted = own.complete(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            assert each["success"], each["error"]
            assert each["generated_text"] == wanted.text
            assert each["output_tokens"] == TOKENS
            assert each["prompt_len"] == len(prompt.encode())
            assert 0 < each["ttft"] <= each["latency"]


def test_its_functions_read_chats(client: Environment, chats: Server) -> None:
    printed = client.python(
        *("vllm_client.py", "chat", "tiny-llama", str(TOKENS)),
        PROMPTS=json.dumps(PROMPTS),
        **url(chats.http_address),
    )
    told = json.loads(printed.splitlines()[-1])
    with Client(chats.address) as own:
        for each, prompt in zip(told, PROMPTS, strict=True):
            said = [{"role": "user", "content": prompt}]
            wanted = own.complete(said, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            assert each["success"], each["error"]
            assert each["generated_text"] == wanted.text
            assert each["output_tokens"] == TOKENS


def test_its_command_measures(client: Environment, chats: Server, tokenizer_folders: Path) -> None:
    client.python(
        *("vllm_bench_serve.py", "--backend", "openai", "--model", "tiny-llama"),
        *("--base-url", f"http://{chats.http_address}", "--endpoint", "/v1/completions"),
        *("--tokenizer", tokenizer_folders / "tiny-llama", "--dataset-name", "random"),
        *("--random-input-len", "60", "--random-output-len", str(TOKENS), "--num-prompts", "6"),
        *("--ignore-eos", "--save-result", "--save-detailed", "--result-filename", "result.json"),
    )
    told = json.loads((client.home / "result.json").read_text())
    assert (told["completed"], told["failed"]) == (6, 0)
    assert told["output_lens"] == [TOKENS] * 6
    assert all(50 <= each <= 61 for each in told["input_lens"])  # texts of random tokens
    assert all(told["generated_texts"])
    assert told["median_ttft_ms"] > 0 and told["median_tpot_ms"] > 0
