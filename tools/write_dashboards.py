"""Writes the Grafana dashboards of the chart, helm/concertina/dashboards, from the panels here.

python -m tools.write_dashboards           writes
python -m tools.write_dashboards --check   fails if a file is stale
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parents[1] / "helm" / "concertina" / "dashboards"
WINDOW: Final = "$__rate_interval"
MODEL: Final = '{model_name=~"$model"}'
_WIDTH: Final = 8
_HEIGHT: Final = 8
_COLUMNS: Final = 24
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """Lines over time. unit: as Grafana calls it. lines: an expression and the legend of each."""

    title: str
    unit: str
    lines: Sequence[tuple[str, str]]


def _rate(counter: str, by: str = "") -> str:
    return (
        f"sum by ({by})(rate(concertina_{counter}{MODEL}[{WINDOW}]))"
        if by
        else (f"sum(rate(concertina_{counter}{MODEL}[{WINDOW}]))")
    )


def _gauge(name: str, by: str = "") -> str:
    total = f"concertina_{name}{MODEL}"
    return f"sum by ({by})({total})" if by else f"sum({total})"


def _quantiles(histogram: str, *ranks: float, by: str = "") -> list[tuple[str, str]]:
    """The quantiles of a histogram, each with its rank as the legend."""
    groups = f"{by}, le" if by else "le"
    total = f"sum by ({groups})(rate(concertina_{histogram}_bucket{MODEL}[{WINDOW}]))"
    label = f"{{{{{by}}}}} " if by else ""
    return [(f"histogram_quantile({r}, {total})", f"{label}p{100 * r:g}") for r in ranks]


def _mean(histogram: str) -> str:
    return f"{_rate(f'{histogram}_sum')} / {_rate(f'{histogram}_count')}"


OVERVIEW: Final = (
    Panel(
        "Streams",
        "short",
        [(_gauge(f"streams_{phase}"), phase) for phase in ("running", "waiting", "paused")],
    ),
    Panel(
        "Tokens/s",
        "short",
        [
            (_rate("generation_tokens_total"), "generated"),
            (_rate("prompt_tokens_total"), "of prompts"),
        ],
    ),
    Panel(
        "State, of its limit", "percentunit", [(f"max(concertina_state_usage_ratio{MODEL})", "")]
    ),
    Panel("Time to first token", "s", _quantiles("time_to_first_token_seconds", 0.5, 0.9, 0.99)),
    Panel(
        "Time per output token",
        "s",
        _quantiles("stream_time_per_output_token_seconds", 0.5, 0.9, 0.99),
    ),
    Panel("Time in the queue", "s", _quantiles("stream_queue_time_seconds", 0.5, 0.9, 0.99)),
    Panel("Whole streams", "s", _quantiles("e2e_stream_latency_seconds", 0.5, 0.9, 0.99)),
    Panel(
        "Streams that ended/s",
        "short",
        [(_rate("streams_finished_total", "finished_reason"), "{{finished_reason}}")],
    ),
    Panel("Refused/s", "short", [(_rate("requests_refused_total", "reason"), "{{reason}}")]),
    Panel(
        "Calls/s, by status",
        "short",
        [(f"sum by (status)(rate(concertina_calls_total[{WINDOW}]))", "{{status}}")],
    ),
    Panel(
        "Calls/s, by method",
        "short",
        [(f"sum by (method)(rate(concertina_calls_total[{WINDOW}]))", "{{method}}")],
    ),
    Panel("Engines", "short", [(_gauge("model_info", "model_name, version"), "{{model_name}}")]),
)
MEMORY: Final = (
    Panel("State of running streams", "bytes", [(_gauge("state_bytes", "kind"), "{{kind}}")]),
    Panel(
        "State: what may be needed",
        "bytes",
        [
            (_gauge("state_admitted_bytes"), "by the streams here"),
            (_gauge("state_limit_bytes"), "limit"),
            (_gauge("state_buffer_bytes"), "reserved for slots"),
        ],
    ),
    Panel(
        "State of a running stream, on average",
        "bytes",
        [(f"{_gauge('state_bytes')} / clamp_min({_gauge('streams_running')}, 1)", "")],
    ),
    Panel(
        "Prefix cache", "bytes", [(_gauge("prefix_cache_bytes", "model_name"), "{{model_name}}")]
    ),
    Panel(
        "Tokens found in the prefix cache",
        "percentunit",
        [(f"{_rate('prefix_cache_hits_total')} / {_rate('prefix_cache_queries_total')}", "")],
    ),
    Panel(
        "Resident memory", "bytes", [("sum(concertina_process_resident_memory_bytes)", "engines")]
    ),
    Panel(
        "Snapshots",
        "Bps",
        [(f"sum(rate(concertina_snapshot_bytes_total[{WINDOW}]))", "stored")],
    ),
    Panel(
        "Time of a snapshot",
        "s",
        [
            (
                "histogram_quantile(0.99, sum by (le)"
                f"(rate(concertina_snapshot_seconds_bucket[{WINDOW}])))",
                "p99",
            )
        ],
    ),
    Panel(
        "The store",
        "short",
        [
            ("min(concertina_store_up)", "works"),
            (f"sum(increase(concertina_snapshot_failures_total[{WINDOW}]))", "failures"),
        ],
    ),
)
STREAMS: Final = (
    Panel(
        "Streams in a step",
        "short",
        [(_mean("step_batch_size"), "streams"), (_mean("step_tokens"), "tokens drawn")],
    ),
    Panel("Time of a pass", "s", _quantiles("step_seconds", 0.5, 0.99, by="phase")),
    Panel("Between two tokens", "s", _quantiles("inter_token_latency_seconds", 0.5, 0.9, 0.99)),
    Panel("Folds/s", "short", [(_rate("folds_total"), "")]),
    Panel("Time of a fold", "s", _quantiles("fold_seconds", 0.5, 0.99)),
    Panel(
        "Preempted and resumed/s",
        "short",
        [
            (_rate("streams_preempted_total"), "preempted"),
            (_rate("streams_resumed_total", "source"), "resumed from {{source}}"),
        ],
    ),
    Panel(
        "Time of a stream, on average",
        "s",
        [
            (_mean("stream_queue_time_seconds"), "queue"),
            (_mean("stream_prefill_time_seconds"), "prefill"),
            (_mean("stream_decode_time_seconds"), "decode"),
        ],
    ),
    Panel("Tokens of a prompt", "short", _quantiles("stream_prompt_tokens", 0.5, 0.9, 0.99)),
    Panel("Tokens generated", "short", _quantiles("stream_generation_tokens", 0.5, 0.9, 0.99)),
    Panel("Draft tokens/s", "short", [(_rate("draft_tokens_total", "outcome"), "{{outcome}}")]),
)
DASHBOARDS: Final = {
    "overview": ("Concertina: overview", OVERVIEW),
    "memory": ("Concertina: memory", MEMORY),
    "streams": ("Concertina: streams", STREAMS),
}


def written() -> Iterator[tuple[Path, str]]:
    """Each file, and what belongs into it."""
    for name, (title, panels) in DASHBOARDS.items():
        text = json.dumps(_dashboard(name, title, panels), indent=2, ensure_ascii=False)
        yield FOLDER / f"{name}.json", text + "\n"


def _dashboard(name: str, title: str, panels: Sequence[Panel]) -> dict[str, Any]:
    return {
        "uid": f"concertina-{name}",
        "title": title,
        "tags": ["concertina"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [_panel(index, panel) for index, panel in enumerate(panels)],
    }


def _variables() -> list[dict[str, Any]]:
    query = "label_values(concertina_model_info, model_name)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": "models"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    across = _COLUMNS // _WIDTH
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {
            "x": index % across * _WIDTH,
            "y": index // across * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend or panel.title,
            }
            for number, (expression, legend) in enumerate(panel.lines)
        ],
    }


def main(check: bool) -> int:
    """The exit status."""
    status = 0
    FOLDER.mkdir(exist_ok=True)
    for path, text in written():
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(f"{path} is stale: run make dashboards", file=sys.stderr)
            status = 1
        elif not check:
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
