"""Bugs that let an output be something else than its grammar says."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_ENGINE = "tests/server/engine/test_engine_grammar.py"
_STATE = "tests/server/engine/sampling/test_grammar_state.py"

MUTANTS = (
    *bugs(
        "server/engine/sampling/grammar_state.py",
        _STATE,
        (
            "an output ends before its grammar may end",
            "allowed[self._end_ids] = may_end",
            "allowed[self._end_ids] = True",
            "test_an_end_is_allowed_where_the_grammar_may_end",
        ),
        (
            "the first token loses a space that the grammar wants",
            "allowed[self._text.altered_first] = False",
            "pass",
            "test_a_token_that_means_another_text_at_the_beginning_is_not_drawn_there",
        ),
    ),
    *bugs(
        "server/engine/sampling/sampler.py",
        _STATE,
        (
            "a large vocabulary has no grammar",
            "            ours[~grammar.allowed()] = -np.inf\n",
            "            grammar.allowed()\n",
            "test_only_what_is_allowed_is_drawn",
        ),
    ),
    *bugs(
        "server/engine/lifecycle.py",
        _ENGINE,
        (
            "a resumed stream begins its grammar anew",
            "            stream.grammar.push(stream.history)\n",
            "            pass\n",
            "test_it_goes_on_from_its_tokens",
        ),
    ),
    *bugs(
        "server/snapshots/request_codec.py",
        "tests/server/api/test_grammar.py",
        (
            "a snapshot forgets the grammar",
            "        grammar=grammar,\n",
            "        grammar=None,\n",
            "test_a_snapshot_keeps_it",
        ),
    ),
    *bugs(
        "server/bundles/grammars.py",
        "tests/server/bundles/test_grammars.py",
        (
            "a schema turns off what it asks for",
            '    "lenient": False,\n',
            "",
            "test_an_invalid_one_is_refused_with_field_and_reason",
        ),
    ),
)
