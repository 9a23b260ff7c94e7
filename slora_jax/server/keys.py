"""API keys: who may ask what, and how much.

A key file is JSON, ``{"keys": [{"name": "alice", "sha256": "<hex>", "adapters": ["team-*"], ...}]}``; `slora-jax key`
writes entries. Only hashes are in it. Keys are drawn at random with 256 bits, so a plain SHA-256 cannot be turned back.
"""

import dataclasses
import fnmatch
import hashlib
import hmac
import json
import math
from pathlib import Path
import re
import secrets
from typing import Any

from slora_jax.errors import SloraError
from slora_jax.server.atomic_file import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One caller. sha256: hex digest of the key.

    adapters: names or patterns (``team-*``) of the adapters it may use. base: whether it may use the base model.
    admin: whether it may load and unload adapters and read metrics and status.
    max_concurrent: completions in flight at the same time; requests_per_minute, tokens_per_minute: rates, the latter of
    prompt and answer tokens. None is no limit. weight: share of the device under the policy "fair".
    """

    name: str
    sha256: str
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    admin: bool = False
    max_concurrent: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    weight: float = 1.0

    def may_use(self, adapter: str | None) -> bool:
        """Whether it may use an adapter, or the base model (None)."""
        if adapter is None:
            return self.base
        return any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def find_key(keys: list[ApiKey], presented: str) -> ApiKey | None:
    """The entry of a key. It takes as long whether the key is there or not, and wherever it stands."""
    digest = hash_key(presented)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file. SloraError names what is wrong with it; no key is ever skipped in silence."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise SloraError(f"{path}: API keys cannot be read ({error.strerror}); slora-jax key makes the file") from None
    except ValueError:
        raise SloraError(f"{path} is not JSON; slora-jax key writes such files") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise SloraError(f'{path} must be {{"keys": [...]}}; slora-jax key writes such files')
    keys = [_parse(entry, f"{path}: keys[{index}]") for index, entry in enumerate(entries)]
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SloraError(f"{path} has the name {twice!r} twice; give each key a name of its own")
    return keys


def add_key(path: Path, name: str, **fields: Any) -> str:
    """Adds a new key to a file, which is made if it is not there, and returns the key. It is stored nowhere."""
    keys = read_keys(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise SloraError(f"{path} has a key {name!r} already; choose another name or remove it from the file")
    key = "sk-" + secrets.token_urlsafe(32)
    entry = {"name": name, "sha256": hash_key(key), **fields}
    keys.append(_parse(entry, f"key {name!r}"))
    document = {"keys": [_to_json(k) for k in keys]}
    write_atomically(path, json.dumps(document, indent=2).encode() + b"\n", mode=0o600)
    return key


def _to_json(key: ApiKey) -> dict[str, Any]:
    fields = dataclasses.asdict(key) | {"adapters": list(key.adapters)}
    return {name: value for name, value in fields.items() if value is not None}


def _parse(entry: Any, where: str) -> ApiKey:
    if not isinstance(entry, dict):
        raise SloraError(f"{where} must be an object")
    unknown = entry.keys() - {field.name for field in dataclasses.fields(ApiKey)}
    if unknown:
        raise SloraError(f"{where} has the unknown field {min(unknown)!r}")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
        raise SloraError(f"{where}: name must be 1 to 64 letters, digits, dots, dashes or underscores")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise SloraError(f"{where}: sha256 must be 64 lower-case hexadecimal digits")
    adapters = entry.get("adapters", ["*"])
    if not isinstance(adapters, list) or not all(isinstance(pattern, str) for pattern in adapters):
        raise SloraError(f"{where}: adapters must be a list of names or patterns")
    for field in ("base", "admin"):
        if not isinstance(entry.get(field, False), bool):
            raise SloraError(f"{where}: {field} must be true or false")
    limits = ("max_concurrent", "requests_per_minute", "tokens_per_minute")
    for field in (*limits, "weight"):
        value = entry.get(field, None if field in limits else 1.0)
        if value is None and field in limits:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SloraError(f"{where}: {field} must be a number above 0")
    return ApiKey(**(entry | {"adapters": tuple(adapters)}))
