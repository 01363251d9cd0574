"""llama.cpp through llama-cpp-python: a GGUF file as it is, or in f32, q8_0 or q4_0.

The other types are made of it by llama.cpp; without a file, of random weights of our size.
"""

from __future__ import annotations

import time

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize

from loadtest.bench.adapters.adapter import FirstToken, Session, Setting, TooLong, Window

_EPSILON = 1e-5
_PREFILL_CHUNK = 512
_PROBE_CHUNKS = 4
_KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
_FILE_TYPES = {
    "float32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def prepare(setting: Setting) -> None:
    """See Adapter."""
    setting.folder.mkdir(parents=True)
    if setting.source is not None:
        _retype(setting)
        return
    shape, random = setting.shape, np.random.default_rng(0)
    writer = gguf.GGUFWriter(_path(setting), "llama")
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.gated_mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(_EPSILON)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    width, hidden = shape.width, shape.gated_mlp

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        if setting.weights in _KINDS:
            kind = _KINDS[setting.weights]
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(width, np.float32))

    matrix("token_embd.weight", shape.vocabulary, width)
    for layer in range(shape.layers):
        norm(f"blk.{layer}.attn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{part}.weight", width, width)
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", hidden, width)
        matrix(f"blk.{layer}.ffn_up.weight", hidden, width)
        matrix(f"blk.{layer}.ffn_down.weight", width, hidden)
    norm("output_norm.weight")
    matrix("output.weight", shape.vocabulary, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _retype(setting: Setting) -> None:
    """Write the source in the setting's type; to float32, nothing is lost."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _FILE_TYPES[setting.weights]
    parameters.nthread, parameters.allow_requantize = setting.threads, True
    failed = llama_cpp.llama_model_quantize(
        str(setting.source).encode(), _path(setting).encode(), parameters
    )
    if failed:
        raise RuntimeError(f"llama_model_quantize gave {failed} for {setting.source}")


def open_session(setting: Setting) -> Session:
    """See Adapter. One stream is prefilled, the others are copies of it."""
    session = _Context(setting)
    session.prefill(setting.context)
    return session


def open_prompt(setting: Setting) -> FirstToken:
    """See Adapter."""
    session = _Context(setting)

    def first_token() -> float:
        session.clear()
        began = time.perf_counter()
        session.prefill(setting.context)
        return time.perf_counter() - began

    session.prefill(8)
    return first_token


class _Context:
    """Streams of their own caches (`kv_unified` off), so that each is read whole at every step."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            _path(setting).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = setting.streams * (setting.context + setting.room)
        parameters.n_seq_max = setting.streams
        parameters.n_batch = parameters.n_ubatch = _PREFILL_CHUNK
        parameters.n_threads = parameters.n_threads_batch = setting.threads
        parameters.kv_unified = False
        if setting.state == "float32":
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise MemoryError("llama.cpp cannot allocate the context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_PREFILL_CHUNK, 0, 1)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        entries = self._setting.context + self._setting.room
        return self._setting.shape.entry_bytes(self._setting.state) * entries

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def prefill(self, tokens: int) -> None:
        """Push a random prompt of `tokens` to the first stream, and copy it to the others."""
        ids = np.random.default_rng(0).integers(2, self._setting.shape.vocabulary, size=tokens)
        began = time.perf_counter()
        for number, begin in enumerate(range(0, tokens, _PREFILL_CHUNK)):
            chunk = ids[begin : begin + _PREFILL_CHUNK].tolist()
            last = begin + len(chunk) == tokens
            self._push([(t, begin + i, 0) for i, t in enumerate(chunk)], [len(chunk) - 1] * last)
            if number == _PROBE_CHUNKS:
                took = time.perf_counter() - began
                # Attention, which is what takes long, grows with the square.
                whole = took * (tokens / (begin + len(chunk))) ** 2 / 2
                if whole > self._setting.open_s:
                    raise TooLong(
                        f"its context would take about {whole / 60:.0f} min to compute, and may "
                        f"take {self._setting.open_s / 60:.0f} (--open-limit)"
                    )
        for stream in range(1, self._setting.streams):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, stream, -1, -1)

    def decode(self, steps: int) -> Window:
        """See Session."""
        streams, context = self._setting.streams, self._setting.context
        for stream in range(streams):
            llama_cpp.llama_memory_seq_rm(self._memory, stream, context, -1)
        tokens = [2] * streams
        began = time.perf_counter()
        for position in range(context, context + steps):
            rows = list(range(streams))
            self._push([(tokens[row], position, row) for row in rows], rows)
            tokens = [self._likeliest(row) for row in rows]
        return Window(steps * streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""

    def _push(self, tokens: list[tuple[int, int, int]], wanted: list[int]) -> None:
        """Push (token, position, stream), with logits for the rows `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, (token, position, stream) in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
            batch.logits[row] = row in wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._setting.shape.vocabulary,)).argmax())


def _path(setting: Setting) -> str:
    return str(setting.folder if setting.folder.is_file() else setting.folder / "model.gguf")
