"""Which form an answer shall have: OpenAI's response_format, vLLM's structured_outputs and its older guided_*."""

from typing import Any

from slora_jax.server.errors import ApiError
from slora_jax.server.schemas import JsonObjectFormat, JsonSchemaFormat, SamplingFields
from slora_jax.structured import StructuredOutput, StructuredOutputError

_GUIDED = dict(guided_json="json_schema", guided_regex="regex", guided_choice="choice", guided_grammar="grammar")
_VLLM = ("json_schema", "regex", "choice", "grammar")


def structured_output(body: SamplingFields) -> tuple[StructuredOutput | None, str]:
    """The form and the field that asks for it. ApiError 400 if there are two, or if it cannot be one."""
    asked: list[tuple[str, dict[str, Any]]] = []
    match body.response_format:
        case JsonObjectFormat():
            asked.append(("response_format", dict(json_object=True)))
        case JsonSchemaFormat(json_schema=form):
            asked.append(("response_format", dict(json_schema=form.schema_)))
    if (vllm := body.structured_outputs) is not None:
        fields = {name: getattr(vllm, name) for name in _VLLM}
        asked.append(("structured_outputs", fields | dict(json_object=bool(vllm.json_object))))
    for name, ours in _GUIDED.items():
        if (value := getattr(body, name)) is not None:
            asked.append((name, {ours: value}))
    if not asked:
        return None, "response_format"
    if len(asked) > 1:
        raise ApiError(400, f"give {asked[0][0]} or {asked[1][0]}, not both", param=asked[1][0])
    param, fields = asked[0]
    try:
        return StructuredOutput(**fields), param
    except StructuredOutputError as error:
        raise ApiError(400, str(error), param=param) from None
