"""What checks annotations in the test run: beartype, on arrays only.

Shapes and dtypes of arrays are what nothing else checks. Other annotations are mypy's business; checking them at run
time too would refuse the bad input of tests before the code under test can.
"""

from collections.abc import Callable
import functools
import inspect
import typing

from beartype import BeartypeConf, beartype
import jaxtyping
from jaxtyping import AbstractArray

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def check[F: Callable[..., typing.Any]](function: F) -> F:
    """Checks the arguments and results of `function` whose annotation mentions an array's shape."""
    function.__annotations__ = _array_hints(function)
    return _beartype(function)


def wrap_only_what_is_checked() -> None:
    """Keeps jaxtyping's import hook from wrapping every function, whose calls then take many times as long."""

    def jaxtyped(thing=None, *, typechecker):
        if thing is None:
            return functools.partial(jaxtyped, typechecker=typechecker)
        return _jaxtyped(thing, typechecker=typechecker) if any(map(_array_hints, _functions(thing))) else thing

    jaxtyping.jaxtyped = jaxtyped


def _functions(thing: typing.Any) -> list[typing.Any]:
    """Those that jaxtyping wraps of what it decorates."""
    if inspect.isclass(thing):
        return [thing.__init__]
    if isinstance(thing, property):
        return [function for function in (thing.fget, thing.fset, thing.fdel) if function is not None]
    return [getattr(thing, "__func__", thing)]


def _array_hints(function: typing.Any) -> dict[str, typing.Any]:
    hints = getattr(function, "__annotations__", {})
    return {name: hint for name, hint in hints.items() if _mentions_array(hint)}


def _mentions_array(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_mentions_array, typing.get_args(hint)))
