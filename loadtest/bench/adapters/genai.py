"""onnxruntime-genai, through its own model builder and generator.

The model is a pretrained one, or a Llama of our size.

In the mode `graph`, the exported graph runs alone, in the onnxruntime that the generator uses, over
a cache that is made up: computing a long context for many streams takes hours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import count

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loadtest.bench.adapters.adapter import FirstToken, Session, Setting, Window
from loadtest.bench.adapters.hugging_face import llama_config
from loadtest.bench.plan import Shape

Tokens = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_CONFIG, _TOKENIZER = "genai_config.json", "tokenizer.json"
_PRECISIONS = {"float32": ["-p", "fp32"], "int4": ["-p", "int4"]}
_ROUNDED = "accuracy_level=4"  # activations in int8: the fastest kernels
_DRIFT = 64
"""Tokens beyond its context up to which a window may begin, where the context is soon computed."""
_SOON = 8192
_ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def prepare(setting: Setting) -> None:
    """See Adapter."""
    source, cache = setting.folder / "transformers", setting.folder / "cache"
    if setting.source is None:
        LlamaForCausalLM(llama_config(setting.shape)).save_pretrained(source)
    else:
        source.mkdir(parents=True)
        for file in setting.source.iterdir():
            (source / file.name).symlink_to(file.resolve())
    if not (source / _TOKENIZER).exists():
        _byte_tokenizer(setting.shape).save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    command += [*_PRECISIONS[setting.weights], "-i", str(source), "-o", str(setting.folder)]
    command += ["-c", str(cache)]
    if setting.weights != "float32":
        command += ["--extra_options", _ROUNDED]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        last = (built.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"the model builder ended with {built.returncode}: {last}")
    path = setting.folder / _CONFIG
    config = json.loads(path.read_text())
    config["search"]["past_present_share_buffer"] = True
    path.write_text(json.dumps(config))


def open_session(setting: Setting) -> Session:
    """See Adapter. The generator can only reach a context by computing it."""
    return _Graph(setting) if setting.mode == "graph" else _Generator(setting)


def open_prompt(setting: Setting) -> FirstToken:
    """See Adapter."""
    model, seeds = _load(setting), count(1)
    _generator(model, setting, _prompt(setting, 8)).generate_next_token()

    def first_token() -> float:
        prompt = _prompt(setting, setting.context, next(seeds))
        generator = og.Generator(model, _parameters(model, setting))
        began = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return time.perf_counter() - began

    return first_token


class _Generator:
    """Passes follow each other, since only a single stream can be rewound.

    A new generator begins where the last has no room left, and soon where the context is short.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = _load(setting)
        self._generator: og.Generator = None
        self._renew()

    @property
    def cache_bytes(self) -> int:
        """See Session. Computed: the buffers cannot be seen from here."""
        return _cache_bytes(self._setting)

    def decode(self, steps: int) -> Window:
        """See Session."""
        setting = self._setting
        soon = setting.context * setting.streams <= _SOON
        if self._decoded + steps >= setting.room or (soon and self._decoded > _DRIFT):
            self._renew()
        self._decoded += steps
        began = time.perf_counter()
        for _ in range(steps):
            self._generator.generate_next_token()
        return Window(steps * setting.streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""

    def _renew(self) -> None:
        self._generator = None  # two caches would be too much
        prompt = _prompt(self._setting, self._setting.context)
        self._generator = _generator(self._model, self._setting, prompt)
        self._generator.generate_next_token()
        self._decoded = 1


class _Graph:
    """The exported graph, with keys and values bound in place as the generator binds them."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
        config = json.loads((setting.folder / _CONFIG).read_text())
        path = setting.folder / config["model"]["decoder"]["filename"]
        self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._streams, capacity = setting.streams, setting.context + setting.room
        self._cache_bytes = 0
        self._mask = np.ones((setting.streams, capacity), np.int64)
        self._binding = self._session.io_binding()
        self._logits = np.empty((setting.streams, 1, setting.shape.vocabulary), np.float32)
        logits = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._binding.bind_ortvalue_output("logits", logits)
        shape = (setting.streams, setting.shape.cached_heads, capacity, setting.shape.head_dim)
        self._inputs = {each.name for each in self._session.get_inputs()}
        for each in self._session.get_inputs():
            if not each.name.startswith("past_key_values."):
                continue
            cache = np.full(shape, 0.01, _ELEMENTS[each.type])
            self._cache_bytes += cache.nbytes
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self._binding.bind_ortvalue_input(each.name, value)
            present = each.name.replace("past_key_values", "present")
            self._binding.bind_ortvalue_output(present, value)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        return self._cache_bytes // self._streams

    def decode(self, steps: int) -> Window:
        """See Session."""
        tokens: Tokens = np.full((self._streams, 1), 2, np.int64)
        began = time.perf_counter()
        for seen in range(self._setting.context, self._setting.context + steps):
            tokens = self._step(tokens, seen)
        return Window(steps * self._streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""

    def _step(self, tokens: Tokens, seen: int) -> Tokens:
        """Push `tokens[B, 1]` after `seen` others; the likeliest next ones."""
        self._binding.bind_cpu_input("input_ids", tokens)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, : seen + 1].copy())
        if "position_ids" in self._inputs:
            self._binding.bind_cpu_input("position_ids", np.full_like(tokens, seen))
        self._session.run_with_iobinding(self._binding)
        following: Tokens = self._logits.argmax(-1)
        return following


def _cache_bytes(setting: Setting) -> int:
    return setting.shape.entry_bytes(setting.state) * (setting.context + setting.room)


def _load(setting: Setting) -> og.Model:
    og.disable_telemetry_events()
    config = og.Config(str(setting.folder))
    options = {"intra_op_num_threads": setting.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def _parameters(model: og.Model, setting: Setting) -> og.GeneratorParams:
    parameters = og.GeneratorParams(model)
    most = setting.context + setting.room
    parameters.set_search_options(
        batch_size=setting.streams, max_length=most, min_length=most, do_sample=False
    )
    return parameters


def _generator(
    model: og.Model, setting: Setting, prompt: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
) -> og.Generator:
    generator = og.Generator(model, _parameters(model, setting))
    generator.append_tokens(prompt)
    return generator


def _prompt(
    setting: Setting, tokens: int, seed: int = 0
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    shape = (setting.streams, tokens)
    ids = np.random.default_rng(seed).integers(2, setting.shape.vocabulary, size=shape)
    return ids.astype(np.int32)


def _byte_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """The builder asks for one; it is not used."""
    words = WordLevel({str(token): token for token in range(shape.vocabulary)}, unk_token="1")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="0", eos_token="1", unk_token="1"
    )
