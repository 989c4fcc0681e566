"""Tools to prove a bot with, and this package: virtual time, faults, scripted models, and a judge of histories.

`run` runs a scenario in a world made from a seed, and `sweep` strikes it at each of its steps; docs/testing.md is the
guide. The modules `proxy` (faults on real sockets) and `crash` (processes that are killed) are imported by themselves.
"""

from __future__ import annotations

from .faults import Corrupt as Corrupt
from .faults import Cut as Cut
from .faults import Delay as Delay
from .faults import Drop as Drop
from .faults import Duplicate as Duplicate
from .faults import FailOperation as FailOperation
from .faults import FailStore as FailStore
from .faults import Fault as Fault
from .faults import HangStore as HangStore
from .faults import Refuse as Refuse
from .faults import SkewClock as SkewClock
from .faults import Stall as Stall
from .history import InvalidHistoryError as InvalidHistoryError
from .history import check_history as check_history
from .history import validate_history as validate_history
from .log import EventLog as EventLog
from .log import LogEvent as LogEvent
from .log import read_log as read_log
from .network import Link as Link
from .network import NetworkStatistics as NetworkStatistics
from .network import VirtualNetwork as VirtualNetwork
from .run import RunReport as RunReport
from .run import ScenarioNotFinishedError as ScenarioNotFinishedError
from .run import StuckError as StuckError
from .run import run as run
from .scripts import Break as Break
from .scripts import Fail as Fail
from .scripts import Hang as Hang
from .scripts import Reply as Reply
from .scripts import Say as Say
from .scripts import ScriptedModel as ScriptedModel
from .scripts import ScriptedRequest as ScriptedRequest
from .scripts import ScriptedTool as ScriptedTool
from .scripts import ScriptEndedError as ScriptEndedError
from .scripts import ToolUse as ToolUse
from .scripts import use_tool as use_tool
from .store import FaultyStore as FaultyStore
from .sweep import SweepFailure as SweepFailure
from .sweep import SweepReport as SweepReport
from .sweep import check_sent_once as check_sent_once
from .sweep import sweep as sweep
from .sweep import sweep_io as sweep_io
from .world import World as World
from .world import WorldSettings as WorldSettings
from .world import open_world as open_world

__all__ = [
    "Break",
    "Corrupt",
    "Cut",
    "Delay",
    "Drop",
    "Duplicate",
    "EventLog",
    "Fail",
    "FailOperation",
    "FailStore",
    "Fault",
    "FaultyStore",
    "Hang",
    "HangStore",
    "InvalidHistoryError",
    "Link",
    "LogEvent",
    "NetworkStatistics",
    "Refuse",
    "Reply",
    "RunReport",
    "Say",
    "ScenarioNotFinishedError",
    "ScriptEndedError",
    "ScriptedModel",
    "ScriptedRequest",
    "ScriptedTool",
    "SkewClock",
    "Stall",
    "StuckError",
    "SweepFailure",
    "SweepReport",
    "ToolUse",
    "VirtualNetwork",
    "World",
    "WorldSettings",
    "check_history",
    "check_sent_once",
    "open_world",
    "read_log",
    "run",
    "sweep",
    "sweep_io",
    "use_tool",
    "validate_history",
]
