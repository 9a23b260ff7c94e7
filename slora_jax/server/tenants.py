"""Who is calling: the tenant of an API key, what it may still ask for, and the limits of all callers together."""

from collections.abc import Iterator
import contextlib
import logging

from slora_jax.errors import SloraError
from slora_jax.server.config import ServerConfig
from slora_jax.server.errors import ApiError
from slora_jax.server.keys import ApiKey, find_key, read_keys
from slora_jax.server.rates import TokenBucket

logger = logging.getLogger(__name__)

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Tenant:
    """A caller and what it has used."""

    def __init__(self, key: ApiKey):
        self.key = key
        self.in_flight = 0
        self.requests = TokenBucket(key.requests_per_minute)
        self.tokens = TokenBucket(key.tokens_per_minute)

    @contextlib.contextmanager
    def admit(self, completions: int) -> Iterator[None]:
        """Holds a place for a call. ApiError 429 if a limit of this tenant is reached."""
        limit = self.key.max_concurrent
        if limit is not None and self.in_flight + completions > limit:
            raise ApiError(
                429, f"your key allows {limit} completions at the same time", code="concurrency_limit", retry_after=1
            )
        for bucket, unit, amount in ((self.requests, "requests", 1.0), (self.tokens, "tokens", 1.0)):
            seconds = bucket.wait(amount)
            if seconds:
                raise ApiError(
                    429,
                    f"your key allows {bucket.per_minute:g} {unit} a minute; try again in {seconds:.0f} s",
                    code="rate_limit_exceeded",
                    retry_after=seconds,
                )
        self.requests.take(1)
        self.in_flight += completions
        try:
            yield
        finally:
            self.in_flight -= completions


class Tenants:
    """The callers that a key file names, or the one anonymous caller."""

    def __init__(self, config: ServerConfig):
        self._path = config.api_keys
        self._check_host = config.api_keys is None and config.on_loopback
        self._anonymous = Tenant(ApiKey(name="anonymous", sha256="", admin=config.on_loopback))
        self._tenants: dict[str, Tenant] = {}
        self._seen: tuple[int, int] | None = None
        if self._path is not None:
            self._take(read_keys(self._path))
            self._seen = self._stamp()

    def authenticate(self, authorization: str | None, host: str | None) -> Tenant:
        """The caller of a request, by its headers. ApiError 401 if it has no valid key."""
        if self._path is None:
            name = (host or "").rsplit(":", 1)[0] if not (host or "").endswith("]") else host
            if self._check_host and name not in _LOOPBACK_NAMES:
                # A web page can have its own name resolve to this machine, and its visitors' browsers would call us.
                raise ApiError(403, "without API keys only requests to localhost are served", code="wrong_host")
            return self._anonymous
        scheme, _, presented = (authorization or "").partition(" ")
        key = find_key([t.key for t in self._tenants.values()], presented.strip())
        if scheme.lower() != "bearer" or key is None:
            raise ApiError(401, "no valid API key; send the header Authorization: Bearer KEY", code="invalid_api_key")
        return self._tenants[key.name]

    def reload(self) -> None:
        """Reads the key file again if it changed. A file that is wrong changes nothing."""
        if self._path is None:
            return
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._take(read_keys(self._path))
                self._seen = stamp
                logger.info("API keys were read again", extra={"fields": {"keys": len(self._tenants)}})
        except (SloraError, OSError) as error:
            logger.error("API keys stay as they were", extra={"fields": {"error": str(error)}})

    def _stamp(self) -> tuple[int, int]:
        assert self._path is not None
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size

    def _take(self, keys: list[ApiKey]) -> None:
        known = self._tenants
        self._tenants = {
            key.name: known[key.name] if key.name in known and known[key.name].key == key else Tenant(key)
            for key in keys
        }
