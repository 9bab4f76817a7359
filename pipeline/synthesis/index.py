"""Questions to the answered shards: which prompts are new, what was written, what the dataset is.

A prompt is new to a step when no answered shard of the step knows its id and content. A prompt
whose text or reference has changed is therefore asked again, and its old answers are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pipeline import storage
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, Prompt, TokenSequence
from pipeline.sequences import read_sequences
from pipeline.synthesis.answered_shards import AnsweredShard, read_answered_shards

StepPrompts = Iterable[tuple[str, Sequence[Prompt]]]
"""Identity digest of each step that answers, with the prompts in the form in which it asks them."""


def new_prompts(
    layout: Layout,
    identity_digest: str,
    prompts: Iterable[Prompt],
    max_model_len: int | None = None,
) -> list[Prompt]:
    """Prompts that no answered shard of a step knows, or that fit into an engine only now.

    Args:
        max_model_len: tokens that the engine holds; None if it is not limited by the config.
    """
    known = {
        digest
        for answered in read_answered_shards(layout, identity_digest)
        for name, digest in answered.prompts.items()
        if name not in answered.needs
        or (max_model_len is not None and max_model_len < answered.needs[name])
    }
    return [prompt for prompt in prompts if prompt.digest not in known]


def written_prompts(
    layout: Layout, identity_digest: str, requests: Iterable[Prompt]
) -> list[Prompt]:
    """Prompts that a step wrote in reply to these requests, in their order."""
    by_request: dict[str, list[Prompt]] = {}
    for answered in read_answered_shards(layout, identity_digest):
        for name, prompts in answered.written.items():
            by_request.setdefault(answered.prompts[name], prompts)
    return [prompt for request in requests for prompt in by_request.get(request.digest, [])]


def answer_counts(
    layout: Layout, identity_digest: str, prompts: Iterable[Prompt]
) -> dict[str, int]:
    """Number of answers of each outcome that a step has for these prompts, and their tokens."""
    counts = Counter(answers=0, kept=0, generated_tokens=0)
    for answered, prompt_ids in _answered(layout, identity_digest, prompts):
        for name in prompt_ids:
            counts.update(answered.counts.get(name, {}))
    return dict(counts)


def sample_counts(layout: Layout, steps: StepPrompts) -> Counter[tuple[str, str]]:
    """Number of times that each sequence was written, by all authors in all steps.

    Returns:
        Counts by `(prompt_id, sequence_id)`.
    """
    prompts_of: dict[str, list[Prompt]] = {}  # two steps of one identity share their answers
    for digest, prompts in steps:
        prompts_of.setdefault(digest, []).extend(prompts)
    counts: Counter[tuple[str, str]] = Counter()
    for digest, prompts in prompts_of.items():
        for answered, prompt_ids in _answered(layout, digest, prompts):
            if answered.shard is None:
                continue
            path = storage.join(layout.root, answered.shard)
            for row in storage.read_table(path, ["prompt_id", "sequence_id"]).to_pylist():
                if (name := row["prompt_id"]) in prompt_ids:
                    identifier = row["sequence_id"]
                    counts[name, identifier] += answered.samples.get(identifier, 1)
    return counts


def build_dataset(
    layout: Layout, prompts: Sequence[Prompt], steps: StepPrompts
) -> list[DatasetEntry]:
    """Dataset of a run: the sequences of its prompts in their order; equal answers are one entry.

    Args:
        prompts: all prompts of the run, given and written.
    """
    by_prompt: dict[str, dict[str, DatasetEntry]] = {prompt.prompt_id: {} for prompt in prompts}
    splits = {prompt.prompt_id: prompt.split for prompt in prompts}
    for digest, asked_prompts in steps:
        for answered, prompt_ids in _answered(layout, digest, asked_prompts):
            if answered.shard is None:
                continue
            for sequence in read_sequences(storage.join(layout.root, answered.shard)):
                name = sequence.prompt_id
                if name in prompt_ids:
                    _add_entry(by_prompt[name], sequence, answered.shard, splits[name])
    return [entry for entries in by_prompt.values() for entry in entries.values()]


def _answered(
    layout: Layout, identity_digest: str, prompts: Iterable[Prompt]
) -> Iterator[tuple[AnsweredShard, set[str]]]:
    """Yields the answered shards that hold some of the prompts, with the ids of these prompts.

    Each prompt is yielded once. If two runs answered it at the same time, one shard's answers
    count. If it once did not fit into an engine and was asked later, the later shard counts.
    """
    missing = {(prompt.prompt_id, prompt.digest) for prompt in prompts}
    shards = read_answered_shards(layout, identity_digest)
    for was_asked in (True, False):
        for answered in shards:
            found = {
                (name, digest)
                for name, digest in missing & answered.prompts.items()
                if (name not in answered.needs) is was_asked
            }
            missing -= found
            if found:
                yield answered, {name for name, _ in found}


def _add_entry(
    entries: dict[str, DatasetEntry], sequence: TokenSequence, shard: str, split: str
) -> None:
    known = entries.get(sequence.sequence_id)
    if known is not None:
        authors = tuple(dict.fromkeys(known.authors + sequence.authors))
        entries[sequence.sequence_id] = replace(known, authors=authors)
        return
    entries[sequence.sequence_id] = DatasetEntry(
        sequence_id=sequence.sequence_id,
        prompt_id=sequence.prompt_id,
        domain=sequence.domain,
        split=split,
        authors=sequence.authors,
        shard=shard,
        num_tokens=len(sequence.input_ids),
        num_positions=sequence.num_positions,
    )
