"""GGUF files through the ``gguf`` package: metadata to ModelConfig, tensors dequantised, in Hugging Face's order.

llama.cpp's converter (``LlamaModel.permute`` in convert_hf_to_gguf.py) interleaves the two rotary halves of each q and
k head for the llama architecture only; qwen2 and qwen3 keep Hugging Face's order.
"""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from slora_jax.errors import ModelError
from slora_jax.loading.config import FAMILIES, checked_config
from slora_jax.loading.params import Checkpoint, expected_shapes
from slora_jax.model_config import ModelConfig, RopeScaling

_ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items() if name != "MistralForCausalLM"}
_UNQUANTISED = {gguf.GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
_LLAMA3_DEFAULTS = (1.0, 4.0, 8192)
"""low_freq_factor, high_freq_factor and original context of every published Llama 3.x; GGUF does not record them."""

_RENAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GGUFFile:
    """An opened GGUF file: its metadata and tensors. The file is memory-mapped, nothing is dequantised yet.

    Raises ModelError where the file is damaged, split in parts, or of an architecture that is not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # noqa: BLE001 - the reader trips over damaged files in many ways
            raise ModelError(f"{path} is damaged, truncated or not a GGUF file: {error}") from None
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.arch = str(self.get("general.architecture"))
        if self.arch not in _ARCHITECTURES:
            raise ModelError(
                f"{path}: architecture {self.arch} is not supported; supported in GGUF are {', '.join(_ARCHITECTURES)}"
            )
        if (parts := self.get("split.count", 1)) > 1:
            raise ModelError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python number, string, bool or list."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def hparam(self, key: str, default: Any = None) -> Any:
        """A metadata value of the model's architecture; ModelError where it is missing and there is no default."""
        value = self.get(f"{self.arch}.{key}", default)
        if value is None:
            raise ModelError(f"{self.path}: metadata {self.arch}.{key} is missing")
        return value

    @staticmethod
    def open(path: Path) -> "GGUFFile":
        """As GGUFFile(path), but the last opened file, if unchanged on disk, is not parsed again until ``forget``.

        Parsing takes seconds (every token of the vocabulary is a metadata item), and a model's configuration is usually
        asked for just before the model.
        """
        state = path.stat()
        return _opened(path, state.st_mtime_ns, state.st_size)

    @staticmethod
    def forget() -> None:
        """Let go of the last opened file."""
        _opened.cache_clear()

    @property
    def name(self) -> str:
        return str(self.get("general.name") or self.path.stem)

    @property
    def quantised(self) -> bool:
        return any(tensor.tensor_type not in _UNQUANTISED for tensor in self.tensors.values())


@functools.lru_cache(maxsize=1)
def _opened(path: Path, _changed: int, _size: int) -> GGUFFile:
    return GGUFFile(path)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """ModelConfig of a GGUF file. Raises ModelError naming what is missing or not supported."""
    name = _ARCHITECTURES[file.arch]
    heads = _size(file, "attention.head_count")
    hidden = _size(file, "embedding_length")
    head_dim = _size(file, "attention.key_length", hidden // heads)
    _refuse_unsupported(file, head_dim)
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: missing tensors: token_embd.weight")
    rope_theta = _float(file.hparam("rope.freq_base", 10000.0))
    return checked_config(
        str(file.path),
        architecture=name,
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        mlp_size=_size(file, "feed_forward_length"),
        num_layers=_size(file, "block_count"),
        num_heads=heads,
        num_kv_heads=_size(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, rope_theta, head_dim),
        norm_eps=_float(file.hparam("attention.layer_norm_rms_epsilon")),
        max_position=_size(file, "context_length"),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias=FAMILIES[name].qkv_bias,
        qk_norm=FAMILIES[name].qk_norm,
    )


def eos_from_gguf(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end an answer: end of sequence, of turn and of message, where the file has them."""
    ids = (file.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def open_checkpoint(file: GGUFFile, config: ModelConfig) -> Checkpoint:
    """The tensors under their Hugging Face names, in Hugging Face's order of rows; values are float32."""
    by_hf_name = {_hf_name(name): tensor for name, tensor in file.tensors.items() if name != "rope_freqs.weight"}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in by_hf_name.items()}
    permuted = {}
    if file.arch == "llama":
        for name in expected_shapes(config):
            if name.endswith("q_proj.weight"):
                permuted[name] = config.num_heads
            elif name.endswith("k_proj.weight"):
                permuted[name] = config.num_kv_heads

    def read(name: str) -> np.ndarray:
        tensor = by_hf_name[name]
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{file.path}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantise"
            ) from None
        return unpermute(value, permuted[name]) if name in permuted else value

    return Checkpoint(source=str(file.path), shapes=shapes, read=read)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's permutation of a q or k projection [heads * dim, in], which pairs rows i and i + dim/2."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: what llama.cpp's converter stores in rope_freqs.weight, the divisor of each frequency."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)


def _rope_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling | None:
    kind = file.get(f"{file.arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: rope scaling {kind} is not supported; supported are none, linear, llama3")
    # Files from before rope.scaling.type say scale_linear.
    factor = _float(file.get(f"{file.arch}.rope.scaling.factor", file.get(f"{file.arch}.rope.scale_linear", 1.0)))
    linear = RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if "rope_freqs.weight" not in file.tensors:
        return linear
    divisors = np.asarray(file.tensors["rope_freqs.weight"].data, np.float32).reshape(-1)
    if divisors.shape == (head_dim // 2,) and np.all(divisors == 1.0):
        return linear
    low, high, original = _LLAMA3_DEFAULTS
    llama3 = RopeScaling(
        kind="llama3",
        factor=_float(float(divisors.max())),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original,
    )
    expected = llama3_factors(llama3, theta, head_dim)
    if linear or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise ModelError(
            f"{file.path}: rope_freqs.weight is not Llama 3's scaling (low 1, high 4, original context 8192); "
            "other per-frequency rope factors are not supported"
        )
    return llama3


def _refuse_unsupported(file: GGUFFile, head_dim: int) -> None:
    if file.hparam("expert_count", 0):
        raise ModelError(f"{file.path}: mixture of experts ({file.arch}.expert_count) is not supported")
    window, context = file.hparam("attention.sliding_window", 0), _size(file, "context_length")
    if 0 < window < context:
        raise ModelError(f"{file.path}: sliding window {window} (context {context}) is not supported")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := file.hparam(key, head_dim)) != head_dim:
            raise ModelError(
                f"{file.path}: {file.arch}.{key} {value} differs from the head dim {head_dim}: not supported"
            )


def _hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor; unknown names stay, to be reported under the name in the file."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _RENAMES:
        return f"model.layers.{parts[1]}.{_RENAMES[parts[2]]}.{parts[3]}"
    return name


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.hparam(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{file.path}: {file.arch}.{key} must be one positive integer, not {value!r}")
    return value


def _float(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-05 for what GGUF stores as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
