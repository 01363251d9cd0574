"""Bugs in what serves: state, steps, folds, readers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, bugs

_STREAMS = "tests/parity/test_streams.py"
_BATCHES = "tests/parity/test_batches.py"
_PREFIX = "tests/parity/test_prefix.py"
_RESTORE = "tests/parity/test_restore.py"
_STORY = "tests/server/sessions/test_story.py"

MUTANTS = (
    *bugs(
        "protos/concertina/bundle/resources.py",
        _STREAMS,
        (
            "a carry takes an entry too few",
            "return rows.bit_length(), rows",
            "return max(1, rows.bit_length() - 1), rows",
            "test_prefill_in_any_chunks",
        ),
        (
            "a carry takes half of its tokens",
            "return rows.bit_length(), rows",
            "return rows.bit_length(), rows // 2",
            "test_prefill_in_any_chunks",
        ),
        (
            "a counter folds as blocks do",
            "if fold.binary:\n        rows",
            "if False:\n        rows",
            "test_prefill_in_any_chunks",
        ),
    ),
    *bugs(
        "server/runtime/onnx_session.py",
        _STREAMS,
        (
            "positions begin anew in every chunk",
            "np.arange(position, position + time)",
            "np.arange(time)",
            "test_prefill_in_any_chunks",
        ),
        (
            "a step's lengths off by one",
            "lengths + 1, len",
            "lengths, len",
            "test_a_stream_that_begins_in_the_batch",
        ),
        (
            "a step reads a dead entry",
            "lengths + 1, len",
            "lengths + 2, len",
            "test_a_stream_that_begins_in_the_batch",
        ),
        (
            "a chunk reads a dead entry",
            "np.array([length + time])",
            "np.array([length + time + 1])",
            "test_prefill_in_any_chunks",
        ),
    ),
    *bugs(
        "server/runtime/host_state.py",
        _STREAMS,
        (
            "layers that stay full count the entries of those that fold",
            ".get(kept, self.tokens)",
            ".get(kept, self.entries)",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
        (
            "a move leaves the query maximum behind",
            "part[...] = self._part(tensor, source, EMPTY, length)",
            "part[...] = part if part.ndim == 2 else self._part(tensor, source, EMPTY, length)",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
        (
            "query maximum not reset between blocks (server)",
            "            at = indices[name]\n",
            "            at = indices[name]\n"
            "            if self._tensors[name].kind == StateKind.RECURRENT:\n"
            "                continue\n",
            "test_prefill_in_any_chunks",
        ),
        (
            "a parked state is no copy",
            ".copy() for t",
            " for t",
            "test_a_parked_stream_continues_to_the_bit",
        ),
        (
            "histories read a row late",
            "buffer[begin.tokens : end.tokens]",
            "buffer[begin.tokens + 1 : end.tokens + 1]",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
        (
            "a row's summaries not written into its history",
            "            at = indices[name]\n",
            "            at = indices[name]\n"
            "            if self._tensors[name].kind == StateKind.HISTORY:\n"
            "                continue\n",
            "test_prefill_in_any_chunks",
        ),
    ),
    *bugs(
        "server/runtime/host_state.py",
        _BATCHES,
        (
            "a fold writes into its neighbours",
            "stack * length + np.array(first)[:, None]",
            "stack * length + first[0]",
            "test_any_order_of_operations",
        ),
        *(
            (
                f"two folds at once share the first {what}",
                "values.reshape(*at.shape, -1)",
                "(values[:1].repeat(len(at), axis=0) if self._tensors[name].kind == "
                f"StateKind.{kind} else values).reshape(*at.shape, -1)",
            )
            for what, kind in (("summary", "STACK"), ("history", "HISTORY"))
        ),
        (
            "of many folds only the first are done",
            "range(0, len(rows), together)",
            "range(0, together, together)",
            "test_any_order_of_operations",
        ),
    ),
    *bugs(
        "server/engine/kv_cache.py",
        _STREAMS,
        (
            "positions begin anew after prefill",
            "self._append(self.prefill_pushed)",
            "self._append(0)",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
        (
            "a block folds before its last token attends",
            "fold_size(tokens)",
            "fold_size(tokens + 1)",
            "test_prefill_in_any_chunks",
        ),
        (
            "a block folds one token late",
            "fold_size(tokens)",
            "fold_size(tokens - 1)",
            "test_prefill_in_any_chunks",
        ),
        (
            "a fold at the wrong base",
            "self._bundle.entries(tokens - 1) + 1,",
            "self._bundle.entries(tokens - 1) + 2,",
            "test_prefill_in_any_chunks",
        ),
        (
            "a move leaves the newest entry behind",
            "self._prefill_row, row, self._length(self.prefill_pushed)",
            "self._prefill_row, row, self._length(self.prefill_pushed - 1)",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
        (
            "a history's newest row forgotten",
            "return StateLength(entries(pushed), pushed, entries(pushed, 0))",
            "return StateLength(entries(pushed), pushed - 1, entries(pushed, 0))",
            "test_any_prefix_in_the_prefill_slot_and_the_rest_in_the_batch",
        ),
    ),
    *bugs(
        "server/engine/prefix_cache.py",
        _PREFIX,
        (
            "a cached block has its newest token for a summary",
            "np.concatenate((stack[:, :1], stack",
            "np.concatenate((stack[:, -1:], stack",
            "test_a_prefix_may_end_before_and_behind_a_fold",
        ),
    ),
    *bugs(
        "server/engine/prefix_cache.py",
        "tests/server/engine/test_prefix_cache.py",
        (
            "summaries lie before the first blocks",
            "[*blocks[: folded.start], *summaries,",
            "[*summaries, *blocks[: folded.start],",
            "test_what_blocks_add_is_the_stack_that_they_left",
        ),
    ),
    *bugs(
        "server/engine/kv_cache.py",
        _BATCHES,
        (
            "the prefill slot keeps the last stream's query maximum",
            "self._runtime.reset(self._prefill_row)",
            "pass",
            "test_any_order_of_operations",
        ),
        (
            "a row keeps the last stream's query maximum",
            "self._runtime.reset(row)",
            "pass",
            "test_any_order_of_operations",
        ),
        (
            "the last row's books not moved when one leaves",
            "self._pushed[row] = self._pushed[last]",
            "pass",
            "test_any_order_of_operations",
        ),
        (
            "the last row not moved when one leaves",
            "self._runtime.move(last, row, self._length(int(self._pushed[last])))",
            "pass",
            "test_any_order_of_operations",
        ),
    ),
    *bugs(
        "server/engine/lifecycle.py",
        _RESTORE,
        (
            "penalties forget what was drawn before a snapshot",
            "stream.penalties.recall(np.array(stream.history, np.int64))",
            "pass",
            "test_streams_continue_to_the_bit_from_every_position_of_two_blocks",
        ),
    ),
    Mutant(
        "a reader that comes back gets a token twice",
        "server/sessions/subscriber.py",
        "            if self._known_tokens:\n                self._known_tokens -= 1",
        "            if self._known_tokens > 1:\n                self._known_tokens -= 1",
        "tests/server/sessions/test_subscriber.py",
    ),
    Mutant(
        "a revived stream forgets what was drawn since its snapshot",
        "server/engine/restore.py",
        "    tokens = checkpoint.generated[begin:].tolist()",
        "    tokens = checkpoint.generated[begin + 1 :].tolist()",
        "tests/server/engine/test_stream.py",
    ),
    Mutant(
        "a wrong draft leaves its mark on the state",
        "server/engine/kv_cache.py",
        "        if count < of and self._bundle.recurrent:",
        "        if count < of and not self._bundle.recurrent:",
        "tests/server/engine/test_prompt_lookup.py::test_a_second_stream_ends_the_drafts_and_changes_nothing",
    ),
    Mutant(
        "a block folds again after a wrong draft",
        "server/engine/decoding.py",
        "        if int(self._cache.pushed[0]) > first and (ending is None or saves):",
        "        if ending is None or saves:",
        "tests/server/engine/test_prompt_lookup.py",
    ),
    Mutant(
        "a stream that was handed over is taken back",
        "server/engine/engine.py",
        "self._closing or (admits and not self._accepting)",
        "self._closing",
        "tests/server/sessions/test_registry.py::test_streams_are_handed_over",
    ),
    Mutant(
        "who has least pays for those who have most",
        "server/sessions/table.py",
        "self._owners.put(owner, -self._by_owner[owner])",
        "self._owners.put(owner, self._by_owner[owner])",
        "tests/server/sessions/test_table.py",
    ),
    Mutant(
        "copies do not count against a quota",
        "server/sessions/opener.py",
        "reserving(caller, copies)",
        "reserving(caller, 0)",
        "tests/server/sessions/test_races.py::test_copies_count_against_the_quota",
    ),
    Mutant(
        "a stream that cannot be placed has no end",
        "server/engine/lifecycle.py",
        'self.end(stream, StepFailed("the stream could not be placed',
        '(stream, StepFailed("the stream could not be placed',
        "tests/server/engine/test_placing_faults.py::test_a_stream_that_cannot_start_ends_alone",
    ),
    Mutant(
        "a backlog is one event, however large",
        "server/sessions/subscriber.py",
        """self._tokens[:most], self._logprobs[:most]
        del self._tokens[:most], self._logprobs[:most]""",
        """self._tokens[:], self._logprobs[:]
        del self._tokens[:], self._logprobs[:]""",
        "tests/server/sessions/test_races.py::test_a_backlog_comes_in_parts",
    ),
    Mutant(
        "a continuation counts the tokens before it",
        "server/api/continuation.py",
        "min_tokens = generated + least",
        "min_tokens = least",
        "tests/server/sessions/test_races.py::test_the_limits_of_a_continuation_count_from_it",
    ),
    Mutant(
        "a delete leaves the reader waiting",
        "server/sessions/lifecycle.py",
        "            self._streams.end(stream, gone)",
        "            self._streams.cancel(stream)",
        "tests/server/sessions/test_races.py::test_a_delete_ends_the_stream_of_its_reader",
    ),
    Mutant(
        "a reader attaches to a session that is gone",
        "server/sessions/lifecycle.py",
        """        taken its name.
        \"\"\"
        self._require_held(session)
