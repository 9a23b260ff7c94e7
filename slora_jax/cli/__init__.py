"""The command ``slora-jax``. What a subcommand needs is imported when it runs, so that ``--help`` is quick."""

from collections.abc import Sequence
import importlib
import os
import sys

from slora_jax.cli.parser import parse_arguments
from slora_jax.errors import SloraError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the program's own) and returns its exit status.

    0: done. 1: done, but something in it failed or was refused. 2: bad input, named in one line on standard error.
    130: interrupted. Only errors that are not the user's show a traceback.
    """
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return importlib.import_module(f"slora_jax.cli.{args.command}").run(args)
    except SloraError as error:
        print(f"slora-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"slora-jax {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; keep Python from saying so again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
