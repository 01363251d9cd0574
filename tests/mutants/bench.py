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
            "test_one_that_hangs_is_ended",
        ),
        (
            "what a contestant started goes on",
            "            each.kill()",
            "            pass",
            "test_what_it_started_ends_with_it",
        ),
        (
            "an answer may be half a line",
            "while not line.endswith",
            "while not line and not line.endswith",
            "test_a_contestant_answers_and_stays_open",
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
    *bugs(
        "loadtest/bench/adapters/sources.py",
        f"{_FOLDER}/test_sources.py",
        (
            "peers get a model with other positions",
            'if make_rope({"rope_theta": theta}, head_dim) == rope:',
            "if theta:",
            "test_what_is_not_written_is_named_with_the_remedy",
        ),
        (
            "peers get gate and up the other way round",
            'parts = file.get_tensor(f"model.{name}").split(rows)',
            'parts = file.get_tensor(f"model.{name}").split(rows)[:: 1 if len(rows) != 2 else -1]',
            "test_a_run_becomes_the_folder_that_it_was_made_of",
        ),
    ),
    *bugs(
        "loadtest/bench/contestants.py",
        f"{_FOLDER}/test_sources.py",
        (
            "llama.cpp runs a model of its own, with random weights",
            "            return replace(peer, source=source.gguf)\n",
            "            return peer\n",
            "test_llama_runs_the_very_file_and_what_it_makes_of_it",
        ),
    ),
)
