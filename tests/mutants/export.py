"""Bugs in what exports a bundle and in what checks it."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_EXPORT = "tests/export/test_parity.py"
_PRETRAINED = "tests/export/test_pretrained.py"
_QUANTISE = "tests/export/test_quantise.py"
_KERNEL = "tests/export/test_kernel.py"
_HELDOUT = "tests/export/test_heldout.py"
_WINDOWS = "tests/export/test_windows.py"
_BESIDE = "tests/export/test_graph_file.py"
_FOLDED = "tests/export/test_folded.py"

MUTANTS = (
    *bugs(
        "export/kernel.py",
        _EXPORT,
        (
            "the kernel scales twice as much",
            '"scale": 1.0',
            '"scale": 2.0',
            "test_what_was_exported_passes",
        ),
        (
            "lengths off by one (graph)",
            "lengths - 1, longest",
            "lengths, longest",
            "test_what_was_exported_passes",
        ),
    ),
    *bugs(
        "export/kernel.py",
        _KERNEL,
        (
            "the entries of one stream are shared out among threads",
            "None, None, None, None, sink, *units",
            "None, None, None, None, None, *units",
            "test_threads_and_company_change_no_bit_of_a_long_stream",
        ),
    ),
    *bugs(
        "export/graphs.py",
        _HELDOUT,
        (
            "folds cut numbers off",
            "(part / units[name]).round()",
            "(part / units[name])",
            "test_what_is_exported_is_small_proven_and_measured",
        ),
        (
            "histories are said to be int8",
            'if "history" in kinds or "stack" not in kinds:',
            "if False:",
            "test_patterns_with_histories_are_refused_by_name",
        ),
    ),
    *bugs(
        "export/heldout.py",
        _HELDOUT,
        (
            "a unit covers only the last entries",
            "np.maximum(most.get(tensor.name, reached), reached)",
            "reached",
            "test_a_unit_covers_entries_of_tokens_and_summaries",
        ),
    ),
    *bugs(
        "export/graphs.py",
        _FOLDED,
        (
            "a fold takes integers for numbers",
            "numbers = wide | {name: wide[name] * unit ",
            "numbers = wide | {name: wide[name] + 0 * unit ",
            "test_caches_in_int8_are_small_proven_and_measured",
        ),
    ),
    *bugs(
        "export/heldout.py",
        _FOLDED,
        (
            "a full layer has as many entries as one that folds",
            "int(graphs.unfolded(stream, tensor)[0])",
            "int(stream.lengths[0])",
            "test_a_unit_covers_every_kind_of_entry",
        ),
        (
            "keys of later tokens do not fit",
            "valid = _longest(valid, turning)",
            "pass",
            "test_keys_of_later_tokens_fit_in_their_units",
        ),
    ),
    *bugs(
        "protos/concertina/bundle/manifest.py",
        _BESIDE,
        (
            "a graph reads weights that nobody verified",
            "    if others:\n",
            "    if False:\n",
            "test_a_file_off_the_list_is_not_read",
        ),
    ),
    *bugs(
        "export/windows.py",
        _HELDOUT,
        (
            "units know only the data",
            "    yield tokens\n",
            "    yield tokens * 0\n",
            "test_windows_have_tokens_that_the_data_has_not",
        ),
    ),
    *bugs(
        "export/windows.py",
        _WINDOWS,
        (
            "windows cross the borders of documents",
            ".split(bytes([END_OF_TEXT]))[0]",
            "",
            "test_windows_are_streams_of_one_document",
        ),
        (
            "no window begins with the begin token",
            "ids = np.concatenate(([begin], ids))",
            "pass",
            "test_windows_are_streams_of_one_document",
        ),
    ),
    *bugs(
        "export/heldout.py",
        _WINDOWS,
        (
            "the loss is for each token",
            "nats / windows.size",
            "nats / count",
            "test_a_head_that_is_looked_up_in_is_stored_once",
        ),
    ),
    *bugs(
        "export/parity.py",
        _EXPORT,
        (
            "the parity check lets NaN pass",
            "float(np.maximum(worst, np.abs(got - expected).max()))",
            "max(worst, float(np.abs(got - expected).max()))",
            "test_a_tampered_graph_is_refused",
        ),
    ),
    *bugs(
        "export/packing.py",
        _QUANTISE,
        (
            "the later of two weights lies in the low half",
            "codes[..., ::2] + codes[..., 1::2] * np.uint8(16)",
            "codes[..., 1::2] + codes[..., ::2] * np.uint8(16)",
        ),
    ),
    *bugs(
        "export/quantise.py",
        _QUANTISE,
        (
            "a packed matrix is not rounded in the reference",
            "matrix.copy_(torch.from_numpy(unpack(packed[name])))",
            "pass",
            "test_the_manifest_says_what_was_stored_and_lost",
        ),
        (
            "the head loses its bias",
            '*(["", "", *rest] if rest else [])',
            "",
            "test_the_manifest_says_what_was_stored_and_lost",
        ),
    ),
    *bugs(
        "export/bundle.py",
        _QUANTISE,
        (
            "any loss is accepted",
            "if not loss <= limit:",
            "if not loss <= 9:",
            "test_too_much_loss_is_refused",
        ),
        (
            "the loss is measured with exact activations",
            '            round_activations(partial / "step.onnx")\n',
            "",
            "test_the_manifest_says_what_was_stored_and_lost",
        ),
    ),
    *bugs(
        "export/bundle.py",
        _HELDOUT,
        (
            "matrices are unpacked where caches are int8",
            "    if packed:\n        quantise_step(step, packed)\n",
            "",
            "test_packed_matrices_stay_packed",
        ),
    ),
    *bugs(
        "export/kernel.py",
        _PRETRAINED,
        (
            "shared heads are told to be own ones",
            '"kv_num_heads": k.shape[1]',
            '"kv_num_heads": heads',
            "test_the_manifest_says_what_the_source_said",
        ),
        (
            "no window is told",
            "if window else {}",
            "if False else {}",
            "test_the_kernels_are_told_heads_and_windows",
        ),
    ),
    *bugs(
        "export/graph_file.py",
        _PRETRAINED,
        (
            "any weight is stored in two bytes",
            "np.array_equal(v.astype(element).astype(v.dtype), v)",
            "True",
            "test_weights_are_stored_as_small_as_loses_nothing",
        ),
        (
            "the narrowest type is named",
            "[*_TYPES.items()][::-1]",
            "[*_TYPES.items()]",
            "test_weights_are_stored_as_small_as_loses_nothing",
        ),
    ),
    *bugs(
        "export/kernel.py",
        _PRETRAINED,
        (
            "all of a head turns",
            "2 * pairs if 2 * pairs < dim else 0",
            "0",
            "test_the_rotation_is_told_how_much_of_a_head_turns",
        ),
        (
            "the scale is lost on the way",
            "_multiply_scale(node, third.scale)",
            "pass",
            "test_the_manifest_says_what_the_source_said",
        ),
    ),
)
