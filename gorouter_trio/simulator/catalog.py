"""The models that the simulator offers, with prices in nano-dollars a token.

Names, sizes and prices are plausible, not current: they give tests and demos something to choose from and to
count with.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

__all__ = [
    "EMBEDDING_MODELS",
    "MODELS",
    "SimulatedModel",
    "Style",
]

Style = Literal["openai", "anthropic", "google", "xai", "open"]
"""How a provider's replies look: finish reasons, fingerprints, call ids, JSON spacing and reasoning blocks differ."""

# Who stops billing when a stream is cancelled (the API's streaming page lists them); the others bill it whole.
_STOPS_BILLING: Final = (
    "Anthropic", "Azure", "Chutes", "Cloudflare", "Cohere", "DeepInfra", "DeepSeek", "Fireworks", "Friendli", "Novita",
    "OpenAI", "Together", "xAI",
)  # fmt: skip


class SimulatedModel(Struct, frozen=True, kw_only=True):
    """One model: how it is called, what it costs, and who serves it."""

    id: str
    name: str
    provider: str
    served_as: str
    """The dated name that replies carry."""
    context_length: int = 128_000
    max_completion_tokens: int = 16_384
    prompt_nanousd: int = 0
    """Price of a prompt token."""
    completion_nanousd: int = 0
    """Price of a completion token, reasoning included."""
    cache_read_nanousd: int | None = None
    request_nanousd: int = 0
    """Price of the request itself."""
    inputs: tuple[str, ...] = ("text",)
    outputs: tuple[str, ...] = ("text",)
    reasoning: bool = False
    """Whether it reasons without being asked to."""
    created: int = 1_735_689_600
    description: str = ""
    knowledge_cutoff: str | None = None
    hugging_face_id: str | None = None

    @property
    def author(self) -> str:
        """The part of the id before the slash."""
        return self.id.partition("/")[0]

    @property
    def is_free(self) -> bool:
        """Whether it is a `:free` variant."""
        return self.id.endswith(":free")

    @property
    def style(self) -> Style:
        """How this model's provider writes its replies."""
        return _STYLES.get(self.author, "open")

    @property
    def tokenizer(self) -> str:
        """The tokenizer family that the model list names."""
        return _TOKENIZERS.get(self.author, "Other")

    @property
    def stops_billing_when_cancelled(self) -> bool:
        """Whether a cancelled stream is billed for its tokens so far only."""
        return self.provider in _STOPS_BILLING


_STYLES: Final[dict[str, Style]] = {
    "openai": "openai",
    "anthropic": "anthropic",
    "google": "google",
    "x-ai": "xai",
}
_TOKENIZERS: Final = {
    "openai": "GPT",
    "anthropic": "Claude",
    "google": "Gemini",
    "meta-llama": "Llama3",
    "qwen": "Qwen3",
    "deepseek": "DeepSeek",
    "mistralai": "Mistral",
    "x-ai": "Grok",
    "cohere": "Cohere",
}
_INPUTS: Final = {"t": "text", "i": "image", "f": "file", "a": "audio", "v": "video"}

