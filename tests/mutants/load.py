"""Bugs in the load tester: clocks that hide a wait, and rates that are none."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_REPORT = "tests/loadtest/reports/test_report.py"

MUTANTS = (
    *bugs(
        "loadtest/open_loop.py",
        "tests/loadtest/test_precision.py",
        (
            "the clock of a request starts when it is sent",
            "task = asyncio.create_task(work(send, request, due_ns))",
            "task = asyncio.create_task(work(send, request, perf_counter_ns()))",
            "test_a_stall_of_the_generator_is_in_the_latencies_of_what_was_due",
        ),
    ),
    *bugs(
        "loadtest/reports/report.py",
        _REPORT,
        (
            "requests of the ramp have latencies",
            "if record.due_ns >= run.window.opens_ns]",
            "if record.due_ns >= 0]",
            "test_a_window_has_the_rates_of_its_time_and_the_latencies_of_what_was_due_in_it",
        ),
        (
            "tokens after the end of the window count",
            "if start_ns <= when_ns <= end_ns\n",
            "if start_ns <= when_ns\n",
            "test_a_window_has_the_rates_of_its_time_and_the_latencies_of_what_was_due_in_it",
        ),
        (
            "a generator that sends late is not void",
            "for each in (lag, late))",
            "for each in (lag,))",
            "test_a_late_call_is_part_of_every_latency_and_voids_the_run",
        ),
    ),
    *bugs(
        "loadtest/reports/objectives.py",
        _REPORT,
        (
            "a gap counts by the mean of its stream",
            "gaps[math.ceil(_GAPS * len(gaps)) - 1]",
            "sum(gaps) / len(gaps)",
            "test_one_gap_in_a_hundred_may_be_longer",
        ),
    ),
    *bugs(
        "loadtest/sweep.py",
        "tests/loadtest/test_sweep.py",
        (
            "every point asks the same prompts, which a server remembers",
            "seed=plan.seed + _NEXT_SEED * index",
            "seed=plan.seed",
            "test_a_sweep_runs_to_the_knee_and_not_beyond",
        ),
    ),
    *bugs(
        "server/ops/engine_metrics.py",
        "tests/server/ops/test_metrics.py",
        (
            "the first token counts as one that follows",
            "decode_s / (lived.generated - 1)",
            "decode_s / lived.generated",
            "test_a_stream_counts_for_what_happened_here",
        ),
    ),
    *bugs(
        "server/api/context.py",
        "tests/server/api/test_calls.py",
        (
            "a refused call counts as a good one",
            "        self.status = code.name\n",
            "",
            "test_calls_count_by_how_they_end",
        ),
    ),
)
