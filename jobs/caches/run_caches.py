"""Sequences and caches of one run, which every `polystill cache` command is about."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jobs.bookkeeping.stage_records import read_record
from pipeline import storage
from pipeline.cache.kinds import entries_of, holds_hidden_states, holds_holdout, teacher_of
from pipeline.cache_care.status import expected_identities
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout
from pipeline.messages import closest
from pipeline.run.preparation import is_current, read_prepared
from pipeline.run.prepared_run import Run
from pipeline.sequences import Dataset, read_dataset


@dataclass(frozen=True)
class RunCaches:
    """A run's sequences and caches, as its last prepare and synthesize stages left them.

    Attributes:
        run: the newest round that has sequences.
        is_current: whether the config is still the one that was prepared.
        dataset: digest of the run's sequences.
        entries: the sequences of all rounds.
    """

    run: Run
    is_current: bool
    dataset: str
    entries: Dataset

    @property
    def layouts(self) -> dict[str, CacheLayout]:
        """Folders of the caches, by name, in the generations that the run uses."""
        return self.run.all_layouts()

    def entries_of(self, name: str) -> Dataset:
        """Sequences of the run that a cache shall hold."""
        return entries_of(name, self.entries)

    def fingerprint(self, name: str) -> str:
        """Digest of a cache's identity."""
        return self.run.prepared.cache_fingerprints[name]

    def chosen(self, teacher: str | None) -> list[str]:
        """Names of the caches that a command is about: those of one teacher, or all.

        Args:
            teacher: name of a teacher or of a cache; None for all.

        Raises:
            ConfigError: there is none of that name.
        """
        known, config = list(self.run.prepared.all_cache_identities), self.run.config
        if teacher is None:
            return known
        if teacher not in known:
            teachers = [name for name in known if name == teacher_of(name)]
            if teacher in config.teachers and teacher not in config.scoring_teachers:
                raise ConfigError(f"teacher {teacher!r} only writes, so it has no cache")
            raise ConfigError(f"there is no teacher {teacher!r}; {closest(teacher, teachers)}")
        return [name for name in known if teacher in (name, teacher_of(name))]

    def distributions(self, teacher: str | None) -> list[str]:
        """Names of the chosen caches that hold distributions: the teachers' names, or the wide
        cache that is asked for.

        Raises:
            ConfigError: there is none of that name, or it holds hidden states.
        """
        chosen = self.chosen(teacher)
        names = [name for name in chosen if not holds_hidden_states(name)]
        names = [name for name in names if name == teacher or not holds_holdout(name)]
        if not names:
            raise ConfigError(
                f"{teacher} holds hidden states, and this command is about distributions: name the "
                f"teacher {teacher_of(str(teacher))} instead"
            )
        return names


def open_caches(config: Config) -> RunCaches:
    """Opens the caches of a run, or those of its new config if that has changed since prepare.

    A run of several rounds has the sequences of all, and the caches of the newest round.

    Raises:
        ConfigError: the run has no sequences yet.
    """
    rounds = [of_round for of_round in rounds_of(config) if round_dataset(of_round) is not None]
    newest = rounds[-1] if rounds else config
    layout = layout_of(newest)
    if not rounds or not storage.exists(layout.prepared):
        raise ConfigError(
            f"run {config.name} has no sequences below {layout.root} yet, so it has no caches: "
            "`polystill run CONFIG` makes them"
        )
    run = Run(newest, layout, read_prepared(layout))
    is_valid = is_current(newest, run.prepared.key, run.prepared.change_times)
    if not is_valid:
        expected = {"cache_identities": expected_identities(run)}
        run = replace(run, prepared=run.prepared.model_copy(update=expected))
    datasets = [str(round_dataset(of_round)) for of_round in rounds]
    entries = Dataset.joined(read_dataset(layout, digest) for digest in datasets)
    dataset = datasets[0] if len(datasets) == 1 else digest_json(datasets)
    return RunCaches(run, is_valid, dataset, entries)


def round_dataset(config: Config) -> str | None:
    """Digest of the sequences of one round; None if it has none yet."""
    return read_record(layout_of(config), "synthesize").dataset
