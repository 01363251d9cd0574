"""All metrics of the server. Names follow vLLM's where the meaning is the same."""

from __future__ import annotations

import platform

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

import concertina

disable_created_metrics()  # a line for each counter and bucket that nobody asks for

_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_STEP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_GAP = (*_STEP, 2.5, 5, 10, 20, 40, 80)
_LONG = (*_TTFT, 320, 640, 1280, 2560, 5120)
_TOKENS = (*(n * 10**power for power in range(6) for n in (1, 2, 5)), 10**6)
_FEW = (0, 1, 2, 5, 10, 20, 50)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, ("model_name", *labels), multiprocess_mode="livesum")


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, ("model_name",), buckets=buckets)


RUNNING = _gauge("concertina_streams_running", "Streams that hold a slot.")
WAITING = _gauge("concertina_streams_waiting", "Streams that wait for a slot.")
PAUSED = _gauge("concertina_streams_paused", "Streams parked until their reader catches up.")
STATE_BYTES = _gauge("concertina_state_bytes", "State of the running streams.", "kind")
STATE_LIMIT = _gauge(
    "concertina_state_limit_bytes", "Most that the admitted streams' largest states may add up to."
)
STATE_USAGE = Gauge(
    "concertina_state_usage_ratio",
    "Largest state that all admitted streams can reach, over its limit; of the fullest process.",
    ("model_name",),
    multiprocess_mode="livemax",
)
ADMITTED_BYTES = _gauge(
    "concertina_state_admitted_bytes", "Largest state that all admitted streams can reach."
)
BUFFER_BYTES = _gauge(
    "concertina_state_buffer_bytes", "Memory reserved for the state of all slots."
)
PROCESS_MEMORY = Gauge(
    "concertina_process_resident_memory_bytes",
    "Resident memory of the processes that hold an engine.",
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter("concertina_prompt_tokens", "Prompt tokens pushed.", ("model_name",))
LOOKED_UP_TOKENS = Counter(
    "concertina_prefix_cache_queries",
    "Prompt tokens looked up in the prefix cache.",
    ("model_name",),
)
SHARED_TOKENS = Counter(
    "concertina_prefix_cache_hits",
    "Prompt tokens taken from the prefix cache instead of being pushed.",
    ("model_name",),
)
PREFIX_BYTES = _gauge("concertina_prefix_cache_bytes", "Folded blocks kept for later prompts.")
DRAFT_TOKENS = Counter(
    "concertina_draft_tokens", "Draft tokens proposed.", ("model_name", "outcome")
)
GENERATION_TOKENS = Counter("concertina_generation_tokens", "Tokens drawn.", ("model_name",))
FINISHED = Counter(
    "concertina_streams_finished", "Streams that ended.", ("model_name", "finished_reason")
)
REFUSED = Counter(
    "concertina_requests_refused", "Requests refused at admission.", ("model_name", "reason")
)
PREEMPTED = Counter(
    "concertina_streams_preempted",
    "Running streams parked for a stream of higher priority.",
    ("model_name",),
)
FOLDS = Counter("concertina_folds", "Blocks folded into summaries.", ("model_name",))
TIME_TO_FIRST_TOKEN = _histogram(
    "concertina_time_to_first_token_seconds", "From acceptance to the first token.", _TTFT
)
INTER_TOKEN = _histogram(
    "concertina_inter_token_latency_seconds",
    "Time between two tokens of the running streams; observed once per step, not per token.",
    _GAP,
)
QUEUE_TIME = _histogram(
    "concertina_stream_queue_time_seconds", "From acceptance to the first work on it.", _TTFT
)
STREAM_TIME = _histogram(
    "concertina_e2e_stream_latency_seconds", "From acceptance to the end.", _LONG
)
STEP_TIME = Histogram(
    "concertina_step_seconds", "One pass of the model.", ("model_name", "phase"), buckets=_STEP
)
SNAPSHOT_TIME = Histogram(
    "concertina_snapshot_seconds", "Time to seal and store one snapshot.", buckets=_STEP
)
SNAPSHOT_BYTES = Counter("concertina_snapshot_bytes", "Bytes of stored snapshots, sealed.")
SNAPSHOT_FAILURES = Counter(
    "concertina_snapshot_failures", "Attempts to store a snapshot that failed."
)
STORE_UP = Gauge(
    "concertina_store_up",
    "0 while the snapshot store does not work; 1 otherwise, also without a store.",
    multiprocess_mode="livemin",
)
STORE_UP.set(1)
RESUMED = Counter(
    "concertina_streams_resumed",
    "Streams resumed by a reader, from memory or from the store.",
    ("model_name", "source"),
)
BATCH_SIZE = _histogram("concertina_step_batch_size", "Streams in one decode step.", _BATCH)
STEP_TOKENS = _histogram(
    "concertina_step_tokens", "Tokens that one decode step drew, accepted drafts included.", _BATCH
)
FOLD_TIME = _histogram(
    "concertina_fold_seconds", "One fold of full blocks of the batch; not those of prompts.", _STEP
)
PREFILL_TIME = _histogram(
    "concertina_stream_prefill_time_seconds",
    "From the first work on a stream to its first token.",
    _TTFT,
)
DECODE_TIME = _histogram(
    "concertina_stream_decode_time_seconds", "From the first token of a stream to its end.", _LONG
)
INFERENCE_TIME = _histogram(
    "concertina_stream_inference_time_seconds", "From the first work on a stream to its end.", _LONG
)
PER_TOKEN_TIME = _histogram(
    "concertina_stream_time_per_output_token_seconds",
    "From the first token of a stream to its end, over the tokens after the first.",
    _GAP,
)
STREAM_PROMPT_TOKENS = _histogram(
    "concertina_stream_prompt_tokens", "Prompt tokens of a stream that ended.", _TOKENS
)
STREAM_GENERATION_TOKENS = _histogram(
    "concertina_stream_generation_tokens", "Tokens drawn for a stream that ended.", _TOKENS
)
STREAM_PREEMPTIONS = _histogram(
    "concertina_stream_preemptions", "How often a stream that ended was preempted.", _FEW
)
CALLS = Counter(
    "concertina_calls", "Calls that ended, by gRPC method and status.", ("method", "status")
)
MODEL_INFO = _gauge(
    "concertina_model_info",
    "Engines that serve a model, with what it is.",
    *("version", "fingerprint", "attention"),
)
BUILD_INFO = Gauge(
    "concertina_build_info",
    "1, with the versions that run.",
    ("version", "python_version"),
    multiprocess_mode="livemax",
)
BUILD_INFO.labels(concertina.__version__, platform.python_version()).set(1)

_METHODS = (
    *("Generate", "Resume", "Score", "Pause", "Continue", "Fork", "Export", "Import", "Delete"),
    *("ListSessions", "ListModels", "GetModel", "Tokenize", "Detokenize"),
)
_REFUSALS = (
    *("CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
    *("UNAUTHENTICATED", "UNAVAILABLE", "INTERNAL"),
)
# A counter that appears with its first count hides that count from `rate()`.
for _method in _METHODS:
    CALLS.labels(_method, "OK")
for _status in _REFUSALS:
    CALLS.labels("Generate", _status)
