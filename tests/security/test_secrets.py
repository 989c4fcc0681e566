"""No key, token or secret is seen anywhere: not in a repr, a log, a traceback with locals, a pickle or an event."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type,dict-item,index,misc,return-value,union-attr"

from __future__ import annotations

import base64
import copy
import logging
import pickle
import traceback
import urllib.parse
from collections.abc import Callable

import msgspec
import pytest
from jwt_forge import GOOD_HEADER, WALL, signed

import gorouter_trio as gr
from gorouter_trio.security import (
    ApiKeyAuth,
    CustomAuth,
    JwtAuth,
    Principal,
    SecurityConfig,
    SecurityEvent,
    SecurityManager,
    ToolAudit,
    ToolCheck,
    UrlPolicy,
    digest_of_key,
)


class Canary:
    """A secret that is never a local variable of the test, where a traceback would rightly show it."""

    def __init__(self, text: str) -> None:
        self._parts = (text[:9], text[9:])

    def __call__(self) -> str:
        return "".join(self._parts)

    def __repr__(self) -> str:
        return "Canary(…)"

    def traces(self) -> tuple[str, ...]:
        """The secret and the forms that row 40 names, and each half of it."""
        text = self()
        encoded = base64.b64encode(text.encode()).decode().rstrip("=")
        url = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
        return (
            text,
            encoded,
            url,
            urllib.parse.quote(text, safe=""),
            text.encode().hex(),
            repr(text)[1:-1],
            text[8:40],
        )


KEY = Canary("canary/key+0123456789-with-many-letters")
SECRET = Canary("canary/secret+0123456789-with-more-letters")
OTHER = Canary("canary/other-secret+0123456789-and-letters")
TOKEN = Canary(signed(GOOD_HEADER, {"sub": "u", "exp": WALL + 60}, secret=SECRET()))
WHO = Principal(id="u", metadata={"pin": "canary-pin"})


def assert_clean(text: str) -> None:
    for canary in (KEY, SECRET, OTHER, TOKEN):
        for trace in canary.traces():
            assert trace not in text


def shown(error: BaseException) -> str:
    """Everything that the most talkative traceback shows, and the error in all its forms."""
    full = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    found = [full, repr(error), str(error), repr(vars(error))]
    if error.__context__ is not None:
        found.append(shown(error.__context__))
    return "\n".join([*found, repr(pickle.loads(pickle.dumps(error)))])


def test_the_search_finds() -> None:
    """The searches of this file would see a secret in a frame, in a context and in an encoding."""

    def careless(token: str) -> None:
        try:
            raise ValueError(len(token))
        except ValueError:
            raise gr.SecurityError("clean") from None

    with pytest.raises(gr.SecurityError) as caught:
        careless(KEY())
    for text in (shown(caught.value), base64.b64encode(KEY().encode()).decode(), f"x{KEY()[8:]}"):
        with pytest.raises(AssertionError):
            assert_clean(text)


def config() -> SecurityConfig:
    return SecurityConfig(auth=JwtAuth(key=SECRET(), former_keys=(OTHER(),)), default_policy="allow-all", debug=True)


MISTAKES: list[Callable[[], object]] = [
    lambda: ApiKeyAuth(api_keys={KEY(): "u"}),
    lambda: ApiKeyAuth(api_keys={KEY() + " ": WHO}),
    lambda: ApiKeyAuth(api_keys={KEY(): WHO, digest_of_key(KEY()): WHO}),
    lambda: ApiKeyAuth(api_keys={KEY(): WHO, TOKEN()[:3]: WHO}),
    lambda: ApiKeyAuth(api_keys=[KEY()]),
    lambda: ApiKeyAuth(api_keys={KEY(): WHO}, min_key_chars=0),
    lambda: ApiKeyAuth(api_keys={KEY(): WHO}, min_key_chars=500),
    lambda: JwtAuth(key=SECRET(), algorithm="HS512"),
    lambda: JwtAuth(key=SECRET(), algorithm="RS256"),
    lambda: JwtAuth(key=SECRET(), algorithm="none"),
    lambda: JwtAuth(key=SECRET(), former_keys=(OTHER(), "short")),
    lambda: JwtAuth(key=SECRET(), leeway_s=-1),
    lambda: JwtAuth(key=[SECRET()], former_keys=OTHER()),
    lambda: SecurityConfig(auth=JwtAuth(key=SECRET()), token_cache_ttl_s=-1),
    lambda: SecurityConfig(auth=ApiKeyAuth(api_keys={KEY(): WHO}), known_roles=["a"], roles={"b": None}),
    lambda: SecurityManager(config()).update_config(tools=7),
    lambda: SecurityManager(config()).update_config(auth=JwtAuth(key=OTHER()), nonsense=1),
    lambda: SecurityManager(config()).update_config(SecurityManager(config()).get_config()),
    lambda: SecurityManager(config()).create_access_token(WHO, wall=WALL, ttl_s=-1),
    lambda: SecurityManager(config()).create_access_token(Principal(id="u", metadata={"a": object()}), wall=WALL),
]


@pytest.mark.parametrize("make", MISTAKES)
def test_mistakes_show_nothing(make: Callable[[], object]) -> None:
    """A wrong setting beside a secret is an error without it, locals of every frame included."""
    with pytest.raises(gr.SecurityError) as caught:
        make()
    assert_clean(shown(caught.value))


def _tamper(token: Canary) -> str:
    return token()[:-6] + "AAAAAA"


@pytest.mark.parametrize(
    ("auth", "token"),
    [
        (lambda: JwtAuth(key=SECRET()), lambda: _tamper(TOKEN)),
        (lambda: JwtAuth(key=OTHER()), TOKEN),
        (lambda: JwtAuth(key=SECRET(), audience="a"), TOKEN),
        (lambda: ApiKeyAuth(api_keys={OTHER(): WHO}), KEY),
        (lambda: CustomAuth(authenticate=lambda token: 1 / 0), KEY),
        (lambda: CustomAuth(authenticate=lambda token: None), KEY),
        (lambda: None, KEY),
        (lambda: JwtAuth(key=SECRET()), lambda: KEY().encode()),
    ],
)
async def test_refusals_show_nothing(auth, token, caplog: pytest.LogCaptureFixture) -> None:
    """A refused token is in no error, no frame of it, no event and no line of the log."""
    caplog.set_level(logging.DEBUG)
    manager = SecurityManager(SecurityConfig(auth=auth(), debug=True))
    events: list[SecurityEvent] = []
    manager.on(SecurityEvent, events.append)
    with pytest.raises(gr.InvalidTokenError) as caught:
        await manager.authenticate(token(), now=0.0, wall=WALL, source="1.2.3.4")
    assert_clean(shown(caught.value))
    assert_clean(repr(events) + caplog.text + repr(manager.statistics()))


async def test_what_is_kept_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """After every kind of work, no object of the manager shows a secret, nor does an event or a line of the log."""
    caplog.set_level(logging.DEBUG)
    manager = SecurityManager(config())
    events: list[SecurityEvent] = []
    manager.on(SecurityEvent, events.append)
    principal = await manager.authenticate(TOKEN(), now=0.0, wall=WALL)
    assert principal is not None
    call = ToolCheck(tool="t", arguments={"password": KEY()})
    manager.check(principal, call, now=0.0, wall=WALL)
    manager.audit(ToolAudit(tool="t", principal=principal, arguments=call.arguments, status="success", at_s=WALL))
    manager.revoke_token(TOKEN())
    manager.update_config(auth=ApiKeyAuth(api_keys={KEY(): WHO}))
    await manager.authenticate(KEY(), now=0.0, wall=WALL)
    manager.update_config(auth=JwtAuth(key=SECRET()))
    kept = [repr(principal), str(principal), f"{principal}", pickle.dumps(principal).hex(), repr(manager)]
    kept += [repr(manager.get_config()), repr(config()), str(config().auth), _insides(manager)]
    kept += [repr(events), msgspec.json.encode(events).decode(), caplog.text]
    assert_clean("\n".join(kept))
    assert "canary-pin" not in "\n".join(kept[:1]) + repr(events) + caplog.text


def _insides(manager: SecurityManager) -> str:
    """Every attribute of the manager and of what it holds, three levels down."""
    found: list[str] = []
    todo: list[tuple[object, int]] = [(manager, 0)]
    while todo:
        item, depth = todo.pop()
        found.append(repr(item))
        if depth < 3 and hasattr(item, "__dict__"):
            todo += [(value, depth + 1) for value in vars(item).values()]
    return "\n".join(found)


def test_secrets_are_not_pickled() -> None:
    """A configuration with a secret cannot be pickled; copies hold the same hidden one."""
    with pytest.raises(TypeError):
        pickle.dumps(config())
    assert_clean(repr(copy.copy(config())))


def test_an_issued_token_is_all_there_is() -> None:
    """Making a token leaves nothing behind that shows it or the key."""
    manager = SecurityManager(config())
    events: list[SecurityEvent] = []
    manager.on(SecurityEvent, events.append)
    token = Canary(manager.create_access_token(WHO, wall=WALL))
    for trace in token.traces():
        assert trace not in _insides(manager) + repr(events)


def test_errors_of_helpers_survive_pickling() -> None:
    """Errors with fields of their own come back whole."""
    for error in (
        gr.InvalidTokenError("m", problem="expired", retry_after_s=2.0),
        gr.ToolRateLimitError("m", retry_after_s=3.0),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.message, vars(again)) == (type(error), "m", vars(error))
    assert UrlPolicy() == UrlPolicy()
