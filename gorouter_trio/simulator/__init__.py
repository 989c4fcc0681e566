"""An OpenRouter that runs in the process: over loopback HTTP, or over memory streams in virtual time.

Its replies depend on the prompt and a seed and have the wire form of the real ones; it counts and charges with code of
its own, so it can prove something about a client.
"""

from __future__ import annotations

from .config import RequestRecord as RequestRecord
from .config import SimulatorConfig as SimulatorConfig
from .config import SimulatorStatistics as SimulatorStatistics
from .limits import FreeTier as FreeTier
from .limits import Limit as Limit
from .limits import LimitWindow as LimitWindow
from .recorder import Recorder as Recorder
from .recorder import open_recorder as open_recorder
from .recordings import Recording as Recording
from .recordings import load_recordings as load_recordings
from .scenario import Behaviour as Behaviour
from .scenario import Capacity as Capacity
from .scenario import Latency as Latency
from .scenario import Phase as Phase
from .scenario import Scenario as Scenario
from .scenario import Spread as Spread
from .scenario import Wire as Wire
from .server import Simulator as Simulator
from .server import serve_simulator as serve_simulator
from .transport import SimulatedNetwork as SimulatedNetwork
from .transport import open_simulated_network as open_simulated_network

__all__ = [
    "Behaviour",
    "Capacity",
    "FreeTier",
    "Latency",
    "Limit",
    "LimitWindow",
    "Phase",
    "Recorder",
    "Recording",
    "RequestRecord",
    "Scenario",
    "SimulatedNetwork",
    "Simulator",
    "SimulatorConfig",
    "SimulatorStatistics",
    "Spread",
    "Wire",
    "load_recordings",
    "open_recorder",
    "open_simulated_network",
    "serve_simulator",
]
