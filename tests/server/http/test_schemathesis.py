"""The OpenAPI document, held against what a gateway answers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from server.http.openapi import document
from tests.server.http.gateways import Front

# Whether it is installed where it should be is found by tests/test_pins.py.
schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

EXAMPLES = 25
CHECKS = [
    pytest.importorskip("schemathesis.checks").not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
CONTENTS = ["", "a", [], [{"type": "text", "text": "b"}] * 2]
# Of values that fit, the few that this server knows: the document names no models and no limits of
# theirs, and most others are refused.
KNOWN: dict[str, dict[str, Any]] = {
    "model": {"enum": ["tiny-text"]},
    "prompt": {"enum": ["", "ab", [97], ["a", "b"], [[97], [98]]]},
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": 2,
        "items": {"enum": [{"role": "user", "content": each} for each in CONTENTS]},
    },
    "max_tokens": {"enum": [8]},
    "max_completion_tokens": {"enum": [8]},
    "min_tokens": {"enum": [0, 1]},
    "n": {"enum": [1, 2]},
    "stop_token_ids": {"enum": [[], [10]]},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
}
IMAGES = {
    "model": {"enum": ["tiny-image"]},
    "prompt": {"enum": ["", "circle"]},
    "size": {"enum": ["auto", "8x8"]},
    "n": {"enum": [1, 2]},
}
# What excludes something else, or needs it, or knows tokens. Other tests are about these.
APART = ("response_format", "structured_outputs", "guided_", "keep", "stream_options")
APART += ("logit_bias", "allowed_token_ids", "top_logprobs", "label")


def _known() -> dict[str, Any]:
    """The document, without what no example of would be answered."""
    told = deepcopy(document())
    for path, operations in told["paths"].items():
        known = IMAGES if "images" in path else KNOWN
        for operation in operations.values():
            for each in operation["parameters"]:
                each["schema"] = known.get(each["name"], each["schema"])
            for body in operation.get("requestBody", {}).get("content", {}).values():
                body["schema"]["properties"] = {
                    name: known.get(name, each)
                    for name, each in body["schema"]["properties"].items()
                    if not name.startswith(APART)
                }
                body["schema"]["required"].append("model")
    return told


def _operations(told: dict[str, Any]) -> dict[str, Any]:
    found = (each.ok() for each in schemathesis.openapi.from_dict(told).get_all_operations())
    return {f"{each.method.upper()} {each.path}": each for each in found}


FITTING, ANY = _operations(_known()), _operations(document())


def _check(operation: Any, mode: Any, front: Front) -> set[int]:
    """The statuses of examples, which are checked."""
    statuses = set[int]()
    held = CHECKS if mode.is_positive else [*CHECKS, checks.negative_data_rejection]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def ask(case: Any) -> None:
        answer = case.call_and_validate(f"http://127.0.0.1:{front.port}", checks=held)
        statuses.add(answer.status_code)

    ask()
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTING)
def test_what_fits_it_is_answered_as_it_says(name: str, front: Front) -> None:
    statuses = _check(FITTING[name], schemathesis.GenerationMode.POSITIVE, front)
    assert 200 in statuses or "{stream_id}" in name, statuses


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ANY if name.startswith("POST")])
def test_what_does_not_fit_it_is_refused(name: str, front: Front) -> None:
    assert 400 in _check(ANY[name], schemathesis.GenerationMode.NEGATIVE, front)
