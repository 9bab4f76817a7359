"""What the prepare stage found out once for all later stages: prompts, identities, recipes.

`runs/<name>/prepared.json` is valid as long as its key is: a hash of the config's sections that
decide it, of size and modification time of every local file that it read, and of the content of
templates and of a checker of the user's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import storage
from pipeline.cache import hidden_states, logprobs
from pipeline.cache.generations import generation_in_use
from pipeline.cache.projection import HiddenStatesRule, holds_hidden_states, teacher_of
from pipeline.config.filters import Judge
from pipeline.config.load import evaluation_files, is_folder
from pipeline.config.run import Config
from pipeline.config.scoring import selection_of
from pipeline.config.synthesis import Writing
from pipeline.config.teachers import NEUTRAL_ENDPOINT_KEYS
from pipeline.errors import ConfigError
from pipeline.filters.answer_checkers import checker_identity
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.run.identities import cache_layout
from pipeline.synthesis.rewriting import rubric_of, templates_of

NEUTRAL_TEACHER_KEYS: dict[str, Any] = {
    **dict.fromkeys(("cost_per_hour", "replicas", "resources"), True),
    "endpoint": dict.fromkeys(NEUTRAL_ENDPOINT_KEYS, True),
}
VERSION = 3
"""Of what is written; an outcome of another one is found out again."""


@dataclass(frozen=True)
class Prepared:
    """The outcome of the prepare stage.

    Attributes:
        prompts: digest of the prompt table.
        prompt_counts: rows read, duplicates dropped, prompts of each split.
        longest_prompt: tokens of the longest given prompt, with the system prompts under which it
            is asked.
        identities: of the teachers' models, also of those that do not score.
        scoring_recipes: by name of the cache: a teacher's distributions, or hidden states.
        synthesis_recipes: by the label of a step (`pipeline/synthesis/steps.py`).
        student: identity of the model that the student starts from.
        hidden_sizes: of the teachers whose hidden states a loss needs.
        filters_before_scoring: identities; with those after scoring all filters of the config.
        checker: identity of `prompts.checker`, where there is one.
    """

    key: str
    prompts: str
    prompt_counts: dict[str, int]
    longest_prompt: int
    tokenizer_hash: str
    eos_token_id: int
    scoring_recipes: dict[str, dict[str, Any]]
    synthesis_recipes: dict[str, dict[str, Any]]
    student: dict[str, str]
    filters_before_scoring: list[dict[str, Any]] = field(default_factory=list)
    filters_after_scoring: list[dict[str, Any]] = field(default_factory=list)
    identities: dict[str, dict[str, str]] = field(default_factory=dict)
    hidden_sizes: dict[str, int] = field(default_factory=dict)
    checker: str | None = None

    def caches(self, layout: Layout) -> dict[str, CacheLayout]:
        """Where every cache lies, by name, in the generation that this run uses."""
        return {
            name: generation_in_use(layout, cache_layout(layout, name, recipe))
            for name, recipe in self.scoring_recipes.items()
        }

    def distributions(self, layout: Layout) -> dict[str, CacheLayout]:
        """Of `caches` those of distributions, by teacher."""
        caches = self.caches(layout)
        return {name: cache for name, cache in caches.items() if not holds_hidden_states(name)}

    def position_bytes(self, cache: str) -> int:
        """Most that a position takes in the cache of that name, before compression."""
        recipe = self.scoring_recipes[cache]
        if not holds_hidden_states(cache):
            return logprobs.position_bytes(selection_of(recipe).max_entries)
        rule = HiddenStatesRule.of_identity(recipe)
        width = rule.dimensions or self.hidden_sizes[teacher_of(cache)]
        return hidden_states.position_bytes(len(rule.layers), width)

    @property
    def synthesis_digests(self) -> dict[str, str]:
        """By step, the digest that names its folder of records."""
        return {label: digest_json(recipe) for label, recipe in self.synthesis_recipes.items()}


def preparation_key(config: Config) -> str:
    """Hash of all that decides the outcome of the prepare stage; of files it reads templates and
    the checker's source alone.

    Raises:
        ConfigError: a template cannot be used.
    """
    models = {"student": config.student.model} | {
        name: t.files.model for name, t in config.teachers.items() if t.files is not None
    }
    models["initial weights"] = config.student.initial_weights or ""
    paths = [source.path for source in config.prompts.sources] + [
        m for m in models.values() if is_folder(m)
    ]
    paths += [file.path for file in evaluation_files(config).values()]
    recipes, filters = config.synthesis.recipes, config.synthesis.filters
    # By content: the shipped ones lie in every job's own copy of the packages.
    texts: list[Any] = [templates_of(recipe) for recipe in recipes if isinstance(recipe, Writing)]
    texts += [rubric_of(rule) for rule in filters if isinstance(rule, Judge)]
    return digest_json(
        [
            VERSION,
            config.model_dump(
                mode="json",
                include={"seed", "prompts", "teachers", "synthesis", "scoring", "combine"},
                exclude={"teachers": {"__all__": NEUTRAL_TEACHER_KEYS}},
            ),
            config.student.model_dump(mode="json", exclude={"cost_per_hour", "replicas"}),
            config.training.teacher_layers,
            config.evaluation.system_prompt,
            [storage.file_states(path) for path in paths],
            texts,
            _checker_here(config),
        ]
    )


def load_prepared(config: Config, layout: Layout) -> Prepared | None:
    """The outcome of the prepare stage; None when it has not run since its inputs changed."""
    if not storage.exists(layout.prepared):
        return None
    prepared = Prepared(**storage.read_json(layout.prepared))
    return prepared if prepared.key == preparation_key(config) else None


def _checker_here(config: Config) -> str | None:
    """The checker's identity; None where it is not installed on this machine, as on a laptop."""
    if config.prompts.checker is None:
        return None
    try:
        return checker_identity(config.prompts.checker)
    except ConfigError:  # prepare refuses it, if it is nowhere
        return None


def save_prepared(layout: Layout, prepared: Prepared) -> None:
    """Writes the outcome of the prepare stage."""
    storage.write_bytes(layout.prepared, (json.dumps(asdict(prepared), indent=2) + "\n").encode())
