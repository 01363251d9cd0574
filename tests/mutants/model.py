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
            "hidden = entries > _newest",
            "hidden = entries > 1 + _newest",
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
        ),
        ("full attention scales again", "is_causal=True, scale=1.0", "is_causal=True"),
    ),
    *bugs(
        "model/decoder.py",
        _DECODER,
        ("queries not scaled", "attend(self.pattern, q * self.scale,", "attend(self.pattern, q,"),
        (
            "queries scaled twice",
            "attend(self.pattern, q * self.scale,",
            "attend(self.pattern, q * self.scale**2,",
        ),
        ("a pattern sees the input before its norm", "k, v, normed)", "k, v, x)"),
    ),
    *bugs(
        "model/initial.py",
        "tests/model/test_initial.py",
        (
            "a matrix of a bundle stays transposed",
            "values.T if transposed else values",
            "values.T if transposed and len(values.T) != len(values) else values",
        ),
        (
            "training goes on from few bits",
            'if any(node.op_type == "MatMulNBits"',
            'if False and any(node.op_type == "MatMulNBits"',
        ),
    ),
)
