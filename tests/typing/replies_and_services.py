"""Checked by mypy, never run: the types that users see of replies, streams and service endpoints."""

from __future__ import annotations

from decimal import Decimal
from typing import assert_never, assert_type

import gorouter_trio as gr


def of_a_reply(reply: gr.ChatResult) -> None:
    """What an answer has."""
    assert_type(reply.annotations, list[gr.Annotation])
    assert_type(reply.images, list[gr.OutputImage])
    assert_type(reply.audio, gr.OutputAudio | None)
    assert_type(reply.logprobs, gr.Logprobs | None)
    assert_type(reply.refusal, str | None)
    assert_type(reply.service_tier, str | None)
    assert_type(reply.call.openrouter_metadata, gr.RouterMetadata | None)
    assert_type(reply.cost, Decimal | None)


async def on_text(text: str) -> None:
    """An async handler."""


async def of_a_stream(client: gr.Client) -> None:
    """What a stream gives."""
    async with client.stream("hi") as stream:
        assert_type(stream.generation_id, str | None)
        async for event in stream:
            assert_type(event, gr.StreamEvent)
            of_an_event(event)
        assert_type(stream.result, gr.ChatResult)
        assert_type(await stream.run(on_content=print, on_complete=of_a_reply), gr.ChatResult)
        await stream.run(on_content=on_text, on_reasoning=on_text, on_error=lambda exc: exc.partial)
        await stream.run(on_content=of_a_reply)  # type: ignore[arg-type]  # a handler of something else


def of_an_event(event: gr.StreamEvent) -> str:
    """The union is closed: this match is complete."""
    match event:
        case gr.TextDelta(text) | gr.ReasoningDelta(text) | gr.RefusalDelta(text):
            return text
        case gr.ToolCallDelta(arguments=arguments) | gr.ToolStarted(arguments=arguments):
            return arguments
        case gr.ToolFinished():
            return event.result
        case gr.ToolProgress():
            return event.message
        case gr.AnnotationDelta():
            return event.annotation.type or ""
        case gr.ImageDelta():
            return event.image.url
        case gr.AudioDelta():
            return event.audio.transcript or ""
        case gr.LogprobsDelta():
            return str(event.logprobs.content)
        case gr.StreamFinished():
            return event.finish_reason or ""
        case gr.RawChunk():
            return event.chunk.id or ""
        case _:
            assert_never(event)


async def of_the_services(client: gr.Client) -> None:
    """What the service endpoints give."""
    models = await client.models(sort="newest", max_price=1, providers=["openai"], limit=5)
    assert_type(models, list[gr.Model])
    assert_type(await client.models_user(output_modalities="all"), list[gr.Model])
    assert_type(await client.embedding_models(), list[gr.Model])
    assert_type(await client.model_count(), int)
    assert_type(await client.model("a/b"), gr.Model)
    assert_type(await client.model_endpoints("a/b"), gr.ModelEndpoints)
    assert_type(await client.zdr_endpoints(), list[gr.ModelEndpoint])
    assert_type(await client.providers(), list[gr.ProviderInfo])
    assert_type((await client.key()).limit, Decimal | None)
    assert_type((await client.credits()).remaining, Decimal)
    assert_type(await client.generation("gen-1"), gr.GenerationInfo)
    vectors = await client.embeddings(["a", "b"], model="c/d", encoding_format="base64")
    assert_type(vectors.vectors, list[list[float]])
    assert_type((await client.completions("a", temperature=0)).text, str)
    pricing = models[0].pricing
    if pricing is not None and pricing.overrides:
        assert_type(pricing.overrides[0], gr.PricingOverride)
        assert_type(pricing.overrides[0].min_prompt_tokens, int | None)
    await client.models(colour="red")  # type: ignore[call-arg]  # no such filter
    await client.embeddings("a")  # type: ignore[call-arg]  # the model is not optional
