"""The entry to every endpoint that takes a JSON body: admission, the body, its fields, then the handler.

Owns: the order of these steps, and the handler's argument. Leaves to others: the tenant (auth.py), admission and bodies
(intake.py), JSON (body.py).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.controller.gateway.api.auth import TENANT, check_admin
from lorafleet.controller.gateway.api.body import Body, decode
from lorafleet.controller.gateway.api.ignored_fields import IGNORED_FIELDS
from lorafleet.controller.gateway.api.intake import Place
from lorafleet.controller.gateway.api.request_id import REQUEST_ID, take_id
from lorafleet.controller.gateway.api.state import STATE, GatewayState
from lorafleet.controller.gateway.tenants import Tenant

_T = TypeVar("_T")
_F = TypeVar("_F", bound=msgspec.Struct)
_F_co = TypeVar("_F_co", bound=msgspec.Struct, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[_F_co]):
    """One request after admission and decoding."""

    request: web.Request
    state: GatewayState
    tenant: Tenant
    place: Place
    num_bytes: int  # of the body
    fields: _F_co

    @property
    def request_id(self) -> str:
        return self.request[REQUEST_ID]

    async def in_thread(self, function: Callable[[], _T]) -> _T:
        """Run a call that may take long on this body off the event loop, in the tenant's turn."""
        return await self.state.in_thread(self.tenant, self.num_bytes, function)

    async def parse(self, function: Callable[[], _T]) -> _T:
        """Run a call that takes long only on a large body: off the event loop if it is one."""
        return await self.state.parse(self.tenant, self.num_bytes, function)


def takes(
    kind: type[_F], check: Callable[[_F], object] = lambda fields: None, *, admin: bool = False
) -> Callable[[Callable[[Call[_F]], Awaitable[web.StreamResponse]]], Handler]:
    """Make a handler of a function that takes a body of `kind`.

    check: raises the errors of fields that contradict each other. admin: only administrators may call it. The request
    keeps its place until the function returns.
    """

    def open_to(answer: Callable[[Call[_F]], Awaitable[web.StreamResponse]]) -> Handler:
        @functools.wraps(answer)
        async def handle(request: web.Request) -> web.StreamResponse:
            if admin:
                check_admin(request)
            state, tenant = request.app[STATE], request[TENANT]
            with state.intake.enter(request) as place:
                body = await place.read_body()

                def decode_and_check() -> Body[_F]:
                    decoded = decode(body, kind, strict=state.config.strict_fields)
                    check(decoded.fields)
                    return decoded

                read = await state.parse(tenant, len(body), decode_and_check)
                fields = read.fields
                if read.ignored:
                    request[IGNORED_FIELDS] = state.ignored_fields.text(read.ignored)
                take_id(request, getattr(fields, "request_id", None))
                return await answer(
                    Call(request=request, state=state, tenant=tenant, place=place, num_bytes=len(body), fields=fields)
                )

        return handle

    return open_to
