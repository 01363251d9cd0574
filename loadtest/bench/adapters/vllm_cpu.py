"""vLLM on the CPU: the folder of transformers in its engine, in this process, decoded greedily."""

from __future__ import annotations

import os
import time
from itertools import count

# Before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import KVTransferConfig

from loadtest.bench.adapters.adapter import FirstToken, Session, Setting, Window
from loadtest.bench.adapters.hugging_face import prepare

__all__ = ["open_prompt", "open_session", "prepare"]

_GIBIBYTE = 1 << 30
_COMPUTED_TOKENS = 8192
"""Tokens of all streams together that are computed anew for each pass."""


def open_session(setting: Setting) -> Session:
    """See Adapter. A long context is filled in by vLLM's own connector for such measurements."""
    return _Engine(setting)


def open_prompt(setting: Setting) -> FirstToken:
    """See Adapter."""
    engine, seeds = _open(setting, made_up=False), count(1)

    def first_token() -> float:
        prompt = _prompt(setting, setting.context, next(seeds))
        began = time.perf_counter()
        engine.add_request(str(began), {"prompt_token_ids": prompt}, _sampling(1))
        while not any(out.outputs[0].token_ids for out in engine.step()):
            pass
        return time.perf_counter() - began

    _drain(engine, setting)
    return first_token


class _Engine:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._engine = _open(setting, setting.context * setting.streams > _COMPUTED_TOKENS)
        self._names = count()
        self._running: list[str] = []

    @property
    def cache_bytes(self) -> int:
        """See Session. Computed: the blocks of all streams lie in one pool."""
        setting = self._setting
        return setting.shape.entry_bytes(setting.state) * (setting.context + setting.room)

    def decode(self, steps: int) -> Window:
        """See Session. Streams begin anew, and the steps of their prompts are not timed."""
        self._begin()
        began, tokens = time.perf_counter(), 0
        for _ in range(steps):
            tokens += len(self._engine.step())
        took = time.perf_counter() - began
        if tokens != steps * self._setting.streams:
            raise RuntimeError(f"{tokens} tokens came in {steps} steps")
        return Window(tokens, took)

    def close(self) -> None:
        """See Session."""

    def _begin(self) -> None:
        setting = self._setting
        self._engine.abort_request(self._running)
        self._running = [str(next(self._names)) for _ in range(setting.streams)]
        for stream, name in enumerate(self._running):
            prompt = _prompt(setting, setting.context, seed=stream)
            self._engine.add_request(
                name, {"prompt_token_ids": prompt}, _sampling(setting.room - 1)
            )
        seen: set[str] = set()
        while len(seen) < setting.streams:  # all have their first token, and decode
            seen |= {out.request_id for out in self._engine.step()}


def _open(setting: Setting, made_up: bool) -> LLMEngine:
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    cache = setting.streams * (setting.context + setting.room)
    cache *= setting.shape.entry_bytes(setting.state)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cache // _GIBIBYTE + 1)
    transfer = KVTransferConfig(kv_connector="DecodeBenchConnector", kv_role="kv_both")
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(setting.folder),
            dtype=setting.weights,
            skip_tokenizer_init=True,
            max_model_len=setting.context + setting.room,
            max_num_seqs=setting.streams,
            enable_prefix_caching=False,
            disable_log_stats=True,
            async_scheduling=False,  # a step then gives the tokens of its own pass
            kv_transfer_config=transfer if made_up else None,
        )
    )


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _prompt(setting: Setting, tokens: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(2, setting.shape.vocabulary, size=tokens)
    return [int(token) for token in ids]


def _drain(engine: LLMEngine, setting: Setting) -> None:
    """A short request, for what is set up with the first one."""
    engine.add_request("warm", {"prompt_token_ids": _prompt(setting, 8, 0)}, _sampling(2))
    while engine.has_unfinished_requests():
        engine.step()
