"""The cache commands that read and write storage alone; those with engines have own modules.

Each takes a run as it was last prepared. Nothing here starts a cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jobs.bookkeeping.stage_records import read_record
from pipeline import storage
from pipeline.cache.generations import named_generations
from pipeline.cache.index import forget_quarantined, missing_sequences
from pipeline.cache.manifest import publish
from pipeline.cache.projection import holds_hidden_states, teacher_of
from pipeline.cache.reader import open_cache
from pipeline.cache.shard import write_shard
from pipeline.cache_care.distillkit import (
    export_distillkit,
    imported_row,
    most_entries,
    read_distillkit,
)
from pipeline.cache_care.gc import find_garbage, garbage_table, remove_garbage
from pipeline.cache_care.long_table import export_long
from pipeline.cache_care.show import find_sequence, token_table
from pipeline.cache_care.status import expected_identities, status_table, teacher_status
from pipeline.cache_care.verify import CheckedCache, check_cache
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.errors import CacheError, ConfigError
from pipeline.fingerprint import digest_bytes, digest_ids, digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import closest
from pipeline.records import DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.run.identities import provenance_of
from pipeline.run.preparation import Prepared, preparation_key
from pipeline.sequences import SequenceReader, read_dataset
from pipeline.synthesis.index import forget_errors
from teachers.preflight.model_layers import text_config
from teachers.tasks.judge import forget_ungraded
from teachers.tokenizing import load_tokenizer


@dataclass(frozen=True)
class RunCaches:
    """A run's sequences and caches, as its last prepare and synthesize left them.

    Attributes:
        config: that of the newest round with sequences, as are layout and preparation.
        is_current: whether the config is still the one that was prepared.
        dataset: digest of the run's sequences.
    """

    config: Config
    layout: Layout
    prepared: Prepared
    is_current: bool
    dataset: str
    entries: list[DatasetEntry]

    @property
    def caches(self) -> dict[str, CacheLayout]:
        """By name, in the generation that the run uses."""
        return self.prepared.caches(self.layout)

    def fingerprint(self, name: str) -> str:
        """Of a cache's recipe."""
        return digest_json(self.prepared.scoring_recipes[name])

    def chosen(self, teacher: str | None) -> list[str]:
        """The names of the caches that a command is about: those of the teacher named, or all.

        Raises:
            ConfigError: there is none of that name.
        """
        known = list(self.prepared.scoring_recipes)
        if teacher is None:
            return known
        if teacher not in known:
            teachers = [name for name in known if not holds_hidden_states(name)]
            if teacher in self.config.teachers and teacher not in self.config.scoring_teachers:
                raise ConfigError(f"teacher {teacher!r} only writes: it has no cache")
            raise ConfigError(f"there is no teacher {teacher!r}; {closest(teacher, teachers)}")
        return [name for name in known if teacher in (name, teacher_of(name))]

    def distributions(self, teacher: str | None) -> list[str]:
        """Of `chosen` the caches of distributions, which have the teachers' names.

        Raises:
            ConfigError: there is none of that name, or it holds hidden states.
        """
        found = [name for name in self.chosen(teacher) if not holds_hidden_states(name)]
        if not found:
            raise ConfigError(f"{teacher} holds hidden states; this is about distributions")
        return found


def open_run(config: Config) -> RunCaches:
    """Reads what a run has; a config that was changed since gets the recipes that it now asks for.

    Of several rounds it has the sequences of all, and the caches that the newest of them uses.

    Raises:
        ConfigError: the run has no sequences yet.
    """
    rounds = [each for each in rounds_of(config) if _dataset_of(each) is not None]
    newest = rounds[-1] if rounds else config
    layout = layout_of(newest)
    if not rounds or not storage.exists(layout.prepared):
        raise ConfigError(
            f"run {config.name} has no sequences below {layout.root} yet, so it has no caches: "
            "`polystill run CONFIG` makes them"
        )
    prepared = Prepared(**storage.read_json(layout.prepared))
    is_current = prepared.key == preparation_key(newest)
    if not is_current:
        prepared = replace(prepared, scoring_recipes=expected_identities(newest, prepared))
    datasets = [str(_dataset_of(each)) for each in rounds]
    entries = {e.sequence_id: e for digest in datasets for e in read_dataset(layout, digest)}
    dataset = datasets[0] if len(datasets) == 1 else digest_json(datasets)
    return RunCaches(newest, layout, prepared, is_current, dataset, list(entries.values()))


