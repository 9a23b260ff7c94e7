"""What the pages of a pool are used for, for people and dashboards. Plain Python, no jax."""

from collections import Counter

from slora_jax.page_pool import Owner, PagePool


def _parts(owner: Owner) -> tuple[str, str]:
    """Kind and name of an owner that sequence_owner, prefix_owner or adapter_owner made."""
    assert isinstance(owner, tuple)
    return owner


def used_pages(pool: PagePool) -> dict[str, int]:
    """Pages by use: kv and adapter (in use), idle_kv and idle_adapter (kept until the space is needed), free."""
    kinds: dict[int, str] = {}
    for owner in pool.owners():
        kind = "adapter" if _parts(owner)[0] == "adapter" else "kv"
        if pool.is_idle(owner):
            kind = f"idle_{kind}"
        kinds.update(dict.fromkeys(pool.pages(owner), kind))  # who shares a page agrees whether it is idle
    counts = Counter(kinds.values())
    return {k: counts[k] for k in ("kv", "idle_kv", "adapter", "idle_adapter")} | dict(free=pool.free)


def page_map(pool: PagePool) -> list[str | None]:
    """What each page id holds: an adapter's digest, "kv", or None if it is free."""
    kinds: list[str | None] = [None] * pool.num_pages
    for owner in pool.owners():
        kind, name = _parts(owner)
        for page in pool.pages(owner):
            kinds[page] = name if kind == "adapter" else "kv"
    return kinds
