"""Architecture of a base model: the sizes and switches the forward pass needs, and nothing else."""

import dataclasses

from pallas_kernels.geometry import Geometry


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary position scaling: ``linear`` divides every frequency; ``llama3`` only the long wavelengths."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-family decoder (Llama 1/2/3.x, Mistral without sliding window, Qwen2/2.5, Qwen3).

    All sizes are in elements. ``architecture`` is the Hugging Face class name and only informs.
    """

    architecture: str = "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_position: int = 4096
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def in_sizes(self) -> tuple[int, ...]:
        """Input width of q, k, v, o, gate, up, down."""
        h = self.hidden_size
        return (h, h, h, self.q_size, h, h, self.mlp_size)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Output width of q, k, v, o, gate, up, down."""
        h, f = self.hidden_size, self.mlp_size
        return (self.q_size, self.kv_size, self.kv_size, h, f, f, h)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            in_sizes=self.in_sizes,
            out_sizes=self.out_sizes,
        )


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter array and the logical name of each axis (used for sharding).

    ``parts``: where the last axis is several projections side by side, their widths in order.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    parts: tuple[int, ...] = ()


def param_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model: a flat dict of few arrays, the layer axis first. Weights are stored [in, out].

    Rotary dims are in Hugging Face order (first half, second half). Optional entries exist only where the model has
    them.
    """
    L, H, D, V, F = cfg.num_layers, cfg.hidden_size, cfg.head_dim, cfg.vocab_size, cfg.mlp_size
    qkv = (cfg.q_size, cfg.kv_size, cfg.kv_size)
    specs = {
        "embed": ParamSpec((V, H), ("vocab", None)),
        "attn_norm": ParamSpec((L, H), (None, None)),
        "wqkv": ParamSpec((L, H, sum(qkv)), (None, None, "heads"), qkv),
        "wo": ParamSpec((L, cfg.q_size, H), (None, "heads", None)),
        "mlp_norm": ParamSpec((L, H), (None, None)),
        "wgu": ParamSpec((L, H, 2 * F), (None, None, "mlp"), (F, F)),
        "wdown": ParamSpec((L, F, H), (None, "mlp", None)),
        "final_norm": ParamSpec((H,), (None,)),
    }
    if cfg.qkv_bias:
        specs["bqkv"] = ParamSpec((L, sum(qkv)), (None, "heads"), qkv)
    if cfg.qk_norm:
        specs["q_norm"] = ParamSpec((L, D), (None, None))
        specs["k_norm"] = ParamSpec((L, D), (None, None))
    if not cfg.tied_embeddings:
        specs["lm_head"] = ParamSpec((V, H), ("vocab", None))
    return specs
