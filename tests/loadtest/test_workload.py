from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from loadtest.workload import Lengths, Request, draw_requests, parse_lengths


def draw(seed: int, count: int = 200, prompts: tuple[str, ...] = (), **start: Any) -> list[Request]:
    requests = draw_requests(
        seed,
        vocabulary=10,
        prompt_lengths=Lengths(0, 3),
        output_lengths=Lengths(4, 6),
        prompts=prompts,
        **start,
    )
    return list(islice(requests, count))


@pytest.mark.parametrize(("text", "lengths"), [("256", (256, 256)), ("128-512", (128, 512))])
def test_lengths_are_a_number_or_a_range(text: str, lengths: tuple[int, int]) -> None:
    assert parse_lengths(text, minimum=1) == Lengths(*lengths)
    assert str(parse_lengths(text, minimum=1)) == text


@pytest.mark.parametrize("text", ["", "many", "1-", "-5", "512-128", "0", "0-3", "1-2-3"])
def test_other_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        parse_lengths(text, minimum=1)


def test_the_seed_decides_everything() -> None:
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_lengths_and_ids_fill_their_ranges_and_stay_inside() -> None:
    requests = draw(1)
    assert {request.output_tokens for request in requests} == {4, 5, 6}
    # A prompt of no tokens is no prompt.
    assert {len(request.prompt or ()) for request in requests} == {0, 1, 2, 3}
    assert all(request.prompt is None or request.prompt for request in requests)
    assert {token for request in requests for token in request.prompt or ()} == set(range(10))
    assert len({request.seed for request in requests}) == len(requests)


def test_given_prompts_replace_random_ones() -> None:
    assert {request.prompt for request in draw(1, prompts=("a", "b"))} == {"a", "b"}


def test_the_server_counts_as_many_tokens_as_are_asked_for() -> None:
    """It does not count what others follow from: a begin token, or the first id without one."""
    for request in draw(1, begin=3):
        ids = request.prompt or ()
        assert request.first_counts == (ids[:1] != (3,))
    for request in draw(1, has_begin=False):
        assert request.prompt and not request.first_counts
    assert {len(request.prompt or ()) for request in draw(1, has_begin=False)} == {1, 2, 3, 4}
