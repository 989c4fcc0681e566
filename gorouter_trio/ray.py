"""A stage of a Ray Data pipeline (extra `ray`): each actor is a runtime of its own, with a client in it.

    stage = dict(fn_constructor_kwargs={"model": "openai/gpt-4o-mini", "template": "Answer: {{question}}"})
    dataset.map_batches(ChatStage, batch_size=512, concurrency=2, **stage)

Ray is not imported here: it gives the stage batches of columns, and takes such ones back.
"""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Protocol, cast

import trio

from ._contain import contain_sync
from .batch.output import encode_row
from .batch.parquet import plain_value
from .batch.rows import RowReader
from .batch.template import Template
from .client import open_client
from .errors import GorouterError, PoolClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .batch.rows import BatchRow, RowProblem
    from .batch.runner import BatchResult
    from .client import Client

__all__ = ["ChatStage"]

_START_S = 120.0
# Kinds of columns of numpy: points in time, and stretches of it.
_TIMES = ("M", "m")


class _Times(Protocol):
    def astype(self, unit: str) -> object: ...


class ChatStage:
    """Asks a model for each row: `stage({"prompt": [...], "id": [...]})` adds the columns `answer`, `error` and `row`.

    Rows are as in files: `messages`, `prompt` or `question`, or what `template` makes of the columns. `answer` is the
    text, None where the row failed, `error` why it did, and `row` the line that a batch's output would have for it.
    `fields` are the settings of the client, `options` those of the requests. Up to `max_in_flight` requests of an actor
    run at a time; a limit is that of one actor, unless `shared` of the settings says otherwise.

    The client lives in a thread of its own until `close`, or the end of the process. Made with settings that cannot be,
    it raises `ConfigError`; when the client does not open for another reason, `OSError`, or a `GorouterError` with its
    cause.
    """

    def __init__(
        self,
        *,
        template: str | None = None,
        max_in_flight: int = 256,
        options: Mapping[str, object] | None = None,
        **fields: object,
    ) -> None:
        self._template = None if template is None else Template(template)
        self._max_in_flight = max_in_flight
        self._options = dict(options or {})
        self._fields = fields
        # Set when the client is open, or never will be.
        self._is_settled = threading.Event()
        self._is_up = False
        self._failure: Exception | None = None
        self._client: Client
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event
        self._thread = threading.Thread(target=self._live, name="gorouter-trio stage", daemon=True)
        self._thread.start()
        if not self._is_settled.wait(_START_S):
            raise GorouterError("the client of the stage does not come up")
        if not self._is_up:
            raise self._reason()

    def __repr__(self) -> str:
        return f"<ChatStage {'open' if self._thread.is_alive() else 'closed'}>"

    def __call__(self, batch: Mapping[str, Sequence[object]]) -> dict[str, Sequence[object]]:
        """The batch with the columns that are new; waits until all of its rows have ended.

        Raises `PoolClosedError` after `close`, and when it is called meanwhile.
        """
        rows = list(self._rows(batch))
        try:
            results = trio.from_thread.run(self._run, rows, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise PoolClosedError("the stage is closed") from None
        return {
            **batch,
            "answer": [None if result.result is None else result.result.text for result in results],
            "error": [None if result.error is None else str(result.error) for result in results],
            "row": [encode_row(result).decode() for result in results],
        }

    def close(self) -> None:
        """End the client; may be called twice."""
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
            self._thread.join()

    def _rows(self, batch: Mapping[str, Sequence[object]]) -> list[BatchRow | RowProblem]:
        names = list(batch)
        with closing(RowReader(template=self._template)) as reader:
            return [
                reader.read_record({name: _plain(value) for name, value in zip(names, values, strict=True)})
                for values in zip(*batch.values(), strict=True)
            ]

    async def _run(self, rows: list[BatchRow | RowProblem]) -> list[BatchResult]:
        batch = cast("Callable[..., object]", self._client.batch)
        opened = batch(rows, max_in_flight=self._max_in_flight, ordered=True, **self._options)
        async with opened as results:  # type: ignore[attr-defined]  # the options are checked when they are encoded
            return [result async for result in results]

    def _live(self) -> None:
        try:
            contain_sync(lambda: trio.run(self._serve), report=self._note)
        finally:
            self._is_settled.set()
        if self._is_up and self._failure is not None:
            # The constructor has returned: nobody but the thread's own hook can tell.
            raise self._failure

    def _note(self, error: Exception) -> None:
        self._failure = error

    def _reason(self) -> Exception:
        """Why the client did not come up: what is of settings and the system as itself, the rest as the cause."""
        if isinstance(self._failure, (GorouterError, OSError, TypeError)):
            return self._failure
        error = GorouterError(f"the client of the stage does not come up: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    async def _serve(self) -> None:
        async with open_client(**self._fields) as client:
            self._client, self._token, self._stop = client, trio.lowlevel.current_trio_token(), trio.Event()
            self._is_up = True
            self._is_settled.set()
            await self._stop.wait()


def _plain(value: object) -> object:
    """A value of a column as JSON has it, the same as of a file: what numpy has made of it knows its Python form."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind in _TIMES:
        # In nanoseconds, a time would become a whole number.
        value = cast("_Times", value).astype(f"{kind}8[us]")
    convert = getattr(value, "tolist", None)
    plain = value if convert is None else convert()
    match plain:
        case list():
            return [_plain(item) for item in plain]
        case dict():
            return {str(name): _plain(item) for name, item in plain.items()}
        case _:
            return plain_value(plain)
