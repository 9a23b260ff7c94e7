"""Progress bars on the terminal."""

from collections.abc import Callable, Iterator
import contextlib

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(title: str, shown: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function ``report(done, total, what)`` that draws a bar, or does nothing when not `shown`."""
    if not shown:
        yield lambda done, total, what: None
        return
    with tqdm(total=0, desc=title, bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {postfix}", leave=True) as bar:

        def report(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.n = done
            bar.set_postfix_str(what)

        yield report
