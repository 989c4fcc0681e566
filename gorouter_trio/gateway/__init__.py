"""Sessions over WebSocket, for programs in any language: `serve_gateway` in front of a client.

protocol     the messages, as values and as JSON         docs/protocol.md
server       the port, and what it leads to               docs/gateway.md
"""

from __future__ import annotations

from .config import ClusterConfig as ClusterConfig
from .config import GatewayConfig as GatewayConfig
from .config import GatewayLimits as GatewayLimits
from .protocol import BudgetRow as BudgetRow
from .protocol import GatewaySnapshot as GatewaySnapshot
from .protocol import SessionRow as SessionRow
from .server import Gateway as Gateway
from .server import serve_gateway as serve_gateway

__all__ = [
    "BudgetRow",
    "ClusterConfig",
    "Gateway",
    "GatewayConfig",
    "GatewayLimits",
    "GatewaySnapshot",
    "SessionRow",
    "serve_gateway",
]