""",
        """        taken its name.
        \"\"\"
""",
        "tests/server/sessions/test_races.py",
    ),
    Mutant(
        "a quota is not held while a stream is opened",
        "server/sessions/registry.py",
        "        self._reserved[caller.name] += streams",
        "        self._reserved[caller.name] += 0",
        "tests/server/sessions/test_races.py::test_a_quota_holds_for_calls_that_come_together",
    ),
    Mutant(
        "a second reader with the same key sends the first away",
        "server/sessions/opener.py",
        "caller, (), joins=True)",
        "caller, (), joins=False)",
        "tests/server/sessions/test_races.py",
    ),
    Mutant(
        "a server that takes a stream over keeps the epoch of its owner",
        "server/sessions/reviver.py",
        "epoch=snapshot.epoch + 1)",
        "epoch=snapshot.epoch)",
        "tests/server/sessions/test_races.py",
    ),
    Mutant(
        "a continuation that the store refuses has begun",
        "server/sessions/opener.py",
        "            model.release(session)\n            if",
        "            model.commit(session)\n            if",
        "tests/server/sessions/test_races.py::test_continuing_changes_nothing_where_the_store_fails",
    ),
    Mutant(
        "a stream with a key waits for a store that is away",
        "server/sessions/opener.py",
        "            except StorageFailed:\n                # If",
        "            except ZeroDivisionError:\n                # If",
        "tests/server/sessions/test_races.py::test_a_new_stream_with_a_key_runs_while_the_store_is_away",
    ),
    Mutant(
        "two servers draw two seeds for one key",
        "server/sessions/opener.py",
        "_with_seed(requests, self._seed(stream_id))",
        "_with_seed(requests, secrets.randbits(63))",
        "tests/server/sessions/test_races.py::test_a_key_that_another_server_has_gives_the_same_stream_in_an_outage",
    ),
    Mutant(
        "nobody ends the reader of an ended stream that cannot be opened",
        "server/sessions/lifecycle.py",
        "            for reader in ended:\n",
        "            for reader in ():\n",
        "tests/server/sessions/test_registry.py::test_a_reader_of_a_stream_that_cannot_be_opened_gets_an_error",
    ),
    Mutant(
        "a quota does not say when to try again",
        "server/auth/quota.py",
        "        room_after_s(has + more - limit),\n",
        "",
        "tests/server/api/test_refusals.py",
    ),
    Mutant(
        "what a continuation measures begins with the first call",
        "server/api/continuation.py",
        "        accepted_at=time.time(),\n",
        "",
        "tests/server/sessions/test_races.py::test_the_limits_of_a_continuation_count_from_it",
    ),
    Mutant(
        "an action that raises ends the engine",
        "server/engine/engine.py",
        '            except Exception:\n                _log.exception("an action in',
        '            except ZeroDivisionError:\n                _log.exception("an action in',
        "tests/server/engine/test_engine_faults.py::test_an_action_that_raises_ends_no_stream",
    ),
    *bugs(
        "server/sessions/registry.py",
        _STORY,
        (
            "a story: a quota is not held while a stream is opened",
            "        self._reserved[caller.name] += streams",
            "        self._reserved[caller.name] += 0",
        ),
    ),
    *bugs(
        "server/sessions/opener.py",
        _STORY,
        (
            "a story: a second reader with the same key sends the first away",
            "caller, (), joins=True)",
            "caller, (), joins=False)",
        ),
    ),
    *bugs(
        "server/sessions/reviver.py",
        _STORY,
        (
            "a story: who takes a stream over keeps the epoch of its owner",
            "epoch=snapshot.epoch + 1)",
            "epoch=snapshot.epoch)",
        ),
    ),
    *bugs(
        "server/snapshots/limited_calls.py",
        _STORY,
        (
            "a story: a call waits for a store that hangs",
            "lambda: all(call.done for call in calls), rest_s)",
            "lambda: all(call.done for call in calls), None)",
        ),
    ),
    Mutant(
        "a stream that is not kept has a second reader",
        "server/sessions/reviver.py",
        "if held is not None and not held[1].lease.keep_s:",
        "if False:",
        "tests/server/sessions/test_races.py::test_a_stream_that_is_not_kept_has_one_reader",
    ),
    Mutant(
        "who looks for a stream sends its reader away",
        "server/sessions/reviver.py",
        "    attachment = await resume(registry, stream_id, caller, (), joins=True)",
        "    attachment = await resume(registry, stream_id, caller, ())",
        "tests/server/sessions/test_races.py::test_who_only_looks_for_a_stream_sends_no_reader_away",
    ),
    Mutant(
        "a pause does not follow a stream that moves",
        "server/api/sessions.py",
        "with suppress(UnknownSession):  # deleted",
        "with suppress(KeyError):  # deleted",
        "tests/server/sessions/test_races.py::test_a_pause_follows_a_stream_that_moves",
    ),
    Mutant(
        "what could not be taken back blocks every later create",
        "server/snapshots/store.py",
        "            finally:\n                self._creating.discard(path)\n\n        self._write",
        "            finally:\n                pass\n\n        self._write",
        _STORY,
    ),
    Mutant(
        "a paused stream does not return while others run",
        "server/engine/placement.py",
        "(self.waiting or self.prefilling or self.paused)",
        "(self.waiting or self.prefilling)",
        "tests/server/engine/test_placement.py",
    ),
    Mutant(
        "steps are not shown while their streams run",
        "server/engine/loop.py",
        "            self._metrics.observe()\n",
        "            pass\n",
        "tests/server/ops/test_metrics.py::test_steps_show_while_their_stream_runs",
    ),
    Mutant(
        "a prompt's logits are those that a pass before wanted",
        "server/runtime/onnx_session.py",
        "        if self._wanted != len(logits):",
        "        if self._wanted < 0:",
        "tests/server/engine/test_engine.py",
    ),
    Mutant(
        "a torn character is forgotten where a token without text follows",
        "protos/concertina/codecs/token_text.py",
        "        if piece:  # nothing completes nothing\n            self",
        "        if True:\n            self",
        "tests/concertina/codecs/test_token_text.py",
    ),
    *bugs(
        "server/runtime/onnx_session.py",
        "tests/server/runtime/test_device_state.py",
        (
            "the CPU attends for a GPU, to int8 caches",
            'if provider != "cpu" and (bundle.rounds_state or not bundle.moves_on_devices):',
            'if provider != "cpu" and not bundle.moves_on_devices:',
            "test_graphs_that_move_state_do_not_make_int8_caches_fit",
        ),
    ),
    *bugs(
        "server/runtime/device_state.py",
        "tests/server/runtime/test_device_state.py",
        (
            "full layers have as many entries on a device as those that fold",
            "along = StateKind.STACK, kept\n",
            "along = StateKind.STACK, 1\n",
            "test_host_and_device_agree_in_any_order_of_operations",
        ),
    ),
)
