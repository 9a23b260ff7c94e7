"""Progress on standard error: a bar on a terminal, a few plain lines elsewhere."""

from collections.abc import Callable, Iterator
import contextlib
import sys
import time

from tqdm import tqdm

Report = Callable[[int, int, str], None]
_BAR = "{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}{postfix}"
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress_bar(title: str, shown: bool) -> Iterator[Report]:
    """Gives a function ``report(done, total, what)`` that may be called as often as one likes.

    It does nothing when not `shown`.
    """
    if not shown:
        yield lambda done, total, what: None
    elif sys.stderr.isatty():
        yield from _bar(title)
    else:
        yield from _lines(title)


def _bar(title: str) -> Iterator[Report]:
    # miniters=1 leaves the rate to mininterval alone: calls come at any pace and with any step
    with tqdm(total=1, desc=title, bar_format=_BAR, mininterval=0.1, miniters=1, file=sys.stderr) as bar:

        def report(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield report
        bar.set_postfix_str("", refresh=False)


def _lines(title: str) -> Iterator[Report]:
    start = last = time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done < total:
            last = now
            print(f"{title}: {100 * done // total}% ({what})", file=sys.stderr, flush=True)

    yield report
    print(f"{title}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
