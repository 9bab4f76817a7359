"""Answered shards: what became of the prompts of one prompt shard, as it is gathered and recorded.

A task collects the replies to its prompts in `ShardReplies`. Once all replies are there, it writes
the sequences, the rejected replies and last an `AnsweredShard`, the JSON file that names them:

    synthesis/<identity digest>/<prompt shard digest>.json

Existence of that file means that its prompts are done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from typing_extensions import TypedDict

from pipeline import storage
from pipeline.errors import CorruptFileError
from pipeline.fingerprint import digest_ids, is_digest
from pipeline.layout import Layout
from pipeline.records import Prompt, TokenSequence
from pipeline.sequences import write_sequences
from pipeline.synthesis.rejected import Rejected, write_rejected


@dataclass
class ShardReplies:
    """Replies to the prompts of one shard, sorted by what became of them.

    Attributes:
        kept: sequences by id.
        samples: number of times that each kept sequence was written.
        written: new prompts by the id of the request that they answer.
        counts: by prompt id, the number of replies of each outcome and the generated tokens.
        rejected: replies that became neither sequence nor prompt.
        errors: by prompt id, why a prompt could not be asked at all.
        needs: by prompt id, the tokens of a prompt and its reply that no engine so far could hold.
    """

    kept: dict[str, TokenSequence] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    written: dict[str, list[Prompt]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)

    def count(self, prompt_id: str, **numbers: int) -> None:
        """Adds numbers to the counts of a prompt."""
        self.counts.setdefault(prompt_id, Counter()).update(numbers)

    def keep(self, sequence: TokenSequence) -> None:
        """Counts an answer and keeps its sequence; equal answers are one sequence."""
        is_known = sequence.sequence_id in self.kept
        self.count(sequence.prompt_id, answers=1, **{"duplicate" if is_known else "kept": 1})
        self.samples[sequence.sequence_id] += 1
        self.kept.setdefault(sequence.sequence_id, sequence)

    def reject(
        self,
        prompt: Prompt,
        author: str,
        reason: str,
        detail: str,
        answer: str | None = None,
        num_answers: int = 1,
        request_id: str | None = None,
    ) -> None:
        """Counts a useless reply and keeps it for people to look at.

        Args:
            num_answers: number of answers that the rejection stands for.
            request_id: id under which the reply is counted, if that is not the id of `prompt`.
        """
        self.count(request_id or prompt.prompt_id, answers=num_answers, **{reason: num_answers})
        self.rejected.append(
            Rejected(
                reason=reason,
                detail=detail,
                prompt_id=prompt.prompt_id,
                domain=prompt.domain,
                split=prompt.split,
                authors=(author,),
                prompt=prompt.words,
                answer=answer,
            )
        )


@dataclass(frozen=True)
class AnsweredShard:
    """Record of one finished prompt shard.

    Attributes:
        author: name of the teacher that replied, `student`, or `dataset`.
        domain: domain of all its prompts.
        prompts: digests of the prompts by id.
        shard: path of the sequence shard relative to the storage root; None if nothing was kept.
        samples: by sequence id, the number of times that a sequence was written, if above 1.
        written: as in `ShardReplies`, and so are `counts`, `errors` and `needs`.
    """

    author: str
    domain: str
    prompts: dict[str, str]
    shard: str | None
    samples: dict[str, int]
    written: dict[str, list[Prompt]]
    counts: dict[str, dict[str, int]]
    errors: dict[str, str]
    needs: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """JSON value of the record; the file calls the author `generator`."""
        values = asdict(self)
        return {"generator": values.pop("author"), **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AnsweredShard:
        """Reads the record from its JSON value."""
        written = {
            name: [_prompt(v) for v in prompts] for name, prompts in values["written"].items()
        }
        others = {key: value for key, value in values.items() if key != "generator"}
        return cls(**others | {"author": values["generator"], "written": written})


ASK_AGAIN = "remove it, and its prompts are asked again"


class _Stored(TypedDict):
    """An answered shard as JSON."""

    generator: str
    shard: str | None
    errors: dict[str, str]
    written: dict[str, list[dict[str, Any]]]


def _prompt(values: dict[str, Any]) -> Prompt:
    prompt = Prompt(**values)
    # JSON has lists only; a tuple makes the prompt equal to the one that was written.
    return prompt if prompt.messages is None else replace(prompt, messages=tuple(prompt.messages))


def shard_digest(prompts: Iterable[Prompt]) -> str:
    """Digest of a prompt shard, which names its answered shard."""
    return digest_ids(prompt.digest for prompt in prompts)


def write_answered_shard(
    layout: Layout,
    identity_digest: str,
    author: str,
    prompts: Sequence[Prompt],
    replies: ShardReplies,
) -> AnsweredShard:
    """Writes the sequences and rejected replies of a prompt shard, and last the record of both."""
    name, domain = shard_digest(prompts), prompts[0].domain
    if replies.rejected:
        write_rejected(layout.rejected(identity_digest, name), replies.rejected)
    kept = list(replies.kept.values())
    answered = AnsweredShard(
        author=author,
        domain=domain,
        prompts={prompt.prompt_id: prompt.digest for prompt in prompts},
        shard=write_sequences(layout, domain, kept) if kept else None,
        samples={name: count for name, count in replies.samples.items() if count > 1},
        written=replies.written,
        counts={name: dict(counts) for name, counts in replies.counts.items()},
        errors=replies.errors,
        needs=replies.needs,
    )
    folder = layout.synthesis_folder(identity_digest)
    storage.write_json(storage.join(folder, f"{name}.json"), answered.as_json())
    return answered


def read_answered_shards(layout: Layout, identity_digest: str) -> list[AnsweredShard]:
    """Reads the answered shards of a step, without shards whose sequences are lost."""
    folder = layout.synthesis_folder(identity_digest)
    shards = [
        _read(storage.join(folder, info.base_name)) for info in storage.list_files(folder, ".json")
    ]
    return [
        answered
        for answered in shards
        if answered.shard is None or storage.exists(storage.join(layout.root, answered.shard))
    ]


def _read(path: str) -> AnsweredShard:
    stored = storage.read_json(path, _Stored, ASK_AGAIN)
    try:
        return AnsweredShard.from_json(stored)
    except TypeError as error:  # a key that this version lacks
        raise CorruptFileError(
            f"{path} does not hold what polystill writes there: {error}; {ASK_AGAIN}"
        ) from error


def forget_errors(layout: Layout, identity_digest: str) -> int:
    """Makes quarantined prompts new again; returns their number."""
    num_forgotten = 0
    folder = layout.synthesis_folder(identity_digest)
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        if not is_digest(info.base_name.removesuffix(".json")):
            continue  # somebody else's file
        # A file with errors holds quarantined prompts only, so it can go as a whole.
        if errors := _read(path).errors:
            num_forgotten += len(errors)
            storage.remove(path)
    return num_forgotten
