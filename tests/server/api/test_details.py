"""What a refusal says to programs."""

from __future__ import annotations

import math

import pytest
from google.rpc import error_details_pb2, status_pb2

from concertina.v1 import generation_service_pb2 as pb
from server.api.details import GOOGLES, OWN, refusal_metadata
from server.errors import InvalidRequest, Overloaded, RequestError, UnknownModel


def google(error: RequestError) -> tuple[status_pb2.Status, dict[str, object]]:
    """The status, and its details by the names of their types."""
    status = status_pb2.Status.FromString(dict(refusal_metadata(error))[GOOGLES])
    kinds = (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
    )
    found: dict[str, object] = {}
    for packed in status.details:
        for kind in kinds:
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    assert len(found) == len(status.details)
    return status, found


def test_a_field_and_its_limit_are_named() -> None:
    error = InvalidRequest("output.n is 9; it must be at most 8", field="output.n", limit=8)
    status, found = google(error)
    assert (status.code, status.message) == (3, error.message)
    (violation,) = found["BadRequest"].field_violations  # type: ignore[attr-defined]
    assert (violation.field, violation.description) == ("output.n", error.message)
    info = found["ErrorInfo"]
    assert info == error_details_pb2.ErrorInfo(
        reason="InvalidRequest", domain="concertina", metadata={"limit": "8"}
    )
    own = pb.Error.FromString(dict(refusal_metadata(error))[OWN])
    expected = pb.Error(code="INVALID_ARGUMENT", message=error.message, field="output.n", limit=8)
    assert own == expected


def test_the_time_to_wait_is_named() -> None:
    status, found = google(Overloaded("full", 1.5))
    assert status.code == 8
    assert found.keys() == {"ErrorInfo", "RetryInfo"}
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", [0.0, 1e-9, 2.0**53, -2.0, math.pi])
def test_a_limit_is_the_number_itself(limit: float) -> None:
    _, found = google(InvalidRequest("no", field="x", limit=limit))
    assert float(found["ErrorInfo"].metadata["limit"]) == limit  # type: ignore[attr-defined]


def test_what_is_absent_is_absent() -> None:
    _, found = google(UnknownModel("no"))
    assert found.keys() == {"ErrorInfo"}
