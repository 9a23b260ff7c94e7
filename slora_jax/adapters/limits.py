"""How large an adapter may be before it is refused."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """Bounds checked before anything large is read. Sizes are in bytes.

    max_rank: largest rank of one module. max_patterns: entries of rank_pattern and of alpha_pattern, each.
    """

    max_rank: int = 512
    max_file_bytes: int = 8 << 30
    max_header_bytes: int = 4 << 20
    max_tensors: int = 8192
    max_config_bytes: int = 1 << 20
    max_patterns: int = 2048


DEFAULT_LIMITS = AdapterLimits()
