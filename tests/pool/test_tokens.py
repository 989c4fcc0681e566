"""Token counts: estimates that learn, bounds that hold, and OpenAI's tokenizer without a download."""

from __future__ import annotations

import base64
import hashlib
import random
import sys
import time
import types
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gorouter_trio.pool.encodings import calibrate, load_encoding
from gorouter_trio.pool.prices import TEXT_ONLY, RequestShape
from gorouter_trio.pool.tokens import TokenEstimator
from gorouter_trio.simulator import _tokens
from gorouter_trio.wire.codec import encode_json, encode_prompt, render_body
from gorouter_trio.wire.responses import Usage


def body_of(content: object, **options: object) -> bytes:
    return render_body(encode_json(options), encode_prompt([{"role": "user", "content": content}]), streaming=False)


def test_cold_and_warm() -> None:
    """A quarter of the bytes at first, what replies say after a few of them, and each model by itself."""
    estimator = TokenEstimator()
    body = body_of("word " * 200, model="m")
    assert estimator.estimate_prompt("m", body) == pytest.approx(len(body) / 4, abs=2)
    for _ in range(60):
        estimator.observe("m", body, usage=Usage(prompt_tokens=len(body) // 2, completion_tokens=1))
    assert estimator.estimate_prompt("m", body) == pytest.approx(len(body) / 2, rel=0.02)
    assert estimator.estimate_prompt("other", body) == pytest.approx(len(body) / 4, abs=2)


def test_old_counts_decay() -> None:
    """A model whose texts change is followed within some dozens of replies, and one odd reply does not turn it."""
    estimator = TokenEstimator()
    body = body_of("x" * 1000)
    for _ in range(50):
        estimator.observe("m", body, usage=Usage(prompt_tokens=250))
    before = estimator.ratio("m")
    estimator.observe("m", body, usage=Usage(prompt_tokens=10**9))
    assert estimator.ratio("m") <= before + 0.1
    for _ in range(60):
        estimator.observe("m", body, usage=Usage(prompt_tokens=500))
    assert estimator.ratio("m") == pytest.approx(500 / len(body), rel=0.02)


def test_models_are_bounded() -> None:
    """The models seen first are forgotten when there are too many."""
    estimator = TokenEstimator()
    for number in range(2_000):
        estimator.learn(f"m{number}", tokens=1, text_bytes=2)
    assert (estimator.ratio("m0"), estimator.ratio("m1999")) == (0.25, 0.5)
    assert repr(estimator) == "<TokenEstimator 1024 models>"


@given(st.text(max_size=300))
def test_the_bound_holds_for_every_text(text: str) -> None:
    """No byte-level tokenizer makes more tokens of a text than it has bytes, however it is escaped."""
    text = text.encode("utf-8", "ignore").decode()
    bound = TokenEstimator().bound_prompt("m", body_of(text))
    assert bound.tokens >= len(text.encode())
    assert bound.tokens >= _tokens.count(text)
    assert bound.shape is TEXT_ONLY


def test_shape() -> None:
    """What else a price depends on is read off the options."""
    bound = TokenEstimator().bound_prompt
    for options, shape in (
        ({"plugins": [{"id": "web"}]}, RequestShape(web_searches=1)),
        ({"plugins": [{"include_domains": ["a"], "id": "web"}]}, RequestShape(web_searches=1)),
        ({"plugins": [{"id": "auto-router", "allowed_models": ["a"]}, {"id": "web"}]}, RequestShape(web_searches=1)),
        ({"plugins": [{"id": "file-parser"}]}, TEXT_ONLY),
        ({"plugins": [{"id": "web-fetch", "allowed_domains": ["a"]}]}, TEXT_ONLY),
        ({"web_search_options": {"search_context_size": "low"}}, RequestShape(web_searches=1)),
        ({"tools": [{"type": "openrouter:web_search"}]}, RequestShape(web_searches=10)),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, RequestShape(long_cache=True)),
        ({"modalities": ["text", "audio"]}, RequestShape(audio_output=True)),
        ({"modalities": ["image", "text"]}, RequestShape(image_output=True)),
        ({"user": '"plugins":[{"id":"web"}]'}, TEXT_ONLY),
    ):
        assert bound("m", body_of("hi", model="m", **options)).shape == shape, options
    cached = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert bound("m", body_of(cached)).shape == RequestShape(long_cache=True)
    assert bound("m", body_of('"ttl":"1h" "content":[')).shape == TEXT_ONLY
    assert bound("m", body_of("hi", tools=[])).tokens > bound("m", body_of("hi")).tokens + 900


def data(count: int) -> str:
    return base64.b64encode(random.Random(1).randbytes(count)).decode()


def test_media() -> None:
    """Pictures count for themselves and not by their bytes, sound and files by theirs; addresses are unbounded."""
    estimator = TokenEstimator()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data(300_000)}"}}
    address = {"type": "image_url", "image_url": {"url": "https://h.example/a.png"}}
    words = {"type": "text", "text": "what is that?"}
    body = body_of([words, picture, address])
    bound = estimator.bound_prompt("m", body)
    assert bound.shape == RequestShape(images=2)
    assert 12_000 < bound.tokens < 13_000
    assert 2_400 < estimator.estimate_prompt("m", body) < 2_600
    assert estimator.bound_prompt("openai/gpt-4o-mini", body).tokens > 73_000
    assert estimator.bound_prompt("m", body, fallbacks=["x", "openai/gpt-4o-mini"]).tokens > 73_000
    estimator.observe("m", body, usage=Usage(prompt_tokens=2_000))
    assert estimator.ratio("m") == 0.25, "media say nothing about text"

    sound = {"type": "input_audio", "input_audio": {"data": data(160_000), "format": "mp3"}}
    bound = estimator.bound_prompt("m", body_of([sound]))
    assert bound.shape == RequestShape(audio=True)
    assert bound.tokens == pytest.approx(160_000 * 4 / 3 / 16, rel=0.05)

    for part in (
        {"type": "file", "file": {"file_data": "https://h.example/a.pdf"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "video_url", "video_url": {"url": "https://h.example/a.mp4"}},
    ):
        assert estimator.bound_prompt("m", body_of([part])).shape.unbounded, part
        assert estimator.bound_prompt("m", body_of([picture, part])).shape.unbounded, part
    inline = {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{data(3_000)}"}}
    assert not estimator.bound_prompt("m", body_of([address, inline])).shape.unbounded


@pytest.mark.parametrize("text", [data(100_000), f"data:image/png;base64,{data(100_000)}"], ids=["base64", "data URL"])
def test_a_text_that_looks_like_data(text: str) -> None:
    """Beside a picture or sound, a text counts as one whatever it is made of."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data(300)}"}}
    sound = {"type": "input_audio", "input_audio": {"data": data(300), "format": "wav"}}
    for part in (picture, sound):
        bound = TokenEstimator().bound_prompt("m", body_of([{"type": "text", "text": text}, part]))
        assert bound.tokens >= len(text), part["type"]


def test_cost_of_the_hooks(record_property) -> None:
    """Estimating and bounding a prompt of a kilobyte take some microseconds."""
    estimator = TokenEstimator()
    body = body_of("What is a tide? " * 60, model="openai/gpt-4o-mini", max_tokens=100)
    best = {}
    for name, call in (("estimate", estimator.estimate_prompt), ("bound", estimator.bound_prompt)):
        times = []
        for _ in range(5):
            begun = time.process_time()
            for _ in range(2_000):
                call("openai/gpt-4o-mini", body)
            times.append((time.process_time() - begun) / 2_000)
        best[name] = min(times) * 1e6
    record_property("figure", ", ".join(f"{name} {us:.1f} µs" for name, us in best.items()) + " for 1 kB")
    assert max(best.values()) < 30


# --- OpenAI's tokenizer -----------------------------------------------------------------------------------------------

URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"


@pytest.fixture
def tiktoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiktoken that notes what it is asked for, since asking could download."""
    asked: list[str] = []

    class Words:
        def encode_ordinary(self, text: str) -> list[int]:
            return list(range(len(text.split())))

    def get_encoding(name: str) -> Words:
        asked.append(name)
        return Words()

    fake = types.ModuleType("tiktoken")
    fake.get_encoding = get_encoding  # type: ignore[attr-defined]  # a module made by hand
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    return asked


@pytest.mark.parametrize("state", ["no folder", "empty", "torn", "off", "other"])
async def test_nothing_is_downloaded(
    state: str, tiktoken: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoding that is not there, or not whole, is not asked for: tiktoken would fetch it."""
    folder = tmp_path if state != "no folder" else tmp_path / "nowhere"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "" if state == "off" else str(folder))
    if state == "torn":
        (tmp_path / hashlib.sha1(URL.encode()).hexdigest()).write_bytes(b"half of it")
    assert await load_encoding("gpt2" if state == "other" else "o200k_base") is None
    assert tiktoken == []


async def test_a_cached_encoding(tiktoken: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is whole is loaded, and teaches the estimator."""
    content = b"the whole encoding"
    monkeypatch.setattr("gorouter_trio.pool.encodings._DIGESTS", {"o200k_base": hashlib.sha256(content).hexdigest()})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / hashlib.sha1(URL.encode()).hexdigest()).write_bytes(content)
    encoding = await load_encoding()
    assert encoding is not None
    estimator = TokenEstimator()
    assert await calibrate(estimator, "m", encoding=encoding, text="one two " * 10) == 20 / 80
    assert await calibrate(estimator, "m", encoding=encoding, text="") == 20 / 80
    assert tiktoken == ["o200k_base"]


async def test_without_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is optional."""
    content = b"x"
    monkeypatch.setattr("gorouter_trio.pool.encodings._DIGESTS", {"o200k_base": hashlib.sha256(content).hexdigest()})
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
    (tmp_path / hashlib.sha1(URL.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert await load_encoding() is None
