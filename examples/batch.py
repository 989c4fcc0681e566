# ruff: noqa: T201 - an example prints
"""Many requests: a bounded number at a time, results as they complete, failures as results.

python examples/batch.py --simulate
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import trio
from _client import open_example_client

if TYPE_CHECKING:
    from collections.abc import Iterator


def requests() -> Iterator[dict[str, object]]:
    """Read only as there is room, so this could be a file of any size."""
    for number in range(200):
        question = f"A crate holds {number} lamps and {2 * number} wicks. How many things are in it?"
        yield {"custom_id": f"crate-{number}", "messages": [{"role": "user", "content": question}]}
    yield {"custom_id": "wrong", "messages": [{"role": "nobody", "content": "This row cannot be sent."}]}


async def main() -> None:
    """Run the rows and add up what they cost."""
    answers: dict[str, str] = {}
    cost = Decimal(0)
    async with (
        open_example_client() as client,
        client.batch(requests(), max_in_flight=64, max_completion_tokens=80) as results,
    ):
        async for row in results:
            if row.error is not None:
                print(f"{row.custom_id}: {type(row.error).__name__}: {row.error}")
            else:
                answers[row.custom_id] = row.result.text
                cost += row.result.cost or 0
    print(f"{len(answers)} answers for ${cost}; crate-21: {answers.get('crate-21')!r}")


if __name__ == "__main__":
    trio.run(main)
