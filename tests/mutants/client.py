"""Bugs in what people meet: client, command line, addresses, the limits of a container."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, bugs

_ARGUMENTS = "tests/concertina/client/test_arguments.py"

MUTANTS: tuple[Mutant, ...] = (
    *bugs(
        "protos/concertina/client/times.py",
        _ARGUMENTS,
        (
            "an endless timeout has passed",
            "return None if seconds > _LONGEST_TIMEOUT_S else seconds",
            "return seconds",
        ),
        ("a timeout of nothing is one", "if not seconds > 0:", "if seconds < 0:"),
    ),
    *bugs(
        "protos/concertina/client/parameters.py",
        _ARGUMENTS,
        ("what a call does not have is ignored", "if name not in known:", "if False:"),
    ),
    *bugs(
        "protos/concertina/client/fields.py",
        _ARGUMENTS,
        (
            "the whole list is named for one item",
            'return f"{name}[{shown(key)}]", each',
            "return name, value",
            "test_the_item_that_is_wrong_is_named",
        ),
    ),
    *bugs(
        "protos/concertina/client/pictures.py",
        "tests/concertina/client/test_pictures.py",
        ("a picture file is taken for raw pixels", "    if name:\n", "    if False:\n"),
        (
            "three bytes make a JPEG",
            'return "JPEG" if _MARKER.match(data, after) else ""',
            'return "JPEG"',
        ),
    ),
    *bugs(
        "protos/concertina/client/statuses.py",
        _ARGUMENTS,
        (
            "a size limit of the transport is a full server",
            'return code.name == "RESOURCE_EXHAUSTED" and any(',
            "return False and any(",
        ),
    ),
    *bugs(
        "protos/concertina/client/channel.py",
        "tests/concertina/client/test_channel.py",
        (
            "what is here is called by a proxy",
            'return (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if direct else _OPTIONS',
            "return _OPTIONS",
        ),
    ),
    *bugs(
        "protos/concertina/shown.py",
        "tests/concertina/test_shown.py",
        ("a message is as long as what was asked", "if len(text) <= most", "if True"),
    ),
    *bugs(
        "protos/concertina/cli/output.py",
        "tests/concertina/cli/test_output.py",
        ("a table is cut where nothing limits it", "if not console.is_terminal:", "if False:"),
        (
            "what cannot be shown ends a stream",
            'errors="replace"',
            'errors="strict"',
            "test_what_an_output_cannot_show_is_replaced",
        ),
        ("a name is markup", "markup=False, emoji=False, highlight", "highlight"),
    ),
    *bugs(
        "protos/concertina/cli/windows.py",
        "tests/concertina/cli/test_windows.py",
        (
            "windows are asked for one by one",
            "len(running) < most:",
            "not running:",
            "test_several_windows_are_asked_for_and_fewer_where_there_is_no_room",
        ),
        (
            "scores are in the order in which they came",
            "[scores[at] for at in range(len(windows))]",
            "list(scores.values())",
        ),
        (
            "a quota ends a score of windows",
            "if len(refused) == len(done) and not running:",
            "if True:",
        ),
        (
            "the first token of a window is not predicted",
            "min(first + stride, counted - shared)",
            "min(first + stride, counted)",
            "test_every_token_but_the_first_is_predicted_from_another",
        ),
    ),
    *bugs(
        "protos/concertina/cli/score.py",
        "tests/concertina/cli/test_windows.py",
        (
            "a space that the tokenizer adds is a byte of the text",
            'tokens.pieces[0].startswith(b" ") and not content.startswith(b" ")',
            "False",
            "test_tokens_and_not_bytes_fill_the_context",
        ),
    ),
    *bugs(
        "protos/concertina/machine.py",
        "tests/concertina/test_machine.py",
        (
            "only the innermost cgroup counts",
            "for each in (folder, *folder.parents) if",
            "for each in (folder,) if",
        ),
    ),
    *bugs(
        "server/hosts/haproxy.py",
        "tests/server/hosts/test_haproxy.py",
        (
            "IPv6 listeners are lost at a reload",
            '(" v6only" if',
            '("" if',
            "test_addresses_as_haproxy_takes_them",
        ),
        (
            "a handshake takes a day",
            "timeout client {handshake_s:g}s",
            "timeout client {idle_s}s",
            "test_a_handshake_has_an_end",
        ),
        (
            "statistics are for everyone",
            "\\\\1 127.0.0.1:/'",
            "\\\\1 *:/'",
            "test_what_ray_opens_to_everyone_is_on_loopback",
        ),
    ),
    *bugs(
        "server/hosts/scratch.py",
        "tests/server/hosts/test_scratch.py",
        (
            "the folder of a running server is removed",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_UN",
        ),
    ),
    *bugs(
        "server/api/context.py",
        "tests/concertina/client/test_refusals.py",
        (
            "programs learn nothing of a refusal",
            "    context.set_trailing_metadata(refusal_metadata(error))\n",
            "",
        ),
    ),
)
