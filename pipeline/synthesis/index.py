"""What synthesis has finished, and the dataset that follows from it.

`synthesis/<recipe>/<prompt shard digest>.json` maps a finished prompt shard to its sequence shard,
or holds the prompts that were written for it. New prompts are those that no record of the recipe
knows, by id and content: a prompt whose text or reference has changed is asked again, and its old
answers are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, Prompt, TokenSequence
from pipeline.sequences import read_sequences, write_sequences
from pipeline.synthesis.rejected import Rejected, write_rejected


@dataclass
class Outcome:
    """What has become of the replies to a prompt shard.

    Attributes:
        kept: sequences by id.
        samples: how often each of them was written.
        written: new prompts by the id of the prompt that asked for them.
        counts: by the id of the prompt that was asked, its replies by what became of them, and the
            tokens generated for it.
        errors: of prompts that could not be asked, by id.
        needs: of prompts that no engine so far could hold, by id: tokens of the prompt and its
            reply.
    """

    kept: dict[str, TokenSequence] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    written: dict[str, list[Prompt]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)

    def count(self, asked: str, **numbers: int) -> None:
        """Adds to the counts of the prompt of that id."""
        self.counts.setdefault(asked, Counter()).update(numbers)

    def keep(self, sequence: TokenSequence) -> None:
        """Counts an answer; equal ones are one sequence."""
        known = sequence.sequence_id in self.kept
        self.count(sequence.prompt_id, answers=1, **{"duplicate" if known else "kept": 1})
        self.samples[sequence.sequence_id] += 1
        self.kept.setdefault(sequence.sequence_id, sequence)

    def reject(
        self,
        prompt: Prompt,
        generator: str,
        reason: str,
        detail: str,
        answer: str | None = None,
        num_answers: int = 1,
        asked: str | None = None,
    ) -> None:
        """Counts a reply of no use, and keeps it for people to look at.

        Args:
            asked: id of the prompt that was asked, where that is not `prompt` itself.
        """
        self.count(asked or prompt.prompt_id, answers=num_answers, **{reason: num_answers})
        self.rejected.append(
            Rejected(
                reason=reason,
                detail=detail,
                prompt_id=prompt.prompt_id,
                domain=prompt.domain,
                split=prompt.split,
                generators=(generator,),
                prompt=prompt.words,
                answer=answer,
            )
        )


def shard_digest(prompts: Iterable[Prompt]) -> str:
    """Names the record of a prompt shard."""
    return digest_ids(prompt.digest for prompt in prompts)


def write_record(
    layout: Layout, recipe_digest: str, generator: str, prompts: Sequence[Prompt], outcome: Outcome
) -> dict[str, Any]:
    """Writes sequences and rejected replies of a prompt shard, then the record that names them."""
    name, domain = shard_digest(prompts), prompts[0].domain
    if outcome.rejected:
        write_rejected(layout.rejected(recipe_digest, name), outcome.rejected)
    kept = list(outcome.kept.values())
    record = {
        "generator": generator,
        "domain": domain,
        "prompts": {prompt.prompt_id: prompt.digest for prompt in prompts},
        "shard": write_sequences(layout, domain, kept) if kept else None,
        "samples": {name: count for name, count in outcome.samples.items() if count > 1},
        "written": {name: [asdict(p) for p in found] for name, found in outcome.written.items()},
        "counts": outcome.counts,
        "errors": outcome.errors,
        "needs": outcome.needs,
    }
    folder = layout.synthesis_folder(recipe_digest)
    storage.write_json(storage.join(folder, f"{name}.json"), record)
    return record


def written_prompts(layout: Layout, recipe_digest: str, asked: Iterable[Prompt]) -> list[Prompt]:
    """What a recipe wrote for the prompts that asked for it, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(layout, recipe_digest):
        for name, prompts in record["written"].items():
            found.setdefault(record["prompts"][name], prompts)
    return [_prompt(values) for prompt in asked for values in found.get(prompt.digest, [])]


