"""A small MCP server, as a program: over standard input and output, or with `--http` on a port that it prints."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Annotated

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import ImageContent, TextContent
from pydantic import BaseModel, Field

server = MCPServer("test")


class Sum(BaseModel):
    total: int


@server.tool()
def add(a: Annotated[int, Field(description="The first")], b: Annotated[int, Field(ge=0)] = 1) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def structured(a: int) -> Sum:
    """Gives a structure."""
    return Sum(total=a)


@server.tool(name="odd name/with.signs")
def odd() -> list[TextContent | ImageContent]:
    """Gives pieces of several kinds."""
    return [
        TextContent(type="text", text="one"),
        ImageContent(type="image", data="aGk=", mime_type="image/png"),
        TextContent(type="text", text="two"),
    ]


@server.tool()
async def hang(ctx: Context) -> str:
    """Tells how far it is, and does not end."""
    await ctx.report_progress(1, 4, "a quarter")
    await asyncio.sleep(3_600)
    return "never"


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("no such thing")


@server.tool()
def large() -> str:
    """Gives more than anybody wants."""
    return "x" * 500_000


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def garbage() -> str:
    """Writes what is no message, and goes on."""
    if "--http" not in sys.argv and sys.__stdout__ is not None:
        sys.__stdout__.write("this is not JSON\n[]\n{}\n")
        sys.__stdout__.flush()
    return "fine"


@server.tool()
def pid() -> int:
    """The id of this process."""
    return os.getpid()


@server.tool()
def environment() -> list[str]:
    """The names in the environment."""
    return sorted(os.environ)


def serve_http() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(server.streamable_http_app(), log_level="critical", lifespan="on")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    if "--http" in sys.argv:
        serve_http()
    elif "--refuse" in sys.argv:
        sys.exit(1)
    else:
        server.run("stdio")
