"""The command as a user runs it: a process, its output and its exit code."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from concertina.v1 import generation_service_pb2 as pb
from tests.loadtest.completions import Answering, Body, completing, texts, usage
from tests.loadtest.scripted import Context, Serve, Stream, keep_contract

ROOT = Path(__file__).parents[2]
COMMAND = (
    sys.executable,
    "-m",
    "concertina.cli.main",
    "loadtest",
    "--streams",
    "4",
    "--warmup",
    "1",
)
LENGTHS = ("--prompt-tokens", "2-5", "--output-tokens", "6")


@asynccontextmanager
async def loadtest(address: str, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The running command; whatever happens, it does not outlive the block."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, *LENGTHS, "--address", address, *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "COLUMNS": "400"},
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def outcome(address: str, *options: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of the command."""
    async with loadtest(address, *options) as process:
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_good_server_gets_a_table_json_and_exit_code_0(
    serve: Serve, tmp_path: Path
) -> None:
    prompts: list[str] = []

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        prompts.append(request.prompt.text)
        for event in keep_contract(request):
            yield event

    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\n")
    file = tmp_path / "report.json"
    code, out, err = await outcome(
        await serve(script),
        *("--requests", "10", "--prompt-file", str(lines), "--max-lag", "60"),
        *("--json", str(file)),
    )
    assert (code, err) == (0, "")
    assert "time to first token" in out and "10 whole of 10" in out
    found = json.loads(file.read_text())
    assert found["plan"]["model"] == "script" and found["plan"]["prompts"] == 2
    assert found["report"]["whole"] == 10 and found["report"]["output_tokens"] == 60
    assert len(prompts) == 11 and set(prompts) == {"one", "two"}


async def test_a_violation_is_listed_and_exits_1_even_when_void(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request)[:-1]:
            yield event

    code, out, err = await outcome(
        await serve(script), "--requests", "4", "--max-lag", "0", "--json", "-"
    )
    assert code == 1
    found = json.loads(out)["report"]
    assert found["num_violations"] == 4
    assert "without a terminal event" in found["violations"][0]["what"]
    assert "4 broke the protocol" in err and "VOID" in err


async def test_an_open_loop_may_be_refused_but_has_to_be_told_when_to_come_again(
    serve: Serve,
) -> None:
    refused = 0

    async def script(request: pb.GenerateRequest, context: Context) -> Stream:
        nonlocal refused
        if request.sampling.seed % 2:
            refused += 1
            error = pb.Error(code="RESOURCE_EXHAUSTED", message="full", retryable=True)
            if request.prompt.text == "tell":
                error.retry_after.FromMilliseconds(100)
            yield pb.GenerateResponse(sequence=1, error=error)
        else:
            for event in keep_contract(request):
                yield event

    address = await serve(script)
    options = ("--rate", "100", "--requests", "30", "--warmup", "0", "--max-lag", "60")
    for text, expected in (("tell", 0), ("do not tell", 1)):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
            prompts.write(text)
            prompts.flush()
            refused = 0
            code, out, _ = await outcome(address, *options, "--prompt-file", prompts.name)
        assert code == expected
        assert "100 requests/s" in out and "refusal" in out
        assert f"{refused} Overloaded RESOURCE_EXHAUSTED" in out and 0 < refused < 30
        assert (f"{refused} without a time to try again" in out) == expected


