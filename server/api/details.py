"""What a refusal says to programs, as trailing metadata: our own `Error`, and Google's details."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from server.api.convert import duration, error_message
from server.errors import RequestError

OWN: Final = "concertina-error-bin"
GOOGLES: Final = "grpc-status-details-bin"
_DOMAIN: Final = "concertina"


def refusal_metadata(error: RequestError) -> list[tuple[str, str | bytes]]:
    """Trailing metadata of a call that is refused with this error."""
    code = grpc.StatusCode[error.status].value[0]
    status = status_pb2.Status(code=code, message=error.message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    own = error_message(error).SerializeToString()
    return [(OWN, own), (GOOGLES, status.SerializeToString())]


def _details(error: RequestError) -> list[Message]:
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)
    details: list[Message] = [info]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.limit is not None:
        info.metadata["limit"] = f"{error.limit:.17g}"
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    return details
