"""The spread of a run of the tests: the number of worker processes, and the order of the files."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

#: More workers need more memory (about 1.5 GB each) than most machines have.
MOST_WORKERS = 4


class Item(Protocol):
    """A test of pytest, as far as its order is concerned."""

    @property
    def path(self) -> Path: ...


AnyItem = TypeVar("AnyItem", bound=Item)


def thinned(functions: Sequence[tuple[str, Sequence[int]]]) -> Iterator[bool]:
    """Yield, for each test in order, True if ``@pytest.mark.sampled(n, first)`` makes it slow.

    Of each test's parameters every n-th is fast, from ``first`` on (0 by default), and the others are slow. A function is the
    test's name without its parameters, and the arguments of the mark; none without the mark.
    """
    seen: Counter[str] = Counter()
    for name, given in functions:
        every, first = (*given, 0)[:2] if given else (1, 0)
        yield seen[name] % every != first
        seen[name] += 1


def workers() -> int:
    """Return the number of workers for ``-n auto``: one per core that this process may use, hyperthreads included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def shuffled(items: Sequence[AnyItem], seed: int) -> list[AnyItem]:
    """Return the tests with their files in a random order. The order inside a file stays."""
    files = list(dict.fromkeys(item.path for item in items))
    random.Random(seed).shuffle(files)
    rank = {path: index for index, path in enumerate(files)}
    return sorted(items, key=lambda item: rank[item.path])
