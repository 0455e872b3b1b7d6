"""Page allocation of the cache: free pages, shared pages, and full pages kept for later prompts (prefix caching)."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

Digest = bytes


def digests(tokens: Sequence[int], slots: int, known: Sequence[Digest]) -> list[Digest]:
    """The digest of each full page: a hash of all tokens up to the end of the page. `known`: those computed before."""
    found = list(known)
    for i in range(len(found), len(tokens) // slots):
        page = np.asarray(tokens[i * slots : (i + 1) * slots], np.int32).tobytes()
        found.append(hashlib.blake2b((found[-1] if found else b"") + page, digest_size=16).digest())
    return found


class Pages:
    """The pages 1 to `count` - 1 of a cache. Padding writes to page 0.

    A page is free, held by one or more sequences, or kept. No sequence holds a kept page, but it can still be found by
    its digest. `take` evicts kept pages when no page is free, in the order of their release.
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
        """Number of pages that `take` can return."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Number of pages that sequences hold."""
        return len(self._held)

    def take(self, n: int) -> list[int]:
        """Takes n pages for one holder, evicting kept pages if needed. At least n must be available."""
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
        """The pages of the longest prefix of these digests that is cached."""
        found = []
        for digest in wanted:
            if digest not in self._by_digest:
                break
            found.append(self._by_digest[digest])
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """Adds a holder to each of these pages, which `find` returned."""
        for page in pages:
            self._kept.pop(page, None)
            self._held[page] = self._held.get(page, 0) + 1

    def kept(self, pages: Sequence[int]) -> int:
        """How many of these pages have no holder. Holding them reduces `available` by that number."""
        return sum(page in self._kept for page in pages)

    def publish(self, page: int, digest: Digest) -> None:
        """Makes a full page findable by its digest, unless another page with the same contents is."""
        if digest not in self._by_digest and page not in self._digest_of:
            self._by_digest[digest], self._digest_of[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """Removes a holder from each page. Later pages of a sequence are evicted before earlier ones."""
        for page in reversed(pages):
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
                if page in self._digest_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Forgets the contents of all pages, as when weights change. Held pages stay held."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._by_digest.clear()
        self._digest_of.clear()
