"""Filters that look for the same text twice: duplicates in the train split, contamination.

The first of several duplicates stays. Hold-out sequences are never dropped here, since the training
data is kept apart from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from pipeline.config.filters import (
    Compared,
    Contamination,
    EvaluationFile,
    ExactDuplicate,
    NearDuplicate,
)
from pipeline.errors import ConfigError
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.synthesis.rows import numbered_rows

NUM_PERMUTATIONS = 128
# Thai, Lao, Burmese, Khmer, kana and ideographs are written without spaces: each character counts
# as a word.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30fa\u30fc-\u30ff\u3400-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def exact_duplicate(
    rule: ExactDuplicate, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops train sequences whose text repeats an earlier one, apart from case and spaces."""
    first: dict[str, Candidate] = {}
    dropped = {}
    for i, candidate in _of_train(candidates):
        other = first.setdefault(compared_text(candidate, rule.of), candidate)
        if _counts_as_other(candidate, other, rule.of):
            dropped[i] = f"the same {rule.of} as {_name(other)}"
    return dropped


def near_duplicate(
    rule: NearDuplicate, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops train sequences that are nearly the same as an earlier kept one.

    MinHash finds candidate pairs; the exact similarity of their sets of shingles decides.
    """
    from datasketch import MinHash, MinHashLSH  # brings scipy, which is slow to import

    # A wrong candidate pair costs one comparison, but a missed pair leaves a duplicate in the data:
    # these weights of false positives and negatives miss few pairs.
    weights = (0.1, 0.9)
    index = MinHashLSH(rule.min_similarity, num_perm=NUM_PERMUTATIONS, weights=weights)
    blank = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
    dropped = {}
    for i, candidate in _of_train(candidates):
        shingles = shingles_of(compared_text(candidate, rule.of), rule.shingle)
        sketch = blank.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        similar: list[Any] = index.query(sketch)
        similarity = {
            j: jaccard(shingles, shingles_of(compared_text(candidates[j], rule.of), rule.shingle))
            for j in similar
            if _counts_as_other(candidate, candidates[j], rule.of)
        }
        nearest = max(similarity, key=lambda j: similarity[j], default=None)
        if nearest is not None and similarity[nearest] >= rule.min_similarity:
            dropped[i] = f"similarity {similarity[nearest]:.2f} to {_name(candidates[nearest])}"
        else:
            index.insert(i, sketch)
    return dropped


def contamination(
    rule: Contamination, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops train and validation sequences that share an n-gram with an evaluated text.

    Raises:
        ConfigError: an evaluation file lacks a column.
        PromptError: an evaluation file cannot be read.
    """
    places: dict[tuple[str, ...], str] = {}
    wholes: dict[tuple[str, ...], str] = {}
    texts = [*evidence.holdout_prompts.items(), *_evaluation_texts(rule.files)]
    for place, text in texts:
        words = words_of(text)
        for ngram in _ngrams(words, rule.ngram):
            places.setdefault(ngram, place)
        if 0 < len(words) < rule.ngram:
            wholes.setdefault(tuple(words), place)
    dropped = {}
    for i, candidate in enumerate(candidates):
        if candidate.entry.split == "holdout":
            continue
        parts = [words_of(candidate.prompt), words_of(candidate.answer)]
        hits = [n for part in parts for n in _ngrams(part, rule.ngram) if n in places]
        whole = tuple(parts[0])
        if hits:
            dropped[i] = f"{places[hits[0]]}: {' '.join(hits[0])!r}"
        elif whole in wholes:
            dropped[i] = f"{wholes[whole]}: {' '.join(whole)!r}"
    return dropped


def compared_text(candidate: Candidate, of: Compared) -> str:
    """Text by which duplicates are compared: in lower case, with single spaces."""
    parts = {
        "prompt": candidate.prompt,
        "answer": candidate.answer,
        "both": f"{candidate.prompt}\n{candidate.answer}",
    }
    return " ".join(parts[of].lower().split())


def shingles_of(text: str, width: int) -> set[str]:
    """All substrings of `width` characters; a shorter text is its own only shingle."""
    return {text[i : i + width] for i in range(max(len(text) - width + 1, 1))}


def jaccard(one: set[str], two: set[str]) -> float:
    """Share of the elements of two sets that are in both sets."""
    return len(one & two) / len(one | two)


def words_of(text: str) -> list[str]:
    """Words of a text without case and punctuation; characters in scripts without spaces."""
    return _WORD.findall(text.lower())


def _of_train(candidates: Sequence[Candidate]) -> Iterator[tuple[int, Candidate]]:
    return (
        (i, candidate) for i, candidate in enumerate(candidates) if candidate.entry.split == "train"
    )


def _counts_as_other(candidate: Candidate, other: Candidate, of: Compared) -> bool:
    """Whether similar sequences are duplicates; answers to one prompt always share the prompt."""
    if other is candidate:
        return False
    return of != "prompt" or candidate.entry.prompt_id != other.entry.prompt_id


def _ngrams(words: list[str], width: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + width]) for i in range(len(words) - width + 1))


def _evaluation_texts(files: Sequence[EvaluationFile]) -> Iterator[tuple[str, str]]:
    """Yields the place and text of every compared column of evaluation files."""
    for file in files:
        for place, row in numbered_rows(file.path):
            for field in file.fields:
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    found = ", ".join(map(str, row)) if isinstance(row, dict) else row
                    raise ConfigError(
                        f"{place}: the filter contamination needs a text {field!r}, but the row "
                        f"has {found}: correct `fields` of this file"
                    )
                yield place, row[field]


def _name(candidate: Candidate) -> str:
    return f"sequence {candidate.entry.sequence_id} of prompt {candidate.entry.prompt_id}"
