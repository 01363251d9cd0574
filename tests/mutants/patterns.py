"""Bugs in the attention patterns of `model/patterns`."""

from __future__ import annotations

from tests.mutants.mutant import bugs

_PATTERNS = "tests/model/test_patterns.py"
_LAYERS = "tests/model/test_streams.py"
_FOLDED = "tests/model/test_folded.py"

MUTANTS = (
    *bugs(
        "model/patterns/fixed.py",
        _PATTERNS,
        (
            "pooled query is the last query",
            "else q).amax(dim)",
            "else q).select(dim, -1)",
            "test_every_length_equals_the_definition",
        ),
        (
            "pooled query starts at zero",
            "else q).amax(dim)",
            "else q).amax(dim).clamp(min=0)",
        ),
        ("summary key is the mean", "else k).amax(dim=-2)", "else k).mean(dim=-2)"),
        ("a token sees the summary of its own block", "far >= own[:, None]", "far > own[:, None]"),
        (
            "block 0 left out, as the paper's indices have it",
            "far >= own[:, None]",
            "(far >= own[:, None]) | (far == 0)",
        ),
        ("mean of the queries is their sum", "return q.mean(dim)", "return q.sum(dim)"),
        ("mean of the keys is their sum", "return k.mean(dim=-2)", "return k.sum(dim=-2)"),
        ("DeepSets layer of the keys skipped", "F.relu(self.of_keys(k))", "k"),
        ("DeepSets layer of the queries skipped", "F.relu(self.of_queries(q))", "q"),
        (
            "DeepSets layer of the queries for the keys",
            "F.relu(self.of_keys(k))",
            "F.relu(self.of_queries(k))",
        ),
        ("DeepSets without its ReLU", "F.relu(self.of_keys(k))", "self.of_keys(k)"),
        (
            "own block as a summary, too, as TensorFlow has it",
            "unseen = far == own[:, None]",
            "unseen = far < 0 * own[:, None]",
        ),
        (
            "padding attended to",
            ".view(blocks, 1, span) >= q.shape[2]",
            ".view(blocks, 1, span) > q.shape[2]",
        ),
        (
            "sparse parent sees the first token of a block",
            "[:, :, :-1, -1] for y",
            "[:, :, :-1, 0] for y",
        ),
    ),
    *bugs(
        "model/patterns/fixed.py",
        _LAYERS,
        (
            "pooled query is the last query (stream)",
            'torch.maximum(state["pooled_query"], self._pooled_query(by_token, dim=1))',
            '0 * state["pooled_query"] + self._pooled_query(by_token, dim=1)',
        ),
        ("query maximum not reset between blocks", "torch.full_like(query, initial)", "query + 0"),
        (
            "query maximum starts at zero",
            '"recurrent", (self.heads, self.dim), initial)',
            '"recurrent", (self.heads, self.dim))',
        ),
        (
            "query maximum starts at zero after a fold",
            "torch.full_like(query, initial)",
            "torch.zeros_like(query)",
        ),
        ("mean of the queries is their sum (stream)", "q.sum(dim=2) / self.span", "q.sum(dim=2)"),
        ("mean of the queries is that of a chunk", "q.sum(dim=2) / self.span", "q.mean(dim=2)"),
        (
            "sparse parent keeps the first token of a block",
            "state[name][:, :, -1:]",
            "state[name][:, :, :1]",
        ),
    ),
    *bugs(
        "model/patterns/grid.py",
        _PATTERNS,
        ("sums instead of maxima, as TensorFlow has it", "cumulative_max(y)", "y.cumsum(dim=-2)"),
        (
            "a summary holds its own reader",
            "future(q.shape[-2] + 1, q.device)[:-1, 1:]",
            "future(q.shape[-2], q.device)",
        ),
    ),
    *bugs(
        "model/patterns/grid.py",
        _LAYERS,
        (
            "own row above itself",
            "tokens < positions[..., None], positions)",
            "tokens <= positions[..., None], positions)",
        ),
    ),
    *bugs(
        "model/patterns/vertical.py",
        _PATTERNS,
        (
            "own column as a summary, too",
            "values.transpose(2, 3), own | first",
            "values.transpose(2, 3), first",
        ),
        (
            "row 0 sees itself as summaries",
            "values.transpose(2, 3), own | first",
            "values.transpose(2, 3), own",
        ),
    ),
    *bugs(
        "model/patterns/vertical.py",
        _LAYERS,
        (
            "live summary instead of the snapshot",
            'state[f"column_{name}"].unsqueeze(1)',
            'state[f"live_{name}"].unsqueeze(1)',
        ),
        ("own column as a summary, too (stream)", "!= positions[..., None] % width", ">= 0"),
        (
            "a column's maximum starts at zero",
            'StateTensor("live_queries", "recurrent", line, NEVER)',
            'StateTensor("live_queries", "recurrent", line)',
        ),
    ),
    *bugs(
        "model/patterns/horizontal.py",
        _PATTERNS,
        ("sides swapped", "left, right = _sides(q, k, v)", "right, left = _sides(q, k, v)"),
        ("right side not reversed", "y.flip(-2) for y", "y for y"),
        ("right side reversed once", "(keys.flip(-2), values.flip(-2))", "(keys, values)"),
        ("last column has a right side", "later | (columns == self.grid.width - 1)", "later"),
    ),
    *bugs(
        "model/patterns/horizontal.py",
        _LAYERS,
        ("sides swapped (stream)", "left, right = _sides(*row)", "right, left = _sides(*row)"),
        ("first column has a left side (stream)", "left.valid & (column > 0)", "left.valid"),
    ),
    *bugs(
        "model/patterns/mixture.py",
        _PATTERNS,
        (
            "mixture as the average",
            'self.averaged = config.attention == "mixture-averaged"',
            "self.averaged = True",
        ),
        (
            "average as the mixture",
            'self.averaged = config.attention == "mixture-averaged"',
            "self.averaged = False",
        ),
    ),
    *bugs(
        "model/patterns/mixture.py",
        _LAYERS,
        ("average as the sum (stream)", "out = out / 2", "out = out * 1"),
    ),
    *bugs(
        "model/patterns/axial.py",
        _PATTERNS,
        (
            "a row is summarised with its future masked",
            "softmax(q @ k.transpose(-1, -2))",
            "softmax((q @ k.transpose(-1, -2)).masked_fill(future(q.shape[-2], q.device), -1e9))",
        ),
        (
            "a row's keys are not normalised",
            "self.norm(x + self.out(joined))",
            "(x + self.out(joined))",
        ),
        (
            "a row's keys without the residual",
            "self.norm(x + self.out(joined))",
            "self.norm(self.out(joined))",
        ),
        ("own row as a summary, too", "rows >= rows[:, None, None]", "rows > rows[:, None, None]"),
        (
            "heads joined in another order",
            "values.permute(0, 2, 3, 1, 4)",
            "values.permute(0, 2, 3, 4, 1)",
        ),
    ),
    *bugs(
        "model/patterns/axial.py",
        _LAYERS,
        (
            "inputs of a row kept under one column",
            'write(state["inputs"], x, positions % grid.width)',
            'write(state["inputs"], x, 0 * positions)',
        ),
    ),
    *bugs(
        "model/patterns/logsparse.py",
        _PATTERNS,
        (
            "value merged from children",
            "expectation(q, raw_k, raw_v)",
            "expectation(q, *(y.unflatten(2, (-1, 2)) for y in level[1:]))",
        ),
        (
            "highest level missing, as JAX has it",
            "for bit in range(bits):",
            "for bit in range((max(length, 2) - 2).bit_length()):",
        ),
        ("the right one of two spans is read", "y[:, :, ::2, None]", "y[:, :, 1::2, None]"),
        (
            "halves mixed as if they were tokens",
            "expectation(query, k, v)",
            "expectation(query, *(y.unflatten(2, (k.shape[2], -1)) for y in tokens[1:]))",
        ),
    ),
    *bugs(
        "model/patterns/logsparse.py",
        _LAYERS,
        (
            "value merged from children (stream)",
            "expectation(query, raw_k, raw_v)",
            'expectation(query, state["keys"], state["values"])',
        ),
        (
            "a stack is an entry short",
            "1 + _most_bits(config.context)",
            "_most_bits(config.context)",
        ),
        (
            "a span's query not kept",
            '"queries": query.unsqueeze(2),',
            '"queries": state["queries"][:, :, -1:],',
        ),
        ("lower merges do not scale down", "(left_alone + taken).exp()", "taken.exp()"),
        (
            "merges scale down by the other half",
            "F.logsigmoid(-ahead).cumsum",
            "F.logsigmoid(ahead).cumsum",
        ),
        (
            "every merge knows the whole span",
            "y.unsqueeze(2).masked_fill(newer, NEVER)",
            "y.unsqueeze(2).expand(-1, -1, y.shape[2], -1, -1)",
        ),
    ),
    *bugs(
        "model/patterns/sparse.py",
        _PATTERNS,
        ("window on the wrong side of the block before", "masked_fill(~later", "masked_fill(later"),
        ("own block among the strides", "rows >= rows[:, None]", "rows > rows[:, None]"),
        (
            "longest step back missing",
            "range((length - 1).bit_length())",
            "range((length - 1).bit_length() - 1)",
        ),
    ),
    *bugs(
        "model/patterns/sparse.py",
        _LAYERS,
        (
            "oldest stride missing (stream)",
            "torch.arange(1, self.blocks,",
            "torch.arange(1, self.blocks - 1,",
        ),
        (
            "longest step back missing (stream)",
            "self.bits = (config.context - 1).bit_length()",
            "self.bits = (config.context - 2).bit_length()",
        ),
    ),
    *bugs(
        "model/patterns/folded.py",
        _FOLDED,
        ("a fold turns keys on, and not back", "cosines, -sines)", "cosines, sines)"),
        ("a fold turns keys back by the newest block", "(self.window + 1) * span +", "span +"),
        ("a window is one block wider", "rows // span - self.window  #", "rows // span - 2  #"),
        ("a group folds as its first head", "softmax(logits).mean(2)", "softmax(logits)[:, :, 0]"),
        (
            "the block itself judges what to keep",
            "first + self.window * span : last + self.window * span",
            "first:last",
        ),
    ),
)
