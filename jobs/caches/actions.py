"""Cache commands that only read and write storage; commands that need engines have own modules.

Each command takes a run as it was last prepared. Nothing here starts a cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from jobs.bookkeeping.stage_records import read_record, write_record
from jobs.caches.run_caches import RunCaches, round_dataset
from jobs.stages.preference import preference_digest
from pipeline import storage
from pipeline.cache.generations import named_generations
from pipeline.cache.index import forget_quarantined, missing_sequences
from pipeline.cache.kinds import holds_holdout, teacher_of
from pipeline.cache.manifest import publish
from pipeline.cache.reader import open_cache
from pipeline.cache.shard import write_shard
from pipeline.cache_care.distillkit import (
    export_distillkit,
    imported_row,
    most_entries,
    read_distillkit,
)
from pipeline.cache_care.gc import (
    find_garbage,
    foreign_lines,
    garbage_table,
    remove_garbage,
)
from pipeline.cache_care.long_table import export_long
from pipeline.cache_care.show import find_sequence, token_table
from pipeline.cache_care.status import status_table, teacher_status
from pipeline.cache_care.verify import CheckedCache, check_cache
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.errors import CacheError, ConfigError
from pipeline.fingerprint import digest_bytes, digest_ids, digest_json
from pipeline.records import DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.run.identities import provenance_of
from pipeline.run.preparation import read_prepared
from pipeline.run.prepared_run import Run
from pipeline.sequences import SequenceReader, read_dataset
from pipeline.synthesis.answered_shards import forget_errors
from teachers.preflight.model_layers import text_config
from teachers.tasks.judge import forget_ungraded
from teachers.tokenizing import load_tokenizer

Confirm = Callable[[str, str], bool]
"""Function that shows a text, asks a question about it, and returns whether the answer is yes."""


def status(caches: RunCaches) -> str:
    """Contents and gaps of each cache, the runs that name it, and stale caches, as a table."""
    run = caches.run
    identities, names = run.prepared.all_cache_identities, named_generations(run.layout)
    statuses = [
        teacher_status(run.layout, name, identities[name], cache, caches.entries_of(name), names)
        for name, cache in caches.layouts.items()
    ]
    lines = [status_table(run.config.name, caches.entries, statuses)]
    if not caches.is_current:
        lines.append(
            "the config or a model has changed since the run was prepared; this table takes the "
            "models as they were then"
        )
    return "\n".join(lines)


def verify(caches: RunCaches, teacher: str | None) -> dict[str, CheckedCache]:
    """Checks every shard and row of the generations that the run uses, by cache name."""
    sequences = SequenceReader(caches.run.layout, caches.entries)
    return {
        name: check_cache(
            caches.layouts[name],
            caches.fingerprint(name),
            vocabulary_of(caches.run.config, teacher_of(name)),
            sequences,
        )
        for name in caches.chosen(teacher)
    }


def vocabulary_of(config: Config, teacher: str) -> int:
    """Rows of a teacher's LM head: every token id that the teacher can return lies below."""
    files = config.teachers[teacher].files
    assert files is not None, "teachers that have a cache exchange token ids"
    return text_config(files).vocab_size


def show(caches: RunCaches, teacher: str | None, sequence_id: str | None) -> str:
    """The rows of one sequence as a table.

    Args:
        sequence_id: id of the sequence or the beginning of it; None for the first sequence.

    Raises:
        ConfigError: no sequence of the run has that id, or several begin with it.
    """
    identifiers = [entry.sequence_id for entry in caches.entries]
    wanted = identifiers[0] if sequence_id is None else find_sequence(identifiers, sequence_id)
    sequence = SequenceReader(caches.run.layout, caches.entries).get(wanted)
    assert sequence is not None, "a dataset names the shard of each of its sequences"
    names = caches.distributions(teacher)
    rows = {name: open_cache(caches.layouts[name]).row(wanted) for name in names}
    tokenizer = load_tokenizer(caches.run.config.student.files)
    return token_table(sequence, rows, lambda token: str(tokenizer.decode([token])))


