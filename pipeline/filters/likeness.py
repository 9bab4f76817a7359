"""Filters that look for the same text twice: duplicates in the train split, contamination.

The first of several duplicates stays. Hold-out sequences are never dropped here, since the training
data is kept apart from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from pipeline.config.filters import Compared, Contamination, ExactDuplicate, NearDuplicate
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.evaluated import EvaluatedTexts, ngrams_of, read_evaluation_file
from pipeline.filters.similar_sets import Rarity, SimilarSets, jaccard, shingles_of
from pipeline.filters.words import plain, words_of


def exact_duplicate(
    rule: ExactDuplicate, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops train sequences that look like an earlier one, apart from case and spaces."""
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
    """Drops train sequences that are nearly the same as an earlier kept one."""
    texts = {i: compared_text(candidate, rule.of) for i, candidate in _of_train(candidates)}
    rarity = Rarity(sum(map(len, texts.values())))
    for text in texts.values():
        rarity.add(shingles_of(text, rule.shingle))
    similar, kept = SimilarSets(rule.min_similarity, rarity), []
    dropped = {}
    for i, text in texts.items():
        shingles = shingles_of(text, rule.shingle)
        for j in map(kept.__getitem__, similar.candidates(shingles)):
            if not _counts_as_other(candidates[i], candidates[j], rule.of):
                continue
            similarity = jaccard(shingles, shingles_of(texts[j], rule.shingle))
            if similarity >= rule.min_similarity:
                dropped[i] = f"similarity {similarity:.2f} to {_name(candidates[j])}"
                break
        else:
            similar.add(shingles)
            kept.append(i)
    return dropped


def contamination(
    rule: Contamination, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops train and validation sequences that share an n-gram with an evaluated text.

    Words that most evaluated texts share are no evidence.

    Raises:
        ConfigError: an evaluation file lacks a column.
        PromptError: an evaluation file cannot be read.
    """
    evaluated = EvaluatedTexts(rule.ngram)
    for group in evidence.holdout_groups:
        evaluated.add(group, evidence.wording)
    for file in rule.files:
        for column in read_evaluation_file(file).values():
            evaluated.add(column.texts, evidence.wording)
    dropped = {}
    for i, candidate in enumerate(candidates):
        if candidate.entry.split == "holdout":
            continue
        prompt = words_of(candidate.prompt)
        grams = chain(
            ngrams_of(prompt, rule.ngram), ngrams_of(words_of(candidate.answer), rule.ngram)
        )
        hit = next((gram for gram in grams if gram in evaluated.ngrams), None)
        if hit is not None:
            dropped[i] = f"{evaluated.ngrams[hit]}: {' '.join(hit)!r}"
        elif (whole := tuple(prompt)) in evaluated.wholes:
            dropped[i] = f"{evaluated.wholes[whole]}: {' '.join(whole)!r}"
    return dropped


def compared_text(candidate: Candidate, of: Compared) -> str:
    """Text by which duplicates are compared: as people see it, without case, in single spaces."""
    parts = {
        "prompt": candidate.prompt,
        "answer": candidate.answer,
        "both": f"{candidate.prompt}\n{candidate.answer}",
    }
    return " ".join(plain(parts[of]).split())


def _of_train(candidates: Sequence[Candidate]) -> Iterator[tuple[int, Candidate]]:
    return (
        (i, candidate) for i, candidate in enumerate(candidates) if candidate.entry.split == "train"
    )


def _counts_as_other(candidate: Candidate, other: Candidate, of: Compared) -> bool:
    """Whether similar sequences are duplicates; answers to one prompt always share the prompt."""
    if other is candidate:
        return False
    return of != "prompt" or candidate.entry.prompt_id != other.entry.prompt_id


def _name(candidate: Candidate) -> str:
    return f"sequence {candidate.entry.sequence_id} of prompt {candidate.entry.prompt_id}"
