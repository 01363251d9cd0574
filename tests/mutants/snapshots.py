"""Bugs in what stores streams and reads them back."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, bugs

_RESTORE = "tests/parity/test_restore.py"
_LOG = "tests/server/snapshots/test_log.py"

MUTANTS = (
    *bugs(
        "server/snapshots/codec.py",
        _RESTORE,
        (
            "recurrent state lost in a snapshot",
            "state[tensor.name] = values.reshape(shape)",
            "state[tensor.name] = values.reshape(shape) * (tensor.kind.value != 2)",
            "test_streams_continue_to_the_bit_from_every_position_of_two_blocks",
        ),
        (
            "a snapshot one token ahead of its state",
            "OutputSnapshot(output=output, pushed=saved.pushed)",
            "OutputSnapshot(output=output, pushed=saved.pushed + (saved.pushed == 3))",
            "test_streams_continue_to_the_bit_from_every_position_of_two_blocks",
        ),
    ),
    Mutant(
        "a snapshot opens for anybody",
        "server/snapshots/sealer.py",
        "        if header.owner != owner:",
        "        if not header.owner and owner:",
        "tests/server/snapshots/test_sealer.py",
    ),
    *bugs(
        "server/snapshots/writer.py",
        "tests/server/snapshots/test_claims.py",
        (
            "a stream that was lost is written on",
            "            self._lose(job.lease, appended.claim)",
            "            pass",
            "test_a_late_write_of_an_older_owner_is_not_read",
        ),
        (
            "a deleted stream leaves no tombstone",
            "if TOMBSTONE not in names:",
            "if TOMBSTONE in names:",
            "test_deleted_stays_deleted",
        ),
        (
            "what waits of an older epoch is written after a claim",
            "self._waiting.withdraw(owner, stream_id, below=lease.epoch)",
            "pass",
            "test_what_waits_of_an_earlier_epoch_is_not_written",
        ),
    ),
    *bugs(
        "server/snapshots/writer.py",
        "tests/server/snapshots/test_outages.py",
        (
            "a snapshot that could not be written is dropped",
            "                again = True",
            "                again = False",
            "test_a_full_store_is_told_once_and_caught_up_with",
        ),
        (
            "a stream that began in an outage is claimed twice",
            "self._late.pop((owner, stream_id), None)\n        with self._changed:",
            "with self._changed:",
            "test_a_stream_that_began_in_an_outage_is_claimed_later",
        ),
        (
            "a snapshot of a deleted stream is written later",
            "            self._waiting.withdraw(owner, stream_id)  # one",
            "            # one",
            "test_what_fails_while_its_stream_is_deleted_is_not_written_later",
        ),
        (
            "a stream that began in an outage is never claimed",
            "self._late[lease.owner, lease.stream_id] = bundle, lease",
            "pass",
            "test_a_stream_that_began_in_an_outage_is_claimed_later",
        ),
    ),
    *bugs(
        "server/snapshots/claims.py",
        "tests/server/snapshots/test_claims.py",
        (
            "who claims does not look whether the stream is deleted",
            "if claim is not None and claim.is_above(lease.epoch):",
            "if False:",
            "test_deleted_stays_deleted",
        ),
        (
            "a claim that another server made is taken back",
            "if name in found and _digest(found[name]) == self._doubtful[claimed]:",
            "if name in found:",
            "test_a_claim_whose_answer_got_lost_is_taken_back",
        ),
    ),
    Mutant(
        "a claim that failed stays in the store",
        "server/snapshots/claims.py",
        "            self._doubtful[claimed] = _digest(origin)\n            if",
        "            if",
        "tests/server/snapshots/test_outages.py::test_a_store_that_fails_now_and_then_loses_nothing",
    ),
    *bugs(
        "server/snapshots/store.py",
        "tests/server/snapshots/test_store.py",
        (
            "what was written during a sweep is swept",
            " and not self._is_new(folder, before)",
            "",
            "test_what_was_written_during_a_sweep_stays",
        ),
        (
            "a claim that was given up is made after all",
            "if not stays():",
            "if stays():",
            "test_what_was_given_up_is_not_created_after_all",
        ),
    ),
    *bugs(
        "server/snapshots/sweeper.py",
        "tests/server/snapshots/test_outages.py",
        (
            "every server sweeps",
            "if self._store.begin_sweep(int(time.time() // self._period_s)):",
            "if time.time():",
            "test_one_server_sweeps_and_holds_up_no_writes",
        ),
        (
            "tombstones are swept like all",
            "{TOMBSTONE: LONGEST_KEEP_S}",
            "{}",
            "test_one_server_sweeps_and_holds_up_no_writes",
        ),
    ),
    Mutant(
        "two create the same file",
        "server/snapshots/backends.py",
        "            os.link(part, path)",
        "            os.replace(part, path)",
        "tests/server/snapshots/test_store.py::test_of_all_who_create_one_succeeds",
    ),
    *bugs(
        "server/snapshots/log_writer.py",
        _LOG,
        (
            "all tokens are written again",
            "first = stored.tail if is_short",
            "first = 0 if is_short",
            "test_what_is_written_grows_as_the_stream_grows",
        ),
        (
            "each part of the tokens stays small",
            "is_short = stored.end - stored.tail < _TAIL",
            "is_short = stored.end - stored.tail < 0 * _TAIL",
            "test_what_is_written_grows_as_the_stream_grows",
        ),
        (
            "a claim takes more tokens than it goes on behind",
            "first = min(end, generated)\n",
            "first = end\n",
            "test_what_a_claim_adopted_stays",
        ),
        (
            "a former owner drops what a claim adopted",
            "needless_before(origin, claim.epoch, added))",
            "added)",
            "test_what_a_claim_adopted_stays",
        ),
        (
            "what is known of a deleted stream is used for the next one",
            "self._stored.pop((owner, stream_id), None)",
            "pass",
            "test_a_name_that_is_used_again_begins_anew",
        ),
        (
            "the prompt is written again with each claim",
            'origin.request.ClearField("prompt")',
            "pass",
            "test_a_takeover_writes_nothing_again",
        ),
        (
            "a claim drops what it adopted",
            "if part.first < adopted.end}",
            "if part.end < adopted.end}",
            "test_a_takeover_writes_nothing_again",
        ),
    ),
    *bugs(
        "server/snapshots/log_reader.py",
        _LOG,
        (
            "the late write of an older owner is read",
            "begin = part.end if end is None else min(part.end, end)",
            "begin = part.end",
            "test_what_a_claim_adopted_stays",
        ),
        (
            "parts can be exchanged",
            "if header.version > _WHOLE_PARTS and header.name != name:",
            "if header.version > _WHOLE_PARTS and not header.name:",
            "test_parts_cannot_be_exchanged",
        ),
        (
            "a damaged state makes a stream unreadable",
            "except (SnapshotRefused, _Missing) as error:",
            "except _Missing as error:",
            "test_of_damaged_states_an_older_one_is_used",
        ),
        (
            "times of an earlier call are those of this one",
            "epoch_of(piece.name) == epoch and ",
            "",
            "test_times_are_those_of_the_last_call",
        ),
        (
            "a stream has tokens after its end",
            "stored.generated = stored.generated[: width * end.first]",
            "pass",
            "test_a_stream_ends_where_its_owner_says",
        ),
    ),
    Mutant(
        "the oldest states are kept",
        "server/snapshots/names.py",
        "sorted(parts.states)[:-kept_states]",
        "sorted(parts.states)[kept_states:]",
        _LOG,
    ),
)
