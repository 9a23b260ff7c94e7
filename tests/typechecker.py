"""What checks annotations in the test run: beartype, on arrays only.

Shapes and dtypes of arrays are what nothing else checks. Other annotations are mypy's business; checking them at run
time too would refuse the bad input of tests before the code under test can.
"""

from collections.abc import Callable
import inspect
import typing

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check[F: Callable[..., typing.Any]](function: F) -> F:
    """Checks the arguments and results of `function` whose annotation mentions an array's shape."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _mentions_array(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return _beartype(function)


def _mentions_array(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_mentions_array, typing.get_args(hint)))
