"""Outcome of the prepare stage, for all later stages: prompts and identities.

`runs/<name>/prepared.json` is valid as long as its key is, and no local file that prepare reads has
changed. The key is a hash of the config's sections that decide the outcome, of these files' sizes
and modification times, and of the content of templates and of a user's own checker. Size and
modification time can outlast a change (`cp -p`, `rsync -a`); the time of change cannot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.cache import hidden_states, logprobs
from pipeline.cache.kinds import holdout_identities, holds_hidden_states, teacher_of
from pipeline.cache.projection import HiddenStatesRule
from pipeline.checkers.answer_checkers import checker_identity
from pipeline.config.filters import Judge
from pipeline.config.load import evaluation_files, is_folder
from pipeline.config.run import Config
from pipeline.config.scoring import selection_of
from pipeline.config.synthesis import Writing
from pipeline.config.teachers import NEUTRAL_ENDPOINT_KEYS
from pipeline.errors import ConfigError, CorruptFileError
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.records import AnswerEnds
from pipeline.synthesis.rewriting import read_template, rubric_of, templates_of

NEUTRAL_TEACHER_KEYS: dict[str, Any] = {
    **dict.fromkeys(("compare_with_transformers", "cost_per_hour", "replicas", "resources"), True),
    "endpoint": dict.fromkeys(NEUTRAL_ENDPOINT_KEYS, True),
}
PREPARATION_VERSION = 3
"""Version of `prepared.json`; a file of another version is made anew."""
JSON_KEYS = {
    "prompts_digest": "prompts",
    "cache_identities": "scoring_recipes",
    "synthesis_identities": "synthesis_recipes",
    "student_identity": "student",
    "checker_identity": "checker",
}
"""Attributes of `Prepared` that have another name in `prepared.json`."""
NEWER_KEYS = (
    "chat_end_token_id",
    "vocabulary_size",
    "own_end_token_ids",
    "template_date",
    "unread_references",
    "change_times",
)
"""Keys of `prepared.json` that are left out where they hold their defaults, as older files do."""


class Prepared(BaseModel):
    """The outcome of the prepare stage, as it stands in `prepared.json`.

    Attributes:
        key: hash of everything that decides the outcome.
        prompts_digest: digest of the table of prompts.
        prompt_counts: rows read, duplicates dropped, prompts of each split.
        longest_prompt: tokens of the longest given prompt, with the system prompts under which it
            is asked.
        tokenizer_hash: hash of the vocabulary that all models share.
        eos_token_id: token that ends an answer to raw text.
        chat_end_token_id: token that ends an answer to chat messages, if it is another one.
        vocabulary_size: number of ids that the tokenizer has, if a teacher has others as well.
        own_end_token_ids: further tokens with which teachers end answers of their own, by teacher.
        template_date: day that the chat template writes as today; None if it writes none.
        cache_identities: identity of every cache, by cache name: a teacher's distributions, or its
            hidden states; wide caches follow from them (`all_cache_identities`).
        synthesis_identities: identity of every step, by its label (`pipeline/synthesis/steps.py`).
        student_identity: identity of the model that the student starts from.
        filters_before_scoring: identities of the filters that need text alone.
        filters_after_scoring: identities of the filters that need cached rows, and of those that
            follow them.
        identities: identities of the teachers' models, including teachers that do not score.
        hidden_sizes: widths of the teachers whose hidden states a loss needs.
        checker_identity: identity of `prompts.checker`; None if the config names none.
        unread_references: for each domain with references that the checker cannot read, a line
            about them for people.
        change_times: hash of the times at which the local files that prepare reads last changed;
            None in files of earlier versions.
    """

    model_config = ConfigDict(
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: JSON_KEYS.get(name, name),
    )

    key: str
    prompts_digest: str
    prompt_counts: dict[str, int]
    longest_prompt: int
    tokenizer_hash: str
    eos_token_id: int
    chat_end_token_id: int | None = None
    vocabulary_size: int | None = None
    own_end_token_ids: dict[str, list[int]] = {}
    template_date: str | None = None
    cache_identities: dict[str, dict[str, Any]]
    synthesis_identities: dict[str, dict[str, Any]]
    student_identity: dict[str, str]
    filters_before_scoring: list[dict[str, Any]] = []
    filters_after_scoring: list[dict[str, Any]] = []
    identities: dict[str, dict[str, str]] = {}
    hidden_sizes: dict[str, int] = {}
    checker_identity: str | None = None
    unread_references: list[str] = []
    change_times: str | None = None

    @property
    def all_cache_identities(self) -> dict[str, dict[str, Any]]:
        """Identity of every cache by cache name, with the wide caches of the hold-out split."""
        return self.cache_identities | holdout_identities(self.cache_identities)

    @property
    def cache_fingerprints(self) -> dict[str, str]:
        """Digest of every cache's identity, by cache name."""
        return {name: digest_json(i) for name, i in self.all_cache_identities.items()}

    @property
    def synthesis_digests(self) -> dict[str, str]:
        """Digest of every step's identity, by its label; it names the folder of the step."""
        return {
            label: digest_json(identity) for label, identity in self.synthesis_identities.items()
        }

    @property
    def answer_ends(self) -> AnswerEnds:
        """Tokens with which answers end, in the dataset and in the exported student."""
        chat = self.chat_end_token_id
        return AnswerEnds(self.eos_token_id if chat is None else chat, self.eos_token_id)

    def stop_token_ids(self, model: str) -> tuple[int, ...]:
        """Tokens at which an engine ends an answer: the run's ends, then the model's own.

        Args:
            model: name of a teacher, or `student` or `twin`.
        """
        own = self.own_end_token_ids.get(model, [])
        return tuple(dict.fromkeys((*self.answer_ends.ids, *own)))

    def position_bytes(self, cache: str) -> int:
        """Most bytes that one position takes in a cache, before compression.

        Args:
            cache: name of the cache.
        """
        identity = self.all_cache_identities[cache]
        if not holds_hidden_states(cache):
            return logprobs.position_bytes(selection_of(identity).max_entries)
        rule = HiddenStatesRule.of_identity(identity)
        width = rule.dimensions or self.hidden_sizes[teacher_of(cache)]
        return hidden_states.position_bytes(len(rule.layers), width)


