# ruff: noqa: T201 - an example prints
"""A taxi dispatcher: each caller is a session, tools look up prices and send cars, and the order comes as a value.

python examples/taxi.py --simulate
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import trio
from _client import open_example_client, staged
from msgspec import Struct

import gorouter_trio as gr
from gorouter_trio.security import Principal, ToolRules

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEM = (
    "You are the dispatcher of a small taxi company. Ask for what is missing, look up the price before you send a car, "
    "and never promise anything that a tool has not confirmed."
)

KM = {("harbour", "station"): 4, ("station", "airport"): 19, ("harbour", "airport"): 23}


class Ride(Struct, frozen=True):
    """What was agreed with the caller."""

    pickup: str
    destination: str
    price_eur: Decimal
    car: Literal["standard", "van"]


class Fleet:
    """The cars that are free. Tools are methods of what they work on; two callers never get the same car."""

    def __init__(self, cars: Sequence[str]) -> None:
        self._free = list(cars)
        self.sent: dict[str, str] = {}

    async def send(self, session: str) -> str:
        """A free car, or the news that there is none."""
        await trio.sleep(0.05)
        if not self._free:
            raise gr.ToolError("no car is free; one will be in about ten minutes")
        self.sent[session] = self._free.pop(0)
        return self.sent[session]


def tools_of(fleet: Fleet) -> list[gr.AnyTool]:
    """What the model may do."""

    @gr.tool(idempotent=True)
    async def price(pickup: str, destination: str) -> dict[str, str]:
        """What a ride costs.

        Args:
            pickup: Where the caller is.
            destination: Where the caller wants to go.
        """
        km = KM.get((pickup, destination)) or KM.get((destination, pickup))
        if km is None:
            raise gr.ToolError(f"no distance known from {pickup} to {destination}; ask for a place nearby")
        return {"price_eur": str(Decimal("3.90") + Decimal("1.80") * km)}

    @gr.tool(rules=ToolRules(sensitive=True))
    async def send_car(pickup: str, *, ctx: gr.ToolContext) -> str:
        """Send a car to the caller. Only when the caller has agreed to the price.

        Args:
            pickup: Where the car is to go.
        """
        return f"car {await fleet.send(ctx.session or '')} is on its way to {pickup}"

    return [price, send_car]


async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
    """What the person at the desk is asked before a car is sent; here they always agree to the harbour."""
    approved = json.loads(request.arguments)["pickup"] == "harbour"
    reason = "" if approved else "we do not go there at night"
    return gr.ApprovalDecision(request=request, approved=approved, reason=reason, by="desk")


async def call(client: gr.Client, fleet: Fleet, caller: Principal, pickup: str) -> None:
    """One caller, from the first question to the order."""
    session = client.session(f"caller:{caller.id}", system=SYSTEM, tools=tools_of(fleet), approve=approve)
    asked = staged(f'[[call price {{"pickup": "{pickup}", "destination": "airport"}}]]')
    reply = await session.ask(f"What is a ride from the {pickup} to the airport?{asked}")
    show(caller, reply)
    ordered = staged(f'[[call send_car {{"pickup": "{pickup}"}}]]')
    reply = await session.ask(f"That is fine, please send a car.{ordered}")
    show(caller, reply)
    # A model may call nothing, or look up the price once more.
    if any(made.name == "send_car" and made.is_success for made in reply.tool_calls):
        await write_down(session, fleet, caller, pickup)
    history = await session.history()
    print(f"{caller.id}: {len(history)} messages kept, the last from the {type(history[-1].message).__name__}")


async def write_down(session: gr.SessionRef, fleet: Fleet, caller: Principal, pickup: str) -> None:
    """The order as a value: an answer that is none is asked for again."""
    written = staged(
        f'[[say {{"pickup": "{pickup}", "destination": "airport", "price_eur": "45.30", "car": "standard"}}]]'
    )
    summary = await session.ask(f"Write the order down.{written}", response_type=Ride)
    ride = summary.value
    print(
        f"{caller.id}: order {ride.pickup} -> {ride.destination}, {ride.price_eur} EUR, car {fleet.sent[session.key]}"
    )


def show(caller: Principal, reply: gr.ChatResult[object]) -> None:
    """What was done, by the report and not by what the model says."""
    for made in reply.tool_calls:
        print(f"{caller.id}: {made.name} {made.status}: {made.text}")


async def main() -> None:
    """Two callers at a time; one of them wants to go where the desk does not let cars go."""
    fleet = Fleet(["7", "12"])
    async with open_example_client(system=SYSTEM) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, client, fleet, Principal(id="ada"), "harbour")
            nursery.start_soon(call, client, fleet, Principal(id="grace"), "station")
        print(f"cars out: {len(fleet.sent)}")


if __name__ == "__main__":
    trio.run(main)
