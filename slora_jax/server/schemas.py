"""Bodies of calls. A field that is not known, or not supported, is refused by name and never passed over."""

from collections.abc import Sequence
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # a padding of OpenAI's against eavesdroppers; there is none here


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


JsonSchema = dict[str, Any] | bool


class NamedSchema(Body):
    """name, description and strict are for OpenAI's own models; a schema is always enforced here."""

    name: str = Field(max_length=64)
    description: str | None = Field(None, max_length=4096)
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Choices = Annotated[list[str], Field(min_length=1, max_length=1024)]


class StructuredOutputs(Body):
    """vLLM's form; exactly one."""

    json_schema: JsonSchema | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class SamplingFields(Body):
    """What chat and completions have in common. None: the client leaves it to the server."""

    model: str = Field(max_length=256)
    frequency_penalty: float | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    max_tokens: int | None = None
    min_p: float | None = None
    n: int | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    response_format: ResponseFormat | None = None
    # vLLM's, and its older names
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    # what OpenAI's service keeps for its own books; it changes no answer
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


Ids = Annotated[list[Token], Field(min_length=1)]


def as_prompts(given: str | list[int] | list[str] | list[list[int]]) -> list[str | Sequence[int]]:
    """OpenAI's four forms: one text, the token ids of one, several texts, token ids of several."""
    if isinstance(given, str):
        return [given]
    ids = [token for token in given if isinstance(token, int)]
    return [ids] if ids else [part for part in given if not isinstance(part, int)]


class CompletionBody(SamplingFields):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    add_special_tokens: bool = True
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | Sequence[int]]:
        return as_prompts(self.prompt)


class EmbeddingBody(Body):
    """dimensions: only the model's own size is accepted. user: for OpenAI's books, as in SamplingFields."""

    model: str = Field(max_length=256)
    input: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    add_special_tokens: bool = True
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    def inputs(self) -> list[str | Sequence[int]]:
        return as_prompts(self.input)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str = Field(max_length=64)
    arguments: str


class CalledTool(Body):
    id: str = Field(max_length=64)
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """With the arguments as a mapping, if that is what they are."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(Body):
    """A message of text, or calls of tools. The fields that are null stand in what the openai package gives back as a
    message.
    """

    role: str = Field(max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_call_id: str | None = Field(None, max_length=64)
    tool_calls: Annotated[list[CalledTool], Field(max_length=128)] | None = None

    def plain(self) -> dict[str, Any]:
        """What chat templates take."""
        content = self.content or ""
        plain: dict[str, Any] = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            plain |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return plain


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str = Field(max_length=64)


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeBody(Body):
    """vLLM's form: a prompt or a chat."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = Field(None, max_length=256)
    tokens: list[Token] = Field(max_length=1 << 20)


class LoadAdapterBody(Body):
    """vLLM's form."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=1024)
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadAdapterBody(Body):
    """vLLM's form."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None


class AdapterNameBody(Body):
    lora_name: str = Field(max_length=256)


class SloraParameters(Body):
    """Sampling as S-LoRA's clients name it. Defaults are S-LoRA's."""

    do_sample: bool = False
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    max_new_tokens: int = 16
    presence_penalty: float = 0.0
    return_details: bool = False
    stop_sequences: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SloraBody(Body):
    """S-LoRA's form. lora_dir: the name of an adapter; model_dir is what its clients send beside it, and not used."""

    inputs: str
    lora_dir: str | None = Field(None, max_length=256)
    model_dir: str | None = None
    parameters: SloraParameters = Field(default_factory=SloraParameters)
    req_id: str | None = None

    @field_validator("req_id", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value
