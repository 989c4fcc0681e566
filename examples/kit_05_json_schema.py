# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 5: JSON of a given form. A type is the schema and what comes back.

python examples/kit_05_json_schema.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client
from msgspec import Struct


class UserSummary(Struct):
    """What is asked for."""

    name: str
    age: int
    city: str


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


async def main() -> None:
    """A type; or, where the form is data, a schema."""
    async with open_example_client() as client:
        prompt = "Return JSON summary for user Alice with age and city."
        reply = await client.chat(prompt, response_type=UserSummary)
        print(f"{reply.value.name!r} {reply.value.age} {reply.value.city!r}")
        by_schema = await client.chat(prompt, response_schema=SCHEMA)
        print(sorted(by_schema.value))


if __name__ == "__main__":
    trio.run(main)
