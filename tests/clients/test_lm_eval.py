"""EleutherAI's lm-evaluation-harness: what it measures is what our own client measures."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from concertina.client import Client
from tests.clients.environments import Environment
from tests.e2e.servers import ROOT, Server, concertina

NEAR = 1e-4  # bits
CONTEXT = 4096
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{context}"
doc_to_target: "{target}"
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 60, do_sample: false}}
"""
Sample = Mapping[str, Any]


def evaluate(
    client: Environment,
    server: Server,
    task: str,
    *options: str,
    model: str = f"python-4k,max_length={CONTEXT}",
    **environment: str,
) -> tuple[Sequence[Sample], Mapping[str, Any]]:
    """The samples and the results of a task."""
    address = f"http://{server.http_address}/v1/completions"
    arguments = f"model={model},base_url={address},num_concurrent=4"
    out = client.home / "out"
    client.run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--tasks", task, "--include_path", client.home, "--output_path", out, "--log_samples"),
        *options,
        **environment,
    )
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    lines = samples.read_text().splitlines()
    found = sorted(map(json.loads, lines), key=lambda each: each["doc_id"])
    return found, json.loads(results.read_text())["results"][task]


def write_task(
    home: Path, kind: str, metric: str, documents: Sequence[Mapping[str, str]], target: str
) -> str:
    """A task of these documents; its name."""
    data = home / "documents.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    context = "" if kind == "loglikelihood_rolling" else "{{context}}"
    told = TASK.format(
        name=f"ours_{kind}", data=data, kind=kind, context=context, target=target, metric=metric
    )
    (home / "task.yaml").write_text(told)
    return f"ours_{kind}"


@pytest.mark.parametrize("model", ["python-4k", "tiny-llama"])
def test_rolling_is_what_score_says(
    model: str, client: Environment, tokenizer_folders: Path, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue("texts" if model == "python-4k" else "chats")
    source = (ROOT / "protos" / "concertina" / "client" / "client.py").read_text()
    documents = [source[:800], source[800:3800], "naïve café — 你好\n", "x"]
    arguments = f"python-4k,max_length={CONTEXT}"
    if model != "python-4k":  # one with a tokenizer, and a shorter context
        documents.pop(1)
        arguments = f"{model},tokenizer={tokenizer_folders / model},max_length=1024"
    task = write_task(
        client.home,
        "loglikelihood_rolling",
        "bits_per_byte",
        [{"text": each} for each in documents],
        "{{text}}",
    )
    samples, results = evaluate(client, server, task, model=arguments)
    bits = 0.0
    for sample, text in zip(samples, documents, strict=True):
        file = client.home / "document.txt"
        file.write_text(text)
        scoring = concertina(
            *("score", str(file), "--json", "--address", server.address, "-m", model),
            stdout=subprocess.PIPE,
        )
        told = json.loads(scoring.communicate(timeout=120)[0])["bits"]
        assert bits_of(sample) / len(told) == pytest.approx(sum(told) / len(told), abs=NEAR)
        bits += sum(told)
    total = sum(len(each.encode()) for each in documents)
    assert results["bits_per_byte,none"] == pytest.approx(bits / total, abs=NEAR)


def test_likelihoods_of_continuations(client: Environment, texts: Server) -> None:
    documents = [
        {"context": "import os\nimport", "next": " sys"},  # it moves spaces to what follows
        {"context": "import os\nimport", "next": " qqq"},
        {"context": "def f(x):\n    return", "next": " x + 1\n"},
        {"context": "é", "next": "é"},
    ]
    task = write_task(client.home, "loglikelihood", "acc", documents, "{{next}}")
    samples, _ = evaluate(client, texts, task)
    with Client(texts.address) as own:
        for sample, document in zip(samples, documents, strict=True):
            context, text = document["context"].encode(), document["next"].encode()
            wanted = sum(own.score([*context, *text]).bits[-len(text) :])
            greedy = own.complete([*context], max_tokens=len(text), temperature=0)
            ((_, is_greedy),) = sample["resps"][0]
            assert bits_of(sample) == pytest.approx(wanted, abs=NEAR * len(text))
            assert (str(is_greedy) == "True") == (greedy.text == document["next"])


def test_it_generates_until(client: Environment, texts: Server) -> None:
    documents = [{"context": each, "next": ""} for each in ("import ", "class A:\n", "é = ")]
    task = write_task(client.home, "generate_until", "exact_match", documents, "{{next}}")
    samples, _ = evaluate(client, texts, task)
    assert_generated(texts, samples, stop=["\n\n"], max_tokens=60)


def test_ruler_finds_needles(client: Environment, texts: Server, tokenizer_folders: Path) -> None:
    # It loads this when it is imported, and needs it for other tasks only.
    (client.home / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    told = {"tokenizer": str(tokenizer_folders / "bytes"), "max_seq_lengths": [CONTEXT]}
    samples, results = evaluate(
        client,
        texts,
        "niah_single_1",
        *("--metadata", json.dumps(told), "--limit", "3"),
        NLTK_DATA=str(client.home / "nltk"),
    )
    assert len(samples) == 3
    prompts = [each["arguments"]["gen_args_0"]["arg_0"] for each in samples]
    # It adds 25 sentences at a time, so that the next size would not fit.
    assert all(2500 < len(each.encode()) < CONTEXT for each in prompts)
    found = assert_generated(texts, samples, max_tokens=128)
    right = [
        needle in text
        for text, sample in zip(found, samples, strict=True)
        for needle in sample["doc"]["outputs"]
    ]
    assert results[f"{CONTEXT},none"] == pytest.approx(sum(right) / len(right))


def bits_of(sample: Sample) -> float:
    """The log-likelihood of a sample, in bits; it writes numbers as texts, in lists of lists."""
    value = sample["resps"]
    while isinstance(value, list):
        value = value[0]
    return -float(value) / math.log(2)


def assert_generated(server: Server, samples: Sequence[Sample], **asked: Any) -> list[str]:
    """The texts of the samples, which are those of our own client."""
    texts = []
    with Client(server.address) as own:
        for sample in samples:
            prompt = sample["arguments"]["gen_args_0"]["arg_0"]
            ((text,),) = sample["resps"]
            assert text == own.complete(prompt, temperature=0, **asked).text
            texts.append(text)
    assert any(texts)
    return texts
