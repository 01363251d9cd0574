"""State in a device's memory does what state in NumPy does, and crosses to the host only on demand.

The same code runs here with the CPU as its device. The tests marked `gpu` run it on a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from server.bundles.bundle import Bundle, load_bundle
from server.checkpoint import SavedState
from server.config import ConfigError, EngineConfig, Provider
from server.engine.kv_cache import Cache
from server.errors import BundleError
from server.request import Request, prompt_of
from server.runtime import onnx_session as runtime
from server.runtime.device_state import DeviceRows
from server.runtime.onnx_session import Runtime
from tests.checkpoints import export_tiny, narrow_tiny
from tests.server.engines import DrivenModel, generate

SLOTS = 3
GPU_TOLERANCE = 0.02
"""Between float16 kernels of two providers: of any logit, as a part of the largest."""


@pytest.fixture(
    params=[
        *("fixed", "full", "logsparse", "folded:fitted"),
        *(
            pytest.param(pattern, marks=pytest.mark.slow)
            for pattern in ("mixture", "folded:max", "folded:tangent")
        ),
    ]
)
def bundle(request: pytest.FixtureRequest, tiny_bundles: Path) -> Bundle:
    """Bundles with float16 caches: all kinds of state, folded by block, by carry, or never."""
    return load_bundle(export_tiny(tiny_bundles, request.param, half=True))


@pytest.fixture
def fixed(tiny_bundles: Path) -> Bundle:
    return load_bundle(export_tiny(tiny_bundles, "fixed", half=True))


@pytest.fixture
def cpu_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the code for devices on the CPU."""
    monkeypatch.setitem(runtime.PROVIDERS, "cuda", ["CPUExecutionProvider"])
    monkeypatch.setitem(runtime.DEVICES, "cuda", "cpu")


def caches(bundle: Bundle, prefix_bytes: int = 0) -> list[Cache]:
    """A cache on the host and one on the device."""
    providers: tuple[Provider, ...] = ("cpu", "cuda")
    return [
        Cache(bundle, Runtime(bundle, SLOTS + 1, 1, provider), SLOTS, prefix_bytes)
        for provider in providers
    ]


def random_course(bundle: Bundle, seed: int, check: Callable[[Any, Any], None]) -> None:
    """Streams come, are prefilled, step, fold, are parked, restored and moved, in both alike."""
    rng = np.random.default_rng(seed)
    vocabulary = bundle.manifest.vocabulary
    both = caches(bundle, prefix_bytes=10**6)
    prompt = rng.integers(vocabulary, size=bundle.context)
    saved: list[list[SavedState]] = []
    for _ in range(80):
        host = both[0]
        action = rng.integers(6)
        if action == 0 and host.num_free:
            for cache in both:
                cache.begin()
        elif action == 1 and host.num_free:
            length = int(rng.integers(1, bundle.context - 4))
            for cache in both:
                cache.start_prefill(prompt)
            assert both[0].prefill_pushed == both[1].prefill_pushed
            while host.prefill_pushed < length:
                begin = host.prefill_pushed
                part = prompt[begin : min(length, begin + host.block_room)]
                check(*(cache.prefill(part, logits=True).copy() for cache in both))
            for cache in both:
                cache.join()
        elif action == 2 and host.num_running:
            row = int(rng.integers(host.num_running))
            saved.append([cache.save(row) for cache in both])
            for name, values in saved[-1][0].state.items():
                assert saved[-1][1].state[name].dtype == values.dtype
                check(values, saved[-1][1].state[name])
            for cache in both:
                cache.leave(row)
        elif action == 3 and host.num_free and saved:
            for cache, state in zip(both, saved.pop(), strict=True):
                cache.restore(state)
        elif host.num_running and host.pushed.max() < bundle.context:
            tokens = rng.integers(vocabulary, size=host.num_running)
            check(*(cache.step(tokens).copy() for cache in both))
            assert both[0].fold() == both[1].fold()
        elif host.num_running:
            row = int(host.pushed.argmax())
            for cache in both:
                cache.leave(row)


def assert_equal(host: Any, device: Any) -> None:
    assert host.shape == device.shape
    assert np.array_equal(host, device)


def assert_near(host: Any, device: Any) -> None:
    assert host.shape == device.shape
    if host.size:
        assert np.abs(host - device).max() <= GPU_TOLERANCE * max(1.0, np.abs(host).max())


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("seed", range(3))
def test_host_and_device_agree_in_any_order_of_operations(bundle: Bundle, seed: int) -> None:
    random_course(bundle, seed, assert_equal)


@pytest.mark.usefixtures("cpu_as_device")
def test_buffers_are_as_large_as_promised(bundle: Bundle) -> None:
    device = Runtime(bundle, 3, threads=1, provider="cuda")
    assert isinstance(device.rows, DeviceRows)
    assert device.nbytes == 3 * bundle.max_state_bytes


