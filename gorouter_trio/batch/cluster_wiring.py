"""What a worker of a shared job needs of a client's runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from .cluster import ClusterJob, Worker
from .wiring import job_services

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._runtime import Runtime
    from .._turns.request import TurnKeywords

__all__ = ["make_worker"]


def make_worker(
    runtime: Runtime,
    job: ClusterJob,
    *,
    settings: Mapping[str, object],
    turn: TurnKeywords,
    name: str,
    width: int = 64,
) -> Worker:
    """A worker of `job`, which was begun with `settings`, with the client of `runtime`.

    `turn` is what its requests need besides their bodies: a response schema, fallbacks, tools that are run here.
    Raises `ConfigError` for a client that does not share the limits of the job, and where tools are not those of which
    the rows tell the model.
    """
    if runtime.config.shared is not job.limits:
        raise ConfigError("shared: must be the `limits` of the job, or its workers overrun its budget")
    services = job_services(runtime, turn)
    if "tools" in turn and _tools_of(services.settings) != _tools_of(settings):
        raise ConfigError("tools: have other names or parameters here than where the job was submitted")
    return Worker(job, services.run_for(None), budget=services.budget, name=name, width=width)


def _tools_of(settings: Mapping[str, object]) -> object:
    options = settings.get("options")
    return options.get("tools") if isinstance(options, dict) else None