async def test_a_lagging_generator_voids_the_run_with_exit_code_3(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            await asyncio.sleep(0.01)
            yield event

    code, out, err = await outcome(await serve(script), "--requests", "8", "--max-lag", "0")
    assert code == 3
    assert "VOID" in err and "--max-lag" in err
    assert "8 whole of 8" in out


async def test_ctrl_c_cancels_and_still_reports(serve: Serve) -> None:
    stuck = asyncio.Event()
    streams = 0

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        nonlocal streams
        streams += 1
        number = streams
        for event in keep_contract(request):
            yield event
            if number == 5:
                stuck.set()
                await asyncio.sleep(60)

    address = await serve(script)
    async with loadtest(
        address, "--duration", "50", "--streams", "1", "--max-lag", "60"
    ) as process:
        await stuck.wait()
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    assert "3 whole of 4" in out.decode() and "1 Cancelled" in out.decode()


async def test_a_sweep_writes_a_table_json_rows_and_a_page(serve: Serve, tmp_path: Path) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        events = keep_contract(request)
        events[-1].finished.usage.state_bytes = 100 * len(request.prompt.tokens.ids)
        for event in events:
            yield event

    files = [tmp_path / name for name in ("r.json", "r.csv", "r.html")]
    names = zip(("--json", "--csv", "--html"), map(str, files), strict=True)
    code, out, err = await outcome(
        await serve(script),
        *("--sweep", "context=32..128", "--requests", "3", "--slo", "e2e=50s", "--max-lag", "60"),
        *(word for pair in names for word in pair),
    )
    assert (code, err) == (0, "")
    assert "context swept" in out and "100.0%" in out
    told = json.loads(files[0].read_text())
    assert told["sweep"]["axis"] == "context"
    assert [point["value"] for point in told["sweep"]["points"]] == [32, 64, 128]
    assert [point["report"]["state_bytes"] for point in told["sweep"]["points"]] == [
        2600,
        5800,
        12200,
    ]
    assert len(files[1].read_text().splitlines()) == 1 + 9
    assert "<svg" in files[2].read_text() and "context swept" in files[2].read_text()


async def test_a_trace_is_replayed_over_openais_api(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    async def answer(body: Body, stream: Answering) -> None:
        asked.append((len(body["prompt"]), body["max_tokens"]))
        for event in [*texts(2), usage(len(body["prompt"]), body["max_tokens"]), "[DONE]"]:
            await stream.event(event)

    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 100 * n, "input_length": 10 + n, "output_length": 2 + n} for n in range(5)
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    async with completing(answer) as address:
        options = ("--target", "openai", "--trace", str(trace), "--trace-speed", "2")
        code, out, err = await outcome(address, *options, "--max-lag", "60")
    assert (code, err) == (0, "")
    assert "a trace of 5 requests" in out and "5 whole of 5" in out
    assert asked[1:] == [(10 + n, 2 + n) for n in range(5)]
    prompt, output = asked[0]  # warms up
    assert 10 <= prompt <= 14 and 2 <= output <= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--slo", "speed=1"), "--slo: 'speed=1' is no limit"),
        (("--sweep", "speed=1"), "--sweep: 'speed=1' is no sweep"),
        (("--sweep", "context=4"), "--sweep: a context of 4 tokens has no room"),
        (("--arrivals", "often"), "--arrivals: 'often' is no way to arrive"),
        (("--target", "grpc"), "'grpc' is not one of 'concertina', 'openai'"),
    ],
)
async def test_a_wrong_option_is_a_usage_error_before_anything_is_sent(
    options: tuple[str, ...], says: str
) -> None:
    code, _, err = await outcome("127.0.0.1:1", *options)
    assert code == 2
    assert says in err


async def test_wrong_lengths_are_a_usage_error() -> None:
    code, _, err = await outcome("127.0.0.1:1", "--output-tokens", "0")
    assert code == 2
    assert "--output-tokens" in err


async def test_without_a_server_there_is_one_line_and_exit_code_1() -> None:
    code, out, err = await outcome("127.0.0.1:1")
    assert (code, out) == (1, "")
    assert "127.0.0.1:1" in err and "Traceback" not in err


async def test_a_prompt_file_without_prompts_is_a_usage_error(tmp_path: Path) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    code, _, err = await outcome("127.0.0.1:1", "--prompt-file", str(empty))
    assert code == 2
    assert "holds no prompt" in err
