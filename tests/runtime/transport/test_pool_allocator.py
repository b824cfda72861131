"""The pool's books: nothing is given twice, nothing is lost, little is spilled."""

from __future__ import annotations

import random

import pytest

from megatron_bpipe.runtime.transport.pool_allocator import Extent, PoolAllocator


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_free_or_taken_once(seed: int) -> None:
    dice = random.Random(seed)
    pool, sizes = PoolAllocator(), []
    for _ in range(300):
        if pool.taken and dice.random() < 0.45:
            pool.give_back(dice.choice(list(pool.taken)))
        else:
            size = dice.randrange(0, 200)
            if pool.missing(size):
                sizes.append(pool.missing(size) + dice.randrange(50))
                pool.add_segment(sizes[-1])
            extents = pool.take(len(sizes) * 1000 + dice.random(), size)
            assert sum(extent.size for extent in extents) == size
        book = [[0] * size for size in sizes]
        for extent in [*pool.free, *(e for taken in pool.taken.values() for e in taken)]:
            assert extent.size > 0
            for at in range(extent.start, extent.start + extent.size):
                book[extent.segment][at] += 1
        assert all(times == 1 for segment in book for times in segment)
        assert pool.occupied == sum(sizes) - sum(gap.size for gap in pool.free)
    for key in list(pool.taken):
        pool.give_back(key)
    assert pool.free == [Extent(i, 0, size) for i, size in enumerate(sizes)]


def test_scattered_room_is_used_before_more_is_asked_for() -> None:
    pool = PoolAllocator()
    pool.add_segment(300)
    for key in range(3):
        pool.take(key, 100)
    pool.give_back(0)
    pool.give_back(2)
    assert pool.missing(150) == 0
    assert pool.take(3, 150) == [Extent(0, 0, 100), Extent(0, 200, 50)]


def test_only_what_is_too_much_goes_to_the_next_segment() -> None:
    pool = PoolAllocator()
    pool.add_segment(100)
    assert pool.missing(101) == 1
    pool.add_segment(64)
    assert pool.take("one byte more", 101) == [Extent(0, 0, 100), Extent(1, 0, 1)]
    pool.give_back("one byte more")
    pool.take("left", 40)
    # the second segment could hold it whole, and is the slower one
    assert pool.take("rest", 62) == [Extent(0, 40, 60), Extent(1, 0, 2)]


def test_whole_where_one_extent_is_large_enough() -> None:
    pool = PoolAllocator()
    pool.add_segment(300)
    for key, size in enumerate((50, 50, 150)):
        pool.take(key, size)
    pool.give_back(0)
    pool.give_back(2)
    assert pool.take(3, 60) == [Extent(0, 100, 60)]
    with pytest.raises(ValueError, match="already has room"):
        pool.take(3, 1)
    with pytest.raises(ValueError, match="1000 bytes wanted, 810 of them are not free"):
        pool.take(4, 1000)
