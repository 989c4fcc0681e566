"""The questions of `query`, answered by SQLite from the entries where they lie: they never become Python objects.

Sums of money and comparisons of times are exact, which SQLite's own numbers are not: the functions at the end of this
module take the digits as they stand in the JSON.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, TypeAlias

from ..transport.sqlite import SQLITE_VERSION
from ..wire.codec import encode_json
from .query import COMPACTED, MOST_TOKENS, CostPoint, HistoryFilter, HistoryStatistics, ModelUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..transport.sqlite import Connection

__all__ = ["CAN_QUERY", "Question", "question", "summarize", "summarize_over_time"]

CAN_QUERY = SQLITE_VERSION >= (3, 38)
"""Whether this SQLite can cut JSON with `->`."""

Question: TypeAlias = "dict[str, object]"
"""The parameters of the queries: which sessions, and what the filter admits."""

# The entries asked about, with their tags: none for what is no JSON of ours. A `LIMIT -1` keeps SQLite from putting the
# expressions in the place of their names, which would compute them as often as they are named.
_ENTRIES = """
WITH picked AS (SELECT id FROM sessions WHERE key >= :from_key AND key < :to_key),
texts AS (
  SELECT e.session, e.number, CAST(e.data AS TEXT) AS d
  FROM picked JOIN entries e ON e.session = picked.id LIMIT -1
),
tagged AS (
  SELECT session, number, d,
    CASE WHEN json_valid(d) THEN CASE json_type(d, '$.type') WHEN 'text' THEN d ->> '$.type' END END AS tag
  FROM texts LIMIT -1
),
log AS (SELECT session, number, tag, CASE WHEN tag IS NOT NULL THEN d END AS d FROM tagged LIMIT -1),
"""
# The answers among them, which calls have made, or none where they were imported without; with what the filter says.
_CALLS = """
calls AS (
  SELECT tag,
    CASE WHEN d -> '$.message' IS NULL THEN 'assistant' ELSE coalesce(d ->> '$.message.role', '') END AS role,
    exact_time(d -> '$.call.finished_at_s') AS at_s,
    d ->> '$.call.model' AS model,
    d ->> '$.call.finish_reason' AS finish_reason,
    d ->> '$.call.interrupted' AS interrupted,
    coalesce(d ->> '$.call.attempts', 1) != 0 AS is_call,
    coalesce(d ->> '$.call.usage.prompt_tokens', 0) AS prompt_tokens,
    coalesce(d ->> '$.call.usage.completion_tokens', 0) AS completion_tokens,
    coalesce(d ->> '$.call.usage.total_tokens', 0) AS total_tokens,
    nullif(d -> '$.call.usage.cost', 'null') AS cost
  FROM log WHERE tag != 'started' AND json_type(d, '$.call') = 'object' LIMIT -1
),
admitted AS (
  SELECT * FROM calls
  WHERE (:start_s IS NULL OR (at_s > 0 AND at_s >= :start_s)) AND (:end_s IS NULL OR (at_s > 0 AND at_s < :end_s))
    AND (:roles IS NULL OR role IN (SELECT value FROM json_each(:roles)))
    AND (:models IS NULL OR model IN (SELECT value FROM json_each(:models)))
    AND (:finish_reasons IS NULL OR finish_reason IN (SELECT value FROM json_each(:finish_reasons)))
    AND (is_call OR NOT :of_calls)
    AND (:min_cost IS NULL OR (cost IS NOT NULL AND usd_reaches(cost, :min_cost)))
)
"""
# Numbers that no request has would end the query: SQLite refuses to add them up.
_PROMPT, _COMPLETION, _TOTAL = (
    f"iif({name} BETWEEN 0 AND {MOST_TOKENS}, {name}, 0)"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens")
)
_SUMS = f"""
  count(*), sum({_PROMPT}), sum({_COMPLETION}),
  sum(CASE {_TOTAL} WHEN 0 THEN {_PROMPT} + {_COMPLETION} ELSE {_TOTAL} END),
  usd_sum(cost), sum(cost IS NULL)
