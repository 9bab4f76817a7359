"""Sets of shingles, and the search for earlier sets that are similar to a new one.

The search is exact. Two sets of a Jaccard similarity of `t` or more share an element among the
first `1 - t` of each set's elements, and a shared element bounds their overlap by its places in
both (PPJoin: Xiao, Wang, Lin and Yu, Efficient similarity joins for near duplicate detection, WWW
2008). With the rarest elements first, texts that share boilerplate and little else never meet: for
two sets whose other elements are shared by all, the bounds hold only if they really are similar.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from sortedcontainers import SortedList

SEED = 1
COUNTERS_PER_ELEMENT, MOST_COUNTERS = 4, 2**27
HIGHEST_COUNT = 2**16 - 1
MOST_SETS = 2**40
SLACK = 1e-9
"""Bounds are lowered by so much, so that rounding hides no pair; similarities are not."""


def shingles_of(text: str, width: int) -> np.ndarray:
    """uint64[S]: hashes of all different substrings of `width` characters, in ascending order; a
    shorter text is its own only shingle.

    A hash is a sum of characters times random odd numbers, modulo 2^64; two substrings have the
    same one with a probability below 2^-43.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    width = min(width, len(characters))
    factors = np.random.default_rng(SEED).integers(0, 2**63, width, np.uint64) * 2 + 1
    count = len(characters) - width + 1
    hashes = np.full(count, width, np.uint64)
    for place, factor in enumerate(factors):
        hashes += characters[place : place + count] * factor
    return np.unique(hashes)


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    """Share of the elements of two sorted sets that are in both sets."""
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared)


class Rarity:
    """Counts of the sets that hold an element: the order in which elements are compared.

    Several elements may share a counter, so that a count is never too small; the highest count also
    stands for all higher ones.

    Args:
        num_elements: elements of all sets together, roughly; decides the number of counters, of two
            bytes each.
    """

    def __init__(self, num_elements: int) -> None:
        num_counters = min(max(COUNTERS_PER_ELEMENT * num_elements, 1), MOST_COUNTERS)
        self._counts = np.zeros(num_counters, np.uint16)

    def add(self, elements: np.ndarray) -> None:
        """Counts the elements of one set."""
        counters, times = np.unique(elements % len(self._counts), return_counts=True)
        counts = np.minimum(self._counts[counters] + times, HIGHEST_COUNT)
        self._counts[counters] = counts.astype(np.uint16)

    def first(self, elements: np.ndarray, share: float) -> list[tuple[int, int]]:
        """Places and elements of the rarest share of a set that any other set may hold as well."""
        counts = self._counts[elements % len(self._counts)]
        order = np.lexsort((elements, counts))[: int(share * len(elements) + SLACK) + 1]
        return [(j, int(elements[i])) for j, i in enumerate(order) if counts[i] > 1]


class SimilarSets:
    """Sets that were added, found again by a set that is similar to them.

    Args:
        min_similarity: Jaccard similarity in (0, 1) from which on sets are similar.
        rarity: counts of all sets that are ever added or looked for.
    """

    def __init__(self, min_similarity: float, rarity: Rarity) -> None:
        self._least, self._rarity = min_similarity - SLACK, rarity
        self._sizes: list[int] = []
        # For each element the sets that have it among their first, as `_key`s: 36 bytes each.
        self._holders: defaultdict[int, SortedList] = defaultdict(SortedList)

    def add(self, elements: np.ndarray) -> int:
        """Adds a set; returns its number, which is the number of sets before it."""
        number = len(self._sizes)
        self._sizes.append(len(elements))
        for place, element in self._rarity.first(elements, 1 - self._least):
            self._holders[element].add(_key(self._bound(elements, place), number))
        return number

    def candidates(self, elements: np.ndarray) -> Iterator[int]:
        """Numbers of the sets that may be similar to a set, each once, the likeliest first: all
        similar sets, and some that only the bounds of their overlap allow.
        """
        found = set()
        lowest = _key(self._least * len(elements), 0)
        for place, element in self._rarity.first(elements, 1 - self._least):
            if element not in self._holders:
                continue
            largest = self._bound(elements, place) / self._least
            for key in self._holders[element].irange(lowest, reverse=True):
                number = key % MOST_SETS
                if self._sizes[number] <= largest and number not in found:
                    found.add(number)
                    yield number

    def _bound(self, elements: np.ndarray, place: int) -> float:
        """Bound of the other set's size, if the element at `place` is the first that both share.

        Sets of sizes a and b need an overlap of t / (1 + t) * (a + b) and have at most a - place,
        so that t * b is at most the result.
        """
        return len(elements) - (1 + self._least) * place


def _key(bound: float, number: int) -> int:
    """A bound, rounded up, and the number of its set, as one integer in the order of bounds."""
    return math.ceil(bound * 1000) * MOST_SETS + number
