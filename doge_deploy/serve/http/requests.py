"""Bodies of requests: OpenAI's fields and those that vLLM added, with what is legal.

A field that is not here is refused by name; nothing is accepted and then ignored but what has no effect.

Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from doge_deploy.serve.grammar.matchers import MAX_GRAMMAR_CHARACTERS, Kind, Source
from doge_deploy.serve.http.findings import kind_error, rule, spelled

MAX_CHOICES = 16
MAX_PROMPTS = 64
"""Prompts of one completion request."""
MAX_EMBEDDED = 2048
"""Texts of one embedding request, as in OpenAI's API; clients send as many where they have them."""
MAX_STOP_TEXTS = 4
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 1024
MAX_PARTS = 256
"""Parts of one message."""
MAX_BIASES = 1024
MAX_GUIDED_CHOICES = 4096
MAX_TOKEN_IDS = 2**16
"""Of one prompt, before it is compared with the model's own limit."""
MAX_UNREAD_VALUES = 1024
"""Of an object that is not looked at, those within one another included: it is held as long as the request is."""
MAX_TOOL_VALUES = 8192
"""The same of tools that must not be called: those of a hundred tools."""
MAX_FIELDS = 128
"""Of a body or of an object in it, those that are refused by name included."""

_NUMBER = {"allow_inf_nan": False, "strict": True}
"""Strict: a text of digits and a boolean are no numbers."""


def _at_most(limit: int) -> BeforeValidator:
    """Refuses a long list or mapping before its items are looked at: what is wrong with each of a million would take
    seconds and gigabytes to say.
    """

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"{len(value)} entries; at most {limit} are taken")
        return value

    return BeforeValidator(check)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"{len(value)} fields; at most {MAX_FIELDS} are taken")
        return value


def _neutral(*values: object) -> Any:
    """A field that is accepted with values under which it has no effect."""

    def check(value: object) -> object:
        if value is not None and value not in values:
            *most, last = ["null", *(json.dumps(one) for one in values)]
            legal = f"{', '.join(most)} or {last}" if most else last
            raise ValueError(f"not supported by this server; {legal} is accepted")
        return value

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": [None, *values]})]


def _as_texts(value: object) -> object:
    if not isinstance(value, str | list):
        raise kind_error("a text or a list of texts", value)
    return [value] if isinstance(value, str) else value


_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": 256}
StopTexts = Annotated[
    list[Annotated[StrictStr, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOP_TEXTS),
    BeforeValidator(_as_texts),
    _at_most(MAX_STOP_TEXTS),
    WithJsonSchema({"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOP_TEXTS}]}),
]

TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)]


_JSON_TYPES = {
    str: "a text",
    int: "a token id",
    list: "a list",
    bool: "a boolean",
    float: "a fraction",
    dict: "an object",
}


def _of_one_kind(value: object) -> object:
    """Of a list that fits none of several types the first one tells what its first entry is not, which helps nobody."""
    if not isinstance(value, str | list):
        raise kind_error("a text, a list of texts, or token ids", value)
    if isinstance(value, list) and 0 < len(value) <= MAX_TOKEN_IDS:
        for place, entry in enumerate(value):
            if type(entry) not in (str, int, list) or type(entry) is not type(value[0]):
                what = _JSON_TYPES.get(type(entry), "null")
                raise ValueError(
                    f"entry {place} is {what}; must be a text, or a list of texts alone, of token ids alone, or of "
                    "lists of token ids alone"
                )
    return value


def _texts(limit: int) -> Any:
    """One text, or at most `limit` of them, as text or as token ids."""
    return Annotated[
        StrictStr
        | Annotated[list[StrictStr], Field(fail_fast=True, min_length=1, max_length=limit), _at_most(limit)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(fail_fast=True, min_length=1, max_length=limit), _at_most(limit)],
        BeforeValidator(_of_one_kind),
    ]


class StreamOptions(_Body):
    """What comes with a stream."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    """vLLM's: with `include_usage`, every chunk has the usage so far."""
    include_obfuscation: StrictBool = False
    """Accepted and without effect here: chunks are not padded."""


class JsonSchema(_Body):
    """`response_format.json_schema`."""

    name: StrictStr = "schema"
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(_Body):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise rule("json_schema", "belongs to the type 'json_schema', which needs it")
        return self


def _token_key(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(_TOKEN_KEY, value):
        raise ValueError("must be a token id, in digits")
    return value


_TOKEN_KEY = r"[0-9]{1,9}"
_TokenKey = Annotated[
    str, BeforeValidator(_token_key), WithJsonSchema({"type": "string", "pattern": f"^{_TOKEN_KEY}$"})
]


def _as_schema(value: object) -> object:
    """A JSON schema that comes as a text, as vLLM takes it too."""
    if not isinstance(value, str):
        if not isinstance(value, dict):
            raise kind_error("a JSON object, or one as a text", value)
        return value
    if len(value) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError(f"{len(value)} characters; at most {MAX_GRAMMAR_CHARACTERS} are compiled")
    try:
        found = json.loads(value)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the text is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"the text must be a JSON object; not {spelled(found)}")
    return found


_Schema = Annotated[
    dict[str, Any],
    BeforeValidator(_as_schema),
    WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "string"}]}),
]
_GuidingText = Annotated[StrictStr, Field(min_length=1)]
_Choices = Annotated[
    list[Annotated[StrictStr, Field(min_length=1)]],
    Field(fail_fast=True, min_length=1, max_length=MAX_GUIDED_CHOICES),
    _at_most(MAX_GUIDED_CHOICES),
]


