"""onnxruntime-genai: a Llama of our size through its own model builder and generator."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import onnxruntime_genai as og
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loadtest.bench.adapters.adapter import Session, Setting, Window
from loadtest.bench.adapters.hugging_face import llama_config
from loadtest.bench.plan import Shape

_CONFIG = "genai_config.json"


def prepare(setting: Setting) -> None:
    """See Adapter."""
    source, cache = setting.folder / "transformers", setting.folder / "cache"
    LlamaForCausalLM(llama_config(setting.shape)).save_pretrained(source)
    _byte_tokenizer(setting.shape).save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command += ["-i", str(source), "-o", str(setting.folder), "-c", str(cache)]
    subprocess.run(command, check=True, capture_output=True)
    path = setting.folder / _CONFIG
    config = json.loads(path.read_text())
    config["search"]["past_present_share_buffer"] = True
    path.write_text(json.dumps(config))


def open_session(setting: Setting) -> Session:
    """See Adapter. A context can only be reached by computing it."""
    return _Generator(setting)


def first_token_s(setting: Setting) -> float:
    """See Adapter."""
    model = _load(setting)
    _generator(model, setting, tokens=8).generate_next_token()
    generator = og.Generator(model, _parameters(model, setting))
    began = time.perf_counter()
    generator.append_tokens(_prompt(setting, setting.context))
    generator.generate_next_token()
    return time.perf_counter() - began


class _Generator:
    """Windows follow each other: only a single stream can be rewound."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._generator = _generator(_load(setting), setting, setting.context)

    @property
    def cache_bytes(self) -> int:
        """See Session. Computed: the buffers cannot be seen from here."""
        return self._setting.shape.entry_bytes * (self._setting.context + self._setting.room)

    def decode(self, steps: int) -> Window:
        """See Session."""
        began = time.perf_counter()
        for _ in range(steps):
            self._generator.generate_next_token()
        return Window(steps * self._setting.streams, time.perf_counter() - began)

    def close(self) -> None:
        """See Session."""


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


def _generator(model: og.Model, setting: Setting, tokens: int) -> og.Generator:
    generator = og.Generator(model, _parameters(model, setting))
    generator.append_tokens(_prompt(setting, tokens))
    return generator


def _prompt(setting: Setting, tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    shape = (setting.streams, tokens)
    ids = np.random.default_rng(0).integers(2, setting.shape.vocabulary, size=shape)
    return ids.astype(np.int32)


def _byte_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """The builder asks for one; it is not used."""
    words = WordLevel({str(token): token for token in range(shape.vocabulary)}, unk_token="1")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="0", eos_token="1", unk_token="1"
    )
