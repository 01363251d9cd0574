"""Charts and pages: what stands on them, and that they need nothing else."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from concertina.v1 import bundle_pb2
from loadtest.record import Record
from loadtest.reports.chart import Chart, Line, draw, short
from loadtest.reports.curves import run_charts, sweep_charts
from loadtest.reports.files import write_csv
from loadtest.reports.page import page
from loadtest.reports.report import summarise
from loadtest.run import Run, Window
from loadtest.sweep import Axis, Point

MS = 1_000_000
RECORD = Record(
    stream_id="s<1>",
    due_ns=1000 * MS,
    started_ns=1001 * MS,
    accepted_ns=1002 * MS,
    tokens_ns=(1100 * MS, 1150 * MS, 1200 * MS),
    counts=(1, 2, 1),
    ended_ns=1250 * MS,
    prompt_tokens=10,
    failure="",
    retry_after_s=None,
    violation="",
    queue_s=0.02,
    state_bytes=4096,
)
RUN = Run((RECORD, replace(RECORD, due_ns=900 * MS, failure="x")), (0,), False, Window(1000 * MS))
MANIFEST = bundle_pb2.Manifest(
    fold=bundle_pb2.FoldSchedule(span=64),
    state=[
        bundle_pb2.StateTensor(
            kind=bundle_pb2.STATE_KIND_STACK,
            shape=[4, 0, 128],
            data_type=bundle_pb2.DATA_TYPE_FLOAT32,
        )
    ],
)
POINTS = [
    Point(value, replace(summarise(RUN, max_lag_s=1.0), state_bytes=size))
    for value, size in ((1024, 1 << 20), (4096, 2 << 20))
]


def circles(svg: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in found]


def words(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter() if each.text]


def test_points_lie_where_their_axes_say() -> None:
    plain = draw(Chart("t", "x", [Line("a", [(0, 0), (5, 50), (10, 100)])]))
    (left, bottom), (middle_x, middle_y), (right, top) = circles(plain)
    assert left < middle_x < right and bottom > middle_y > top  # up is less
    assert middle_x == pytest.approx((left + right) / 2)
    assert middle_y == pytest.approx((top + bottom) / 2)
    points = [(1024, 1), (4096, 10), (16384, 100)]
    logs = draw(Chart("t", "x", [Line("a", points)], log_x=True, log_y=True, binary_x=True))
    (left, bottom), (middle_x, middle_y), (right, top) = circles(logs)
    assert middle_x == pytest.approx((left + right) / 2, abs=0.1)
    assert middle_y == pytest.approx((top + bottom) / 2, abs=0.1)
    assert {"1k", "4k", "16k", "100"} <= set(words(logs))


def test_a_chart_names_its_lines_and_escapes_them() -> None:
    svg = draw(Chart("<t>", "x&y", [Line("<a>", [(1, 2)]), Line("b", [(1, 3)], dashed=True)]))
    assert {"<t>", "x&y", "<a>", "b"} <= set(words(svg))
    assert svg.count("stroke-dasharray") == 2  # the line and its name
    assert len(circles(svg)) == 1  # what was computed has no points


@pytest.mark.parametrize("points", [[], [(1.0, 0.0)], [(1.0, float("nan"))]])
def test_what_cannot_be_drawn_is_left_out(points: list[tuple[float, float]]) -> None:
    assert draw(Chart("t", "x", [Line("a", points)], log_y=True)) == ""


@pytest.mark.parametrize("value", [0.0, 1e-3, 7.0, 1e9])
def test_one_point_is_drawn_whatever_it_is(value: float) -> None:
    for log in (False, True):
        svg = draw(Chart("t", "x", [Line("a", [(3.0, value)])], log_x=log, log_y=log))
        assert (len(circles(svg)) if svg else 0) == (0 if log and value == 0 else 1)


def test_numbers_are_short() -> None:
    assert [short(each, True) for each in (512, 65536, 3 << 20)] == ["512", "64k", "3M"]
    assert [short(each, False) for each in (0.02, 1500, 2e9)] == ["0.02", "1.5k", "2G"]


def test_state_and_speed_against_context_are_drawn_with_what_full_attention_would_hold() -> None:
    charts = sweep_charts(Axis.CONTEXT, POINTS, MANIFEST)
    measured, most, every = charts[0].lines
    assert list(measured.points) == [(1024, 1 << 20), (4096, 2 << 20)]
    assert list(every.points) == [(1024, 2 << 20), (4096, 8 << 20)] and every.dashed
    # A fold leaves one entry of 64: just before the last one there are 15 or 63, and 64 more.
    assert list(most.points) == [(1024, 2048 * (15 + 64)), (4096, 2048 * (63 + 64))]
    (speed,) = charts[1].lines
    assert [round(rate, 3) for _, rate in speed.points] == [30.0, 30.0]  # 3 tokens in 100 ms
    assert len(sweep_charts(Axis.CONTEXT, POINTS, None)[0].lines) == 1


def test_a_run_is_drawn_over_time_and_by_shares() -> None:
    shares, rates, streams = run_charts(RUN)
    first = shares.lines[0].points
    assert first[0] == (100.0, 0.0) and first[-1] == (100.0, 100.0)  # the ramp has no latency
    assert sum(rate for _, rate in rates.lines[0].points) * 0.35 == pytest.approx(8)
    assert max(count for _, count in streams.lines[0].points) == 2
    assert run_charts(Run((), (), False, Window(0)))[0].lines[0].points == []


class _Outside(HTMLParser):
    """Collects what a page would fetch or run, and checks that its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "onload", "onclick")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("axis", [None, Axis.CONTEXT, Axis.RATE])
def test_a_page_needs_nothing_else_and_escapes_what_servers_say(axis: Axis | None) -> None:
    evil = "<script>alert(1)</script>"
    charts = run_charts(RUN) if axis is None else sweep_charts(axis, POINTS, MANIFEST)
    text = page(
        evil,
        charts,
        axis,
        POINTS if axis else POINTS[:1],
        knee=f"knee {evil}",
        warnings=[f"VOID {evil}"],
        told={"model": evil, "number": 7},
    )
    outside = _Outside()
    outside.feed(text)
    assert not outside.found and not outside.open
    assert text.count("<svg") == len(charts) and "http" not in text.replace("http://www.w3.org", "")
    data = text[text.index("<pre>") + 5 : text.index("</pre>")]
    assert json.loads(data.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')) == {
        "model": evil,
        "number": 7,
    }
    assert ("4k" in text) is (axis is not None) and ("p99.9" in text) is (axis is None)


def test_rows_are_requests_in_the_order_in_which_they_were_due(tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    write_csv(file, Axis.CONTEXT, [(1024, RUN)])
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["due_s"] for row in rows] == ["-0.100000", "0.000000"]  # the ramp lies before
    row = rows[1]
    assert (row["context"], row["stream_id"], row["output_tokens"]) == ("1024", "s<1>", "4")
    assert (row["late_s"], row["time_to_first_token_s"]) == ("0.001000", "0.100000")
    assert (row["end_to_end_s"], row["queue_s"], row["state_bytes"]) == (
        "0.250000",
        "0.020000",
        "4096",
    )
    assert rows[0]["failure"] == "x"
    write_csv(file, None, [(0, RUN)])
    assert file.read_text().startswith("stream_id,due_s,")
