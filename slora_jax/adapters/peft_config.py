"""``adapter_config.json`` of a PEFT LoRA adapter: which fields are honoured, which only inform, and which are refused.

Follows ``LoraConfig`` of PEFT 0.21 (peft/tuners/lora/config.py and layer.py). Every field is in one of the tables
below; a field that is in none of them is refused unless it is switched off, because it may change what the adapter
computes.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from slora_jax.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from slora_jax.errors import AdapterError

HONOURED = frozenset(
    """peft_type r lora_alpha use_rslora target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
    alpha_pattern init_lora_weights bias fan_in_fan_out base_model_name_or_path""".split()
)
"""Fields that decide what the adapter computes. ``fan_in_fan_out`` is among them although it has no effect: PEFT
switches it off for ``nn.Linear``, and every projection of the supported models is one. ``base_model_name_or_path``
serves error messages.
"""

INFORMATIVE = frozenset(
    """auto_mapping revision task_type peft_version inference_mode lora_dropout ensure_weight_tying megatron_core
    runtime_config qalora_group_size loftq_config eva_config corda_config lora_ga_config""".split()
)
"""Fields without any effect on the forward pass of an adapter that is otherwise supported. The four ``*_config`` act
only through ``init_lora_weights``; ``ensure_weight_tying`` only on embeddings, ``qalora_group_size`` only with
``use_qalora``.
"""

_PLAIN = "train or re-save it as a plain LoRA adapter"
REFUSED = {
    "use_dora": (
        "DoRA rescales every weight by a learned magnitude",
        "merge it into the base model with PEFT, or train without use_dora",
    ),
    "lora_bias": ("the adapter adds a bias to its outputs", "train with lora_bias=false"),
    "modules_to_save": ("the adapter replaces whole modules of the base model", "train without modules_to_save"),
    "trainable_token_indices": ("the adapter replaces rows of the embedding", "train without trainable_token_indices"),
    "alora_invocation_tokens": ("an activated LoRA (aLoRA) applies from its invocation tokens on only", _PLAIN),
    "use_qalora": ("QALoRA averages groups of inputs before A", "train with use_qalora=false"),
    "layer_replication": (
        "the adapter is for a model with repeated layers",
        "serve the expanded model as the base model",
    ),
    "target_parameters": ("the adapter targets bare parameters (mixture of experts)", "use target_modules"),
    "megatron_config": ("the adapter is for Megatron's parallel layers", "convert it to Hugging Face's layout"),
    "arrow_config": (
        "Arrow routes every token among several adapters",
        "register the adapters one by one without arrow_config",
    ),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", _PLAIN),
    "kasa_config": (
        "KaSA truncates the base weights and adds a diagonal between A and B",
        "merge it into the base model with PEFT",
    ),
    "velora_config": ("VeLoRA is a training-time variant whose files hold more than A and B", _PLAIN),
    "monteclora_config": ("MonteCLoRA samples around the weights and its files hold more than A and B", _PLAIN),
}
"""Fields that are refused when switched on: name -> (what it does, remedy)."""

SUBCONFIGS = frozenset(["arrow_config", "use_bdlora", "kasa_config", "velora_config", "monteclora_config"])
"""Fields that PEFT switches on even with an empty object: only null (and false) is off."""

_PURE_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLoraConfig:
    """What an ``adapter_config.json`` says about the computation, checked.

    See PEFT's LoraConfig for the meaning of each field. target_modules: names (a tuple), a regular expression or
    "all-linear" (a string), or None for PEFT's default of the architecture. layers_to_transform: None where every
    layer is meant. Patterns keep the order of the file: the first match wins.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    base_model: str | None = None


