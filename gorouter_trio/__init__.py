"""gorouter_trio: an LLM client runtime for the OpenRouter API on trio.

Every conversation is an actor, every request goes through one shared pool::

    import gorouter_trio as gr

    async with gr.open_client(model="openai/gpt-4o-mini") as client:
        reply = await client.chat("Reply in one short sentence.")
        print(reply.text, reply.cost)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import abc as abc
from . import stores as stores
from ._bus import EventFeed as EventFeed
from ._bus import Handler as Handler
from ._bus import HandlerId as HandlerId
from ._chain import ChatState as ChatState
from ._chain import Hook as Hook
from ._chain import Middleware as Middleware
from ._chain import Next as Next
from ._output import OutputPolicy as OutputPolicy
from ._stream import ChatStream as ChatStream
from ._stream import TextStream as TextStream
from ._turns import AskTurnKeywords as AskTurnKeywords
from ._turns import TurnKeywords as TurnKeywords
from .batch.rows import BatchRow as BatchRow
from .batch.rows import RowProblem as RowProblem
from .batch.runner import Batch as Batch
from .batch.runner import BatchRequest as BatchRequest
from .batch.runner import BatchResult as BatchResult
from .batch.runner import BatchStatistics as BatchStatistics
from .client import Client as Client
from .client import open_client as open_client
from .client import session_key as session_key
from .config import ClientConfig as ClientConfig
from .config import Deadlines as Deadlines
from .config import PoolLimits as PoolLimits
from .config import RetryPolicy as RetryPolicy
from .config import Seams as Seams
from .config import SessionConfig as SessionConfig
from .errors import ActorGoneError as ActorGoneError
from .errors import ApiError as ApiError
from .errors import AuthenticationError as AuthenticationError
from .errors import BadRequestError as BadRequestError
from .errors import ConfigError as ConfigError
from .errors import ConnectError as ConnectError
from .errors import DeadlineExceededError as DeadlineExceededError
from .errors import DeadlinePhase as DeadlinePhase
from .errors import DecodeError as DecodeError
from .errors import ExtensionError as ExtensionError
from .errors import GorouterError as GorouterError
from .errors import HistoryNotSaved as HistoryNotSaved
from .errors import InsufficientCreditsError as InsufficientCreditsError
from .errors import InvalidOutputError as InvalidOutputError
from .errors import ModerationError as ModerationError
from .errors import NotFoundError as NotFoundError
from .errors import OverloadedError as OverloadedError
from .errors import PermissionDeniedError as PermissionDeniedError
from .errors import PoolClosedError as PoolClosedError
from .errors import PoolError as PoolError
from .errors import PoolFullError as PoolFullError
from .errors import ProviderError as ProviderError
from .errors import RateLimitError as RateLimitError
from .errors import SessionBusyError as SessionBusyError
from .errors import SessionConflictError as SessionConflictError
from .errors import SessionError as SessionError
from .errors import StoreError as StoreError
from .errors import StoreErrorKind as StoreErrorKind
from .errors import StreamBrokenError as StreamBrokenError
from .errors import StreamNotFinishedError as StreamNotFinishedError
from .errors import TransportError as TransportError
from .errors import TurnInDoubtError as TurnInDoubtError
from .errors import TurnInterruptedError as TurnInterruptedError
from .events import RawChunk as RawChunk
from .events import ReasoningDelta as ReasoningDelta
from .events import RefusalDelta as RefusalDelta
from .events import StreamEvent as StreamEvent
from .events import TextDelta as TextDelta
from .events import ToolCallDelta as ToolCallDelta
from .network import TlsConfig as TlsConfig
from .pool.workers import PoolStatistics as PoolStatistics
from .runtime_events import ChatContext as ChatContext
from .runtime_events import ChatFailed as ChatFailed
from .runtime_events import ChatFinished as ChatFinished
from .runtime_events import ChatStarted as ChatStarted
from .runtime_events import HandlerFailed as HandlerFailed
from .runtime_events import HookFailed as HookFailed
from .runtime_events import PluginFailed as PluginFailed
from .runtime_events import RuntimeEvent as RuntimeEvent
from .secret import Secret as Secret
from .session.actor import SessionStatistics as SessionStatistics
from .session.directory import SessionRef as SessionRef
from .transport.httpx_transport import HttpTransport as HttpTransport
from .wire.catalog import Architecture as Architecture
from .wire.catalog import Credits as Credits
from .wire.catalog import KeyInfo as KeyInfo
from .wire.catalog import Model as Model
from .wire.catalog import Pricing as Pricing
from .wire.catalog import TopProvider as TopProvider
from .wire.messages import AssistantMessage as AssistantMessage
from .wire.messages import AudioPart as AudioPart
from .wire.messages import CacheControl as CacheControl
from .wire.messages import ContentPart as ContentPart
from .wire.messages import DeveloperMessage as DeveloperMessage
from .wire.messages import FilePart as FilePart
from .wire.messages import FileSource as FileSource
from .wire.messages import FunctionCall as FunctionCall
from .wire.messages import ImagePart as ImagePart
from .wire.messages import ImageSource as ImageSource
from .wire.messages import InputAudio as InputAudio
from .wire.messages import Message as Message
from .wire.messages import SystemMessage as SystemMessage
from .wire.messages import TextPart as TextPart
from .wire.messages import ToolCall as ToolCall
from .wire.messages import ToolMessage as ToolMessage
from .wire.messages import UserMessage as UserMessage
from .wire.messages import VideoPart as VideoPart
from .wire.messages import VideoSource as VideoSource
from .wire.preferences import AudioOutput as AudioOutput
from .wire.preferences import AutoRouterPlugin as AutoRouterPlugin
from .wire.preferences import ContextCompressionPlugin as ContextCompressionPlugin
from .wire.preferences import DebugOptions as DebugOptions
from .wire.preferences import FileParserPlugin as FileParserPlugin
from .wire.preferences import FunctionChoice as FunctionChoice
from .wire.preferences import FunctionSpec as FunctionSpec
from .wire.preferences import FunctionTool as FunctionTool
from .wire.preferences import GrammarFormat as GrammarFormat
from .wire.preferences import JsonObjectFormat as JsonObjectFormat
from .wire.preferences import JsonSchema as JsonSchema
from .wire.preferences import JsonSchemaFormat as JsonSchemaFormat
from .wire.preferences import MaxPrice as MaxPrice
from .wire.preferences import ModerationPlugin as ModerationPlugin
from .wire.preferences import NamedToolChoice as NamedToolChoice
from .wire.preferences import PdfOptions as PdfOptions
from .wire.preferences import Percentiles as Percentiles
from .wire.preferences import Plugin as Plugin
from .wire.preferences import Prediction as Prediction
from .wire.preferences import PromptCacheOptions as PromptCacheOptions
from .wire.preferences import ProviderPreferences as ProviderPreferences
from .wire.preferences import ProviderSort as ProviderSort
from .wire.preferences import ReasoningOptions as ReasoningOptions
from .wire.preferences import ResponseFormat as ResponseFormat
from .wire.preferences import ResponseHealingPlugin as ResponseHealingPlugin
from .wire.preferences import ServerTool as ServerTool
from .wire.preferences import TextFormat as TextFormat
from .wire.preferences import Tool as Tool
from .wire.preferences import ToolChoice as ToolChoice
from .wire.preferences import TraceOptions as TraceOptions
from .wire.preferences import WebFetchPlugin as WebFetchPlugin
from .wire.preferences import WebPlugin as WebPlugin
from .wire.preferences import WebSearchOptions as WebSearchOptions
from .wire.requests import AskKeywords as AskKeywords
from .wire.requests import ChatKeywords as ChatKeywords
from .wire.requests import ChatOptions as ChatOptions
from .wire.requests import ChatRequest as ChatRequest
from .wire.responses import CompletionTokensDetails as CompletionTokensDetails
from .wire.responses import CostDetails as CostDetails
from .wire.responses import PromptTokensDetails as PromptTokensDetails
from .wire.responses import Usage as Usage
from .wire.result import CallRecord as CallRecord
from .wire.result import ChatResult as ChatResult
from .wire.result import HistoryEntry as HistoryEntry

__all__ = [
    "ActorGoneError",
    "ApiError",
    "Architecture",
    "AskKeywords",
    "AskTurnKeywords",
    "AssistantMessage",
    "AudioOutput",
    "AudioPart",
    "AuthenticationError",
    "AutoRouterPlugin",
    "BadRequestError",
    "Batch",
    "BatchRequest",
    "BatchResult",
    "BatchRow",
    "BatchStatistics",
    "CacheControl",
    "CallRecord",
    "ChatContext",
    "ChatFailed",
    "ChatFinished",
    "ChatKeywords",
    "ChatOptions",
    "ChatRequest",
    "ChatResult",
    "ChatStarted",
    "ChatState",
    "ChatStream",
    "Client",
    "ClientConfig",
    "CompletionTokensDetails",
    "ConfigError",
    "ConnectError",
    "ContentPart",
    "ContextCompressionPlugin",
    "CostDetails",
    "Credits",
    "DeadlineExceededError",
    "DeadlinePhase",
    "Deadlines",
    "DebugOptions",
    "DecodeError",
    "DeveloperMessage",
    "EventFeed",
    "ExtensionError",
    "FileParserPlugin",
    "FilePart",
    "FileSource",
    "FunctionCall",
    "FunctionChoice",
    "FunctionSpec",
    "FunctionTool",
    "GorouterError",
    "GrammarFormat",
    "Handler",
    "HandlerFailed",
    "HandlerId",
    "HistoryEntry",
    "HistoryNotSaved",
    "Hook",
    "HookFailed",
    "HttpTransport",
    "ImagePart",
    "ImageSource",
    "InputAudio",
    "InsufficientCreditsError",
    "InvalidOutputError",
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "KeyInfo",
    "MaxPrice",
    "Message",
    "Middleware",
    "Model",
    "ModerationError",
    "ModerationPlugin",
    "NamedToolChoice",
    "Next",
    "NotFoundError",
    "OutputPolicy",
    "OverloadedError",
    "PdfOptions",
    "Percentiles",
    "PermissionDeniedError",
    "Plugin",
    "PluginFailed",
    "PoolClosedError",
    "PoolError",
    "PoolFullError",
    "PoolLimits",
    "PoolStatistics",
    "Prediction",
    "Pricing",
    "PromptCacheOptions",
    "PromptTokensDetails",
    "ProviderError",
    "ProviderPreferences",
    "ProviderSort",
    "RateLimitError",
    "RawChunk",
    "ReasoningDelta",
    "ReasoningOptions",
    "RefusalDelta",
    "ResponseFormat",
    "ResponseHealingPlugin",
    "RetryPolicy",
    "RowProblem",
    "RuntimeEvent",
    "Seams",
    "Secret",
    "ServerTool",
    "SessionBusyError",
    "SessionConfig",
    "SessionConflictError",
    "SessionError",
    "SessionRef",
    "SessionStatistics",
    "StoreError",
    "StoreErrorKind",
    "StreamBrokenError",
    "StreamEvent",
    "StreamNotFinishedError",
    "SystemMessage",
    "TextDelta",
    "TextFormat",
    "TextPart",
    "TextStream",
    "TlsConfig",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolMessage",
    "TopProvider",
    "TraceOptions",
    "TransportError",
    "TurnInDoubtError",
    "TurnInterruptedError",
    "TurnKeywords",
    "Usage",
    "UserMessage",
    "VideoPart",
    "VideoSource",
    "WebFetchPlugin",
    "WebPlugin",
    "WebSearchOptions",
    "abc",
    "open_client",
    "plugins",
    "session_key",
    "simulator",
    "stores",
    "testing",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import plugins as plugins
    from . import simulator as simulator
    from . import testing as testing


def _show_public_names() -> None:
    """Let classes and functions say the name they are imported by, in tracebacks and documentation.

    Structs keep the module they were made in: msgspec resolves their annotations there.
    """
    for name in __all__:
        value = globals().get(name)
        is_struct = hasattr(value, "__struct_fields__")
        if getattr(value, "__module__", "").startswith(f"{__name__}.") and not is_struct:
            value.__module__ = __name__


_show_public_names()


def __getattr__(name: str) -> object:
    """Load `plugins`, `simulator` and `testing` when they are first asked for: most programs never do."""
    if name in {"plugins", "simulator", "testing"}:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
