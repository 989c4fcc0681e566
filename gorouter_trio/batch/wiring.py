"""What a job needs of a client's runtime."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from .._turns.request import Rounds, TurnExtras
from ..wire.codec import decode_json, encode_request
from .api import ApiMoney, ApiServices
from .job import JobServices

if TYPE_CHECKING:
    from .._runtime import Runtime
    from .._turns.request import TurnKeywords
    from ..wire.result import ChatResult
    from .runner import EncodeRequest

__all__ = ["job_services"]


def job_services(runtime: Runtime, options: TurnKeywords, *, ambiguous_retries: int = 0) -> JobServices:
    """The services of a job whose rows have these options; raises as `client.chat` for options that cannot be."""
    defaults, settings, extras = runtime.defaults.turn({"lane": "batch", **options})
    system = runtime.defaults.system

    def encode_for(name: str) -> EncodeRequest:
        named = msgspec.structs.replace(settings, batch=name)
        return partial(encode_request, defaults=defaults, beneath=named, system=system)

    return JobServices(
        encode_for=encode_for,
        run_for=lambda answers: partial(
            runtime.pipeline.run_with_body, extras=extras, ambiguous_retries=ambiguous_retries, answers=answers
        ),
        budget=runtime.accounting,
        pricer=runtime.accounting,
        api=_api_services(runtime, extras),
        settings={"options": decode_json(defaults), "system": system.decode()},
        new_id=runtime.config.seams.new_id,
    )


def _api_services(runtime: Runtime, extras: TurnExtras | None) -> ApiServices:
    services, limits = runtime.services, runtime.config.tools

    def finish(result: ChatResult) -> ChatResult[object]:
        return Rounds(extras or TurnExtras(), tools=None, limits=limits, may_reask=False).take(result).result

    return ApiServices(
        submit=services.submit_batch,
        find=services.find_batch,
        list=lambda after: services.list_batches(after=after),
        money=ApiMoney(runtime.accounting),
        wall=runtime.config.seams.wall,
        finish=finish,
        refusal=_why_not_by_api(extras),
    )


def _why_not_by_api(extras: TurnExtras | None) -> str | None:
    """What the Batch API cannot do that a turn with these extras needs."""
    if extras is not None and extras.tools is not None:
        return "runs no tools; give definitions only, or send the rows live"
    if extras is not None and extras.fallbacks:
        return "knows no fallbacks; give models=[...], or send the rows live"
    return None
