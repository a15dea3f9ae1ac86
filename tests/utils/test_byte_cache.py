"""What a process keeps in memory has a limit, and the least recently used goes first."""

from __future__ import annotations

from pipeline.utils.byte_cache import ByteCache

LIMIT = 100


def test_what_is_kept_has_a_limit() -> None:
    kept: ByteCache[str, object] = ByteCache()

    def keep(key: str, size_bytes: int) -> int:
        kept.put(key, object(), size_bytes)
        return kept.trim(LIMIT)

    for key in "abc":
        keep(key, 40)
    assert kept.get("a") is None
    assert kept.get("b") is not None
    assert keep("d", 40) == 1
    assert kept.get("c") is None, "the least recently used is dropped"
    keep("d", 20)
    keep("e", 20)
    assert all(kept.get(key) is not None for key in "bde")
    assert kept.size_bytes == 80
    assert keep("f", 4000) == 4
    assert kept.get("f") is None, "larger than the limit"
    assert kept.size_bytes == 0


def test_a_number_of_values_can_stay_whatever_their_size() -> None:
    kept: ByteCache[str, str] = ByteCache()
    for key in "ab":
        kept.put(key, key, 1000)
    assert kept.trim(LIMIT, at_least=1) == 1
    assert kept.keys() == ["b"]
    assert "b" in kept
    kept.clear()
    assert kept.keys() == []
    assert kept.size_bytes == 0
