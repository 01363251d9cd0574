from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.trace import read_trace, trace_requests

LINES = (
    {"timestamp": 5000, "input_length": 1300, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 3000, "input_length": 600, "output_length": 2, "hash_ids": [7, 11]},
    {"timestamp": 9000, "input_length": 4, "output_length": 1},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return path


def test_requests_come_in_order_from_zero_on(file: Path) -> None:
    entries = read_trace(file)
    assert [entry.due_s for entry in entries] == [0, 2, 6]
    assert [(entry.prompt_tokens, entry.output_tokens) for entry in entries] == [
        (600, 2),
        (1300, 5),
        (4, 1),
    ]
    faster = read_trace(file, speed=4, scale=0.5)
    assert [entry.due_s for entry in faster] == [0, 0.5, 1.5]
    assert [(entry.prompt_tokens, entry.output_tokens) for entry in faster] == [
        (300, 1),
        (650, 2),
        (2, 1),
    ]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_prompts_share_what_they_shared(file: Path, scale: float) -> None:
    entries = read_trace(file, scale=scale)
    requests = [r for _, r in trace_requests(entries, 1, vocabulary=256, scale=scale)]
    prompts = [request.prompt for request in requests]
    assert [len(prompt or ()) for prompt in prompts] == [entry.prompt_tokens for entry in entries]
    first, second, _ = prompts
    assert isinstance(first, tuple) and isinstance(second, tuple)
    block = round(512 * scale)
    assert first[:block] == second[:block]
    assert first[block : block + 20] != second[block : block + 20]
    assert [request.output_tokens for request in requests] == [e.output_tokens for e in entries]
    again = [r for _, r in trace_requests(entries, 1, vocabulary=256, scale=scale)]
    other = [r for _, r in trace_requests(entries, 2, vocabulary=256, scale=scale)]
    assert again == requests and other != requests


def test_a_token_that_is_not_counted_is_one_more(file: Path) -> None:
    for (_, request), entry in zip(
        trace_requests(read_trace(file), 1, vocabulary=9, has_begin=False),
        read_trace(file),
        strict=True,
    ):
        assert len(request.prompt or ()) == entry.prompt_tokens + 1
        assert not request.first_counts


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"timestamp": 1, "input_length": 3}',
        '{"timestamp": "soon", "input_length": 3, "output_length": 3}',
        '{"timestamp": NaN, "input_length": 3, "output_length": 3}',
        '{"timestamp": 1, "input_length": 0, "output_length": 3}',
        '{"timestamp": 1, "input_length": 3, "output_length": 1.5}',
        '{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": ["x"]}',
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"trace.jsonl, line 2: .*timestamp \(ms\), input_length"):
        read_trace(file)


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no request"):
        read_trace(tmp_path / "empty")