def preparation_key(config: Config) -> str:
    """Hash of everything that decides the outcome of the prepare stage.

    Templates and the checker's source are read for it. All other files enter by size and
    modification time.

    Raises:
        ConfigError: a template cannot be used.
    """
    recipes, filters = config.synthesis.recipes, config.synthesis.filters
    # Templates enter by content, since every job has its own copy of the shipped ones.
    texts: list[Any] = [templates_of(recipe) for recipe in recipes if isinstance(recipe, Writing)]
    texts += [rubric_of(rule) for rule in filters if isinstance(rule, Judge)]
    return digest_json(
        [
            PREPARATION_VERSION,
            config.model_dump(
                mode="json",
                include={"seed", "prompts", "teachers", "synthesis", "scoring", "combine"},
                exclude={"teachers": {"__all__": NEUTRAL_TEACHER_KEYS}},
            ),
            _student_values(config),
            config.training.teacher_layers,
            config.evaluation.system_prompt,
            [storage.file_states(path) for path in _input_paths(config)],
            texts,
            _checker_here(config),
        ]
    )


def change_times(config: Config) -> str:
    """Hash of the times at which the local files that prepare reads last changed."""
    files = [
        file
        for path in map(Path, _input_paths(config))
        for file in sorted([path, *path.rglob("*")])
        if file.is_file()
    ]
    return digest_json([[str(file), file.stat().st_ctime_ns] for file in files])


def is_current(config: Config, key: Any, times: Any) -> bool:
    """Whether a preparation is still that of a config.

    Args:
        key, times: `key` and `change_times` of the preparation.
    """
    return key == preparation_key(config) and times in (None, change_times(config))


def _input_paths(config: Config) -> list[str]:
    """Files, folders and URIs that the prepare stage reads: prompts, models, evaluation files."""
    models = [config.student.model]
    models += [t.files.model for t in config.teachers.values() if t.files is not None]
    models.append(config.student.initial_weights or "")
    return [
        *(source.path for source in config.prompts.sources),
        *filter(is_folder, models),
        *(file.path for file in evaluation_files(config).values()),
    ]


def _student_values(config: Config) -> dict[str, Any]:
    """The student's section as it enters the key, with its chat template by content."""
    values = config.student.model_dump(mode="json", exclude={"cost_per_hour", "replicas"})
    if config.student.chat_template is not None:
        values["chat_template"] = read_template(config.student.chat_template)
    return values


def read_prepared(layout: Layout) -> Prepared:
    """The outcome of the last prepare stage, whatever has changed since.

    Raises:
        StorageError: the run was never prepared, or the file is corrupt.
    """
    return _validated(layout, storage.read_json(layout.prepared, dict[str, Any]))


def load_prepared(config: Config, layout: Layout) -> Prepared | None:
    """The outcome of the prepare stage; None if it has not run since its inputs changed."""
    if not storage.exists(layout.prepared):
        return None
    stored = storage.read_json(layout.prepared, dict[str, Any])
    is_valid = is_current(config, stored.get("key"), stored.get("change_times"))
    return _validated(layout, stored) if is_valid else None


def _validated(layout: Layout, stored: Any) -> Prepared:
    try:
        return Prepared.model_validate(stored)
    except ValidationError as error:
        raise CorruptFileError(
            f"{layout.prepared} is not what the prepare stage writes: "
            f"{error.errors()[0]['msg']}; remove the file and let prepare run again"
        ) from error


def save_prepared(layout: Layout, prepared: Prepared) -> None:
    """Writes the outcome of the prepare stage."""
    values = prepared.model_dump(by_alias=True)
    for key in NEWER_KEYS:
        if values[key] == Prepared.model_fields[key].default:
            del values[key]
    storage.write_json(layout.prepared, values)


def _checker_here(config: Config) -> str | None:
    """Identity of the checker; None if it is not installed on this machine, such as a laptop."""
    if config.prompts.checker is None:
        return None
    try:
        return checker_identity(config.prompts.checker)
    except ConfigError:  # the prepare stage refuses a checker that the cluster lacks, too
        return None