def _dataset_of(config: Config) -> str | None:
    return read_record(layout_of(config), "synthesize").get("dataset")


def status(run: RunCaches) -> str:
    """Per teacher what its cache holds and lacks, who names it, and stale caches, as a table."""
    recipes, names = run.prepared.scoring_recipes, named_generations(run.layout)
    found = [
        teacher_status(run.layout, name, recipes[name], cache, run.entries, names)
        for name, cache in run.caches.items()
    ]
    lines = [status_table(run.config.name, run.entries, found)]
    if not run.is_current:
        lines.append(
            "the config or a model has changed since the run was prepared; the identities of "
            "models are those of then"
        )
    return "\n".join(lines)


def verify(run: RunCaches, teacher: str | None) -> dict[str, CheckedCache]:
    """Checks every shard and row of the generations that the run uses."""
    sequences = SequenceReader(run.layout, run.entries)
    return {
        name: check_cache(
            run.caches[name],
            run.fingerprint(name),
            vocabulary_of(run.config, teacher_of(name)),
            sequences,
        )
        for name in run.chosen(teacher)
    }


def vocabulary_of(config: Config, teacher: str) -> int:
    """Rows of a teacher's head: every id that it can return lies below."""
    files = config.teachers[teacher].files
    assert files is not None, "teachers that have a cache exchange token ids"
    return text_config(files).vocab_size


def show(run: RunCaches, teacher: str | None, sequence: str | None) -> str:
    """The rows of one sequence, the first one without a name, as a table.

    Raises:
        ConfigError: no sequence of the run has that id, or several begin with it.
    """
    identifiers = [entry.sequence_id for entry in run.entries]
    wanted = identifiers[0] if sequence is None else find_sequence(identifiers, sequence)
    found = SequenceReader(run.layout, run.entries).get(wanted)
    assert found is not None, "a dataset names the shard of each of its sequences"
    rows = {name: open_cache(run.caches[name]).row(wanted) for name in run.distributions(teacher)}
    tokenizer = load_tokenizer(run.config.student.files)
    return token_table(found, rows, lambda token: str(tokenizer.decode([token])))


def export(run: RunCaches, teacher: str, form: str, folder: str) -> str:
    """Writes a teacher's rows of the run's sequences in another format.

    Raises:
        ConfigError: there is no such teacher.
        CacheError: the folder holds something, or there are no rows.
    """
    (name,) = run.distributions(teacher)
    if storage.files_below(folder):
        raise CacheError(f"{folder} is not empty; name a new folder")
    if form == "parquet-long":
        written = export_long(_pairs(run, name), folder)
    else:
        most = most_entries(_pairs(run, name))
        vocabulary = vocabulary_of(run.config, name)
        written = export_distillkit(_pairs(run, name), folder, vocabulary, most)
    if not written:
        raise CacheError(f"the cache of {name} has no row of this run's sequences")
    return f"{written} of {len(run.entries)} sequences written to {folder}"


