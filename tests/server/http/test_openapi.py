"""The OpenAPI document: that it is served, and leaves out no route."""

from __future__ import annotations

from server.http.application import ROUTES
from server.http.openapi import document
from server.http.page.routes import PAGE_ROUTES
from tests.server.http.gateways import Front


def test_it_is_served_and_knows_every_route(front: Front) -> None:
    told = front.call("GET", "/openapi.json").json
    assert told == document()
    known = {
        (method.upper(), path)
        for path, operations in told["paths"].items()
        for method in operations
    }
    offered = [route for route in ROUTES if route not in PAGE_ROUTES]  # the page's are its own
    routes = {(method, path.replace(":path}", "}")) for method, path, _ in offered}
    assert known == routes | {("GET", "/openapi.json")}