def _prompt(values: dict[str, Any]) -> Prompt:
    found = Prompt(**values)
    return found if found.messages is None else replace(found, messages=tuple(found.messages))


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


def new_prompts(
    layout: Layout, recipe_digest: str, prompts: Iterable[Prompt], room: int | None = None
) -> list[Prompt]:
    """The prompts that no finished shard of a recipe knows, and those that only now have room.

    Args:
        room: tokens that the engine holds; None where it holds whatever it is asked.
    """
    known = {
        digest
        for record in read_records(layout, recipe_digest)
        for name, digest in record["prompts"].items()
        if name not in record["needs"] or (room is not None and room < record["needs"][name])
    }
    return [prompt for prompt in prompts if prompt.digest not in known]


def forget_errors(layout: Layout, recipe_digest: str) -> int:
    """Makes the prompts new again that could not be asked; returns how many they are."""
    found = 0
    folder = layout.synthesis_folder(recipe_digest)
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        if errors := storage.read_json(path)["errors"]:  # a record of them alone
            found += len(errors)
            storage.remove(path)
    return found


def answer_counts(layout: Layout, recipe_digest: str, prompts: Iterable[Prompt]) -> dict[str, int]:
    """What became of a recipe's answers to these prompts, and the tokens generated for them."""
    counts = Counter(answers=0, kept=0, generated_tokens=0)
    for record, answered in _finished(layout, recipe_digest, prompts):
        for name in answered:
            counts.update(record["counts"].get(name, {}))
    return dict(counts)


def sample_counts(
    layout: Layout, asked: Iterable[tuple[str, Sequence[Prompt]]]
) -> Counter[tuple[str, str]]:
    """By prompt and sequence, how often it was written: by all generators, in all recipes.

    Args:
        asked: as in `build_dataset`.
    """
    questions: dict[str, list[Prompt]] = {}
    for digest, prompts in asked:
        questions.setdefault(digest, []).extend(prompts)
    counts: Counter[tuple[str, str]] = Counter()
    for digest, prompts in questions.items():
        for record, answered in _finished(layout, digest, prompts):
            if record["shard"] is None:
                continue
            path = storage.join(layout.root, record["shard"])
            for row in storage.read_table(path, ["prompt_id", "sequence_id"]).to_pylist():
                if (name := row["prompt_id"]) in answered:
                    identifier = row["sequence_id"]
                    counts[name, identifier] += record["samples"].get(identifier, 1)
    return counts


def build_dataset(
    layout: Layout, prompts: Sequence[Prompt], asked: Iterable[tuple[str, Sequence[Prompt]]]
) -> list[DatasetEntry]:
    """The sequences of a run's prompts in prompt order; equal answers are one entry.

    Args:
        prompts: all of the run.
        asked: the digest of each recipe that answers, and its prompts as it asked them.
    """
    by_prompt: dict[str, dict[str, DatasetEntry]] = {prompt.prompt_id: {} for prompt in prompts}
    splits = {prompt.prompt_id: prompt.split for prompt in prompts}
    for digest, questions in asked:
        for record, answered in _finished(layout, digest, questions):
            if record["shard"] is None:
                continue
            for sequence in read_sequences(storage.join(layout.root, record["shard"])):
                name = sequence.prompt_id
                if name in answered:
                    _merge(by_prompt[name], sequence, record["shard"], splits[name])
    return [entry for entries in by_prompt.values() for entry in entries.values()]


def _finished(
    layout: Layout, recipe_digest: str, prompts: Iterable[Prompt]
) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """The records of a recipe that hold some of the prompts, with the ids of these.

    Where two runs at once answered a prompt under one recipe, one shard's answers count; a prompt
    that had no room before it was asked counts where it was asked.
    """
    wanted = {(prompt.prompt_id, prompt.digest) for prompt in prompts}
    records = read_records(layout, recipe_digest)
    for asked in (True, False):
        for record in records:
            found = wanted & record["prompts"].items()
            found = {each for each in found if (each[0] not in record["needs"]) is asked}
            wanted -= found
            if found:
                yield record, {name for name, _ in found}


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
