"""JSON without NaN, which it does not have and Python writes all the same."""

from __future__ import annotations

import re
from typing import BinaryIO, Protocol

# A string is matched as a whole, or to where the block ends, so that the words in it stay what they are.
_TOKEN = re.compile(rb'(?P<string>"[^"\\]*(?:\\.[^"\\]*)*(?:(?P<end>")|\\?\Z))|-?(?:NaN|Infinity)', re.DOTALL)
_LONGEST = len(b"-Infinity")


class Readable(Protocol):
    """What a JSON parser reads from."""

    def read(self, size: int) -> bytes:
        """At most about so many bytes; none at the end."""


def finite(file: BinaryIO) -> Readable:
    """The file itself, or, where it holds NaN or Infinity, a reader of it that gives null in their place.

    To look for them takes about a second for 500 MB; to replace them, as long again as the parser takes.
    """
    found, before = False, b""
    while not found and (block := file.read(1 << 20)):
        seen = before + block
        found = b"NaN" in seen or b"Infinity" in seen
        before = block[-_LONGEST:]
    file.seek(0)
    return _Nulls(file) if found else file


class _Nulls:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.rest = b""  # what may be the beginning of a string or a word that the next block ends

    def read(self, size: int) -> bytes:
        """At most about so many bytes; none at the end."""
        out = b""
        while not out:
            block = self.file.read(size)
            data = self.rest + block
            if not data:
                return b""
            out = self._replaced(data, last=not block)
        return out

    def _replaced(self, data: bytes, last: bool) -> bytes:
        parts, copied = [], 0
        whole = len(data) - _LONGEST + 1
        for token in _TOKEN.finditer(data):
            if token["string"] is None:
                parts += [data[copied : token.start()], b"null"]
                copied = token.end()
            whole = max(whole, token.end()) if token["string"] is None or token["end"] else token.start()
        whole = len(data) if last else max(whole, copied)
        self.rest = data[whole:]
        return b"".join([*parts, data[copied:whole]])
