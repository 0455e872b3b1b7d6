"""Who holds which page of the cache: free ones, shared ones, and full ones kept for the next prompt of these tokens."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

Digest = bytes


def digests(tokens: Sequence[int], slots: int, known: Sequence[Digest]) -> list[Digest]:
    """A digest of each full page of the tokens, of all tokens up to its end; the first are `known` already."""
    found = list(known)
    for i in range(len(found), len(tokens) // slots):
        page = np.asarray(tokens[i * slots : (i + 1) * slots], np.int32).tobytes()
        found.append(hashlib.blake2b((found[-1] if found else b"") + page, digest_size=16).digest())
    return found


class Pages:
    """The pages 1 to `count` - 1 of a cache; page 0 takes what padding writes.

    A page is free, or held by so many sequences, or kept: nobody holds it, but its digest finds it until its room is
    needed. Kept pages are given up in the order in which they were let go.
    """

    def __init__(self, count: int):
        self._free = list(range(count - 1, 0, -1))
        self._held: dict[int, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._by_digest: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self.count = count

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return len(self._held)

    def take(self, n: int) -> list[int]:
        """n pages for one holder, whatever they kept forgotten. The caller knows that so many are available."""
        assert n <= self.available, "more pages taken than are available"
        taken = []
        for _ in range(n):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._by_digest[self._digest_of.pop(page)]
            self._held[page] = 1
            taken.append(page)
        return taken

    def find(self, wanted: Sequence[Digest]) -> list[int]:
        """The pages of the longest known run of these digests."""
        found = []
        for digest in wanted:
            if digest not in self._by_digest:
                break
            found.append(self._by_digest[digest])
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of these, which `find` named."""
        for page in pages:
            self._kept.pop(page, None)
            self._held[page] = self._held.get(page, 0) + 1

    def kept(self, pages: Sequence[int]) -> int:
        """How many of these nobody holds: holding them takes so many from what is available."""
        return sum(page in self._kept for page in pages)

    def publish(self, page: int, digest: Digest) -> None:
        """Makes a full page known. If another one of the same contents is, that one stays known."""
        if digest not in self._by_digest and page not in self._digest_of:
            self._by_digest[digest], self._digest_of[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; the last pages of a sequence are the first to be given up."""
        for page in reversed(pages):
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
                if page in self._digest_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Makes all pages unknown, as when weights change: what is held stays held."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._by_digest.clear()
        self._digest_of.clear()
