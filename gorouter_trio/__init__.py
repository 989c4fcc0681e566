"""gorouter_trio: an LLM client runtime for the OpenRouter API on trio.

Every conversation is an actor, every request goes through one shared pool::

    import gorouter_trio as gr

    async with gr.open_client(model="openai/gpt-4o-mini") as client:
        reply = await client.chat("Reply in one short sentence.")
        print(reply.text, reply.cost)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from . import abc as abc
from . import security as security
from . import stores as stores
from ._bus import EventFeed as EventFeed
from ._bus import Handler as Handler
from ._bus import HandlerId as HandlerId
from ._feed import Observer as Observer
from ._inspect import ClientSnapshot as ClientSnapshot
from ._inspect import SessionSnapshot as SessionSnapshot
from ._prometheus import MetricFamily as MetricFamily
from ._prometheus import Sample as Sample
from ._runtime import MetricsSource as MetricsSource
from ._turns.chain import ChatState as ChatState
from ._turns.chain import Hook as Hook
from ._turns.chain import Middleware as Middleware
from ._turns.chain import Next as Next
from ._turns.observing import EndedChat as EndedChat
from ._turns.output import OutputPolicy as OutputPolicy
from ._turns.request import AskTurnKeywords as AskTurnKeywords
from ._turns.request import TurnKeywords as TurnKeywords
from ._turns.stream import ChatStream as ChatStream
from ._turns.stream import TextStream as TextStream
from .batch.estimate import JobEstimate as JobEstimate
from .batch.report import JobReport as JobReport
from .batch.rows import BatchRow as BatchRow
from .batch.rows import RowProblem as RowProblem
from .batch.runner import Batch as Batch
from .batch.runner import BatchRequest as BatchRequest
from .batch.runner import BatchResult as BatchResult
from .batch.runner import BatchStatistics as BatchStatistics
from .batch.settings import BatchJob as BatchJob
from .client import Client as Client
from .client import open_client as open_client
from .client import session_key as session_key
from .config import ApiKey as ApiKey
from .config import BreakerPolicy as BreakerPolicy
from .config import Budget as Budget
from .config import ClientConfig as ClientConfig
from .config import ContextPolicy as ContextPolicy
from .config import Deadlines as Deadlines
from .config import KeyProvider as KeyProvider
from .config import LedgerConfig as LedgerConfig
from .config import PoolLimits as PoolLimits
from .config import PricePolicy as PricePolicy
from .config import RateLimits as RateLimits
from .config import RetryPolicy as RetryPolicy
from .config import Seams as Seams
from .config import SessionConfig as SessionConfig
from .config import ToolLimits as ToolLimits
from .errors import AccessDeniedError as AccessDeniedError
from .errors import ActorGoneError as ActorGoneError
from .errors import ApiError as ApiError
from .errors import AuthenticationError as AuthenticationError
from .errors import AuthenticationRequiredError as AuthenticationRequiredError
from .errors import BadRequestError as BadRequestError
from .errors import BudgetError as BudgetError
from .errors import BudgetExceededError as BudgetExceededError
from .errors import CircuitOpenError as CircuitOpenError
from .errors import ConfigError as ConfigError
from .errors import ConnectError as ConnectError
from .errors import DangerousArgumentError as DangerousArgumentError
from .errors import DeadlineExceededError as DeadlineExceededError
from .errors import DeadlinePhase as DeadlinePhase
from .errors import DecodeError as DecodeError
from .errors import ExtensionError as ExtensionError
from .errors import GorouterError as GorouterError
from .errors import HistoryNotSaved as HistoryNotSaved
from .errors import InsufficientCreditsError as InsufficientCreditsError
from .errors import InvalidOutputError as InvalidOutputError
from .errors import InvalidTokenError as InvalidTokenError
from .errors import ModerationError as ModerationError
from .errors import NotFoundError as NotFoundError
from .errors import OverloadedError as OverloadedError
from .errors import PermissionDeniedError as PermissionDeniedError
from .errors import PoolClosedError as PoolClosedError
from .errors import PoolError as PoolError
from .errors import PoolFullError as PoolFullError
from .errors import ProviderError as ProviderError
from .errors import RateLimitError as RateLimitError
from .errors import SecurityConfigError as SecurityConfigError
from .errors import SecurityError as SecurityError
from .errors import SessionBusyError as SessionBusyError
from .errors import SessionConflictError as SessionConflictError
from .errors import SessionError as SessionError
from .errors import SessionNotFoundError as SessionNotFoundError
from .errors import StoreError as StoreError
from .errors import StoreErrorKind as StoreErrorKind
from .errors import StreamBrokenError as StreamBrokenError
from .errors import StreamNotFinishedError as StreamNotFinishedError
from .errors import TokenProblem as TokenProblem
from .errors import ToolError as ToolError
from .errors import ToolRateLimitError as ToolRateLimitError
from .errors import TransportError as TransportError
from .errors import TurnInDoubtError as TurnInDoubtError
from .errors import TurnInterruptedError as TurnInterruptedError
from .errors import TurnParkedError as TurnParkedError
from .errors import UnpriceableRequestError as UnpriceableRequestError
from .events import AnnotationDelta as AnnotationDelta
from .events import AudioDelta as AudioDelta
from .events import ImageDelta as ImageDelta
from .events import LogprobsDelta as LogprobsDelta
from .events import RawChunk as RawChunk
from .events import ReasoningDelta as ReasoningDelta
from .events import RefusalDelta as RefusalDelta
from .events import StreamEvent as StreamEvent
from .events import StreamFinished as StreamFinished
from .events import TextDelta as TextDelta
from .events import ToolCallDelta as ToolCallDelta
from .events import ToolEvent as ToolEvent
from .events import ToolFinished as ToolFinished
from .events import ToolProgress as ToolProgress
from .events import ToolStarted as ToolStarted
from .network import TlsConfig as TlsConfig
from .pool.admission import ModelStatistics as ModelStatistics
from .pool.attempts import AttemptRecord as AttemptRecord
from .pool.budget import AccountStatistics as AccountStatistics
from .pool.budget import BudgetStatistics as BudgetStatistics
from .pool.costs import CostRow as CostRow
from .pool.costs import CostSnapshot as CostSnapshot
from .pool.costs import CostSums as CostSums
from .pool.costs import CostTracker as CostTracker
from .pool.keys import KeyStatistics as KeyStatistics
from .pool.ledger import LedgerChange as LedgerChange
from .pool.ledger import LedgerSink as LedgerSink
from .pool.ledger import LedgerStatistics as LedgerStatistics
from .pool.ledger_file import LedgerReader as LedgerReader
from .pool.prices import PriceEvent as PriceEvent
from .pool.prices import PriceRefreshFailed as PriceRefreshFailed
from .pool.prices import PricesRefreshed as PricesRefreshed
from .pool.prices import PriceStatistics as PriceStatistics
from .pool.statistics import LaneStatistics as LaneStatistics
from .pool.statistics import PoolStatistics as PoolStatistics
from .pool.statistics import WorkerStatistics as WorkerStatistics
from .pool.tracing import RequestSpan as RequestSpan
from .pool.tracing import ToolSpan as ToolSpan
from .pool.tracing import ToolStart as ToolStart
from .pool.tracing import Tracer as Tracer
from .runtime_events import AccountingFailed as AccountingFailed
from .runtime_events import AskerRefused as AskerRefused
from .runtime_events import ChatContext as ChatContext
from .runtime_events import ChatFailed as ChatFailed
from .runtime_events import ChatFinished as ChatFinished
from .runtime_events import ChatStarted as ChatStarted
from .runtime_events import CostUnknown as CostUnknown
from .runtime_events import HandlerFailed as HandlerFailed
from .runtime_events import HookFailed as HookFailed
from .runtime_events import PluginFailed as PluginFailed
from .runtime_events import RuntimeEvent as RuntimeEvent
from .runtime_events import ToolCallDenied as ToolCallDenied
from .secret import Secret as Secret
from .session.actor import SessionStatistics as SessionStatistics
from .session.directory import SessionRef as SessionRef
from .tools.context import ToolContext as ToolContext
from .tools.outcomes import ToolOutcome as ToolOutcome
from .tools.registry import AnyTool as AnyTool
from .tools.registry import Isolation as Isolation
from .tools.registry import Tool as Tool
from .tools.registry import ToolSet as ToolSet
from .tools.registry import ToolSource as ToolSource
from .tools.registry import tool as tool
from .tools.sources import ToolQuery as ToolQuery
from .tools.sources import ToolRegistry as ToolRegistry
from .tools.statistics import ToolCallStatistics as ToolCallStatistics
from .tools.statistics import ToolStatistics as ToolStatistics
from .tools.turn import ApprovalDecision as ApprovalDecision
from .tools.turn import ApprovalRequest as ApprovalRequest
from .wire.attachments import Annotation as Annotation
from .wire.attachments import FileAnnotation as FileAnnotation
from .wire.attachments import OutputAudio as OutputAudio
from .wire.attachments import OutputImage as OutputImage
from .wire.attachments import UrlCitation as UrlCitation
from .wire.catalog import AliasTarget as AliasTarget
from .wire.catalog import Architecture as Architecture
from .wire.catalog import Benchmarks as Benchmarks
from .wire.catalog import Credits as Credits
from .wire.catalog import EndpointPercentiles as EndpointPercentiles
from .wire.catalog import FreeModelRequests as FreeModelRequests
from .wire.catalog import GenerationInfo as GenerationInfo
from .wire.catalog import KeyBudget as KeyBudget
from .wire.catalog import KeyInfo as KeyInfo
from .wire.catalog import Model as Model
from .wire.catalog import ModelEndpoint as ModelEndpoint
from .wire.catalog import ModelEndpoints as ModelEndpoints
from .wire.catalog import ModelReasoning as ModelReasoning
from .wire.catalog import Pricing as Pricing
from .wire.catalog import PricingOverride as PricingOverride
from .wire.catalog import ProviderAttempt as ProviderAttempt
from .wire.catalog import ProviderInfo as ProviderInfo
from .wire.catalog import TopProvider as TopProvider
from .wire.embeddings import Embedding as Embedding
from .wire.embeddings import EmbeddingInput as EmbeddingInput
from .wire.embeddings import EmbeddingKeywords as EmbeddingKeywords
from .wire.embeddings import EmbeddingResult as EmbeddingResult
from .wire.ledger import LedgerRow as LedgerRow
from .wire.ledger import LedgerState as LedgerState
from .wire.ledger import Purpose as Purpose
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
from .wire.preferences import Tool as ToolDefinition
from .wire.preferences import ToolChoice as ToolChoice
from .wire.preferences import TraceOptions as TraceOptions
from .wire.preferences import WebFetchPlugin as WebFetchPlugin
from .wire.preferences import WebPlugin as WebPlugin
from .wire.preferences import WebSearchOptions as WebSearchOptions
from .wire.queries import ModelFilters as ModelFilters
from .wire.requests import AskKeywords as AskKeywords
from .wire.requests import ChatKeywords as ChatKeywords
from .wire.requests import ChatOptions as ChatOptions
from .wire.requests import ChatRequest as ChatRequest
from .wire.responses import CompletionTokensDetails as CompletionTokensDetails
from .wire.responses import CostDetails as CostDetails
from .wire.responses import Logprobs as Logprobs
from .wire.responses import PromptTokensDetails as PromptTokensDetails
from .wire.responses import RouterMetadata as RouterMetadata
from .wire.responses import ServerToolUse as ServerToolUse
from .wire.responses import TokenAlternative as TokenAlternative
from .wire.responses import TokenLogprob as TokenLogprob
from .wire.responses import Usage as Usage
from .wire.result import CallRecord as CallRecord
from .wire.result import ChatResult as ChatResult
from .wire.result import CompletionResult as CompletionResult
from .wire.result import HistoryEntry as HistoryEntry
from .wire.toolcalls import ToolCallError as ToolCallError
from .wire.toolcalls import ToolCallReport as ToolCallReport
from .wire.toolcalls import ToolStatus as ToolStatus

__all__ = [
    "AccessDeniedError",
    "AccountStatistics",
    "AccountingFailed",
    "ActorGoneError",
    "AliasTarget",
    "Annotation",
    "AnnotationDelta",
    "AnyTool",
    "ApiError",
    "ApiKey",
    "ApprovalDecision",
    "ApprovalRequest",
    "Architecture",
    "AskKeywords",
    "AskTurnKeywords",
    "AskerRefused",
    "AssistantMessage",
    "AttemptRecord",
    "AudioDelta",
    "AudioOutput",
    "AudioPart",
    "AuthenticationError",
    "AuthenticationRequiredError",
    "AutoRouterPlugin",
    "BadRequestError",
    "Batch",
    "BatchJob",
    "BatchRequest",
    "BatchResult",
    "BatchRow",
    "BatchStatistics",
    "Benchmarks",
    "BreakerPolicy",
    "Budget",
    "BudgetError",
    "BudgetExceededError",
    "BudgetStatistics",
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
    "CircuitOpenError",
    "Client",
    "ClientConfig",
    "ClientSnapshot",
    "CompletionResult",
    "CompletionTokensDetails",
    "ConfigError",
    "ConnectError",
    "ContentPart",
    "ContextCompressionPlugin",
    "ContextPolicy",
    "CostDetails",
    "CostRow",
    "CostSnapshot",
    "CostSums",
    "CostTracker",
    "CostUnknown",
    "Credits",
    "DangerousArgumentError",
    "DeadlineExceededError",
    "DeadlinePhase",
    "Deadlines",
    "DebugOptions",
    "DecodeError",
    "DeveloperMessage",
    "Embedding",
    "EmbeddingInput",
    "EmbeddingKeywords",
    "EmbeddingResult",
    "EndedChat",
    "EndpointPercentiles",
    "EventFeed",
    "ExtensionError",
    "FileAnnotation",
    "FileParserPlugin",
    "FilePart",
    "FileSource",
    "FreeModelRequests",
    "FunctionCall",
    "FunctionChoice",
    "FunctionSpec",
    "FunctionTool",
    "GenerationInfo",
    "GorouterError",
    "GrammarFormat",
    "Handler",
    "HandlerFailed",
    "HandlerId",
    "HistoryEntry",
    "HistoryManager",
    "HistoryNotSaved",
    "Hook",
    "HookFailed",
    "HttpTransport",
    "ImageDelta",
    "ImagePart",
    "ImageSource",
    "InputAudio",
    "InsufficientCreditsError",
    "InvalidOutputError",
    "InvalidTokenError",
    "Isolation",
    "JobEstimate",
    "JobReport",
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "KeyBudget",
    "KeyInfo",
    "KeyProvider",
    "KeyStatistics",
    "LaneStatistics",
    "LedgerChange",
    "LedgerConfig",
    "LedgerReader",
    "LedgerRow",
    "LedgerSink",
    "LedgerState",
    "LedgerStatistics",
    "Logprobs",
    "LogprobsDelta",
    "MaxPrice",
    "Message",
    "MetricFamily",
    "MetricsSource",
    "Middleware",
    "Model",
    "ModelEndpoint",
    "ModelEndpoints",
    "ModelFilters",
    "ModelReasoning",
    "ModelStatistics",
    "ModerationError",
    "ModerationPlugin",
    "NamedToolChoice",
    "Next",
    "NotFoundError",
    "Observer",
    "OutputAudio",
    "OutputImage",
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
    "PriceEvent",
    "PricePolicy",
    "PriceRefreshFailed",
    "PriceStatistics",
    "PricesRefreshed",
    "Pricing",
    "PricingOverride",
    "PromptCacheOptions",
    "PromptTokensDetails",
    "ProviderAttempt",
    "ProviderError",
    "ProviderInfo",
    "ProviderPreferences",
    "ProviderSort",
    "Purpose",
    "RateLimitError",
    "RateLimits",
    "RawChunk",
    "ReasoningDelta",
    "ReasoningOptions",
    "RefusalDelta",
    "RequestSpan",
    "ResponseFormat",
    "ResponseHealingPlugin",
    "RetryPolicy",
    "RouterMetadata",
    "RowProblem",
    "RuntimeEvent",
    "Sample",
    "Seams",
    "Secret",
    "SecurityConfigError",
    "SecurityError",
    "ServerTool",
    "ServerToolUse",
    "SessionBusyError",
    "SessionConfig",
    "SessionConflictError",
    "SessionError",
    "SessionNotFoundError",
    "SessionRef",
    "SessionSnapshot",
    "SessionStatistics",
    "StoreError",
    "StoreErrorKind",
    "StreamBrokenError",
    "StreamEvent",
    "StreamFinished",
    "StreamNotFinishedError",
    "SystemMessage",
    "TextDelta",
    "TextFormat",
    "TextPart",
    "TextStream",
    "TlsConfig",
    "TokenAlternative",
    "TokenLogprob",
    "TokenProblem",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallDenied",
    "ToolCallError",
    "ToolCallReport",
    "ToolCallStatistics",
    "ToolChoice",
    "ToolContext",
    "ToolDefinition",
    "ToolError",
    "ToolEvent",
    "ToolFinished",
    "ToolLimits",
    "ToolMessage",
    "ToolOutcome",
    "ToolProgress",
    "ToolQuery",
    "ToolRateLimitError",
    "ToolRegistry",
    "ToolSet",
    "ToolSource",
    "ToolSpan",
    "ToolStart",
    "ToolStarted",
    "ToolStatistics",
    "ToolStatus",
    "TopProvider",
    "TraceOptions",
    "Tracer",
    "TransportError",
    "TurnInDoubtError",
    "TurnInterruptedError",
    "TurnKeywords",
    "TurnParkedError",
    "UnpriceableRequestError",
    "UrlCitation",
    "Usage",
    "UserMessage",
    "VideoPart",
    "VideoSource",
    "WebFetchPlugin",
    "WebPlugin",
    "WebSearchOptions",
    "WorkerStatistics",
    "abc",
    "aio",
    "blocking",
    "gateway",
    "open_client",
    "plugins",
    "redis",
    "remote",
    "security",
    "session_key",
    "simulator",
    "stores",
    "testing",
    "tool",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import aio as aio
    from . import blocking as blocking
    from . import gateway as gateway
    from . import plugins as plugins
    from . import redis as redis
    from . import remote as remote
    from . import simulator as simulator
    from . import testing as testing
    from .history import HistoryManager as HistoryManager
    from .transport.httpx_transport import HttpTransport as HttpTransport


_LAZY = frozenset({"aio", "blocking", "gateway", "plugins", "redis", "remote", "security", "simulator", "testing"})
"""Modules that are loaded when they are first asked for: most programs never do."""

_LAZY_CLASSES = {"HistoryManager": ".history", "HttpTransport": ".transport.httpx_transport"}
"""Classes of which the same holds, and where they are: the second one loads httpx."""


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
    """Load these modules and classes when they are first asked for: most programs never do."""
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY_CLASSES:
        found = getattr(importlib.import_module(_LAZY_CLASSES[name], __name__), name)
        found.__module__ = __name__
        return cast("object", found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