@dataclass(frozen=True)
class Guide:
    """What an answer must look like."""

    field: str
    """Of the body, where it was said."""
    kind: Kind
    source: Source = None


class StructuredOutputs(_Body):
    """vLLM's present form of what it called `guided_...` before."""

    json_: _Schema | None = Field(default=None, alias="json")
    regex: _GuidingText | None = None
    choice: _Choices | None = None
    grammar: _GuidingText | None = None
    """Lark."""

    @property
    def guides(self) -> list[Guide]:
        """What is given; after validation one."""
        return _given("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)

    @model_validator(mode="after")
    def _says_one_thing(self) -> StructuredOutputs:
        if len(self.guides) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


def _given(prefix: str, schema: Source, regex: Source, choice: Source, grammar: Source) -> list[Guide]:
    """Those of vLLM's four that are not None; both of its forms have them."""
    fields: tuple[tuple[str, Kind, Source], ...] = (
        ("json", "json_schema", schema),
        ("regex", "regex", regex),
        ("choice", "choice", choice),
        ("grammar", "grammar", grammar),
    )
    return [Guide(prefix + name, kind, source) for name, kind, source in fields if source is not None]


def _of_few_values(limit: int) -> BeforeValidator:
    def check(value: object) -> object:
        left: list[list[Any] | dict[Any, Any]] = [value] if isinstance(value, list | dict) else []
        count = 0
        while left:
            found = left.pop()
            inner = list(found.values() if isinstance(found, dict) else found)
            count += len(inner)
            if count > limit:
                raise ValueError(f"more than {limit} values; it is accepted and not looked at")
            left += [one for one in inner if isinstance(one, list | dict)]
        return value

    return BeforeValidator(check)


class GenerationBody(_Body):
    """What chat and text completions share. null means not given."""

    model: StrictStr | None = None
    """A name of `/v1/models`; the only model where there is one."""
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """The same under its newer name."""
    temperature: Annotated[float, Field(ge=0, le=100, **_NUMBER)] | None = None
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(ge=0, le=1, **_NUMBER)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    """0 or -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1, **_NUMBER)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, **_NUMBER)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, **_NUMBER)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, **_NUMBER)] | None = None
    logit_bias: (
        Annotated[
            dict[_TokenKey, Annotated[float, Field(ge=-100, le=100, **_NUMBER)]],
            Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
            _at_most(MAX_BIASES),
        ]
        | None
    ) = None
    """Token id to what is added to its logit."""
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: StopTexts | None = None
    ignore_eos: StrictBool | None = None
    """A token that ends a text is one like others, as in vLLM."""
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: _GuidingText | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _GuidingText | None = None
    user: StrictStr | None = None
    """Accepted and not looked at."""
    safety_identifier: StrictStr | None = None
    """The same."""
    prompt_cache_key: StrictStr | None = None
    """The same: what requests share is found by their tokens."""
    metadata: Annotated[dict[str, Any], _of_few_values(MAX_UNREAD_VALUES)] | None = None
    """Accepted and not looked at."""
    store: _neutral(False) = None  # type: ignore[valid-type]
    service_tier: _neutral("auto", "default") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agrees(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise rule("stream_options", "only with stream: true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise rule("max_tokens", "max_completion_tokens says another number; give one of them")
        guides = self._guides()
        if self.ignore_eos and guides:
            field = guides[0].field
            raise rule("ignore_eos", f"a text whose form is given ends with it; leave out ignore_eos or {field}")
        if len(guides) > 1:
            first, second = (guide.field for guide in guides[:2])
            raise rule(first.partition(".")[0], f"{second} is given too, and they cannot both be followed")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of an answer at most, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def guide(self) -> Guide | None:
        """What the answer must look like, where it must."""
        return next(iter(self._guides()), None)

    def _guides(self) -> list[Guide]:
        guides = [] if self.structured_outputs is None else self.structured_outputs.guides
        guides += _given("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        form = self.response_format
        if form is not None and form.type == "json_object":
            guides.append(Guide("response_format", "json_object"))
        if form is not None and form.json_schema is not None:
            guides.append(Guide("response_format", "json_schema", form.json_schema.schema_))
        return guides


class CacheControl(_Body):
    """What clients of other models mark the end of a shared beginning with."""

    type: Literal["ephemeral"]
    ttl: StrictStr | None = None


class TextPart(_Body):
    """A part of a message; text is the only kind that a Doge reads."""

    type: Literal["text"]
    text: StrictStr
    cache_control: CacheControl | None = None
    """Accepted and not looked at: what requests share is found by their tokens."""


def _as_content(value: object) -> object:
    if not isinstance(value, str | list):
        raise kind_error("a text or a list of parts", value)
    return value


class Message(_Body):
    """One message of a conversation."""

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    # before the content, which is null because of it: of two wrong fields the first one is named
    tool_calls: _neutral([]) = None  # type: ignore[valid-type]
    content: Annotated[
        StrictStr | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS), _at_most(MAX_PARTS)],
        BeforeValidator(_as_content),
    ]
    name: StrictStr | None = None
    """Accepted and not looked at: chat templates know roles."""
    # what clients send back of an answer as they got it, from this server or from another one
    type: _neutral("text", "message") = None  # type: ignore[valid-type]
    tool_call_id: _neutral() = None  # type: ignore[valid-type]
    refusal: _neutral("") = None  # type: ignore[valid-type]
    audio: _neutral() = None  # type: ignore[valid-type]
    function_call: _neutral() = None  # type: ignore[valid-type]
    annotations: _neutral([]) = None  # type: ignore[valid-type]
    images: _neutral([]) = None  # type: ignore[valid-type]
    parsed: _neutral() = None  # type: ignore[valid-type]
    reasoning: _neutral("") = None  # type: ignore[valid-type]
    reasoning_content: _neutral("") = None  # type: ignore[valid-type]
    provider_specific_fields: _neutral({}) = None  # type: ignore[valid-type]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


_Messages = Annotated[
    list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), _at_most(MAX_MESSAGES)
]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: _Messages
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Any], _of_few_values(MAX_TOOL_VALUES)] | None = None
    """Accepted where `tool_choice` is none: this server calls none."""
    tool_choice: Annotated[Any, WithJsonSchema({"enum": [None, "none", "auto"]})] = None
    parallel_tool_calls: _neutral(True, False) = None  # type: ignore[valid-type]
    functions: _neutral([]) = None  # type: ignore[valid-type]
    function_call: _neutral("none", "auto") = None  # type: ignore[valid-type]
    audio: _neutral() = None  # type: ignore[valid-type]
    prediction: _neutral() = None  # type: ignore[valid-type]
    verbosity: _neutral() = None  # type: ignore[valid-type]
    web_search_options: _neutral() = None  # type: ignore[valid-type]
    modalities: _neutral(["text"]) = None  # type: ignore[valid-type]
    reasoning_effort: _neutral("none") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _calls_no_tools(self) -> ChatBody:
        if self.tool_choice not in (None, "none", "auto") or (self.tools and self.tool_choice != "none"):
            raise rule(
                "tools",
                "this server calls no tools; leave tools and tool_choice out, or send tool_choice 'none'; "
                "for an answer of a given form use response_format",
            )
        return self

    @model_validator(mode="after")
    def _agrees_in_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise rule("top_logprobs", "only with logprobs: true")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: _texts(MAX_PROMPTS)  # type: ignore[valid-type]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    """0 only with `echo`: the prompt's own logprobs and nothing new."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: StrictBool | None = None
    suffix: _neutral("") = None  # type: ignore[valid-type]
    best_of: _neutral(1) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agrees_in_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise rule("max_tokens", "0 only with echo: true; else it must be at least 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class EmbeddingBody(_Body):
    """`POST /v1/embeddings`."""

    model: StrictStr | None = None
    input: _texts(MAX_EMBEDDED)  # type: ignore[valid-type]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    """Those that the model's vectors have."""
    user: StrictStr | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """One entry a text, as text or as token ids."""
        value = self.input
        if isinstance(value, str) or isinstance(value[0], int):
            return [value]
        return list(value)


class TokenizeBody(_Body):
    """`POST /tokenize`: a text or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: _Messages | None = None
    add_special_tokens: StrictBool = True
    """With `prompt`: put bos in front where the tokenizer does."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise rule("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(_Body):
    """`POST /detokenize`."""

    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]
