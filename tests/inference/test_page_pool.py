"""Page allocation: random operations compared with a simple model, prefixes found by content, order of eviction."""

import random

from dsv2_jax.inference.pages import Pages, digests


def test_digests_tell_all_tokens_up_to_the_end_of_a_page():
    a, b = digests(range(10), 4, []), digests([0, 1, 2, 3, 9, 5, 6, 7], 4, [])
    assert len(a) == 2
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert digests([9, *range(1, 8)], 4, [])[1] != a[1]  # the same second page after a different first one
    assert digests(range(10), 4, a[:1]) == a


def test_kept_pages_are_found_until_they_are_reused():
    pages, names = Pages(5), digests(range(12), 4, [])
    first = pages.take(3)
    for page, name in zip(first, names, strict=True):
        pages.publish(page, name)
    assert pages.available == 1
    pages.release(first)
    assert (pages.available, pages.held) == (4, 0)
    assert pages.find(names) == first
    pages.hold(first[:2])
    assert (pages.available, pages.held, pages.kept(first)) == (2, 2, 1)
    pages.take(2)  # the last free one, and the third of the run
    assert pages.find(names) == first[:2]
    pages.release(first[:2])
    pages.take(1)
    assert pages.find(names) == first[:1]  # the end of a run goes first
    pages.forget()
    assert pages.find(names) == []
    assert pages.available == 1


def test_random_use_leaks_no_page():
    rng, pages = random.Random(0), Pages(20)
    holders: list[list[int]] = []
    contents = [digests([i] * 16, 4, []) for i in range(4)]
    for _ in range(3000):
        if rng.random() < 0.5:
            names = rng.choice(contents)
            found = pages.find(names)[: rng.randrange(5)]
            needed = rng.randrange(4)
            if needed <= pages.available - pages.kept(found):
                pages.hold(found)
                mine = found + pages.take(needed)
                for page, name in zip(mine, names, strict=False):
                    pages.publish(page, name)
                holders.append(mine)
        elif holders:
            pages.release(holders.pop(rng.randrange(len(holders))))
        held = {page for mine in holders for page in mine}
        assert pages.held == len(held)
        assert pages.available == 19 - len(held)
        assert 0 not in held
    for mine in holders:
        pages.release(mine)
    assert (pages.held, pages.available) == (0, 19)
