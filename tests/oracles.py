"""Plain numpy float64 versions of what the packages compute, written from the definitions, for tests to compare
with.
"""

import numpy as np

from pallas_kernels.geometry import GROUPS, MODULES, PAGE_TOKENS, Geometry


def relative_error(out, ref) -> float:
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / max(np.linalg.norm(ref), 1e-30))


def place_adapter(pages: np.ndarray, page_ids, factors, geometry: Geometry):
    """Writes an adapter's image into `pages` [L, P, E] tile by tile.

    factors: {(layer, module): (A [r, in], B [out, r])}. Returns (tile_start [L], granules [L, 7]).
    """
    view = pages.reshape(*pages.shape[:2], geometry.page_tiles, 8, 64)
    tile_start = np.zeros(geometry.num_layers, np.int32)
    granules = np.zeros((geometry.num_layers, len(MODULES)), np.int32)
    at = 0

    def put(matrix):  # [rank, columns]
        nonlocal at
        rank, columns = matrix.shape
        padded = np.zeros((-(-rank // 8) * 8, -(-columns // 64) * 64))
        padded[:rank, :columns] = matrix
        for r in range(0, padded.shape[0], 8):
            for c in range(0, padded.shape[1], 64):
                unit, slot = divmod(at, geometry.page_tiles)
                page, layer = divmod(unit, geometry.num_layers)
                view[layer, page_ids[page], slot] = padded[r : r + 8, c : c + 64]
                at += 1

    for layer in range(geometry.num_layers):
        tile_start[layer] = at
        for modules in GROUPS.values():
            for factor in (0, 1):
                for m in modules:
                    if (layer, m) in factors:
                        a, b = factors[layer, m]
                        granules[layer, m] = -(-a.shape[0] // 8)
                        put(a if factor == 0 else b.T)
    return tile_start, granules


def image_pages(factors, geometry: Geometry) -> int:
    tiles = 0
    for (_, m), (a, _) in factors.items():
        tiles += -(-a.shape[0] // 8) * (geometry.in_tiles(m) + geometry.out_tiles(m))
    return -(-tiles // geometry.tiles_per_page_id)


def attention(q, k, v, scale, window=None, cap=None):
    """One sequence: q [n, N, D] are the last n of the k, v [m, K, D] tokens."""
    n, heads, _ = q.shape
    m, kv_heads, _ = k.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    position = np.arange(m - n, m)[:, None]
    key = np.arange(m)[None]
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


def fill_kv(pages: np.ndarray, layer: int, page_ids, k, v, geometry: Geometry) -> None:
    """Writes a sequence's keys and values [m, K, D] into its pages."""
    view = pages.reshape(*pages.shape[:2], 2, geometry.num_kv_heads, PAGE_TOKENS, geometry.head_dim)
    for t in range(len(k)):
        view[layer, page_ids[t // PAGE_TOKENS], 0, :, t % PAGE_TOKENS] = k[t]
        view[layer, page_ids[t // PAGE_TOKENS], 1, :, t % PAGE_TOKENS] = v[t]


def _rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x, positions, config):
    dim = config.head_dim
    freq = 1.0 / config.rope_theta ** (np.arange(0, dim, 2) / dim)
    s = config.rope_scaling
    if s is not None and s.kind == "linear":
        freq = freq / s.factor
    if s is not None and s.kind == "llama3":
        scaled = []
        for f in freq:
            wavelength = 2 * np.pi / f
            if wavelength < s.original_max_position / s.high_freq_factor:
                scaled.append(f)
            elif wavelength > s.original_max_position / s.low_freq_factor:
                scaled.append(f / s.factor)
            else:
                smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                scaled.append((1 - smooth) * f / s.factor + smooth * f)
        freq = np.array(scaled)
    angle = positions[:, None] * freq
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def llama_logits(config, params, tokens, adapter=None):
    """Logits [n, V] of one prompt. Arguments as in llama_hidden."""
    head = np.asarray(params["embed" if config.tied_embeddings else "lm_head"], np.float64)
    return llama_hidden(config, params, tokens, adapter) @ head.T


def llama_hidden(config, params, tokens, adapter=None):
    """Final hidden states [n, H] of one prompt, in one pass without a cache. adapter: slora_jax Adapter or None."""
    w = {name: np.asarray(x, np.float64) for name, x in params.items()}
    x = w["embed"][np.asarray(tokens)]
    positions = np.arange(len(tokens), dtype=np.float64)

    def delta(h, layer, m):
        if adapter is None or not adapter.ranks[layer, m]:
            return 0.0
        a = np.asarray(adapter.a(layer, MODULES[m]), np.float64)
        b = np.asarray(adapter.b(layer, MODULES[m]), np.float64)
        return float(adapter.scaling[layer, m]) * (h @ a.T @ b.T)

    for i in range(config.num_layers):
        h = _rms_norm(x, w["attn_norm"][i], config.norm_eps)
        qkv = h @ w["wqkv"][i] + (w["bqkv"][i] if config.qkv_bias else 0.0)
        parts = np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=-1)
        q, k, v = (p + delta(h, i, m) for m, p in enumerate(parts))
        q, k, v = (p.reshape(len(tokens), -1, config.head_dim) for p in (q, k, v))
        if config.qk_norm:
            q = _rms_norm(q, w["q_norm"][i], config.norm_eps)
            k = _rms_norm(k, w["k_norm"][i], config.norm_eps)
        out = attention(_rope(q, positions, config), _rope(k, positions, config), v, config.head_dim**-0.5)
        out = out.reshape(len(tokens), -1)
        x = x + out @ w["wo"][i] + delta(out, i, 3)
        h = _rms_norm(x, w["mlp_norm"][i], config.norm_eps)
        gate, up = np.split(h @ w["wgu"][i], 2, axis=-1)
        gate, up = gate + delta(h, i, 4), up + delta(h, i, 5)
        h = gate / (1 + np.exp(-gate)) * up
        x = x + h @ w["wdown"][i] + delta(h, i, 6)
    return _rms_norm(x, w["final_norm"], config.norm_eps)
