"""`gorouter-trio chat`: one question, and a conversation on a terminal."""

from __future__ import annotations

import json


def test_one_question(gorouter) -> None:
    """The answer alone on stdout, what it cost on stderr."""
    done = gorouter("chat", "-p", "[[say Žlutý kůň 🐎]]", "--simulate")
    assert (done.code, done.out) == (0, "Žlutý kůň 🐎\n")
    assert done.err.startswith("openai/gpt-4o-mini-2024-07-18, ")
    assert " tokens, $" in done.err


def test_piped_question(inside) -> None:
    """Without -p, what is piped in is the question."""
    done = inside("chat", "--simulate", stdin="\ufeff[[say größer]]\n".encode())
    assert (done.code, done.out) == (0, "größer\n")
    done = inside("chat", "--simulate", stdin=b"caf\xe9")
    assert (done.code, done.message) == (2, "standard input is not UTF-8: byte 0xe9 at 3")


def test_json(inside) -> None:
    """One object with the answer and what is known about it."""
    done = inside("chat", "-p", "[[say hi]]", "--simulate", "--json", "--session", "s:1")
    answer = json.loads(done.out)
    assert (answer["text"], answer["session"], answer["finish_reason"]) == ("hi", "s:1", "stop")
    assert answer["cost_usd"] > 0
    assert done.err == ""


def test_model_and_system(inside) -> None:
    """Both reach the service; a model that is not there is one line and exit code 1."""
    done = inside(
        "chat", "-p", "hi", "--simulate", "--json", "--model", "anthropic/claude-sonnet-4", "--system", "Be kind"
    )
    assert json.loads(done.out)["model"].startswith("anthropic/claude-")
    done = inside("chat", "-p", "hi", "--simulate", "--model", "no/such-model")
    assert (done.code, done.message) == (1, "400: no/such-model is not a valid model ID")


def test_errors_of_the_service(inside) -> None:
    """An error in a 200 and a stream that is cut: what had come, one line, exit code 1."""
    done = inside("chat", "-p", "[[fault error_in_200]]", "--simulate")
    assert (done.code, done.out) == (1, "")
    assert "operation was aborted" in done.message
    assert not done.message.startswith("200")
    done = inside("chat", "-p", "[[fault stream_cut]]", "--simulate")
    assert done.code == 1
    assert done.out.endswith("\n")
    assert "it may have been billed" in done.message


def test_control_characters(inside) -> None:
    """What a model writes cannot steer the terminal."""
    done = inside("chat", "-p", "[[say a\x1b]0;title\x07\x9b31mb]]", "--simulate")
    assert done.out == "a]0;title31mb\n"


async def test_conversation(on_terminal) -> None:
    """It remembers, knows its commands, survives errors, and ends with Ctrl-D."""
    async with on_terminal("chat", "--simulate") as terminal:
        await terminal.wait_shown("openai/gpt-4o-mini (simulated). /help lists the commands, Ctrl-D ends.\n> ")
        await terminal.type("My name is Ada\n")
        await terminal.wait_shown("Nice to meet you, Ada!")
        await terminal.wait_shown("tokens, $")
        await terminal.wait_shown("\n\n> ")
        await terminal.type("What is my name?\n")
        await terminal.wait_shown("Your name is Ada.\nopenai/gpt-4o-mini")
        await terminal.wait_shown("\n\n> ")
        await terminal.type("[[fault 401]]\n")
        await terminal.wait_shown("error: 401: User not found.\n> ")
        await terminal.type("/cost\n")
        await terminal.wait_shown("2 answers, ")
        await terminal.wait_shown("> ")
        await terminal.type("/history\n")
        await terminal.wait_shown("user: What is my name?\nassistant: Your name is Ada.\n> ")
        await terminal.type("/clear\n")
        await terminal.wait_shown("forgotten\n> ")
        await terminal.type("/history\n")
        await terminal.wait_shown("nothing yet\n> ")
        await terminal.type("/frob\n")
        await terminal.wait_shown("there is no /frob; /help lists the commands\n> ")
        await terminal.type("/help\n")
        await terminal.wait_shown("Ctrl-C stops an answer")
        await terminal.wait_shown("> ")
        await terminal.type("\x04")
        assert await terminal.wait_ended() == 0


async def test_interrupt(on_terminal) -> None:
    """Ctrl-C stops the answer and not the program, keeps what had come, and ends it at the prompt."""
    async with on_terminal("chat", "--simulate") as terminal:
        await terminal.wait_shown("> ")
        await terminal.type("[[tokens 3000]] the history of clocks\n")
        await terminal.wait_shown(". ")
        await terminal.type("\x03")
        await terminal.wait_shown("stopped; what had come is kept\n\n> ")
        await terminal.type("[[say still here]]\n")
        await terminal.wait_shown("still here\nopenai/gpt-4o-mini")
        await terminal.wait_shown("\n\n> ")
        await terminal.type("/history\n")
        await terminal.wait_shown("assistant (interrupted): ")
        await terminal.wait_shown("assistant: still here\n> ")
        await terminal.type("half a mess\x03")
        assert await terminal.wait_ended() == 130
        assert "Traceback" not in terminal.shown


async def test_quit(on_terminal) -> None:
    """A command for those who look for one."""
    async with on_terminal("chat", "--simulate") as terminal:
        await terminal.wait_shown("> ")
        await terminal.type("/quit\n")
        assert await terminal.wait_ended() == 0