def export(caches: RunCaches, teacher: str, form: str, folder: str) -> str:
    """Writes a teacher's rows of the run's sequences in another format.

    Raises:
        ConfigError: there is no such teacher.
        CacheError: the folder holds something, or there are no rows.
    """
    (name,) = caches.distributions(teacher)
    if storage.files_below(folder):
        raise CacheError(f"{folder} is not empty; name a new folder")
    if form == "parquet-long":
        written = export_long(_pairs(caches, name), folder)
    else:
        most = most_entries(_pairs(caches, name))
        vocabulary = vocabulary_of(caches.run.config, teacher_of(name))
        written = export_distillkit(_pairs(caches, name), folder, vocabulary, most)
    if not written:
        raise CacheError(
            f"the cache of {name} has no row of this run's sequences: let the score stage run first"
        )
    return f"{written} of {len(caches.entries_of(name))} sequences written to {folder}"


def import_distillkit(caches: RunCaches, teacher: str, folder: str) -> str:
    """Fills a teacher's cache from a DistillKit dataset; sequences are found by their tokens.

    Sequences that have a row keep it. A file's last token may be padding that its capture added.

    Raises:
        ConfigError: there is no such teacher, or the config has changed since it was prepared.
        CacheError: the dataset cannot be read, or none of it fits the run.
    """
    (name,) = caches.distributions(teacher)
    if holds_holdout(name):
        raise ConfigError(
            f"{name} holds wide rows for the report, which the score stage writes: name the "
            f"teacher {teacher_of(name)} instead"
        )
    if not caches.is_current:
        raise ConfigError(
            "the config has changed since it was prepared: let the run's prepare stage run first"
        )
    run, cache, fingerprint = caches.run, caches.layouts[name], caches.fingerprint(name)
    sequences = SequenceReader(run.layout, caches.entries)
    missing = missing_sequences(caches.entries, cache)
    by_tokens: dict[str, list[DatasetEntry]] = {}
    for entry in missing:
        by_tokens.setdefault(_digest(_sequence(sequences, entry).input_ids), []).append(entry)
    rule, num_rows = run.config.scoring.selection, vocabulary_of(run.config, name)
    rows: dict[str, dict[str, SparseLogprobs]] = {}
    read, incomplete = 0, 0
    for foreign in read_distillkit(folder):
        read += 1
        fits = by_tokens.get(_digest(foreign.input_ids), [])
        for entry in fits or by_tokens.get(_digest(foreign.input_ids[:-1]), []):
            sequence = _sequence(sequences, entry)
            row = imported_row(sequence, foreign, rule, fingerprint, num_rows)
            incomplete += row is None
            if row is not None:
                rows.setdefault(entry.shard, {})[entry.sequence_id] = row
    if not rows:
        raise CacheError(
            f"none of the {read} sequences in {folder} has the tokens of one of the "
            f"{len(missing)} sequences that the cache of {name} lacks ({incomplete} have these "
            "tokens without values at every position)"
        )
    written = {digest_ids(of_shard): list(of_shard.values()) for of_shard in rows.values()}
    origin = {"engine": "import", "imported_from": folder}
    for digest, members in written.items():
        write_shard(cache.shard(digest), members, fingerprint, origin)
    identity = run.prepared.cache_identities[name]
    publish(cache, identity, provenance_of(run.config, name), written)
    imported = sum(map(len, rows.values()))
    return (
        f"{imported} of {read} sequences imported into {cache.shards_folder}; `polystill cache "
        f"verify CONFIG --teacher {name} --rescore {min(imported, 100)}` compares rows with what "
        "the teacher says"
    )


