"""Bugs in attention by definition, and in the decoder around the patterns."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_KERNELS = "tests/model/test_attention.py"
_DECODER = "tests/model/test_decoder.py"
_PATTERNS = "tests/model/test_patterns.py"

MUTANTS = (
    *bugs(
        "model/attention.py",
        _KERNELS,
        (
            "dead entries attended to",
            "hidden = entries > newest",
            "hidden = entries > 1 + newest",
        ),
    ),
    *bugs(
        "model/attention.py",
        _PATTERNS,
        (
            "pooled query not scaled",
            "keys @ query.unsqueeze(-1)",
            "keys @ query.unsqueeze(-1) * keys.shape[-1] ** 0.5",
        ),
        (
            "pooled query scaled twice",
            "keys @ query.unsqueeze(-1)",
            "keys @ query.unsqueeze(-1) * keys.shape[-1] ** -0.5",
        ),
        ("summary value is the mean", "softmax((keys @ query", "softmax(0 * (keys @ query"),
        ("a token sees the next one", ".triu(1)", ".triu(2)"),
        (
            "softmax in bfloat16",
            "torch.softmax(widen(logits), dim=-1)",
            "torch.softmax(logits, dim=-1)",
            "test_softmax_of_bfloat16_is_computed_in_float32",
        ),
        ("full attention scales again", "is_causal=True, scale=1.0", "is_causal=True"),
    ),
    *bugs(
        "model/decoder.py",
        _DECODER,
        (
            "queries not scaled",
            "attend(self.pattern, q * self.scale,",
            "attend(self.pattern, q,",
            "test_every_earlier_token_matters_and_no_later_one",
        ),
        (
            "queries scaled twice",
            "attend(self.pattern, q * self.scale,",
            "attend(self.pattern, q * self.scale**2,",
            "test_scale_and_squared_relu_by_hand",
        ),
        (
            "a pattern sees the input before its norm",
            "k, v, normed)",
            "k, v, x)",
            "test_scale_and_squared_relu_by_hand",
        ),
    ),
    *bugs(
        "model/attention.py",
        _DECODER,
        (
            "a window is one token wider",
            "(before < window)",
            "(before <= window)",
            "test_stream_equals_parallel_however_layers_are_built",
        ),
        (
            "a stream's window is one token wider",
            "newest - window)",
            "newest - window - 1)",
            "test_stream_equals_parallel_however_layers_are_built",
        ),
        (
            "heads take turns with shared ones",
            "shared.repeat_interleave(heads // groups, dim=1)",
            "shared.repeat(1, heads // groups, 1, 1)",
            "test_a_shared_head_is_that_of_its_neighbours",
        ),
    ),
    *bugs(
        "model/decoder.py",
        _DECODER,
        (
            "a parallel MLP reads what attention gave",
            "x if self.built.parallel else attended",
            "attended",
            "test_every_architecture_is_another_function",
        ),
        (
            "every layer turns",
            "turn is not None and self.turns",
            "turn is not None",
            "test_every_architecture_is_another_function",
        ),
        (
            "keys are not turned",
            "q, k = turn(q), turn(k)",
            "q = turn(q)",
            "test_queries_and_keys_are_turned_and_values_are_not",
        ),
    ),
    *bugs(
        "model/layers/positions.py",
        "tests/model/layers/test_positions.py",
        (
            "turned the other way",
            "one * cosines - other * sines, other * cosines + one * sines",
            "one * cosines + other * sines, other * cosines - one * sines",
        ),
        (
            "angles in double",
            "positions.unsqueeze(-1).float() * self.frequencies.float()",
            "positions.unsqueeze(-1).double() * self.frequencies.double()",
        ),
        ("sines without the scale", "angles.sin() * self.scale", "angles.sin()"),
    ),
    *bugs(
        "model/layers/mlp.py",
        "tests/model/layers/test_mlp.py",
        ("the second half is the gate", "gate, value = hidden", "value, gate = hidden"),
    ),
    *bugs(
        "model/pretrained/folder.py",
        "tests/model/pretrained/test_folder.py",
        ("an index may name any file", "Path(name).name != name\n", "False\n"),
        ("a header of any size is read", "if size > _MOST_HEADER:", "if size > 1 << 63:"),
        ("any type of weight is taken", "not tensor.is_floating_point() or", "False and"),
    ),
    *bugs(
        "model/pretrained/gguf_file.py",
        "tests/model/pretrained/test_gguf.py",
        ("pairs stay side by side", "by_pair.transpose(1, 2)", "by_pair"),
    ),
    *bugs(
        "model/pretrained/gguf_header.py",
        "tests/model/pretrained/test_gguf.py",
        ("any number of values is read", "if self._items > _MOST_ITEMS:", "if False:"),
        ("a tensor may end behind the file", "if stored.begin + stored.bytes >", "if 0 >"),
    ),
    *bugs(
        "model/pretrained/weights.py",
        "tests/model/pretrained/test_convert.py",
        (
            "tensors without a use are passed over",
            "if name not in used and not",
            "if False and not",
        ),
        ("a shape of any kind is taken", "if there != shape:", "if not there:"),
    ),
    *bugs(
        "model/pretrained/weights.py",
        "tests/model/pretrained/test_parity.py",
        (
            "heads stay as GPT-NeoX sorts them",
            "by_head.transpose(0, 1)",
            "by_head",
            "test_logits_are_those_of_transformers",
        ),
    ),
    *bugs(
        "model/pretrained/settings.py",
        "tests/model/pretrained/test_settings.py",
        (
            "a mixture of experts is taken for a plain MLP",
            "settings[name] > 1:",
            "settings[name] > 999:",
        ),
        ("the layers below have the window", "if n >= first else", "if n < first else"),
    ),
    *bugs(
        "model/pretrained/rope.py",
        "tests/model/pretrained/test_parity.py",
        (
            "yarn does not sharpen",
            "0.1 * weight * math.log(factor) + 1.0",
            "1.0",
            "test_logits_are_those_of_transformers",
        ),
        (
            "slow pairs turn as before",
            "plain / factor, plain)",
            "plain, plain)",
            "test_logits_are_those_of_transformers",
        ),
    ),
    *bugs(
        "model/initial.py",
        "tests/model/test_initial.py",
        (
            "a matrix of a bundle stays transposed",
            "values.T if transposed else values",
            "values.T if transposed and len(values.T) != len(values) else values",
            "test_a_model_begins_with_what_a_bundle_computes",
        ),
        (
            "training goes on from few bits",
            'if any(node.op_type == "MatMulNBits"',
            'if False and any(node.op_type == "MatMulNBits"',
            "test_bundles_that_give_no_weights_are_named",
        ),
    ),
    *bugs(
        "model/uptraining/keys.py",
        "tests/model/uptraining/test_keys.py",
        (
            "questions stand one token late",
            "length + torch.arange(len(each))",
            "length + 1 + torch.arange(len(each))",
            "test_a_question_is_answered_as_if_it_came_alone",
        ),
        (
            "a question forgets what its own tokens fold",
            "pattern.summaries(q, k, v) if isinstance(pattern, Folded)",
            "pattern.summaries(q[:, :, :begin], k[:, :, :begin], v[:, :, :begin]) "
            "if isinstance(pattern, Folded)",
            "test_a_question_is_answered_as_if_it_came_alone",
        ),
        (
            "digits are compared one token late",
            "logits[-question.key - 1 : -1]",
            "logits[-question.key :]",
            "test_a_digit_is_right_if_it_is_the_most_likely_one",
        ),
    ),
    *bugs(
        "model/uptraining/sizes.py",
        "tests/model/uptraining/test_sizes.py",
        (
            "a window is reported to keep an entry of every block",
            "schedule.entries(length, kept)",
            "schedule.entries(length)",
            "test_entries_are_those_of_the_patterns",
        ),
    ),
)