# id | name | provider | served name or end | context | output | prompt | completion | cache read | inputs | reasons
_TABLE: Final = """
openai/gpt-4o-mini|OpenAI: GPT-4o-mini|OpenAI|-2024-07-18|128000|16384|150|600|75|tif|
openai/gpt-4o|OpenAI: GPT-4o|OpenAI|-2024-11-20|128000|16384|2500|10000|1250|tif|
openai/gpt-4.1|OpenAI: GPT-4.1|OpenAI|-2025-04-14|1047576|32768|2000|8000|500|tif|
openai/gpt-4.1-mini|OpenAI: GPT-4.1 Mini|OpenAI|-2025-04-14|1047576|32768|400|1600|100|tif|
openai/gpt-4.1-nano|OpenAI: GPT-4.1 Nano|OpenAI|-2025-04-14|1047576|32768|100|400|25|tif|
openai/gpt-4-turbo|OpenAI: GPT-4 Turbo|OpenAI|-2024-04-09|128000|4096|10000|30000||ti|
openai/gpt-3.5-turbo|OpenAI: GPT-3.5 Turbo|OpenAI|-0125|16385|4096|500|1500||t|
openai/o3|OpenAI: o3|OpenAI|-2025-04-16|200000|100000|2000|8000|500|tif|r
openai/o3-mini|OpenAI: o3 Mini|OpenAI|-2025-01-31|200000|100000|1100|4400|550|tf|r
openai/o4-mini|OpenAI: o4 Mini|OpenAI|-2025-04-16|200000|100000|1100|4400|275|tif|r
openai/gpt-5|OpenAI: GPT-5|OpenAI|-2025-08-07|400000|128000|1250|10000|125|tif|r
openai/gpt-5-mini|OpenAI: GPT-5 Mini|OpenAI|-2025-08-07|400000|128000|250|2000|25|tif|r
openai/gpt-5-nano|OpenAI: GPT-5 Nano|OpenAI|-2025-08-07|400000|128000|50|400|5|tif|r
openai/gpt-oss-120b|OpenAI: gpt-oss-120b|DeepInfra||131072|32768|50|250||t|r
openai/gpt-oss-20b|OpenAI: gpt-oss-20b|Fireworks||131072|32768|30|140||t|r
openai/gpt-oss-20b:free|OpenAI: gpt-oss-20b (free)|Chutes||131072|32768|0|0||t|r
anthropic/claude-sonnet-4.5|Anthropic: Claude Sonnet 4.5|Anthropic|=claude-4.5-sonnet-20250929|1000000|64000|3000|15000|300|tif|
anthropic/claude-haiku-4.5|Anthropic: Claude Haiku 4.5|Anthropic|=claude-4.5-haiku-20251001|200000|64000|1000|5000|100|ti|
anthropic/claude-opus-4.1|Anthropic: Claude Opus 4.1|Anthropic|=claude-4.1-opus-20250805|200000|32000|15000|75000|1500|tif|
anthropic/claude-opus-4.5|Anthropic: Claude Opus 4.5|Anthropic|=claude-4.5-opus-20251124|200000|64000|5000|25000|500|tif|
anthropic/claude-sonnet-4|Anthropic: Claude Sonnet 4|Anthropic|=claude-4-sonnet-20250522|1000000|64000|3000|15000|300|tif|
anthropic/claude-3.7-sonnet|Anthropic: Claude 3.7 Sonnet|Anthropic|=claude-3-7-sonnet-20250219|200000|64000|3000|15000|300|tif|
anthropic/claude-3.7-sonnet:thinking|Anthropic: Claude 3.7 Sonnet (thinking)|Anthropic|=claude-3-7-sonnet-20250219|200000|64000|3000|15000|300|tif|r
anthropic/claude-3.5-haiku|Anthropic: Claude 3.5 Haiku|Anthropic|=claude-3-5-haiku-20241022|200000|8192|800|4000|80|ti|
google/gemini-2.5-pro|Google: Gemini 2.5 Pro|Google||1048576|65536|1250|10000|125|tifav|r
google/gemini-2.5-flash|Google: Gemini 2.5 Flash|Google||1048576|65535|300|2500|30|tifav|
google/gemini-2.5-flash-lite|Google: Gemini 2.5 Flash Lite|Google||1048576|65535|100|400|10|tifav|
google/gemini-2.0-flash-001|Google: Gemini 2.0 Flash|Google||1048576|8192|100|400|25|tifav|
google/gemini-3-pro-preview|Google: Gemini 3 Pro Preview|Google|-20251117|1048576|65536|2000|12000|200|tifav|r
google/gemma-3-27b-it|Google: Gemma 3 27B|DeepInfra||131072|16384|90|160||ti|
google/gemma-3-27b-it:free|Google: Gemma 3 27B (free)|Chutes||96000|8192|0|0||ti|
google/gemma-3-12b-it|Google: Gemma 3 12B|DeepInfra||131072|16384|40|130||ti|
google/gemma-3-4b-it|Google: Gemma 3 4B|DeepInfra||96000|16384|20|70||ti|
meta-llama/llama-3.3-70b-instruct|Meta: Llama 3.3 70B Instruct|DeepInfra||131072|16384|130|390||t|
meta-llama/llama-3.3-70b-instruct:free|Meta: Llama 3.3 70B Instruct (free)|Together||131072|8192|0|0||t|
meta-llama/llama-3.1-8b-instruct|Meta: Llama 3.1 8B Instruct|DeepInfra||131072|16384|20|30||t|
meta-llama/llama-3.1-405b-instruct|Meta: Llama 3.1 405B Instruct|Together||130815|16384|3500|3500||t|
meta-llama/llama-4-maverick|Meta: Llama 4 Maverick|DeepInfra||1048576|16384|150|600||ti|
meta-llama/llama-4-scout|Meta: Llama 4 Scout|DeepInfra||327680|16384|80|300||ti|
mistralai/mistral-large-2411|Mistral Large 2411|Mistral||131072|16384|2000|6000||t|
mistralai/mistral-medium-3.1|Mistral: Mistral Medium 3.1|Mistral||131072|16384|400|2000||ti|
mistralai/mistral-small-3.2-24b-instruct|Mistral: Mistral Small 3.2 24B|Mistral||131072|16384|60|180||ti|
mistralai/mistral-nemo|Mistral: Mistral Nemo|DeepInfra||131072|16384|20|40||t|
mistralai/codestral-2508|Mistral: Codestral 2508|Mistral||256000|16384|300|900||t|
mistralai/devstral-medium|Mistral: Devstral Medium|Mistral||131072|16384|400|2000||t|
mistralai/magistral-medium-2506|Mistral: Magistral Medium 2506|Mistral||40960|40000|2000|5000||t|r
qwen/qwen3-235b-a22b|Qwen: Qwen3 235B A22B|Novita|-04-28|40960|16384|180|540||t|r
qwen/qwen3-235b-a22b-2507|Qwen: Qwen3 235B A22B Instruct 2507|Novita||262144|16384|80|550||t|
qwen/qwen3-coder|Qwen: Qwen3 Coder 480B A35B|Novita|-480b-a35b-07-25|262144|65536|220|950||t|
qwen/qwen3-coder:free|Qwen: Qwen3 Coder 480B A35B (free)|Chutes|-480b-a35b-07-25|262144|65536|0|0||t|
qwen/qwen3-32b|Qwen: Qwen3 32B|DeepInfra|-04-28|40960|16384|50|200||t|r
qwen/qwen3-30b-a3b|Qwen: Qwen3 30B A3B|DeepInfra|-04-28|40960|16384|60|220||t|r
qwen/qwen3-8b|Qwen: Qwen3 8B|Novita|-04-28|128000|20000|35|138||t|r
qwen/qwen-2.5-72b-instruct|Qwen2.5 72B Instruct|DeepInfra||32768|16384|70|260||t|
qwen/qwen2.5-vl-72b-instruct|Qwen: Qwen2.5 VL 72B Instruct|Novita||32768|16384|250|750||ti|
qwen/qwq-32b|Qwen: QwQ 32B|DeepInfra||131072|16384|150|400||t|r
deepseek/deepseek-chat-v3.1|DeepSeek: DeepSeek V3.1|Fireworks||163840|16384|200|800||t|
deepseek/deepseek-chat-v3-0324|DeepSeek: DeepSeek V3 0324|DeepInfra||163840|16384|240|840||t|
deepseek/deepseek-chat-v3-0324:free|DeepSeek: DeepSeek V3 0324 (free)|Chutes||163840|16384|0|0||t|
deepseek/deepseek-r1-0528|DeepSeek: R1 0528|DeepInfra||163840|65536|400|1750||t|r
deepseek/deepseek-r1-0528:free|DeepSeek: R1 0528 (free)|Chutes||163840|65536|0|0||t|r
deepseek/deepseek-v3.2|DeepSeek: DeepSeek V3.2|DeepSeek|-20251201|131072|65536|280|420|28|t|
x-ai/grok-4|xAI: Grok 4|xAI|-07-09|256000|64000|3000|15000|750|ti|r
x-ai/grok-4-fast|xAI: Grok 4 Fast|xAI||2000000|30000|200|500|50|ti|r
x-ai/grok-3|xAI: Grok 3|xAI||131072|16384|3000|15000|750|t|
x-ai/grok-3-mini|xAI: Grok 3 Mini|xAI||131072|16384|300|500|75|t|r
x-ai/grok-code-fast-1|xAI: Grok Code Fast 1|xAI||256000|10000|200|1500|20|t|r
cohere/command-a|Cohere: Command A|Cohere|-03-2025|256000|8192|2500|10000||t|
cohere/command-r-plus-08-2024|Cohere: Command R+ (08-2024)|Cohere||128000|4000|2500|10000||t|
amazon/nova-pro-v1|Amazon: Nova Pro 1.0|Amazon Bedrock||300000|5120|800|3200||ti|
amazon/nova-lite-v1|Amazon: Nova Lite 1.0|Amazon Bedrock||300000|5120|60|240||ti|
microsoft/phi-4|Microsoft: Phi 4|DeepInfra||16384|8192|60|140||t|
moonshotai/kimi-k2-0905|MoonshotAI: Kimi K2 0905|Fireworks||262144|16384|390|1900||t|
moonshotai/kimi-k2-thinking|MoonshotAI: Kimi K2 Thinking|Fireworks|-20251106|262144|65536|600|2500||t|r
z-ai/glm-4.6|Z.AI: GLM 4.6|Novita||202752|65536|390|1750||t|r
z-ai/glm-4.5-air|Z.AI: GLM 4.5 Air|Novita||131072|65536|130|850||t|r
minimax/minimax-m2|MiniMax: MiniMax M2|Minimax||196608|65536|255|1020||t|r
nousresearch/hermes-4-70b|Nous: Hermes 4 70B|Nebius||131072|65536|110|380||t|
perplexity/sonar|Perplexity: Sonar|Perplexity||127072|8192|1000|1000||ti|
"""  # noqa: E501 - a table


