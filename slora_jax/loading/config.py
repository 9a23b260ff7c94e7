"""From a Hugging Face ``config.json`` to a ModelConfig, refusing by name whatever the forward pass does not do.

Missing fields take the default of transformers' configuration class of that architecture, as transformers itself does.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from slora_jax.errors import ModelError
from slora_jax.model_config import ModelConfig, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What transformers assumes for one architecture where config.json is silent. None: as many kv heads as heads."""

    model_type: str
    num_kv_heads: int | None
    max_position: int
    head_dim: int | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": _Family(model_type="llama", num_kv_heads=None, max_position=2048),
    "MistralForCausalLM": _Family(model_type="mistral", num_kv_heads=8, max_position=131072, sliding_window=4096),
    "Qwen2ForCausalLM": _Family(model_type="qwen2", num_kv_heads=32, max_position=32768, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(model_type="qwen3", num_kv_heads=32, max_position=32768, head_dim=128, qk_norm=True),
}
"""Supported Hugging Face architectures."""


def config_from_hf(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """ModelConfig of a Hugging Face config.json, given as a dict. ``source`` names the model in messages.

    Raises ModelError naming the field that is missing, malformed or not supported.
    """
    name = _architecture(raw, source)
    family = FAMILIES[name]
    _refuse_unsupported(raw, name, source)

    heads = _size(raw, "num_attention_heads", source)
    hidden = _size(raw, "hidden_size", source)
    max_position = _size(raw, "max_position_embeddings", source, family.max_position)
    _refuse_sliding_window(raw, name, family, max_position, source)
    if raw.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise ModelError(
            f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set head_dim"
        )
    rope_theta, rope_scaling = _rope(raw, source)
    return checked_config(
        source,
        architecture=name,
        vocab_size=_size(raw, "vocab_size", source),
        hidden_size=hidden,
        mlp_size=_size(raw, "intermediate_size", source),
        num_layers=_size(raw, "num_hidden_layers", source),
        num_heads=heads,
        num_kv_heads=_size(raw, "num_key_value_heads", source, family.num_kv_heads or heads),
        head_dim=_size(raw, "head_dim", source, family.head_dim or hidden // heads),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=_number(raw, "rms_norm_eps", source, 1e-6),
        max_position=max_position,
        tied_embeddings=bool(raw.get("tie_word_embeddings") or False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def checked_config(source: str, **fields: Any) -> ModelConfig:
    """A ModelConfig whose inner constraints, also those of the page layout, raise ModelError instead of ValueError."""
    try:
        config = ModelConfig(**fields)
        config.geometry  # noqa: B018 - building it checks that a page holds whole adapter tiles
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None
    if config.head_dim % 2:
        raise ModelError(f"{source}: head_dim {config.head_dim} is odd; rotary positions need an even one")
    return config


def unsupported_architecture(found: str, source: str) -> ModelError:
    return ModelError(f"{source}: architecture {found} is not supported; supported are {', '.join(FAMILIES)}")


def _architecture(raw: Mapping[str, Any], source: str) -> str:
    names = raw.get("architectures") or []
    if not names:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        model_type = raw.get("model_type")
        if model_type not in by_type:
            raise unsupported_architecture(str(model_type), source)
        return by_type[model_type]
    if len(names) != 1 or names[0] not in FAMILIES:
        raise unsupported_architecture(", ".join(map(str, names)), source)
    return names[0]


def _refuse_unsupported(raw: Mapping[str, Any], name: str, source: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelError(
            f"{source}: quantization_config ({method}) is not supported; use the unquantised checkpoint or a GGUF file"
        )
    activation = raw.get("hidden_act", raw.get("hidden_activation", "silu"))
    if activation not in ("silu", "swish"):
        raise ModelError(f"{source}: hidden_act {activation} is not supported; only silu is")
    if raw.get("attention_bias") and name != "Qwen2ForCausalLM":
        raise ModelError(f"{source}: attention_bias is not supported for {name} (it adds a bias to the o projection)")
    if raw.get("mlp_bias"):
        raise ModelError(f"{source}: mlp_bias is not supported")
    partial = raw.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"{source}: partial_rotary_factor {partial} is not supported; rotary must cover the whole head"
        )


def _refuse_sliding_window(raw: Mapping[str, Any], name: str, family: _Family, max_position: int, source: str) -> None:
    if raw.get("use_sliding_window"):
        raise ModelError(f"{source}: use_sliding_window is not supported; only full attention is")
    other = sorted({str(kind) for kind in raw.get("layer_types") or []} - {"full_attention"})
    if other:
        raise ModelError(f"{source}: layer_types {', '.join(other)} not supported; only full attention is")
    if name != "MistralForCausalLM":
        return
    window = raw.get("sliding_window", family.sliding_window)
    if window is not None and window < max_position:
        raise ModelError(
            f"{source}: sliding_window {window} is smaller than max_position_embeddings {max_position}; "
            "sliding-window attention is not supported"
        )


def _rope(raw: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{source}: {field} must be an object, not {rope!r}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"{source}: {field} per layer type is not supported")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(f"{source}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    theta_from = rope if rope.get("rope_theta") is not None else raw
    theta = _number(theta_from, "rope_theta", source, 10000.0)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_number(rope, "factor", f"{source}: {field}"))
    if kind == "llama3":
        where = f"{source}: {field}"
        scaling = RopeScaling(
            kind="llama3",
            factor=_number(rope, "factor", where),
            low_freq_factor=_number(rope, "low_freq_factor", where),
            high_freq_factor=_number(rope, "high_freq_factor", where),
            original_max_position=_size(rope, "original_max_position_embeddings", where),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ModelError(f"{where}.high_freq_factor must be larger than low_freq_factor")
        return theta, scaling
    raise ModelError(f"{source}: rope type {kind} is not supported; supported are default, linear, llama3")


def _size(raw: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{source}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{source}: {key} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"{source}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{source}: {key} must be a positive number, not {value!r}")
    return float(value)
