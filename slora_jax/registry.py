"""Adapters by name. A name points at contents; contents are known by their digest."""

import difflib

from slora_jax.adapters import Adapter
from slora_jax.errors import AdapterError


class AdapterRegistry:
    """Names of adapters and the host copies of their weights. The same contents under two names are kept once."""

    def __init__(self):
        self._by_name: dict[str, Adapter] = {}

    def add(self, name: str, adapter: Adapter) -> Adapter:
        """Points `name` at `adapter`, replacing what it pointed at, and returns the copy that is kept."""
        if not name or name != name.strip() or len(name) > 256 or not name.isprintable():
            raise AdapterError(
                f"adapter name {name!r} is not usable: use 1 to 256 printable characters without spaces at the ends"
            )
        kept = next((a for a in self._by_name.values() if a.digest == adapter.digest), adapter)
        self._by_name[name] = kept
        return kept

    def remove(self, name: str) -> Adapter:
        """Forgets a name and returns what it pointed at. AdapterError if it is unknown."""
        adapter = self.get(name)
        del self._by_name[name]
        return adapter

    def get(self, name: str) -> Adapter:
        """The adapter of a name. AdapterError, with the nearest known name, if it is unknown."""
        if name not in self._by_name:
            near = difflib.get_close_matches(str(name), self._by_name, n=1)
            if near:
                hint = f"did you mean {near[0]!r}?"
            elif self._by_name:
                hint = f"known: {', '.join(sorted(self._by_name)[:10])}{', …' if len(self._by_name) > 10 else ''}"
            else:
                hint = "no adapter is registered; add it with add_adapter"
            raise AdapterError(f"adapter {name!r} is unknown: {hint}")
        return self._by_name[name]

    def items(self) -> list[tuple[str, Adapter]]:
        return list(self._by_name.items())

    def has_digest(self, digest: str) -> bool:
        return any(a.digest == digest for a in self._by_name.values())
