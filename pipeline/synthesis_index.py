"""What synthesis has finished, and the dataset that follows from it.

`synthesis/<recipe>/<prompt shard digest>.json` maps a finished prompt shard to its sequence shard.
New prompts are those that no record of the recipe knows.
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
        identifier
        for record in read_records(layout, recipe_digest)
        for identifier in record["prompt_ids"]
    }
    return [prompt for prompt in prompts if prompt.prompt_id not in known]


def build_dataset(
    layout: Layout, prompts: Sequence[Prompt], recipe_digests: Sequence[str]
) -> list[DatasetEntry]:
    """The dataset of a run: the sequences of its prompts in prompt order; equal answers are one
    entry.
    """
    by_prompt: dict[str, dict[str, DatasetEntry]] = {prompt.prompt_id: {} for prompt in prompts}
    splits = {prompt.prompt_id: prompt.split for prompt in prompts}
    for digest in recipe_digests:
        for record in read_records(layout, digest):
            if record["shard"] is None or by_prompt.keys().isdisjoint(record["prompt_ids"]):
                continue
            for sequence in read_sequences(storage.join(layout.root, record["shard"])):
                if sequence.prompt_id in by_prompt:
                    _merge(
                        by_prompt[sequence.prompt_id],
                        sequence,
                        record["shard"],
                        splits[sequence.prompt_id],
                    )
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