def parse_config(fields: Mapping[str, Any], limits: AdapterLimits = DEFAULT_LIMITS) -> PeftLoraConfig:
    """Checks the fields of an ``adapter_config.json``.

    Raises AdapterError naming the field, the reason and the remedy.
    """
    if "peft_type" not in fields:
        raise AdapterError("adapter_config.json has no peft_type; is it a PEFT adapter?")
    if fields["peft_type"] != "LORA":
        raise AdapterError(f"peft_type {_show(fields['peft_type'])} is not supported; only LORA adapters are")
    _refuse_unsupported(fields)
    target = _names(fields, "target_modules")
    if target == ():
        raise AdapterError("target_modules is empty, so the adapter does nothing; name the projections that it adapts")
    layers = _layers(fields)
    pattern = _names(fields, "layers_pattern")
    pattern = (pattern,) if isinstance(pattern, str) and pattern else tuple(pattern or ())
    if isinstance(target, str) and fields.get("layers_to_transform") is not None:
        raise AdapterError(
            "layers_to_transform cannot be combined with a target_modules string (PEFT's rule); list the modules "
            "instead"
        )
    if isinstance(target, str) and fields.get("layers_pattern") is not None:
        raise AdapterError(
            "layers_pattern cannot be combined with a target_modules string (PEFT's rule); list the modules instead"
        )
    if pattern and fields.get("layers_to_transform") is None:
        raise AdapterError("layers_pattern is set without layers_to_transform (PEFT's rule); name the layers too")
    base = fields.get("base_model_name_or_path")
    return PeftLoraConfig(
        r=_rank(fields.get("r", 8), "r", limits),
        lora_alpha=_number(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_switch(fields, "use_rslora"),
        target_modules=target,
        exclude_modules=_names(fields, "exclude_modules") or (),
        layers_to_transform=layers,
        layers_pattern=pattern,
        rank_pattern=tuple(
            (k, _rank(v, f"rank_pattern[{k!r}]", limits)) for k, v in _patterns(fields, "rank_pattern", limits)
        ),
        alpha_pattern=tuple(
            (k, _number(v, f"alpha_pattern[{k!r}]")) for k, v in _patterns(fields, "alpha_pattern", limits)
        ),
        base_model=base if isinstance(base, str) else None,
    )


def decode_config(data: bytes) -> dict[str, Any]:
    """JSON text of an ``adapter_config.json`` to its fields. Raises AdapterError where it is not one JSON object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter_config.json is not valid JSON ({_one_line(error)}); save the adapter again"
        ) from None
    if not isinstance(fields, dict):
        raise AdapterError("adapter_config.json does not hold a JSON object; save the adapter again")
    return fields


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, (reason, remedy) in REFUSED.items():
        value = fields.get(name)
        off = value is None or value is False if name in SUBCONFIGS else not value
        if not off:
            raise AdapterError(f"{name} = {_show(value)} is not supported: {reason}; {remedy}")
    bias = fields.get("bias", "none")
    if bias != "none":
        raise AdapterError(
            f"bias = {_show(bias)} is not supported: the adapter changes biases of the base model; train with "
            'bias="none"'
        )
    init = fields.get("init_lora_weights", True)
    kind = init.lower() if isinstance(init, str) else init
    if isinstance(kind, str) and kind.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"init_lora_weights = {_show(init)} is not supported: this initialisation changes the base weights; "
            "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or train "
            "with another initialisation"
        )
    if not any(kind is pure or (isinstance(kind, str) and kind == pure) for pure in _PURE_INITS):
        raise AdapterError(
            f"init_lora_weights = {_show(init)} is not known, so it may change the base weights; if it does not, set "
            "it to true"
        )
    _switch(fields, "fan_in_fan_out")
    for name, value in fields.items():
        if (
            name not in HONOURED | INFORMATIVE | REFUSED.keys()
            and value is not None
            and value is not False
            and value not in ("", [], {})
        ):
            raise AdapterError(
                f"unknown field {_show(name)} = {_show(value)} may change what the adapter computes; remove it if it "
                "does not"
            )


def _switch(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{name} must be true or false, got {_show(value)}")
    return bool(value)


def _rank(value: Any, name: str, limits: AdapterLimits) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{name} must be a whole number of at least 1, got {_show(value)}")
    if value > limits.max_rank:
        raise AdapterError(
            f"{name} = {_show(value)} is over the limit of {limits.max_rank}; raise AdapterLimits.max_rank if it is "
            "meant"
        )
    return value


def _number(value: Any, name: str) -> float:
    # Bounded so that neither alpha nor the scaling made from it leaves float32.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e30:
        raise AdapterError(f"{name} must be a finite number, got {_show(value)}")
    return float(value)


def _names(fields: Mapping[str, Any], name: str) -> tuple[str, ...] | str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterError(f"{name} must be a list of names or a string, got {_show(value)}")


def _layers(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = fields.get("layers_to_transform")
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise AdapterError(f"layers_to_transform must be a layer index or a list of them, got {_show(value)}")
    return tuple(items) or None


def _patterns(fields: Mapping[str, Any], name: str, limits: AdapterLimits) -> list[tuple[str, Any]]:
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise AdapterError(f"{name} must be an object from module patterns to numbers, got {_show(value)}")
    if len(value) > limits.max_patterns:
        raise AdapterError(
            f"{name} has {len(value)} entries, over the limit of {limits.max_patterns}; raise "
            "AdapterLimits.max_patterns if they are meant"
        )
    return list(value.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _show(value: Any) -> str:
    """A value as it stands in the file, cut to a readable length."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
