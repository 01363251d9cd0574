"""Bugs in the bench: turns, ratios, what is called the best, and what fits into memory."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_FOLDER = "tests/loadtest/bench"

MUTANTS = (
    *bugs(
        "loadtest/bench/rounds.py",
        f"{_FOLDER}/test_rounds.py",
        ("a round goes there twice", "[*names, *reversed(names)]", "[*names, *names]"),
        (
            "a ratio of the first windows alone",
            "sum(each[over]) / sum(each[under])",
            "each[over][0] / each[under][0]",
        ),
        (
            "a ratio is upside down",
            "sum(each[over]) / sum(each[under])",
            "sum(each[under]) / sum(each[over])",
        ),
        (
            "the spread is that of the extremes",
            'low, median, high = statistics.quantiles(values, n=4, method="inclusive")',
            "low, median, high = min(values), statistics.median(values), max(values)",
        ),
        ("the slowest is the best", "return min(shares", "return max(shares"),
        (
            "a machine that gets faster does not move",
            "max(each[name]) / min(each[name])",
            "each[name][1] / each[name][0]",
        ),
    ),
    *bugs(
        "loadtest/bench/run.py",
        f"{_FOLDER}/test_run.py",
        (
            "one contestant after the other",
            "for name in turns(names):",
            "for name in sorted(turns(names)):",
        ),
        (
            "a window of a contestant that failed counts",
            "if len(w) == 2}",
            "for w in [[*w, *w]]}",
        ),
        (
            "who fails in a window is there to the end",
            "contenders.pop(name).close()",
            "contenders[name].close()",
        ),
        (
            "the bench itself counts as another program",
            "busy - sum(used.values())",
            "busy",
        ),
        (
            "a peer meets our float32 alone",
            "for name in dict.fromkeys((base, best))",
            "for name in (base,)",
        ),
    ),
    *bugs(
        "loadtest/bench/process.py",
        f"{_FOLDER}/test_process.py",
        (
            "who hangs goes on",
            "            self.close()\n            return Answer(FAILED",
            "            return Answer(FAILED",
        ),
        ("what a contestant started goes on", "            each.kill()", "            pass"),
        (
            "an answer may be half a line",
            "while not line.endswith",
            "while not line and not line.endswith",
        ),
    ),
    *bugs(
        "loadtest/bench/plan.py",
        f"{_FOLDER}/test_plan.py",
        (
            "a group takes what does not fit",
            "if fits(plan, cell, [*group, contestant]):",
            "if group:",
        ),
        (
            "all state is float32",
            "entry = shape.entry_bytes(contestant.state)",
            "entry = shape.entry_bytes()",
        ),
        (
            "a long context is computed",
            "return contestant.made_up == takes_too_long",
            "return not contestant.made_up",
        ),
    ),
    *bugs(
        "loadtest/bench/report.py",
        f"{_FOLDER}/test_report.py",
        (
            "the slowest rival is the best",
            "theirs = min(here,",
            "theirs = max(here,",
        ),
        (
            "float32 beside few bits",
            "alike = {c.name for c in rivals if c.is_float32}",
            "alike = {c.name for c in rivals}",
        ),
        ("a bare graph counts beside its engine", " and not is_check(c, cell)", ""),
        ("a rival that failed is forgotten", "and entry.outcome != OK\n    ]", "and False\n    ]"),
    ),
)
