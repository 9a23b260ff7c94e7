"""Text from untrusted files inside one-line error messages."""


def shown(text: str, length: int = 120) -> str:
    """A name from a file, cut to `length` characters, with everything that is not printable escaped."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]
