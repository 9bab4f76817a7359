"""The first stage: reads prompts, checks models and vocabularies, fixes recipes; on CPUs alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jobs.plan import layout_of
from pipeline import storage
from pipeline.checkers import find_checker
from pipeline.config import Config, TeacherConfig
from pipeline.config_synthesis import Balance
from pipeline.config_targets import ByDomainWeights, LearnedWeights
from pipeline.config_training import StudentConfig
from pipeline.errors import ConfigError
from pipeline.filters import filter_identity
from pipeline.learned_weights import SPLIT as LEARNED_SPLIT
from pipeline.loading import evaluation_files
from pipeline.prepared import Prepared, preparation_key, save_prepared
from pipeline.prompts import read_prompts, write_prompts
from pipeline.recipes import DATASET_GENERATOR, cache_recipes, dataset_recipe, synthesis_recipe
from pipeline.records import Prompt
from teachers.identity import check_model, model_identity, student_identity
from teachers.layers import check_layers, text_config
from teachers.vllm_teacher import check_engine_arguments, check_sampling_parameters
from teachers.vocabulary import check_vocabularies, load_tokenizer, prompt_ids


def prepare(config: Config) -> Prepared:
    """Checks everything that can be checked without an engine, and writes `prepared.json`.

    Raises:
        PromptError, ConfigError, VocabularyMismatchError: what is wrong, before any hardware is
            taken.
    """
    layout = layout_of(config)
    prompts, counts = check_inputs(config)
    for model in [*config.teachers.values(), config.student]:
        check_model(model)
    tokenizer_digest = check_vocabularies(config, prompts)
    _check_vocabulary_sizes(config)
    check_layers(config)
    identities = {
        name: model_identity(teacher, layout) for name, teacher in config.teachers.items()
    }
    tokenizer = load_tokenizer(config.student)
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int), "a tokenizer without one is refused above"
    prepared = Prepared(
        key=preparation_key(config),
        prompts=write_prompts(layout, prompts),
        prompt_counts=counts,
        longest_prompt=max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts),
        tokenizer_hash=tokenizer_digest,
        eos_token_id=eos_token_id,
        student=student_identity(config.student, layout),
        scoring_recipes=cache_recipes(config, identities, tokenizer_digest),
        synthesis_recipes={DATASET_GENERATOR: dataset_recipe(config, tokenizer_digest)}
        if config.synthesis.generator == DATASET_GENERATOR
        else {
            name: synthesis_recipe(config, name, identity, tokenizer_digest)
            for name, identity in identities.items()
            if config.synthesis.generator == "every_teacher" or config.teachers[name].domains
        },
        filters_before_scoring=[
            filter_identity(rule, config.prompts.checker)
            for rule in config.synthesis.filters_before_scoring
        ],
        filters_after_scoring=[
            filter_identity(rule, config.prompts.checker)
            for rule in config.synthesis.filters_after_scoring
        ],
    )
    save_prepared(layout, prepared)
    return prepared


def check_inputs(config: Config) -> tuple[list[Prompt], dict[str, int]]:
    """Checks upstream's options and the prompts, without a look at any model.

    Returns:
        The prompts and their counts.

    Raises:
        ConfigError, PromptError: what is wrong.
    """
    _check_upstream_options(config)
    prompts, counts = read_prompts(config.prompts)
    _check_prompts(config, prompts)
    return prompts, counts


def _check_upstream_options(config: Config) -> None:
    checks = {
        f"teachers.{name}": partial(
            check_engine_arguments,
            teacher.vllm,
            config.scoring.num_logprobs,
            name in config.training.teacher_layers,
        )
        for name, teacher in config.teachers.items()
    }
    checks["student"] = partial(check_engine_arguments, config.student.vllm)
    checks["evaluation"] = partial(check_sampling_parameters, config.evaluation.sampling)
    if config.synthesis.generator != DATASET_GENERATOR:
        checks["synthesis"] = partial(
            check_sampling_parameters,
            config.synthesis.sampling,
            config.synthesis.samples_per_prompt,
        )
    most = config.synthesis.max_sequence_tokens
    for place, sampling in (
        ("synthesis", config.synthesis.sampling),
        ("evaluation", config.evaluation.sampling),
    ):
        if most is not None and most <= sampling.get("max_tokens", 0):
            raise ConfigError(
                f"{place}.sampling.max_tokens ({sampling['max_tokens']}) leaves no room for a "
                f"prompt in synthesis.max_sequence_tokens ({most})"
            )
    for place, check in checks.items():
        try:
            check()
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error


def _check_prompts(config: Config, prompts: Sequence[Prompt]) -> None:
    domains = {prompt.domain for prompt in prompts}
    splits = {prompt.split for prompt in prompts}
    advice = {"train": "lower the other splits' fractions", "holdout": "raise holdout_fraction"}
    for split, change in advice.items():
        if split not in splits:
            raise ConfigError(
                f"no prompt of {len(prompts)} is in the {split} split; give a source "
                f"`split: {split}`, or in `prompts` {change}"
            )
    weights = config.combine.weights
    if isinstance(weights, ByDomainWeights) and (unnamed := domains - weights.domains.keys()):
        raise ConfigError(f"combine.weights.domains has no weights for {sorted(unnamed)}")
    learnable = {prompt.domain for prompt in prompts if prompt.split == LEARNED_SPLIT}
    if isinstance(weights, LearnedWeights) and (unknown := domains - learnable):
        raise ConfigError(
            f"combine.weights are learned on the {LEARNED_SPLIT} split, which has no prompt of "
            f"{sorted(unknown)}: raise prompts.validation_fraction, or give a source `split: "
            f"{LEARNED_SPLIT}`"
        )
    if config.synthesis.generator == "domain_teacher":
        owned = {domain for teacher in config.teachers.values() for domain in teacher.domains}
        if unowned := domains - owned:
            raise ConfigError(
                f"generator domain_teacher: no teacher names {sorted(unowned)} in its `domains`; "
                f"the teachers name {sorted(owned)}"
            )
    without = sum(prompt.reference is None for prompt in prompts)
    if config.synthesis.generator == DATASET_GENERATOR and without:
        raise ConfigError(
            f"generator dataset takes references as answers; {without} of {len(prompts)} prompts "
            "have none"
        )
    if config.prompts.checker and without == len(prompts):
        raise ConfigError(
            f"prompts.checker is {config.prompts.checker}, but no prompt has a reference"
        )
    if config.prompts.checker:
        find_checker(config.prompts.checker)
    for key, file in evaluation_files(config).items():
        if not storage.exists(file.path):
            raise ConfigError(f"{key}: {file.path} does not exist")
    for rule in config.synthesis.filters:
        if isinstance(rule, Balance) and rule.shares.keys() != domains:
            raise ConfigError(
                f"filter balance has shares of {sorted(rule.shares)}; the prompts' domains are "
                f"{sorted(domains)}"
            )


def _check_vocabulary_sizes(config: Config) -> None:
    used = max(load_tokenizer(config.student).get_vocab().values()) + 1
    named: list[tuple[str, TeacherConfig | StudentConfig]] = [("student", config.student)]
    for name, model in [*named, *config.teachers.items()]:
        size = text_config(model).vocab_size
        if size < used:
            raise ConfigError(
                f"{name}: the model has {size} rows in its vocabulary, the tokenizer uses ids up "
                f"to {used - 1}"
            )
        if name != "student" and size < config.scoring.num_logprobs:
            raise ConfigError(
                f"scoring.num_logprobs is {config.scoring.num_logprobs}, but teacher {name!r} has "
                f"only {size} tokens"
            )
