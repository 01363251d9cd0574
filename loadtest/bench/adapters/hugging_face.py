"""Transformers on PyTorch, decoded greedily over its static cache.

The model is a pretrained one, or a Llama of our size.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from loadtest.bench.adapters.adapter import FirstToken, Session, Setting, Window
from loadtest.bench.plan import Shape

_POSITIONS = 1 << 17
_PREFILL_CHUNK = 2048  # the mask of a whole long prompt would not fit into memory


def llama_config(shape: Shape) -> LlamaConfig:
    """A Llama with as many weights as our decoder, whose MLP has no gate."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.gated_mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=_POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )


def prepare(setting: Setting) -> None:
    """See Adapter."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(setting.shape)).save_pretrained(setting.folder)


def open_session(setting: Setting) -> Session:
    """See Adapter."""
    return _Static(setting, setting.context)


def open_prompt(setting: Setting) -> FirstToken:
    """See Adapter. The prompt goes in by chunks of 2,048 tokens."""
    session = _Static(setting, context=0)
    session.decode(1)

    def first_token() -> float:
        prompt = session.tokens(torch.randint(setting.shape.vocabulary, (1, setting.context)))
        began = time.perf_counter()
        session.rewind()
        for chunk in prompt.split(_PREFILL_CHUNK, dim=1):
            session.push(chunk)
        session.wait()
        return time.perf_counter() - began

    return first_token


class _Static:
    def __init__(self, setting: Setting, context: int) -> None:
        torch.set_num_threads(setting.threads)
        self._streams, self._context = setting.streams, context
        weights, state = getattr(torch, setting.weights), getattr(torch, setting.state)
        self._device = torch.device(setting.device)
        loaded = AutoModelForCausalLM.from_pretrained(
            setting.folder, dtype=weights, attn_implementation="sdpa"
        )
        self._model = loaded.eval().to(self._device)
        room = setting.context + setting.room
        self._cache = StaticCache(config=self._model.config, max_cache_len=room)
        shape = setting.shape
        self._cache.early_initialization(
            batch_size=setting.streams,
            num_heads=shape.cached_heads,
            head_dim=shape.head_dim,
            dtype=state,
            device=self._device,
        )
        for layer in self._cache.layers:
            layer.keys.fill_(0.01)
            layer.values.fill_(0.01)

    @property
    def cache_bytes(self) -> int:
        """See Session."""
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)
        return int(held) // self._streams

    def decode(self, steps: int) -> Window:
        """See Session."""
        self.rewind()
        tokens = self.tokens(torch.zeros(self._streams, 1, dtype=torch.int64))
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            tokens = self.push(tokens)
        self.wait()
        return Window(steps * self._streams, time.perf_counter() - began)

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """The same, where the model computes."""
        return values.to(self._device)

    def wait(self) -> None:
        """Until a card has done what it was told."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def rewind(self) -> None:
        """Forget what was decoded after the context."""
        self._seen = self._context
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._seen)

    @torch.inference_mode()
    def push(self, tokens: torch.Tensor) -> torch.Tensor:
        """Push `tokens[B, T]`; the likeliest next ones, `[B, 1]`."""
        end = self._seen + tokens.shape[1]
        positions = torch.arange(self._seen, end, device=self._device)[None]
        self._seen += tokens.shape[1]
        out = self._model(
            input_ids=tokens,
            position_ids=positions.expand(len(tokens), -1),
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        following: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return following

    def close(self) -> None:
        """See Session."""
