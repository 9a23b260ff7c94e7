"""Which projections of a model an adapter's configuration names, and at which rank and scaling.

Follows PEFT 0.21: ``check_target_module_exists`` and ``_maybe_include_all_linear_layers`` in
peft/tuners/tuners_utils.py, ``get_pattern_key`` in peft/utils/other.py. PEFT also shortens lists of 20 or more target
names to suffixes; that is done before it saves a file, so the shortened list is what is read here.
"""

import math
import re

from jaxtyping import Float32, Int32
import numpy as np

from pallas_kernels.geometry import MODULES
from slora_jax.adapters.messages import shown
from slora_jax.adapters.peft_config import PeftLoraConfig
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

HF_MODULES = tuple(
    ("self_attn." if module in ("q", "k", "v", "o") else "mlp.") + module + "_proj" for module in MODULES
)
"""Name of each of MODULES inside a decoder layer of Hugging Face's models."""

MODULE_NAMES = {name: index for index, module in enumerate(MODULES) for name in (module, f"{module}_proj")}
"""Index into MODULES by a module's own name and by PEFT's."""

# PEFT's choice for llama, mistral, qwen2 and qwen3 where target_modules is null.
_DEFAULT_TARGETS = ("q_proj", "v_proj")
_EMBEDDINGS = ("model.embed_tokens", "lm_head")


def projection_name(layer: int, module: int) -> str:
    """Hugging Face's name of one projection, for instance ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{HF_MODULES[module]}"


def resolve(peft: PeftLoraConfig, config: ModelConfig) -> tuple[Int32[np.ndarray, "L 7"], Float32[np.ndarray, "L 7"]]:
    """Rank (0 = not targeted) and scaling of every projection of the model.

    Raises AdapterError where a pattern is no regular expression, where nothing or something else than a projection is
    named.
    """
    targets = _Targets(peft)
    rank_pattern = [(_compile(rf"(.*\.)?({key})$", key, "rank_pattern"), rank) for key, rank in peft.rank_pattern]
    for name in _other_modules(config):
        if targets.match(name):
            what = "the embedding or output head" if name in _EMBEDDINGS else "a module that is not a linear projection"
            raise AdapterError(
                f"target_modules names {name}, {what}, which is not supported; target only "
                "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
            )
    ranks = np.zeros((config.num_layers, len(MODULES)), np.int32)
    for layer, module in np.ndindex(*ranks.shape):
        name = projection_name(layer, module)
        if targets.match(name):
            ranks[layer, module] = next((rank for pattern, rank in rank_pattern if pattern.match(name)), peft.r)
    if not ranks.any():
        raise AdapterError(
            "target_modules, exclude_modules and layers_to_transform together name no projection of this model of "
            f"{config.num_layers} layers; the adapter is probably for another base model"
            + (f" ({shown(peft.base_model)})" if peft.base_model else "")
        )
    return ranks, scalings(peft, ranks)


def scalings(peft: PeftLoraConfig, ranks: Int32[np.ndarray, "L 7"]) -> Float32[np.ndarray, "L 7"]:
    """Factor of ``B A`` of every projection.

    It is the projection's alpha (lora_alpha, or the first alpha_pattern that matches) over its rank or the root of it.
    """
    alpha_pattern = [(_compile(rf"(.*\.)?({key})$", key, "alpha_pattern"), alpha) for key, alpha in peft.alpha_pattern]
    result = np.zeros(ranks.shape, np.float32)
    for layer, module in np.argwhere(ranks).tolist():
        name = projection_name(layer, module)
        alpha = next((alpha for pattern, alpha in alpha_pattern if pattern.match(name)), peft.lora_alpha)
        rank = int(ranks[layer, module])
        result[layer, module] = alpha / math.sqrt(rank) if peft.use_rslora else alpha / rank
    return result


class _Targets:
    """PEFT's decision whether a module is targeted, with the patterns compiled once."""

    def __init__(self, peft: PeftLoraConfig):
        names, exclude = peft.target_modules, peft.exclude_modules
        self.exclude = _compile(exclude, exclude, "exclude_modules") if isinstance(exclude, str) else frozenset(exclude)
        self.all_linear = isinstance(names, str) and names.lower() == "all-linear"
        self.regex = (
            _compile(names, names, "target_modules") if isinstance(names, str) and not self.all_linear else None
        )
        self.names = frozenset(_DEFAULT_TARGETS if names is None or isinstance(names, str) else names)
        self.layers = peft.layers_to_transform
        # Without layers_pattern PEFT takes the first number of the name that has a name before it.
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in peft.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        self.index = [_compile(p, p, "layers_pattern") for p in patterns] if self.layers is not None else []

    def match(self, name: str) -> bool:
        if isinstance(self.exclude, frozenset):
            if _is_or_ends_with(name, self.exclude):
                return False
        elif self.exclude.fullmatch(name):
            return False
        if self.all_linear:
            return name.endswith(HF_MODULES)
        if self.regex is not None:
            return self.regex.fullmatch(name) is not None
        if name in self.names:
            return True  # a full name is taken whatever layers_to_transform says
        if not _is_or_ends_with(name, self.names):
            return False
        if self.layers is None:
            return True
        found = next((match for match in (pattern.match(name) for pattern in self.index) if match), None)
        return found is not None and found["idx"] is not None and int(found["idx"]) in self.layers


def _is_or_ends_with(name: str, names: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def _compile(pattern: str, source: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{field} {source[:80]!r} is not a regular expression ({shown(str(error))}); correct it"
        ) from None


def _other_modules(config: ModelConfig) -> list[str]:
    """Names of all modules of Hugging Face's model that are not projections, as ``named_modules()`` gives them."""
    inner = ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm"]
    if config.qk_norm:
        inner += [".self_attn.q_norm", ".self_attn.k_norm"]
    layers = [f"model.layers.{layer}{name}" for layer in range(config.num_layers) for name in inner]
    return ["model", "model.embed_tokens", "model.layers", *layers, "model.norm", "model.rotary_emb", "lm_head"]