"""
_BY_MODEL = (
    _ENTRIES
    + _CALLS
    + "SELECT is_call, coalesce(nullif(model, ''), 'unknown') AS name,"
    + " CASE WHEN interrupted THEN 'interrupted' ELSE coalesce(nullif(finish_reason, ''), 'unknown') END AS reason,"
    + " min(at_s) FILTER (WHERE at_s > 0), max(at_s) FILTER (WHERE at_s > 0),"
    + _SUMS
    + " FROM admitted GROUP BY is_call, name, reason"
)
_OVER_TIME = (
    _ENTRIES
    + _CALLS
    + "SELECT stretch(at_s, :width_s) AS since_s,"
    + _SUMS
    + " FROM admitted WHERE is_call GROUP BY since_s ORDER BY since_s"
)
# What was asked belongs to a turn that was answered: its start is the last thing before that in the log, but for
# entries that neither start nor end a turn. The messages of other entries stand for themselves.
_SAID = (
    _ENTRIES
    + """
heads AS (
  SELECT d, tag, CASE tag WHEN 'answered' THEN (
      SELECT CAST(e.data AS TEXT) FROM entries e
      WHERE e.session = log.session AND e.number < log.number
        AND CASE WHEN json_valid(CAST(e.data AS TEXT))
          THEN CAST(e.data AS TEXT) ->> '$.type' IN ('started', 'answered', 'abandoned') END
      ORDER BY e.number DESC LIMIT 1
    ) END AS before
  FROM log WHERE tag != 'started' LIMIT -1
),
lists AS (
  SELECT CASE tag WHEN 'answered' THEN before ELSE d END AS d FROM heads
  WHERE CASE tag WHEN 'answered'
    THEN before ->> '$.type' = 'started' AND coalesce(before ->> '$.turn_id', '') = coalesce(d ->> '$.turn_id', '')
    ELSE json_type(d, '$.messages') = 'array' END
),
said AS (
  SELECT coalesce(m.value ->> '$.role', '') AS role, exact_time(d -> '$.at_s') AS at_s
  FROM lists, json_each(d, '$.messages') m LIMIT -1
)
SELECT count(*), coalesce(sum(fits), 0), min(at_s) FILTER (WHERE fits AND at_s > 0),
  max(at_s) FILTER (WHERE fits AND at_s > 0)
FROM (
  SELECT at_s,
    (NOT :of_calls)
    AND (:start_s IS NULL OR (at_s > 0 AND at_s >= :start_s)) AND (:end_s IS NULL OR (at_s > 0 AND at_s < :end_s))
    AND (:roles IS NULL OR role IN (SELECT value FROM json_each(:roles))) AS fits
  FROM said LIMIT -1
)
"""
)
_COUNTS = (
    _ENTRIES
    + """
ends AS (SELECT tag, d ->> '$.maybe_billed' AS doubtful, json_type(d, '$.call') AS call FROM log LIMIT -1)
SELECT (SELECT count(*) FROM picked), coalesce(sum(tag IS NULL), 0),
  coalesce(sum(tag = 'abandoned' AND NOT coalesce(doubtful, 0)), 0),
  coalesce(sum(tag = 'abandoned' AND coalesce(doubtful, 0)), 0),
  coalesce(sum(tag != 'started' AND call = 'object'), 0)
FROM ends
"""
)
_COMPACTED = (
    _ENTRIES
    + """
compacted AS (SELECT d FROM log WHERE tag = 'compacted' LIMIT -1)
SELECT coalesce(sum(d ->> '$.calls'), 0), 0, 0, 0, coalesce(usd_sum(d -> '$.cost_usd'), '0'),
  coalesce(sum(d ->> '$.unpriced'), 0)
FROM compacted
"""
)
# Turns that were started and have no end: nothing follows in their session, or what starts or ends another one.
_OPEN = (
    _ENTRIES
    + """
