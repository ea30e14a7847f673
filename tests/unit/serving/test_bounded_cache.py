from __future__ import annotations

from bnexport.serving.serving_limits import BoundedCache


def test_a_full_cache_is_emptied_before_it_grows() -> None:
    cache: BoundedCache[int, str] = BoundedCache(3)
    for key in range(3):
        cache[key] = str(key)
    assert dict(cache) == {0: "0", 1: "1", 2: "2"}
    cache[1] = "again"
    assert dict(cache) == {0: "0", 1: "again", 2: "2"}, "a known key needs no room"
    cache[3] = "3"
    assert dict(cache) == {3: "3"}


def test_no_number_of_keys_makes_it_larger() -> None:
    cache: BoundedCache[int, int] = BoundedCache(8)
    assert max(len(cache) for key in range(1000) if cache.__setitem__(key, key) is None) == 8
