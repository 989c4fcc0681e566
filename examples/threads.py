# ruff: noqa: T201 - an example prints
"""A program with threads: one client for all of them, a stream, a session with a tool, and a batch.

python examples/threads.py --simulate
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from _client import front_settings, staged

import gorouter_trio as gr

if TYPE_CHECKING:
    from collections.abc import Iterator


def many_threads(client: gr.blocking.Client) -> None:
    """Any number of threads may use one client; its limits and budgets hold for all of them together."""
    questions = [f"What is {number} times {number}?" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda question: client.chat(question, deadline_s=30), questions))
    print(f"8 threads, {len(answers)} answers, ${sum(answer.cost or 0 for answer in answers)}")


def stream(client: gr.blocking.Client) -> None:
    """Text as it arrives."""
    pieces = 0
    with client.stream("Tell a short story." + staged("[[tokens 60]]")) as answer:
        for text in answer.text:
            print(text, end="", flush=True)
            pieces += 1
    print(f"\n-- {pieces} pieces, {answer.result.finish_reason!r}")


def converse(client: gr.blocking.Client) -> None:
    """A session; its tool is an ordinary function, which may block: it has a thread."""

    def look_up(name: str) -> str:
        """Look a person up."""
        return f"{name} was looked up in {threading.current_thread().name}"

    session = client.session("user:ada", tools=[look_up])
    reply = session.ask("Who is Ada?" + staged('[[call look_up {"name": "Ada"}]]'))
    print(*(call.text for call in reply.tool_calls))


def batch(client: gr.blocking.Client) -> None:
    """Rows are read as there is room for them, and results come as they complete."""

    def rows() -> Iterator[dict[str, object]]:
        for number in range(200):
            yield {"custom_id": f"row-{number}", "messages": [{"role": "user", "content": f"Describe crate {number}."}]}

    with client.batch(rows(), max_in_flight=64) as results:
        failed = sum(result.error is not None for result in results)
        print(f"{results.statistics().taken} rows, {failed} failed")


def main() -> None:
    """One client for the whole program."""
    with gr.blocking.open_client(**front_settings()) as client:
        many_threads(client)
        stream(client)
        converse(client)
        batch(client)


if __name__ == "__main__":
    main()