turns AS (
  SELECT session, number, tag, coalesce(d ->> '$.turn_id', '') AS turn_id FROM log
  WHERE tag IN ('started', 'answered', 'abandoned') LIMIT -1
),
pairs AS (
  SELECT tag, turn_id, lead(tag) OVER later AS next_tag, lead(turn_id) OVER later AS next_id
  FROM turns WINDOW later AS (PARTITION BY session ORDER BY number)
)
SELECT count(*) FROM pairs
WHERE tag = 'started' AND (next_tag IS NULL OR next_tag = 'started' OR next_id != turn_id)
"""
)


def question(from_key: bytes, to_key: bytes, *, only: HistoryFilter) -> Question:
    """The parameters for the sessions from a key to below another."""
    return {
        "from_key": from_key,
        "to_key": to_key,
        "start_s": only.start_s,
        "end_s": only.end_s,
        "roles": _listed(only.roles),
        "models": _listed(only.models),
        "finish_reasons": _listed(only.finish_reasons),
        "min_cost": None if only.min_cost_usd is None else str(only.min_cost_usd),
        "is_filtered": only != HistoryFilter(),
        "of_calls": bool(only.models or only.finish_reasons or only.min_cost_usd is not None),
    }


def summarize(connection: Connection, *, asked: Question) -> HistoryStatistics:
    """What the sessions asked about add up to."""
    _add_functions(connection)
    total = HistoryStatistics()
    for is_call, model, reason, first_s, last_s, *sums in connection.execute(_BY_MODEL, asked):
        usage = _usage(sums)
        if is_call:
            total.count_calls(usage, model=model, reason=reason)
        total.entries += usage.calls
        total.see_time(first_s)
        total.see_time(last_s)
    said, fitting, first_s, last_s = connection.execute(_SAID, asked).fetchone()
    total.entries += fitting
    total.see_time(first_s)
    total.see_time(last_s)
    compacted = _compacted(connection, asked)
    if compacted != ModelUsage():
        total.count_calls(compacted, model=COMPACTED, reason=COMPACTED)
    counts = connection.execute(_COUNTS, asked).fetchone()
    total.sessions, total.unreadable, total.abandoned, total.in_doubt, calls = counts
    total.in_doubt += connection.execute(_OPEN, asked).fetchone()[0]
    total.total_entries = calls + said
    total.sort()
    return total


def summarize_over_time(connection: Connection, *, asked: Question, width_s: int) -> list[CostPoint]:
    """One point for each stretch of time that has a call, in order."""
    _add_functions(connection)
    points = []
    for at_s, *sums in connection.execute(_OVER_TIME, {**asked, "width_s": width_s}):
        point = CostPoint(at_s=at_s)
        point.merge(_usage(sums))
        points.append(point)
    compacted = _compacted(connection, asked)
    if compacted != ModelUsage():
        if not points or points[0].at_s != 0:
            points.insert(0, CostPoint(at_s=0.0))
        points[0].merge(compacted)
    return points


def _compacted(connection: Connection, asked: Question) -> ModelUsage:
    """What compacted logs have left out, where nothing is filtered."""
    if asked["is_filtered"]:
        return ModelUsage()
    return _usage(connection.execute(_COMPACTED, asked).fetchone())


def _usage(sums: Sequence[int | str]) -> ModelUsage:
    calls, prompt, completion, tokens, cost, unpriced = sums
    return ModelUsage(
        calls=int(calls),
        prompt_tokens=int(prompt),
        completion_tokens=int(completion),
        total_tokens=int(tokens),
        cost_usd=Decimal(cost),
        unpriced=int(unpriced),
    )


def _listed(names: Iterable[str]) -> str | None:
    found = sorted(names)
    return encode_json(found).decode() if found else None


# Functions of the queries


def _add_functions(connection: Connection) -> None:
    connection.text_factory = _read_text
    connection.create_function("exact_time", 1, _exact_time, deterministic=True)
    connection.create_function("stretch", 2, _stretch, deterministic=True)
    connection.create_function("usd_reaches", 2, _usd_reaches, deterministic=True)
    connection.create_aggregate("usd_sum", 1, _UsdSum)  # type: ignore[arg-type]  # the stubs only know sums of integers


def _read_text(data: bytes) -> str:
    """What is no UTF-8 must not end the query."""
    return data.decode(errors="replace")


def _exact_time(digits: str | None) -> float:
    try:
        return float(digits or 0)
    except ValueError:
        return 0.0


def _stretch(at_s: float, width_s: int) -> float:
    return at_s // width_s * width_s


def _usd_reaches(cost: str, least: str) -> bool:
    return _usd(cost) >= Decimal(least)


def _usd(digits: str) -> Decimal:
    try:
        return Decimal(digits.strip('"'))
    except InvalidOperation:
        return Decimal(0)


class _UsdSum:
    """Adds up JSON numbers as decimals; nulls count for nothing."""

    def __init__(self) -> None:
        self._sum = Decimal(0)

    def step(self, digits: str | None) -> None:
        """Take one more."""
        if digits is not None:
            self._sum += _usd(digits)

    def finalize(self) -> str:
        """The sum, to the last digit."""
        return str(self._sum)