def import_distillkit(run: RunCaches, teacher: str, folder: str) -> str:
    """Fills a teacher's cache from a DistillKit dataset; sequences are found by their tokens.

    Sequences that have a row keep it. A file's last token may be padding that its capture added.

    Raises:
        ConfigError: there is no such teacher, or the config has changed since it was prepared.
        CacheError: the dataset cannot be read, or none of it fits the run.
    """
    (name,) = run.distributions(teacher)
    if not run.is_current:
        raise ConfigError("the config has changed since it was prepared: run it first")
    cache, sequences = run.caches[name], SequenceReader(run.layout, run.entries)
    missing = missing_sequences(run.entries, cache)
    by_tokens: dict[str, list[DatasetEntry]] = {}
    for entry in missing:
        sequence = sequences.get(entry.sequence_id)
        assert sequence is not None, "a dataset names the shard of each of its sequences"
        by_tokens.setdefault(_digest(sequence.input_ids), []).append(entry)
    rows: dict[str, dict[str, SparseLogprobs]] = {}
    read, incomplete = 0, 0
    for foreign in read_distillkit(folder):
        read += 1
        fits = by_tokens.get(_digest(foreign.input_ids), [])
        for entry in fits or by_tokens.get(_digest(foreign.input_ids[:-1]), []):
            sequence = sequences.get(entry.sequence_id)
            assert sequence is not None, "it was read above"
            row = imported_row(
                sequence, foreign, run.config.scoring.selection, run.fingerprint(name)
            )
            incomplete += row is None
            if row is not None:
                rows.setdefault(entry.shard, {})[entry.sequence_id] = row
    if not rows:
        raise CacheError(
            f"none of the {read} sequences in {folder} has the tokens of one of the "
            f"{len(missing)} sequences that the cache of {name} lacks ({incomplete} have them "
            "without values at every position)"
        )
    written = {digest_ids(found): list(found.values()) for found in rows.values()}
    origin = {"engine": "import", "imported_from": folder}
    for digest, members in written.items():
        write_shard(cache.shard(digest), members, run.fingerprint(name), origin)
    recipe = run.prepared.scoring_recipes[name]
    publish(cache, recipe, provenance_of(run.config, name), written)
    imported = sum(map(len, rows.values()))
    return (
        f"{imported} of {read} sequences imported into {cache.shards_folder}; `polystill cache "
        f"verify CONFIG --teacher {name} --rescore {min(imported, 100)}` compares rows with what "
        "the teacher says"
    )


def retry(config: Config) -> str:
    """Forgets what was quarantined: the run's next start asks for it again.

    That is prompts whose answer or rewriting failed, answers that a judge could not grade, and
    sequences that a teacher could not score.
    """
    found: Counter[str] = Counter()
    for each in rounds_of(config):
        layout = layout_of(each)
        if not storage.exists(layout.prepared):
            continue
        prepared = Prepared(**storage.read_json(layout.prepared))
        for digest in set(prepared.synthesis_digests.values()):
            found["prompts"] += forget_errors(layout, digest)
        rules = prepared.filters_before_scoring + prepared.filters_after_scoring
        grades = sum(
            forget_ungraded(layout, digest_json(rule["rubric"]))
            for rule in rules
            if rule["type"] == "judge"
        )
        if grades:
            found["grades"] += grades
            for stage in ("synthesize", "score"):  # where filters run
                if record := read_record(layout, stage):
                    storage.write_json(layout.stage_record(stage), record | {"key": ""})
        dataset = _dataset_of(each)
        entries = [] if dataset is None else read_dataset(layout, dataset)
        for cache in prepared.caches(layout).values():
            found["rows"] += forget_quarantined(cache, {entry.sequence_id for entry in entries})
    told = ", ".join(f"{count} {what}" for what, count in found.items() if count)
    return f"to be asked again by the next run: {told}" if told else "nothing is quarantined"


def collect_garbage(config: Config, dry_run: bool, unfinished: bool) -> str:
    """Removes what nobody names below the config's root, or lists it."""
    layout = layout_of(config)
    garbage = find_garbage(layout, time.time(), unfinished)
    if not garbage:
        return f"nothing to remove below {layout.root}"
    text = garbage_table(garbage)
    if dry_run:
        return text
    remove_garbage(layout, garbage)
    return f"{text}\nremoved"


def _pairs(run: RunCaches, teacher: str) -> Iterator[tuple[TokenSequence, SparseLogprobs]]:
    reader, sequences = open_cache(run.caches[teacher]), SequenceReader(run.layout, run.entries)
    for entry in run.entries:
        row, sequence = reader.row(entry.sequence_id), sequences.get(entry.sequence_id)
        if row is not None and sequence is not None:
            yield sequence, row


def _digest(input_ids: np.ndarray) -> str:
    return digest_bytes(input_ids.astype("<i4").tobytes())
