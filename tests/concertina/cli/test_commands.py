"""The commands that talk to a server, against the fake one, with and without a terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from concertina.cli.canvas import Canvas, Easel
from concertina.cli.main import main
from concertina.v1 import bundle_pb2
from concertina.v1 import generation_service_pb2 as pb
from tests.concertina.conftest import WAIT, Fake, Status, image_model, text_model

BLACK, WHITE, RED, BLUE = (0, 0, 0, 255), (255, 255, 255, 255), (255, 0, 0, 255), (0, 0, 255, 255)
CLEAR = (0, 0, 0, 0)

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `concertina` with arguments in this process: exit code, output, errors."""
    monkeypatch.setenv("CONCERTINA_ADDRESS", fake.address)

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concertina", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def start(fake: Fake) -> Iterator[Start]:
    """Starts `concertina` with arguments as a process of its own."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "concertina.cli.main", *arguments]
        environment = os.environ | {
            "CONCERTINA_ADDRESS": fake.address,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "",
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "COLUMNS": "80",
            "LINES": "24",
        }
        processes.append(subprocess.Popen(command, env=environment, **options))  # type: ignore
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait(WAIT)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


class Terminal:
    """A pseudo-terminal, seen from the side of the person before it."""

    def __init__(self) -> None:
        self._master, self.side = pty.openpty()
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def wait_for(self, text: str) -> None:
        """Reads until `text` has been shown."""
        deadline = time.monotonic() + WAIT
        while text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} was not shown, only {self.shown!r}"
            self.shown += self._decoder.decode(os.read(self._master, 65536))

    def close(self) -> None:
        os.close(self._master)
        os.close(self.side)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def pixels(path: Path) -> tuple[tuple[int, int], list[tuple[int, ...]]]:
    """Size and colours, as RGBA in raster order."""
    image = Image.open(path).convert("RGBA")
    data = image.tobytes()
    return image.size, [tuple(data[start : start + 4]) for start in range(0, len(data), 4)]


def painted(fake: Fake, ids: list[int], prompt: int = 0) -> list[pb.GenerateResponse]:
    """A stream that paints these palette indices, five an event."""
    events = [fake.accepted(prompt_tokens=prompt)]
    for start in range(0, len(ids), 5):
        events.append(fake.pixels(len(events) + 1, prompt + start, ids[start : start + 5]))
    return [*events, fake.finished(len(events) + 1, pb.FINISH_REASON_END)]


def test_generate_writes_the_text_and_nothing_else(fake: Fake, run: Run) -> None:
    fake.script = [
        fake.accepted(),
        fake.text(2, 0, "é\x1b[31m"),
        fake.text(3, 6 + 1, "b\n"),
        fake.finished(4),
    ]
    assert run("generate", "def ") == (0, "é\x1b[31mb\n", "")


def test_generate_passes_its_options_on(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    options = (
        "--temperature 0.5 --top-k 3 --top-p 0.25 --min-p 0.125 --seed 9 --max-tokens 5 "
        "--stop a --stop b --time-limit 2 --label x --model prose --typical-p 0.75 "
        "--repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5 "
        "--logit-bias 3=-1.5 --logit-bias 4=2 --allowed-token-id 3 --allowed-token-id 4 "
        "--bad-word c --bad-word d --stop-token-id 4 --include-stop --min-tokens 2 --ignore-eos "
        "--n 1 --logprobs 0 --prompt-logprobs 1 --stream-interval 8 --priority -3 "
        "--keep 5"
    )
    assert run("generate", "def ", *options.split())[0] == 0
    expected = pb.GenerateRequest(
        model="prose",
        prompt=pb.Prompt(text="def ", label="x"),
        sampling=pb.SamplingParameters(
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            seed=9,
            typical_p=0.75,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={3: -1.5, 4: 2},
            allowed_token_ids=[3, 4],
            bad_words=["c", "d"],
        ),
        stopping=pb.StoppingCriteria(
            max_tokens=5,
            stop=["a", "b"],
            stop_token_ids=[4],
            include_stop=True,
            min_tokens=2,
            ignore_eos=True,
        ),
        output=pb.OutputOptions(n=1, logprobs=0, prompt_logprobs=1, stream_interval=8),
        priority=-3,
    )
    expected.stopping.time_limit.FromSeconds(2)
    expected.keep.FromSeconds(5)
    assert fake.requests[0].idempotency_key  # a random one
    expected.idempotency_key = fake.requests[0].idempotency_key
    assert fake.requests == [expected]


def test_what_an_output_must_be(fake: Fake, run: Run, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    given = {
        ("--json-schema", str(tmp_path / "schema.json")): pb.Grammar(
            json_schema='{"type": "object"}'
        ),
        ("--regex", "a+"): pb.Grammar(regex="a+"),
        ("--choice", "yes", "--choice", "no"): pb.Grammar(choice=pb.Choice(texts=["yes", "no"])),
    }
    fake.script = [fake.accepted(), fake.text(2, 0, "yes"), fake.finished(3)]
    for options in given:
        fake.script = [fake.accepted(), fake.finished(2)]
        assert run("generate", "x", *options)[0] == 0
    assert [request.sampling.grammar for request in fake.requests] == [*given.values()]


def test_several_outputs_are_written_one_after_the_other(fake: Fake, run: Run) -> None:
    fake.script = [
        fake.accepted(outputs=3),
        fake.text(2, 0, "two ", output=2),
        fake.text(3, 0, "zero"),
        fake.finished(4),
        fake.text(5, 0, "one", output=1),
        fake.text(6, 4, "more", output=2),
        fake.finished(7, output=2),
        fake.finished(8, output=1),
    ]
    assert run("generate", "--n", "3") == (
        0,
        "--- output 0 ---\nzero\n--- output 1 ---\none\n--- output 2 ---\ntwo more",
        "",
    )


def test_a_refused_request_for_several_outputs_writes_no_heading(fake: Fake, run: Run) -> None:
    fake.script = [Status(grpc.StatusCode.INVALID_ARGUMENT, "no such label")]
    code, written, errors = run("generate", "--n", "3")
    assert (code, written) == (1, "") and "no such label" in errors


@pytest.mark.parametrize("bias", ["7", "x=1", "7=", "7:1"])
def test_a_bias_that_is_none_is_wrong_usage(run: Run, bias: str) -> None:
    code, _, err = run("generate", "x", "--logit-bias", bias)
    assert code == 2
    assert "ID=BIAS" in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        (["é"], b"", "é"),
        (["-"], "é\n".encode(), "é\n"),
        (["--prompt-file", "FILE"], b"", "from a file\n"),
    ],
)
def test_prompts_come_from_three_places(
    fake: Fake, run: Run, tmp_path: Path, arguments: list[str], stdin: bytes, text: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n")
    fake.script = [fake.accepted(), fake.finished(2)]
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert run("generate", *arguments, stdin=stdin)[0] == 0
    assert fake.requests[0].prompt == pb.Prompt(text=text)


@pytest.mark.parametrize("arguments", [[], ["-"], [""]])
def test_no_prompt_starts_from_nothing(fake: Fake, run: Run, arguments: list[str]) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    assert run("generate", *arguments)[0] == 0
    assert not fake.requests[0].HasField("prompt")


def test_two_prompts_are_wrong_usage(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("x")
    code, _, err = run("generate", "y", "--prompt-file", str(file))
    assert code == 2
    assert "not both" in err


def test_a_prompt_that_is_no_text_is_refused(run: Run) -> None:
    message = "error: standard input is not UTF-8 text: see byte 1\n"
    assert run("generate", "-", stdin=b"a\xff") == (1, "", message)


def test_generate_json_is_an_object_per_event(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.finished(3)]
    code, out, err = run("generate", "--json")
    accepted, tokens, finished = (json.loads(line) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert (accepted["event"], accepted["stream_id"]) == ("accepted", "s1")
    assert accepted["sampling"]["temperature"] == 0.8
    assert tokens == {
        "event": "tokens",
        "sequence": 2,
        "first_position": 0,
        "ids": [97, 98],
        "text": "ab",
        "rgb": "",
        "output": 0,
        "logprobs": [],
    }
    assert (finished["event"], finished["reason"]) == ("finished", "max_tokens")
    assert finished["usage"]["generated_tokens"] == 9


def test_events_of_two_words_are_named_as_on_the_wire(fake: Fake, run: Run) -> None:
    told = pb.PromptLogprobs(logprobs=[pb.TokenLogprobs(logprob=-0.5, token="a", piece=b"a")])
    fake.script = [
        fake.accepted(prompt_tokens=1),
        pb.GenerateResponse(sequence=2, prompt_logprobs=told),
        fake.finished(3),
    ]
    _, out, _ = run("generate", "x", "--json")
    assert json.loads(out.splitlines()[1]) == {
        "event": "prompt_logprobs",
        "sequence": 2,
        "first_position": 0,
        "logprobs": [
            {
                "logprob": -0.5,
                "top_ids": [],
                "top_logprobs": [],
                "token": "a",
                "piece": "61",
                "top_tokens": [],
                "top_pieces": [],
            }
        ],
    }


def test_a_failed_stream_leaves_its_text_and_one_line(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.error(3)]
    assert run("generate") == (1, "ab", "error: it broke\n")


def test_json_errors_are_json(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(), fake.error(2)]
    code, out, err = run("generate", "--json")
    assert code == 1
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["accepted"]
    assert json.loads(err) == {
        "error": {
            "type": "GenerationFailed",
            "message": "it broke",
            "code": "INTERNAL",
            "retryable": True,
            "retry_after": 2.5,
            "field": "",
            "limit": None,
        }
    }


def test_no_server(run: Run) -> None:
    code, out, err = run("models", "--address", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err == (
        "error: no Concertina server answers at 127.0.0.1:1; start one with `concertina serve`\n"
    )


def test_the_model_is_chosen_by_what_it_writes(fake: Fake, run: Run) -> None:
    fake.script = [fake.accepted(), fake.finished(2)]
    assert run("generate", "x")[0] == 0
    assert fake.requests[0].model == "prose"
    assert run("generate", "--model", "pictures") == (
        1,
        "",
        "error: pictures writes image, this needs text\n",
    )
    assert run("generate", "--model", "other")[0] == 1
    fake.models = [text_model("a"), text_model("b")]
    assert "choose with --model: a, b" in run("generate")[2]
    assert "no image model is served" in run("paint")[2]
    assert len(fake.requests) == 1


def test_ctrl_c_cancels_the_stream_and_exits_with_130(fake: Fake, start: Start) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.never]
    process = start("generate", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"ab"  # written though the stream goes on
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 130
    assert process.stderr.read() == b""
    assert fake.cancelled.wait(WAIT)


def test_a_reader_that_leaves_is_no_error(fake: Fake, start: Start) -> None:
    gate = threading.Event()
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), gate, fake.text(3, 2, "c"), fake.never]
    process = start("generate", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"ab"
    process.stdout.close()
    gate.set()
    assert process.wait(WAIT) == 1
    assert process.stderr.read() == b""
    assert fake.cancelled.wait(WAIT)


def test_generate_in_a_terminal(fake: Fake, start: Start, terminal: Terminal) -> None:
    gate = threading.Event()
    fake.script = [
        fake.accepted(),
        fake.text(2, 0, "a\x1b]0;b\x07\n"),
        gate,
        fake.text(3, 8, "c"),
        fake.finished(4),
    ]
    process = start("generate", stdout=terminal.side, stderr=terminal.side)
    terminal.wait_for("a␛]0;b␇\r\n")
    gate.set()
    terminal.wait_for("seed 7")
    assert process.wait(WAIT) == 0
    assert "\r\nc\r\n" in terminal.shown
    line = "9 tokens in 1.50 s (6 tokens/s, first after 250 ms), ended by max_tokens, seed 7"
    assert line in terminal.shown


def test_paint_writes_a_png(fake: Fake, run: Run, tmp_path: Path) -> None:
    fake.script = painted(fake, [0, 1, 2, 3, 3, 2, 1, 0, 2, 2, 2, 2])
    out = tmp_path / "x.png"
    assert run("paint", "--out", str(out), "--scale", "2", "--label", "Food & Drink") == (0, "", "")
    size, colours = pixels(out)
    assert size == (8, 6)
    assert colours[:16] == 2 * [BLACK, BLACK, WHITE, WHITE, RED, RED, BLUE, BLUE]
    assert colours[-8:] == 8 * [RED]
    assert fake.requests[0].model == "pictures"
    assert fake.requests[0].prompt == pb.Prompt(label="Food & Drink")


def test_paint_leaves_what_was_not_painted_transparent(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    fake.script = [fake.accepted(), fake.pixels(2, 0, [1] * 5), fake.finished(3)]
    out = tmp_path / "x.png"
    assert run("paint", "--out", str(out), "--scale", "1")[0] == 0
    assert pixels(out) == ((4, 3), 5 * [WHITE] + 7 * [CLEAR])


def test_paint_without_a_terminal_prints_the_picture(fake: Fake, run: Run) -> None:
    fake.script = painted(fake, [0, 0, 2, 3, 1, 1, 3, 3, 2, 2, 2, 2])
    code, out, err = run("paint")
    assert (code, err) == (0, "")
    assert out == (
        "\x1b[38;2;0;0;0;48;2;255;255;255m▀▀\x1b[0m"
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m"
        "\x1b[38;2;0;0;255;48;2;0;0;255m▀\x1b[0m\n"
        "\x1b[38;2;255;0;0m▀▀▀▀\x1b[0m\n"
    )


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_paint_without_colours_prints_shades(
    fake: Fake, run: Run, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "dumb")
    fake.script = painted(fake, [0, 0, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    assert run("paint") == (0, "@=#%\n= -=\n", "")


def test_paint_in_a_terminal_without_colours(
    fake: Fake, start: Start, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    fake.script = painted(fake, [0, 0, 1, 1] * 3)
    process = start("paint", stdout=terminal.side, stderr=terminal.side)
    terminal.wait_for("seed 7")
    assert process.wait(WAIT) == 0
    assert "12/12 pixels" in terminal.shown
    assert "@@" in terminal.shown
    assert "▀" not in terminal.shown


def test_a_terminal_that_says_it_is_huge_is_not_filled() -> None:
    canvas = Canvas(32, 32)
    sizes = {(80, 24): 1, (208, 80): 4, (1_000_000, 1_000_000): 16}
    for (width, height), zoom in sizes.items():
        Easel(canvas, "").fit(Console(width=width, height=height))
        assert canvas.zoom == zoom


def test_paint_completes_an_image(fake: Fake, run: Run, tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 3), CLEAR)
    half.paste((250, 10, 10, 255), (0, 0, 4, 1))  # nearly red
    half.putpixel((0, 0), (0, 0, 0, 10))  # nearly transparent: shows as white
    half.save(tmp_path / "half.png")
    fake.script = painted(fake, [3] * 8, prompt=4)
    out = tmp_path / "whole.png"
    arguments = ["paint", "--complete", str(tmp_path / "half.png"), "--out", str(out), "--scale"]
    assert run(*arguments, "3") == (0, "", "")
    sent = Image.open(io.BytesIO(fake.requests[0].prompt.image.png))
    assert (sent.size, sent.getpixel((1, 0))) == ((4, 1), (250, 10, 10, 255))
    size, colours = pixels(out)
    assert size == (12, 9)
    assert colours[::3][:4] == [WHITE, RED, RED, RED]
    assert set(colours[12 * 3 :]) == {BLUE}


def test_paint_completes_what_it_wrote(fake: Fake, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    fake.script = [fake.accepted(), fake.pixels(2, 0, [0, 1, 2, 3]), fake.finished(3)]
    assert run("paint", "--out", str(out))[0] == 0
    fake.script = painted(fake, [0] * 8, prompt=4)
    assert run("paint", "--complete", str(out), "--out", str(out), "--scale", "1")[0] == 0
    sent = Image.open(io.BytesIO(fake.requests[1].prompt.image.png))
    assert sent.size == (4, 1)
    assert pixels(out)[1] == [BLACK, WHITE, RED, BLUE] + 8 * [BLACK]


@pytest.mark.parametrize(
    ("size", "colour", "message"),
    [
        ((5, 2), RED, "is 5x2 pixels; the model takes images 4 wide and at most 3 high"),
        ((4, 4), RED, "is 4x4 pixels"),
        ((2, 1), RED, "is 2x1 pixels"),
        ((12, 8), RED, "12x8 pixels, 3 times as wide as the model's 4"),
        ((12, 8), RED, "its height is no multiple of 3: crop it to 6 pixels high"),
        ((12, 2), RED, "its height is no multiple of 3: make it 3 pixels high"),
        ((4, 3), CLEAR, "is wholly transparent"),
    ],
)
def test_an_image_that_cannot_be_completed_is_refused(
    run: Run,
    fake: Fake,
    tmp_path: Path,
    size: tuple[int, int],
    colour: tuple[int, int, int, int],
    message: str,
) -> None:
    Image.new("RGBA", size, colour).save(tmp_path / "x.png")
    code, _, err = run("paint", "--complete", str(tmp_path / "x.png"))
    assert code == 1
    assert message in err
    assert not fake.requests


def test_what_is_no_image_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    code, _, err = run("paint", "--complete", str(tmp_path / "x.png"))
    assert code == 1
    assert "x.png is not a readable image (PNG, JPEG" in err


def test_a_picture_that_was_enlarged_and_cut_between_cells_is_completed(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    Image.new("RGB", (12, 6), "red").save(tmp_path / "x.png")
    fake.script = painted(fake, [3] * 4, prompt=8)
    arguments = ["--complete", str(tmp_path / "x.png"), "--out", str(tmp_path / "y.png")]
    assert run("paint", *arguments, "--scale", "1") == (0, "", "")
    assert pixels(tmp_path / "y.png")[1] == 8 * [RED] + 4 * [BLUE]


def test_a_photograph_is_completed_as_it_is_seen(fake: Fake, run: Run, tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 4), "red")  # upright, it is 4 wide and 3 high
    image.paste((0, 0, 255), (0, 0, 1, 4))
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(tmp_path / "x.png", exif=exif)
    fake.script = painted(fake, [], prompt=12)
    arguments = ["--complete", str(tmp_path / "x.png"), "--out", str(tmp_path / "y.png")]
    assert run("paint", *arguments, "--scale", "1") == (0, "", "")
    assert pixels(tmp_path / "y.png")[1] == 8 * [RED] + 4 * [BLUE]
    sent = Image.open(io.BytesIO(fake.requests[0].prompt.image.png))
    assert sent.size == (4, 3)
    assert not sent.getexif()


def test_grey_of_16_bits_is_sent_as_it_is_seen(fake: Fake, run: Run, tmp_path: Path) -> None:
    values = np.full((3, 4), 128 * 257, np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert run("score", str(tmp_path / "x.png"))[0] == 0
    sent = Image.open(io.BytesIO(fake.requests[0].prompt.image.png))
    assert set(sent.convert("RGBA").get_flattened_data()) == {(128, 128, 128, 255)}


def test_the_largest_scale_depends_on_the_model(fake: Fake, run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "x.png")
    code, _, err = run("paint", "--out", out, "--scale", "100000")
    assert code == 2
    shown = " ".join(err.replace("│", " ").split())
    assert "--scale: 100000 times 4x3 pixels are more than 67,108,864: use at most 2364" in shown
    assert not fake.requests
    fake.script = painted(fake, [1] * 12)
    assert run("paint", "--scale", "100000")[0] == 0  # nothing is saved


@pytest.mark.parametrize("out", ["x.jpg", "nowhere/x.png"])
def test_where_no_png_can_be_written_nothing_is_painted(
    run: Run, fake: Fake, tmp_path: Path, out: str
) -> None:
    assert run("paint", "--out", str(tmp_path / out))[0] == 2
    assert not fake.requests


def test_paint_json(fake: Fake, run: Run, tmp_path: Path) -> None:
    fake.script = painted(fake, [2] * 12)
    out = tmp_path / "x.png"
    code, lines, err = run("paint", "--json", "--out", str(out))
    events = [json.loads(line) for line in lines.splitlines()]
    assert (code, err) == (0, "")
    assert [event["event"] for event in events] == ["accepted", *3 * ["tokens"], "finished"]
    assert events[3]["rgb"] == "ff0000ff0000"
    assert set(pixels(out)[1]) == {RED}


def test_paint_in_a_terminal_shows_pixels_as_they_come(
    fake: Fake, start: Start, terminal: Terminal
) -> None:
    gate = threading.Event()
    first, *rest = painted(fake, [2] * 10 + [3] * 2)
    fake.script = [first, rest[0], gate, *rest[1:]]
    process = start("paint", "--label", "Food & Drink", stdout=terminal.side, stderr=terminal.side)
    terminal.wait_for("5/12 pixels")
    assert "pictures · Food & Drink" in terminal.shown
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m" in terminal.shown
    assert "0;0;255m" not in terminal.shown
    gate.set()
    terminal.wait_for("seed 7")
    assert process.wait(WAIT) == 0
    assert "12/12 pixels" in terminal.shown
    assert "0;0;255m" in terminal.shown


def test_score_of_a_text(fake: Fake, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("ab")
    assert run("score", str(file)) == (0, "1.5000 bits/byte over 2 tokens (prose)\n", "")
    assert run("score", "-", stdin=b"cd")[0] == 0
    assert [request.prompt.text for request in fake.requests] == ["ab", "cd"]
    out = run("score", str(file), "--json")[1]
    assert json.loads(out) == {
        "model": "prose",
        "fingerprint": "f0",
        "bits_per_token": 1.5,
        "bits": [1.0, 2.0],
    }


def test_a_file_to_score_must_be_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # the path on one line, however long it is
    code, _, err = run("score", str(tmp_path))
    assert code == 2
    assert "is not a file" in err


def test_score_of_an_image(fake: Fake, run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "x.bmp")
    code, out, _ = run("score", str(tmp_path / "x.bmp"), "--label", "Food & Drink")
    assert (code, out) == (0, "1.5000 bits/dim over 2 tokens (pictures)\n")
    prompt = fake.requests[0].prompt
    assert prompt.label == "Food & Drink"
    assert Image.open(io.BytesIO(prompt.image.png)).size == (4, 3)


LOOK_LIKE_IMAGES = ["BM25 is a ranking function", "P1 is the first", "P1 1 1 0", "GIF89a is old"]


@pytest.mark.parametrize("text", LOOK_LIKE_IMAGES)
def test_a_text_model_is_given_text(fake: Fake, run: Run, tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.png"
    file.write_text(text)
    code, out, _ = run("score", str(file), "-m", "prose")
    assert (code, out) == (0, "1.5000 bits/byte over 2 tokens (prose)\n")
    fake.models = [text_model()]
    assert run("score", str(file))[0] == 0
    assert [request.prompt.text for request in fake.requests] == [text, text]


@pytest.mark.parametrize("arguments", [("-m", "pictures"), ()])
@pytest.mark.parametrize("text", LOOK_LIKE_IMAGES[:2])
def test_an_image_model_is_given_an_image(
    fake: Fake, run: Run, tmp_path: Path, text: str, arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text)
    fake.models = [text_model(), image_model()] if arguments else [image_model()]
    code, _, err = run("score", str(file), *arguments)
    assert code == 1
    assert f"{file} is not a readable image (PNG, JPEG" in err
    assert not fake.requests


def test_without_a_model_what_can_be_opened_is_an_image(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("BM25 is a ranking function")
    assert run("score", str(file))[1].endswith("(prose)\n")
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    assert run("score", str(file))[1].endswith("(pictures)\n")
    assert run("score", "-", stdin=file.read_bytes())[1].endswith("(pictures)\n")
    file.write_bytes(file.read_bytes()[:45])
    code, _, err = run("score", str(file))
    assert code == 1
    assert f"{file} is not a readable PNG: image file is truncated" in err
    assert f"; and {file} is not UTF-8 text: see byte 0" in err


def test_a_refused_score_is_one_line(fake: Fake, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("ab")
    fake.refusal = Status(grpc.StatusCode.INVALID_ARGUMENT, "too long: 2 tokens, the limit is 1")
    assert run("score", str(file)) == (1, "", "error: too long: 2 tokens, the limit is 1\n")


def test_models_table(fake: Fake, run: Run) -> None:
    code, out, _ = run("models")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "prose" in line]
    for part in ("text", "fixed", "12.3 M", "8,192", "3.0 MB", "1.250 bits/byte"):
        assert part in line
    assert max(map(len, out.splitlines())) <= 80


def test_models_table_leaves_out_what_was_measured_at_many_lengths(fake: Fake, run: Run) -> None:
    (model,) = fake.models = [text_model()]
    model.manifest.metrics.update({"full_nats_512": 2.0, "folded_keys_512_at_10%": 1.0})
    code, out, _ = run("models")
    assert code == 0
    assert "1.250 bits/byte" in out and "and 2 more with --json" in out and "512" not in out
    (found,) = map(json.loads, run("models", "--json")[1].splitlines())
    assert found["metrics"]["full_nats_512"] == 2.0


def test_models_table_shows_what_few_bits_cost(fake: Fake, run: Run) -> None:
    (model,) = fake.models = [text_model()]
    model.manifest.quantisation.CopyFrom(
        bundle_pb2.Quantisation(bits=4, heldout=1.2626, heldout_float16=1.25)
    )
    code, out, _ = run("models")
    assert code == 0
    assert [line.split()[-3:] for line in out.splitlines() if "int4" in line] == [
        ["+0.013", "as", "int4"]
    ]
    assert max(map(len, out.splitlines())) <= 80
    (model,) = map(json.loads, run("models", "--json")[1].splitlines())
    assert (model["weights"], model["weights_loss"]) == ("int4", pytest.approx(0.0126))


def test_models_table_shows_what_small_caches_cost(fake: Fake, run: Run) -> None:
    (model,) = fake.models = [text_model()]
    model.manifest.state.add(name="keys.0", data_type=bundle_pb2.DATA_TYPE_INT8)
    model.manifest.state_quantisation.heldout = 1.2526
    model.manifest.state_quantisation.heldout_float32 = 1.25
    code, out, _ = run("models")
    assert code == 0
    assert [line.split()[-4:] for line in out.splitlines() if "int8" in line] == [
        ["+0.003", "with", "int8", "state"]
    ]
    (model,) = map(json.loads, run("models", "--json")[1].splitlines())
    assert (model["state"], model["state_loss"]) == ("int8", pytest.approx(0.0026))


def test_models_json(fake: Fake, run: Run) -> None:
    fake.models = [text_model(), image_model()]
    code, out, _ = run("models", "--json")
    text, image = (json.loads(line) for line in out.splitlines())
    assert (code, text["name"], text["metrics"]) == (0, "prose", {"bits/byte": 1.25})
    assert (text["weights"], text["weights_loss"]) == ("float16", 0)
    assert (text["state"], text["state_loss"]) == ("float32", 0)
    text_as_it_was, _ = fake.models
    text_as_it_was.manifest.weights = bundle_pb2.DATA_TYPE_BFLOAT16
    assert json.loads(run("models", "--json")[1].splitlines()[0])["weights"] == "bfloat16"
    assert "+" not in run("models")[1]
    assert image["image"] == {"width": 4, "height": 3, "palette": "000000fffffff" + "f00000000ff"}


def test_tokens_are_shown_one_a_line(fake: Fake, run: Run) -> None:
    assert run("tokenize", "aé") == (0, "      0 'a\\xc3'\n      1 '\\xa9'\n", "")
    code, out, _ = run("tokenize", "-", "--json", stdin=b"abc")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": 0, "bytes": "6162"},
        {"id": 1, "bytes": "63"},
    ]
    assert [request.model for request in fake.requests] == ["prose", "prose"]


def test_a_text_longer_than_the_context_is_scored_by_the_model_s_tokens(
    fake: Fake, run: Run, tmp_path: Path
) -> None:
    """Of 2 bytes each, and the last of 1; the fake's bits are 1, 2 of each window, whose first
    token follows from nothing: 6 bits for the 7 bytes of 4 tokens."""
    fake.models[0].manifest.tokenizer.CopyFrom(bundle_pb2.Tokenizer())
    fake.models[0].manifest.context = 3
    file = tmp_path / "x.txt"
    file.write_text("abcdefghi")
    code, out, _ = run("score", str(file))
    assert (code, out) == (0, "0.8571 bits/byte over 4 tokens in 2 windows (prose)\n")
    scored = [r.prompt.tokens.ids for r in fake.requests if isinstance(r, pb.ScoreRequest)]
    assert sorted(map(list, scored)) == [[0, 1, 2], [2, 3, 4]]  # side by side: in any order


def test_a_conversation_goes_on_with_what_was_said(fake: Fake, run: Run) -> None:
    fake.script = [
        fake.accepted(prompt_tokens=2),
        fake.text(2, 2, "An "),
        fake.text(3, 5, "instrument."),
        fake.finished(4, pb.FINISH_REASON_END),
    ]
    code, out, err = run("chat", "--system", "Be brief.", stdin=b"What is it?\n\n And how old?\n")
    assert (code, out, err) == (0, "An instrument.\nAn instrument.\n", "")
    first, second = (
        [(m.role, m.content) for m in request.prompt.messages.messages]
        for request in fake.requests
        if isinstance(request, pb.GenerateRequest)
    )
    assert first == [("system", "Be brief."), ("user", "What is it?")]
    assert second == [*first, ("assistant", "An instrument."), ("user", "And how old?")]
