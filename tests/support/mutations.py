"""Changes of bytes for the fuzzer: flips, cuts, splices, lengths."""

from collections.abc import Callable

from hypothesis import strategies as st

Change = Callable[[bytes], bytes]
#: Numbers that break readers: ends of ranges in several widths, varints without an end, punctuation of each format.
INTERESTING = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8,
    b"\x00" * 7 + b"\x80", b"\xff" * 9 + b"\x01", b"\x80" * 10, b"PK\x03\x04", b"PK\x01\x02", b"[", b"{", b'"', b"\\",
    b"NaN", b"1e999", b"-1", b"9" * 25, b"null", b"true", b"\x80\x02", b"cos\nsystem\n", b"R.", b"\x85", b"t", b"(",
    b"../", b"\xe2\x80\xae", b"\xed\xa0\x80",
)  # fmt: skip


@st.composite
def one_change(draw: st.DrawFn) -> Change:
    """One edit at a place that is a share of the length, so that it fits any file."""
    at, span = draw(st.integers(0, 2**16 - 1)), draw(st.integers(1, 40))
    other, piece = draw(st.integers(0, 2**16 - 1)), draw(st.sampled_from(INTERESTING) | st.binary(max_size=12))
    kind = draw(st.sampled_from(("flip", "cut", "put", "insert", "delete", "copy", "add")))

    def change(content: bytes) -> bytes:
        start = at * len(content) >> 16
        end = min(len(content), start + span)
        source = other * len(content) >> 16
        if kind == "flip" and content:
            return content[:start] + bytes([content[start] ^ 1 << span % 8]) + content[start + 1 :]
        if kind == "add" and content:  # a length that is off by a little
            return content[:start] + bytes([(content[start] + span) % 256]) + content[start + 1 :]
        if kind == "cut":
            return content[:start]
        if kind == "put":
            return content[:start] + piece + content[start + len(piece) :]
        if kind == "insert":
            return content[:start] + piece + content[start:]
        if kind == "delete":
            return content[:start] + content[end:]
        return content[:start] + content[source : source + span] + content[start:]

    return change


def changes(most: int = 6) -> st.SearchStrategy[Change]:
    """Several edits in turn."""

    def together(edits: list[Change]) -> Change:
        def change(content: bytes) -> bytes:
            for edit in edits:
                content = edit(content)
            return content

        return change

    return st.lists(one_change(), min_size=1, max_size=most).map(together)
