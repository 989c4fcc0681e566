"""The client of the examples: OpenRouter itself, or with --simulate one inside this process, without key and cost."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatedNetwork, Simulator, SimulatorConfig, open_simulated_network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def is_simulated() -> bool:
    """Whether the program talks to the simulator."""
    return "--simulate" in sys.argv[1:]


def staged(directive: str) -> str:
    """What a prompt tells the simulator to do, which knows no better; nothing where there is a model."""
    return f" {directive}" if is_simulated() else ""


def front_settings() -> dict[str, object]:
    """The same for `gr.aio.open_client` and `gr.blocking.open_client`, which open the network in their own thread."""
    if not is_simulated():
        return {"model": "openai/gpt-4o-mini"}
    simulator = Simulator(SimulatorConfig(first_token_s=0.05, tokens_per_s=600.0))
    return {
        "api_key": "sk-simulated",
        "base_url": SimulatedNetwork.base_url,
        "transport": open_simulated_network(simulator),
        "insecure_http": True,  # nothing leaves the process
    }


@asynccontextmanager
async def open_example_client(**fields: object) -> AsyncIterator[gr.Client]:
    """What the command line asks for; the key comes from OPENROUTER_API_KEY. `fields` are those of `open_client`."""
    if not is_simulated():
        async with gr.open_client(**{"model": "openai/gpt-4o-mini", **fields}) as client:
            yield client
        return
    # It types about as fast as a small hosted model, times four.
    simulator = Simulator(SimulatorConfig(first_token_s=0.05, tokens_per_s=600.0))
    async with (
        open_simulated_network(simulator) as network,
        gr.open_client(
            api_key="sk-simulated",
            base_url=network.base_url,
            transport=network,
            insecure_http=True,  # nothing leaves the process
            **fields,
        ) as client,
    ):
        yield client
