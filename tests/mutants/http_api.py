"""Bugs that let the HTTP API answer something else than was asked, or answer somebody else."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_STREAMS = "tests/server/http/test_streams.py"
_STRUCTURE = "tests/server/http/test_structure.py"

MUTANTS = (
    *bugs(
        "server/http/reading/structure.py",
        _STRUCTURE,
        (
            "of two structures one is forgotten",
            "    if len(asked) > 1:\n",
            "    if len(asked) > 3:\n",
            "test_two_at_a_time_are_refused",
        ),
        (
            "a structure of a kind that nobody knows is ignored",
            "        if name not in _OPTIONS and name not in _KINDS:\n",
            "        if name == _OPTIONS:\n",
            "test_what_is_not_understood_is_named",
        ),
    ),
    *bugs(
        "server/http/reading/parameters.py",
        _STRUCTURE,
        (
            "a structure is read and not asked for",
            "        parameters.update(asked.parameters)\n",
            "        pass\n",
            "test_json_for_a_schema",
        ),
    ),
    *bugs(
        "server/http/writing/sse.py",
        _STREAMS,
        (
            "a stream that failed ends as a good one does",
            "await self._fail(send, error_of(self._error))",
            'await send({"type": "http.response.body", "body": b"", "more_body": False})',
            "test_a_stream_that_fails_is_cut",
        ),
    ),
    *bugs(
        "server/http/runs.py",
        _STREAMS,
        (
            "a stream goes on without its reader",
            "            stream.cancel()\n",
            "            stream.detach()\n",
            "test_whoever_leaves_ends_the_stream",
        ),
    ),
    *bugs(
        "server/http/runs.py",
        "tests/server/http/test_completions.py",
        (
            "texts of several prompts are mixed",
            "    return Piece(first + event.output, event.text, entries, event.rgb)\n",
            "    return Piece(event.output, event.text, entries, event.rgb)\n",
            "test_many_prompts_with_several_outputs_each",
        ),
    ),
    *bugs(
        "server/http/upstream.py",
        "tests/server/http/test_refusals.py",
        (
            "a caller speaks with the key of another",
            "[each for each in self._connections if each.key == key]",
            "[*self._connections]",
            "test_keys_are_passed_on",
        ),
    ),
    *bugs(
        "server/http/process.py",
        "tests/server/http/test_certificates.py",
        (
            "callers of a former authority are still served",
            "            config.ssl.sni_callback = _moving_to(renewed)\n",
            "            config.ssl.load_cert_chain(tls.cert, tls.key)\n"
            "            config.ssl.load_verify_locations(tls.client_ca)\n",
            "test_renewed_certificates_are_used_without_a_restart",
        ),
    ),
)
