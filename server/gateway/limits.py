"""The limits of a request that the gateway answers itself: its headers and its body."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request

from configs.schema import GatewayConfig
from server.gateway.client import read_body
from server.gateway.protocol import read_head


def limited_head(config: GatewayConfig) -> Any:
    """A dependency of routes: headers within `gateway.max_header_bytes`."""

    def check(request: Request) -> None:
        read_head(request.scope, config.max_header_bytes)

    return Depends(check)


async def body_of_request(request: Request, config: GatewayConfig, limit: int) -> bytes:
    """The whole body of a request, within `limit` bytes and `gateway.max_body_bytes`.

    Raises:
        BodyTooLargeError: it is larger.
        RequestTimeoutError: it did not come within `gateway.client_timeout_s`.
        ClientGoneError: the client hung up.
    """
    head = read_head(request.scope)
    return await read_body(
        request.receive,
        head.content_length,
        min(limit, config.max_body_bytes),
        config.client_timeout_s,
    )