def retry(config: Config) -> str:
    """Forgets quarantine notes, so that the next start of the run asks again for what failed.

    Prompts failed if they were not answered or rewritten, answers if a judge could not grade them,
    and sequences if a teacher could not score them.
    """
    counts: Counter[str] = Counter()
    for of_round in rounds_of(config):
        layout = layout_of(of_round)
        if storage.exists(layout.prepared):
            counts.update(_retry_round(Run(of_round, layout, read_prepared(layout))))
    forgotten = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if not forgotten:
        return "nothing is quarantined"
    return f"to be asked again by the next run: {forgotten}"


def _retry_round(run: Run) -> Counter[str]:
    """Forgets the quarantine notes of one round; returns how many there were of each kind."""
    layout, prepared = run.layout, run.prepared
    counts: Counter[str] = Counter()
    for digest in set(prepared.synthesis_digests.values()):
        counts["prompts"] += forget_errors(layout, digest)
    filters = prepared.filters_before_scoring + prepared.filters_after_scoring
    grades = sum(
        forget_ungraded(layout, digest_json(identity["rubric"]))
        for identity in filters
        if identity["type"] == "judge"
    )
    if grades:
        counts["grades"] += grades
        for stage in ("synthesize", "score"):  # the stages that run filters
            record = read_record(layout, stage)
            if record.key:
                write_record(layout, stage, record.model_copy(update={"key": ""}))
    if (judge := run.config.evaluation.judge) is not None:
        forgotten = forget_ungraded(layout, preference_digest(run, judge))
        counts["preferences"] += forgotten
        record = read_record(layout, "evaluate")
        if forgotten and record.key:
            write_record(layout, "evaluate", record.model_copy(update={"key": ""}))
    dataset = round_dataset(run.config)
    entries = [] if dataset is None else read_dataset(layout, dataset)
    for cache in run.all_layouts().values():
        counts["rows"] += forget_quarantined(cache, {entry.sequence_id for entry in entries})
    return counts


def collect_garbage(
    config: Config, dry_run: bool, unfinished: bool, confirm: Confirm | None = None
) -> str:
    """Removes or lists everything below the config's storage root that nothing names.

    Args:
        unfinished: whether forced regenerations that have not ended count as garbage.
        confirm: shows the table and asks whether to remove what it lists; None to remove it at
            once.

    Raises:
        CacheError: the runs that may name caches are not all there.
    """
    layout = layout_of(config)
    found = find_garbage(layout, time.time(), unfinished)
    if not found.garbage:
        lines = foreign_lines(layout, found)
        return "\n".join([f"nothing to remove below {layout.root}", *lines])
    text = garbage_table(layout, found)
    if dry_run:
        return text
    garbage = found.garbage
    if confirm is not None:
        if not confirm(text, f"remove these {len(garbage)} files?"):
            return "nothing was removed"
        text = ""
        listed = {item.path for item in garbage}
        again = find_garbage(layout, time.time(), unfinished).garbage
        garbage = [item for item in again if item.path in listed]
    remove_garbage(layout, garbage)
    return f"{text}\nremoved" if text else f"removed {len(garbage)} files"


def _pairs(caches: RunCaches, teacher: str) -> Iterator[tuple[TokenSequence, SparseLogprobs]]:
    """Sequences of the run that have a row of the teacher, with that row."""
    reader = open_cache(caches.layouts[teacher])
    sequences = SequenceReader(caches.run.layout, caches.entries)
    for entry in caches.entries:
        row, sequence = reader.row(entry.sequence_id), sequences.get(entry.sequence_id)
        if row is not None and sequence is not None:
            yield sequence, row


def _sequence(sequences: SequenceReader, entry: DatasetEntry) -> TokenSequence:
    sequence = sequences.get(entry.sequence_id)
    assert sequence is not None, "a dataset names the shard of each of its sequences"
    return sequence


def _digest(input_ids: np.ndarray) -> str:
    return digest_bytes(input_ids.astype("<i4").tobytes())
