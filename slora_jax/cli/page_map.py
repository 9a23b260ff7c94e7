"""The page pool as text: one character a page."""

from collections.abc import Mapping, Sequence

_KV, _FREE, _LINE = "#", ".", 64
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def choose_letters(names: Sequence[str]) -> dict[str, str]:
    """A character for each name: its first letter that is not taken yet, or any; "*" when there are none left."""
    letters: dict[str, str] = {}
    for name in names:
        wanted = [*name.lower(), *name.upper(), *_LETTERS, "*"]
        taken = letters.values()
        letters[name] = next(c for c in wanted if c == "*" or (c in _LETTERS and c not in taken))
    return letters


def draw_pages(pages: Sequence[str | None], names: Mapping[str, str]) -> str:
    """Draws Engine.page_map(), 64 pages a line, with a legend.

    pages: of each page an adapter's digest, "kv", or None. names: digest -> name of the adapter.
    """
    letters = choose_letters(list(names.values()))
    marks = {"kv": _KV, None: _FREE} | {digest: letters[name] for digest, name in names.items()}
    text = "".join(marks[page] for page in pages)
    lines = [f"{start:5} {text[start : start + _LINE]}" for start in range(0, len(text), _LINE)]
    counts = [(_KV, "KV cache", text.count(_KV)), (_FREE, "free", text.count(_FREE))]
    counts[1:1] = [(letters[name], name, text.count(letters[name])) for name in names.values()]
    legend = "   ".join(f"{mark} {name} {count}" for mark, name, count in counts)
    return "\n".join([*lines, "", legend])