def _models() -> tuple[SimulatedModel, ...]:
    rows = [line.split("|") for line in _TABLE.strip().splitlines()]
    return tuple(_model(row, number) for number, row in enumerate(rows))


def _model(row: list[str], number: int) -> SimulatedModel:
    model_id, name, provider, served, context, output, prompt, completion, cached, inputs, reasons = row
    base = model_id.partition(":")[0]
    author = base.partition("/")[0]
    return SimulatedModel(
        id=model_id,
        name=name,
        provider=provider,
        served_as=f"{author}/{served[1:]}" if served.startswith("=") else base + served,
        context_length=int(context),
        max_completion_tokens=int(output),
        prompt_nanousd=int(prompt),
        completion_nanousd=int(completion),
        cache_read_nanousd=int(cached) if cached else None,
        request_nanousd=5_000_000 if provider == "Perplexity" else 0,
        inputs=tuple(_INPUTS[letter] for letter in inputs),
        reasoning=reasons == "r",
        created=1_704_067_200 + 86_400 * 8 * number,
        description=f"{name}, as the simulator imagines it: {int(context):,} tokens of context.",
        knowledge_cutoff=f"{2023 + number % 3}-{1 + number * 5 % 12:02d}-28" if number % 4 else None,
        hugging_face_id=base if _is_open(base) else None,
    )


def _is_open(base: str) -> bool:
    return base.startswith(("meta-llama/", "qwen/", "deepseek/", "google/gemma", "openai/gpt-oss", "microsoft/"))


MODELS: Final = _models()
"""The default catalog."""

EMBEDDING_MODELS: Final = (
    SimulatedModel(
        id="openai/text-embedding-3-small",
        name="OpenAI: Text Embedding 3 Small",
        provider="OpenAI",
        served_as="openai/text-embedding-3-small",
        context_length=8_192,
        prompt_nanousd=20,
        outputs=("embeddings",),
        description="Text Embedding 3 Small, as the simulator imagines it.",
    ),
    SimulatedModel(
        id="qwen/qwen3-embedding-8b",
        name="Qwen: Qwen3 Embedding 8B",
        provider="DeepInfra",
        served_as="qwen/qwen3-embedding-8b",
        context_length=32_768,
        prompt_nanousd=10,
        outputs=("embeddings",),
        description="Qwen3 Embedding 8B, as the simulator imagines it.",
        hugging_face_id="qwen/qwen3-embedding-8b",
    ),
)
"""The default models for embeddings."""
