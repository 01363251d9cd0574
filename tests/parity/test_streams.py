"""One stream on the served path equals the parallel float64 forward at every position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from concertina.v1 import bundle_pb2 as pb
from tests.parity.served import Served, assert_parity, draw_tokens, expected_logits

SPAN, LENGTH = 8, 26


@pytest.mark.parametrize("limit", [1, 2, 3, 5, SPAN - 1, SPAN, None])
def test_prefill_in_any_chunks(bundle: Path, limit: int | None) -> None:
    tokens = draw_tokens(bundle, 1)
    served = Served(bundle)
    served.start_prefill()
    assert_parity(served.prefill(tokens[0], limit), expected_logits(bundle, tokens)[0])


def test_prefill_in_random_chunks(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        tokens = draw_tokens(bundle, 1, LENGTH, seed)
        expected = expected_logits(bundle, tokens)[0]
        served = Served(bundle)
        served.start_prefill()
        done = 0
        while done < LENGTH:
            part = tokens[0, done : done + int(rng.integers(1, SPAN + 3))]
            assert_parity(served.prefill(part), expected[done : done + len(part)])
            done += len(part)


def test_a_stream_that_begins_in_the_batch(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1)
    served = Served(bundle)
    served.cache.begin()
    assert_parity(served.decode(tokens), expected_logits(bundle, tokens))


def test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1, LENGTH)
    expected = expected_logits(bundle, tokens)
    served = Served(bundle)
    for prefix in range(1, LENGTH):
        served.start_prefill()
        assert_parity(served.prefill(tokens[0, :prefix]), expected[0, :prefix])
        row = served.join()
        assert_parity(served.decode(tokens[:, prefix:]), expected[:, prefix:])
        assert served.cache.leave(row) is None


def test_prefill_and_steps_leave_the_same_state(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1, LENGTH)
    slow = Served(bundle)
    slow.cache.begin()
    for prefix in range(1, LENGTH):
        slow.step(tokens[:, prefix - 1])
        fast = Served(bundle)
        fast.start_prefill()
        fast.prefill(tokens[0, :prefix])
        at_once = fast.state(fast.join())
        for name, values in slow.state(0).items():
            assert values.shape == at_once[name].shape
            np.testing.assert_allclose(values, at_once[name], rtol=0, atol=2e-5)


def test_chunks_without_logits_leave_the_same_state(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1, LENGTH)
    states = []
    for logits in (True, False):
        served = Served(bundle)
        served.start_prefill()
        while served.cache.prefill_pushed < LENGTH:
            part = tokens[0, served.cache.prefill_pushed : LENGTH][: served.cache.block_room]
            out = served.cache.prefill(part, logits)
            assert len(out) == (len(part) if logits else 0)
        states.append(served.state(served.join()))
    for name, values in states[0].items():
        assert np.array_equal(values, states[1][name])


@pytest.mark.parametrize("value", [1e4, np.nan])
def test_unused_entries_are_never_read(bundle: Path, value: float) -> None:
    tokens = draw_tokens(bundle, 1, LENGTH)
    results = []
    for poison in (0.0, value):
        served = Served(bundle, poison=poison)
        served.start_prefill()
        first = served.prefill(tokens[0, : SPAN + 3], 5)
        served.join()
        results.append(np.concatenate((first, served.decode(tokens[:, SPAN + 3 :])[0])))
    assert np.isfinite(results[0]).all()
    assert np.array_equal(*results)


def test_reading_poison_changes_the_logits(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1, 6)
    served = Served(bundle)
    served.start_prefill()
    served.prefill(tokens[0, :5])
    row = served.join()
    buffer = served.runtime.rows.buffers["values.1"][row]
    kinds = {tensor.name: tensor.kind for tensor in served.bundle.manifest.state}
    if kinds["values.1"] == pb.STATE_KIND_STACK:
        buffer[:, served.bundle.entries(5) - 1] = served.value
    else:
        buffer[4] = served.value
    assert np.isnan(served.step(tokens[0, 5:])).all()


def test_a_parked_stream_continues_to_the_bit(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 2, LENGTH)
    for parked_at in (1, 5, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN + 3):
        tokens[1, :parked_at] = tokens[0, :parked_at]
        served = Served(bundle)
        served.start_prefill()
        served.prefill(tokens[0, :parked_at])
        saved = served.cache.save(served.join())
        went_on = served.decode(tokens[:1, parked_at:])
        for row, fork in enumerate(("the same", "another", "the same")):
            other = Served(bundle)
            other.cache.restore(saved)
            other.poison()
            future = tokens[row % 2 : row % 2 + 1]
            came_back = other.decode(future[:, parked_at:])
            assert_parity(came_back, expected_logits(bundle, future)[:, parked_at:])
            assert np.array_equal(came_back, went_on) == (fork == "the same")


def test_a_saved_state_holds_no_more_than_its_entries(bundle: Path) -> None:
    tokens = draw_tokens(bundle, 1, LENGTH)
    served = Served(bundle)
    served.cache.begin()
    for pushed, token in enumerate(tokens[0], start=1):
        served.step(np.array([token]))
        saved = served.cache.save(0)
        assert saved.pushed == pushed
        sizes = served.bundle.state_bytes(pushed)
        assert sum(sizes.values()) == sum(values.nbytes for values in saved.state.values())
        assert sizes == served.cache.state_bytes()
