"""Stop strings and streaming of text."""

from hypothesis import given
from hypothesis import strategies as st

from slora_jax.text_stream import TextStream


class Pieces:
    """A detokenizer whose token i is the i-th piece."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def feed(pieces, stop):
    stream = TextStream(Pieces(pieces), stop)
    shown = ""
    for i in range(len(pieces)):
        found = stream.push(i)
        shown += stream.take(final=found is not None)
        if found is not None:
            return shown, found
    stream.flush()
    return shown + stream.take(final=True), None


@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=2))
def test_streamed_text_ends_before_the_first_stop_string(pieces, stop):
    shown, found = feed(pieces, stop)
    whole = "".join(pieces)
    if found is None:
        assert shown == whole and not any(s in whole for s in stop)
    else:
        assert whole.startswith(shown + found)
        # no stop string was complete before the piece that ended the text
        seen = ""
        for piece in pieces:
            if any(s in seen + piece for s in stop):
                break
            seen += piece
        assert all(s not in seen for s in stop)
        assert len(shown) >= len(seen) - max(map(len, stop))


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(Pieces(["Hello EN", "D", "ING"]), ["ENDING"])
    stream.push(0)
    assert stream.take(final=False) == "Hello "
    stream.push(1)
    assert stream.take(final=False) == ""
    assert stream.push(2) == "ENDING"
    assert stream.take(final=True) == "" and stream.text == "Hello "


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ())
    assert stream.push(5) is None and stream.take(final=True) == "" and stream.flush() is None
