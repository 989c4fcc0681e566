"""Messages and their parts, as a request carries them (openrouter API, POST /chat/completions, "Messages").

The Structs are frozen values: no ids of storage, no clocks, no parents. A field left at `UNSET` is not
sent; `None` is sent as null; zero and the empty string are values like any other. A part of a content
that is newer than this package is raw JSON.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import UNSET, Struct, UnsetType

__all__ = [
    "AssistantMessage",
    "AudioPart",
    "CacheControl",
    "ContentPart",
    "DeveloperMessage",
    "FilePart",
    "FileSource",
    "FunctionCall",
    "ImagePart",
    "ImageSource",
    "InputAudio",
    "Message",
    "SystemMessage",
    "TextPart",
    "ToolCall",
    "ToolMessage",
    "UserMessage",
    "VideoPart",
    "VideoSource",
]


class CacheControl(Struct, frozen=True, kw_only=True):
    """An explicit prompt-cache breakpoint; `ttl` is "5m" or "1h"."""

    type: Literal["ephemeral"] = "ephemeral"
    ttl: str | UnsetType = UNSET


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    """Plain text."""

    text: str
    cache_control: CacheControl | UnsetType = UNSET


class ImageSource(Struct, frozen=True):
    """`url` is an https or data URL; `detail` is auto, low, high or original."""

    url: str
    detail: str | UnsetType = UNSET


class ImagePart(Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image by URL."""

    image_url: ImageSource
    cache_control: CacheControl | UnsetType = UNSET


class InputAudio(Struct, frozen=True):
    """`data` is bare base64; `format` is wav, mp3, flac, m4a, ogg, aiff, aac, pcm16 or pcm24."""

    data: str
    format: str


class AudioPart(Struct, frozen=True, tag_field="type", tag="input_audio"):
    """Audio, inline."""

    input_audio: InputAudio


class VideoSource(Struct, frozen=True):
    """`url` is an https or data URL."""

    url: str


class VideoPart(Struct, frozen=True, tag_field="type", tag="video_url"):
    """A video by URL."""

    video_url: VideoSource


class FileSource(Struct, frozen=True, kw_only=True):
    """A document: `file_data` is a data or https URL, `file_id` names an uploaded file."""

    filename: str | UnsetType = UNSET
    file_data: str | UnsetType = UNSET
    file_id: str | UnsetType = UNSET


class FilePart(Struct, frozen=True, tag_field="type", tag="file"):
    """A document."""

    file: FileSource
    cache_control: CacheControl | UnsetType = UNSET


ContentPart: TypeAlias = TextPart | ImagePart | AudioPart | VideoPart | FilePart


class FunctionCall(Struct, frozen=True):
    """`arguments` is the JSON text that the model wrote: it may be empty or invalid."""

    name: str
    arguments: str = ""


class ToolCall(Struct, frozen=True):
    """One call that the model asks for."""

    id: str
    function: FunctionCall
    type: str = "function"


class SystemMessage(Struct, frozen=True, tag_field="role", tag="system"):
    """Instructions."""

    content: str | list[TextPart | msgspec.Raw]
    name: str | UnsetType = UNSET


class DeveloperMessage(Struct, frozen=True, tag_field="role", tag="developer"):
    """Instructions, in the newer role name."""

    content: str | list[TextPart | msgspec.Raw]
    name: str | UnsetType = UNSET


class UserMessage(Struct, frozen=True, tag_field="role", tag="user"):
    """What the user says."""

    content: str | list[ContentPart | msgspec.Raw]
    name: str | UnsetType = UNSET


class AssistantMessage(Struct, frozen=True, tag_field="role", tag="assistant"):
    """What the model said.

    `content` keeps null, the empty string and parts apart. `reasoning_details`, `annotations`,
    `images` and `audio` are echoed to the provider byte for byte, so they are kept as raw JSON.
    """

    content: str | list[msgspec.Raw] | None = None
    name: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_details: msgspec.Raw | UnsetType = UNSET
    annotations: msgspec.Raw | UnsetType = UNSET
    images: msgspec.Raw | UnsetType = UNSET
    audio: msgspec.Raw | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ToolMessage(Struct, frozen=True, tag_field="role", tag="tool"):
    """The result of one tool call."""

    tool_call_id: str
    content: str | list[ContentPart | msgspec.Raw]
    name: str | UnsetType = UNSET


Message: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
"""A message of a request; the role is the tag."""
