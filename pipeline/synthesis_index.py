"""What synthesis has finished, and the dataset that follows from it.

`synthesis/<recipe>/<prompt shard digest>.json` maps a finished prompt shard to its sequence shard.
New prompts are those that no record of the recipe knows, by id and content: a prompt whose text or
reference has changed is asked again, and its old answers are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.datasets import DatasetEntry, read_sequences
from pipeline.layout import Layout
from pipeline.records import Prompt, TokenSequence


def read_records(layout: Layout, recipe_digest: str) -> list[dict[str, Any]]:
    """The finished prompt shards of a recipe, without those whose sequence shard is gone."""
    folder = layout.synthesis_folder(recipe_digest)
    records = [
        storage.read_json(storage.join(folder, info.base_name))
        for info in storage.list_files(folder, ".json")
    ]
    return [
        record
        for record in records
        if record["shard"] is None or storage.exists(storage.join(layout.root, record["shard"]))
    ]


def new_prompts(layout: Layout, recipe_digest: str, prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts that no finished shard of a recipe knows."""
    known = {
        digest
        for record in read_records(layout, recipe_digest)
        for digest in record["prompts"].values()
    }
    return [prompt for prompt in prompts if prompt.digest not in known]


def answer_counts(
    layout: Layout, recipe_digest: str, prompts: Iterable[Prompt]
) -> dict[str, float]:
    """Answers by what became of them, generated tokens and seconds of a recipe's prompt shards.

    Counted are the shards that hold one of the prompts.
    """
    digests = {prompt.digest for prompt in prompts}
    counts: dict[str, float] = {"answers": 0, "kept": 0, "generated_tokens": 0, "seconds": 0.0}
    for record in read_records(layout, recipe_digest):
        if digests.isdisjoint(record["prompts"].values()):
            continue
        found = record["counts"] | {k: record[k] for k in ("generated_tokens", "seconds")}
        for name, value in found.items():
            counts[name] = counts.get(name, 0) + value
    return counts


def sample_counts(layout: Layout, recipe_digests: Iterable[str]) -> dict[tuple[str, str], int]:
    """By generator and sequence, how often it was written, where that is more than once."""
    return {
        (record["generator"], identifier): count
        for digest in recipe_digests
        for record in read_records(layout, digest)
        for identifier, count in record["samples"].items()
    }


def build_dataset(
    layout: Layout, prompts: Sequence[Prompt], recipe_digests: Sequence[str]
) -> list[DatasetEntry]:
    """The sequences of a run's prompts in prompt order; equal answers are one entry.

    Where two runs at once answered a prompt under one recipe, one shard's answers count.
    """
    by_prompt: dict[str, dict[str, DatasetEntry]] = {prompt.prompt_id: {} for prompt in prompts}
    splits = {prompt.prompt_id: prompt.split for prompt in prompts}
    wanted = {(prompt.prompt_id, prompt.digest) for prompt in prompts}
    for digest in recipe_digests:
        open_prompts = set(wanted)
        for record in read_records(layout, digest):
            found = open_prompts & record["prompts"].items()
            answered = {name for name, _ in found}
            if record["shard"] is None or not answered:
                continue
            open_prompts -= found
            for sequence in read_sequences(storage.join(layout.root, record["shard"])):
                name = sequence.prompt_id
                if name in answered:
                    _merge(by_prompt[name], sequence, record["shard"], splits[name])
    return [entry for entries in by_prompt.values() for entry in entries.values()]


def _merge(
    entries: dict[str, DatasetEntry], sequence: TokenSequence, shard: str, split: str
) -> None:
    known = entries.get(sequence.sequence_id)
    if known is not None:
        generators = tuple(dict.fromkeys(known.generators + sequence.generators))
        entries[sequence.sequence_id] = replace(known, generators=generators)
        return
    entries[sequence.sequence_id] = DatasetEntry(
        sequence_id=sequence.sequence_id,
        prompt_id=sequence.prompt_id,
        domain=sequence.domain,
        split=split,
        generators=sequence.generators,
        shard=shard,
        num_tokens=len(sequence.input_ids),
        num_positions=sequence.num_positions,
    )
