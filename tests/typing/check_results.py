"""What type checkers make of the results of calls; checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import assert_type

import msgspec

import gorouter_trio as gr


class Person(msgspec.Struct):
    """Somebody."""

    name: str


async def results(client: gr.Client) -> None:
    """A result has the value of the type that was asked for, and None without one."""
    plain = await client.chat("Who?")
    assert_type(plain, gr.ChatResult[None])
    assert_type(plain.value, None)
    typed = await client.chat("Who?", response_type=Person, temperature=0)
    assert_type(typed, gr.ChatResult[Person])
    assert_type(typed.value, Person)
    listed = await client.chat("Who?", response_type=list[int])
    assert_type(listed.value, list[int])
    assert_type(typed.text, str)


async def wrong(client: gr.Client) -> None:
    """What is refused at run time is refused here."""
    await client.chat("Who?", response_type=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await client.chat("Who?", temperatur=0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
