"""Hashes by which a Content-Security-Policy allows a page's own scripts and styles, and no others."""

import base64
import hashlib
import re


def script_hashes(page: str, tag: str) -> str:
    """The sources for the inline elements of a tag, "script" or "style"."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in contents)
