"""Which tools a chat may call, and whether it must."""

import dataclasses
from typing import Any

from slora_jax.server.errors import ApiError
from slora_jax.server.schemas import ChatBody, NamedTool, TextFormat, Tool
from slora_jax.server.tools import ToolFormat, ToolParser, format_of
from slora_jax.structured import StructuredOutput, StructuredOutputError

_ANY = {"type": "object"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """described: for the chat template. form: how calls are found. structured: what forces the answer to be a call."""

    described: list[dict[str, Any]]
    names: tuple[str, ...]
    form: ToolFormat
    structured: StructuredOutput | None = None

    @property
    def skip_special(self) -> bool:
        """Mistral's and Llama's marks are special tokens, and must be seen."""
        return self.form not in ("mistral", "llama3")

    def parser(self) -> ToolParser:
        return ToolParser(self.form, self.names)


def choose_tools(body: ChatBody, template: str) -> Tools | None:
    """None if the chat has no tools or may not use them. ApiError 400 if the call contradicts itself."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    forced = named is not None or body.tool_choice == "required"
    if not body.tools:
        if forced:
            raise ApiError(400, "tool_choice names tools, and there are none", param="tool_choice")
        return None
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools has a name twice; give each function a name of its own", param="tools")
    if named is not None and named not in names:
        raise ApiError(400, f"tool_choice names {named!r}, which is not among the tools", param="tool_choice")
    if body.tool_choice == "none":
        return None
    asks_form = body.response_format is not None and not isinstance(body.response_format, TextFormat)
    vllm = (body.structured_outputs, body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if asks_form or any(value is not None for value in vllm):
        raise ApiError(400, "an answer in a given form calls no tools; send tool_choice none", param="tools")
    taught = format_of(template)
    if taught is None and not forced:
        raise ApiError(400, "this model's chat template teaches no tool calls that this server knows", param="tools")
    described = [tool.model_dump(exclude_none=True) for tool in body.tools] if taught else []
    if not forced:
        assert taught is not None
        return Tools(described=described, names=tuple(names), form=taught)
    chosen = [tool for tool in body.tools if named is None or tool.function.name == named]
    schema = chosen[0].function.parameters or _ANY
    if named is None:
        schema = _calls_schema(chosen, body.parallel_tool_calls is not False)
    try:
        return Tools(
            described=described,
            names=tuple(tool.function.name for tool in chosen),
            form="forced" if named is None else "forced_arguments",
            structured=StructuredOutput(json_schema=schema),
        )
    except StructuredOutputError as error:
        raise ApiError(400, str(error), param="tools") from None


def _calls_schema(tools: list[Tool], several: bool) -> dict[str, Any]:
    """A list of one or more calls. Definitions of each function's schema move to the outside, where $ref finds them."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        parameters = dict(tool.function.parameters or _ANY)
        for key in ("$defs", "definitions"):
            for name, definition in (parameters.pop(key, None) or {}).items():
                if definitions.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise ApiError(400, f"two tools define {name!r} differently; rename one", param="tools")
        fields = {"name": {"const": tool.function.name}, "arguments": parameters}
        calls.append(
            {"type": "object", "properties": fields, "required": ["name", "arguments"], "additionalProperties": False}
        )
    schema: dict[str, Any] = {
        "type": "array",
        "items": {"anyOf": calls},
        "minItems": 1,
        "maxItems": 16 if several else 1,
    }
    return schema | definitions
