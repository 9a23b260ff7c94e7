"""Errors a user can cause. Each message is one line that names the thing and the remedy."""


class SloraError(Exception):
    """Base of every error raised on bad input; the command line prints it without a traceback."""


class ModelError(SloraError):
    """The base model cannot be loaded or is not supported."""


class AdapterError(SloraError):
    """An adapter is refused, unknown, or cannot be loaded."""


class RequestError(SloraError):
    """A request cannot be served as asked."""


class CapacityError(SloraError):
    """Memory, page pool or limits are too small for what was asked."""