@pytest.mark.usefixtures("cpu_as_device")
def test_a_decoding_loop_sends_indices_and_gets_logits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whole blocks of two streams, or as many as it takes to fold, and a stream that leaves."""
    *_, cache = caches(bundle)
    fold = bundle.manifest.fold
    steps_taken = max(16, (bundle.span or 0) * (1 + fold.keep_first + fold.keep_newest))
    for _ in range(2):
        cache.begin()
    crossed: dict[str, int] = {}

    class Watched:
        """An I/O binding that records inputs from the host and outputs to it."""

        def __init__(self, session: ort.InferenceSession) -> None:
            self._io = ort.IOBinding(session)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._io, name)

        def bind_cpu_input(self, name: str, values: np.ndarray) -> None:
            crossed[name] = max(crossed.get(name, 0), values.size)
            self._io.bind_cpu_input(name, values)

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            if id(value) in views:
                crossed[name] = max(crossed.get(name, 0), views[id(value)].size)
            self._io.bind_ortvalue_input(name, value)

        def bind_ortvalue_output(self, name: str, value: Any) -> None:
            if id(value) in views:
                assert name == "logits", "only logits come to the host"
                crossed[name] = 0
            self._io.bind_ortvalue_output(name, value)

    def view(values: np.ndarray, *device: Any) -> Any:
        """Records host memory that a run reads or writes."""
        assert not device, "the loop copies a whole value to the device"
        value = from_numpy(values)
        alive.append(value)
        views[id(value)] = values
        return value

    def run(session: ort.InferenceSession, io: Any, *rest: Any) -> None:
        run_bound(session, getattr(io, "_io", io), *rest)

    def forbidden(*_: Any) -> None:
        raise AssertionError("the loop copies a whole value between host and device")

    run_bound = ort.InferenceSession.run_with_iobinding
    monkeypatch.setattr(ort.InferenceSession, "io_binding", lambda session: Watched(session))
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    monkeypatch.setattr(ort.InferenceSession, "run", forbidden)
    from_numpy, views, alive = ort.OrtValue.ortvalue_from_numpy, dict[int, np.ndarray](), []
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", view)
    monkeypatch.setattr(ort.OrtValue, "update_inplace", forbidden)
    monkeypatch.setattr(ort.OrtValue, "numpy", forbidden)
    folds = 0
    for _ in range(steps_taken):
        cache.step(np.zeros(cache.num_running, np.int64))
        folds += cache.fold()
    assert (folds > 0) == (bundle.span is not None)
    cache.leave(0)
    cache.step(np.zeros(1, np.int64))
    steps = {"tokens", "positions", "rows", "logits"}
    lengths = {"lengths", "longest", "entries"}
    assert steps <= crossed.keys()
    assert {name.partition(".")[0] for name in crossed.keys() - steps} <= lengths
    assert max(crossed.values()) <= 2 * (steps_taken + 1), "no more than the indices of what moves"


def test_a_missing_provider_names_the_package(fixed: Bundle) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=r"CUDAExecutionProvider; .* extra `gpu` in place"):
        Runtime(fixed, 1, provider="cuda")


def test_a_provider_that_does_not_start_is_an_error(
    fixed: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a driver, onnxruntime only warns and uses the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = ort.InferenceSession

    def on_the_cpu(path: Path, options: ort.SessionOptions, providers: list[str]) -> Any:
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    with pytest.raises(ConfigError, match="CUDAExecutionProvider did not start"):
        Runtime(fixed, 1, provider="cuda")


@pytest.mark.usefixtures("cpu_as_device")
def test_the_error_for_a_float32_bundle_names_the_export_option(fixed_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"state in float32, .* with --state float16"):
        Runtime(load_bundle(fixed_bundle), 1, provider="cuda")


@pytest.mark.usefixtures("cpu_as_device")
def test_int8_caches_are_refused_by_name_on_a_device(fixed_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"state in int8, .* with --state float16"):
        Runtime(load_bundle(narrow_tiny(fixed_bundle)), 1, provider="cuda")


@pytest.mark.usefixtures("cpu_as_device")
def test_graphs_that_move_state_do_not_make_int8_caches_fit(fixed: Bundle) -> None:
    narrowed = load_bundle(narrow_tiny(fixed.folder))
    assert narrowed.moves_on_devices and narrowed.cache_type == "int8"
    with pytest.raises(BundleError, match=r"state in int8, .* with --state float16"):
        Runtime(narrowed, 1, provider="cuda")


@pytest.mark.usefixtures("cpu_as_device")
async def test_an_engine_generates_the_same_on_a_device(fixed: Bundle) -> None:
    outcomes = []
    start = prompt_of(fixed.manifest.vocabulary, [], fixed.typecode)
    providers: tuple[Provider, ...] = ("cpu", "cuda")
    for provider in providers:
        model = DrivenModel(fixed, EngineConfig(slots=2, threads=1, provider=provider))
        try:
            outcomes.append(await generate(model, Request(start, max_tokens=20)))
        finally:
            model.close()
    assert outcomes[0].tokens == outcomes[1].tokens and len(outcomes[0].tokens) == 20


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="no onnxruntime for GPUs"
)
def test_a_gpu_agrees_with_the_cpu(bundle: Bundle) -> None:
    for seed in range(3):
        random_course(bundle, seed, assert_near)
