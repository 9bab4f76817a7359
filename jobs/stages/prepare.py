"""Stage 1: reads prompts, checks models and vocabularies, and fixes all identities.

It needs no engine and no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from jobs.bookkeeping.stage_records import read_record
from jobs.stages.preflight import (
    check_filters,
    check_lengths,
    check_recipes,
    check_step_sampling,
    filter_identities,
    synthesis_identities,
)
from pipeline.combine.learned import SPLIT as LEARNED_SPLIT
from pipeline.config.base import ModelFiles
from pipeline.config.combine import ByDomainWeights, LearnedWeights
from pipeline.config.rounds import layout_of, round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError
from pipeline.filters.answer_checkers import checker_identity
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.run.identities import cache_identities
from pipeline.run.preparation import Prepared, preparation_key, save_prepared
from pipeline.run.prepared_run import Run
from pipeline.synthesis.prompts import read_prompts, write_prompts
from pipeline.synthesis.steps import steps_of, with_system_prompts
from teachers.engine.options import check_engine_arguments, check_sampling_parameters
from teachers.preflight.identity import check_model, check_weights, model_identity, student_identity
from teachers.preflight.model_layers import check_layers, hidden_sizes, text_config
from teachers.preflight.vocabulary import check_vocabularies
from teachers.tokenizing import chat_end, load_tokenizer, prompt_ids, repeats_bos

logger = logging.getLogger(__name__)


def prepare(config: Config) -> Run:
    """Checks everything that can be checked without an engine, and writes `prepared.json`.

    Raises:
        PromptError, ConfigError, VocabularyMismatchError: a prompt, a model or a setting cannot be
            used; no hardware has been taken yet.
    """
    layout = layout_of(config)
    _check_start(config)
    prompts, counts = check_inputs(config)
    for files in [*(teacher.files for teacher in config.teachers.values()), config.student]:
        if files is not None:
            check_model(files)
    _check_weights(config)
    asked_prompts = with_system_prompts(config, prompts)
    tokenizer_hash = check_vocabularies(config, asked_prompts)
    _check_vocabulary_sizes(config)
    check_layers(config)
    tokenizer = load_tokenizer(config.student.files)
    lengths = {prompt.digest: len(prompt_ids(tokenizer, prompt)) for prompt in asked_prompts}
    check_lengths(config, prompts, lengths)
    repeated = sum(p.text is not None and repeats_bos(tokenizer, p.text) for p in prompts)
    if repeated:
        logger.info(
            "%d text prompts begin with %s, which the tokenizer adds by itself: they get it once",
            repeated,
            tokenizer.bos_token,
        )
    identities = _model_identities(config, layout)
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int), "a tokenizer without one is refused above"
    end = chat_end(tokenizer)
    end = None if end == eos_token_id else end
    prepared = Prepared(
        key=preparation_key(config),
        prompts_digest=write_prompts(layout, prompts),
        prompt_counts=counts,
        longest_prompt=max(lengths.values()),
        tokenizer_hash=tokenizer_hash,
        eos_token_id=eos_token_id,
        chat_end_token_id=end,
        student_identity=student_identity(config.student, layout),
        cache_identities=cache_identities(config, identities, tokenizer_hash),
        synthesis_identities=synthesis_identities(config, identities, tokenizer_hash, end),
        filters_before_scoring=filter_identities(
            config, config.synthesis.filters_before_scoring, identities, tokenizer_hash
        ),
        filters_after_scoring=filter_identities(
            config, config.synthesis.filters_after_scoring, identities, tokenizer_hash
        ),
        identities=identities,
        hidden_sizes=hidden_sizes(config),
        checker_identity=config.prompts.checker and checker_identity(config.prompts.checker),
    )
    save_prepared(layout, prepared)
    return Run(config, layout, prepared)


def _model_identities(config: Config, layout: Layout) -> dict[str, dict[str, str]]:
    """Identities of the teachers' models, and of the student's if it writes in this round."""
    authors = {step.author for step in steps_of(config)} & {STUDENT}
    return {
        name: model_identity(config.author(name), layout)
        for name in [*config.teachers, *sorted(authors)]
    }


def _check_start(config: Config) -> None:
    """Checks that the round before has exported its student.

    Raises:
        ConfigError: it has not.
    """
    if config.round == 1:
        return
    if not read_record(round_layouts(config)[-2], "export").key:
        before = config.round - 1
        raise ConfigError(
            f"round {config.round} of run {config.name} starts from the student of round {before}, "
            f"which is not exported yet: submit the stages of that round first (round={before}), "
            "or all rounds with `polystill run`"
        )


def _check_weights(config: Config) -> None:
    """Checks the weights of all models that are loaded from their folders as usual.

    A random student has none, and an engine's `load_format` decides which files it reads.
    """
    for teacher in config.teachers.values():
        if isinstance(teacher, TeacherConfig) and "load_format" not in teacher.vllm:
            check_weights(teacher.model, teacher.revision)
    student = config.student
    if student.initialization == "pretrained" and student.initial_weights is None:
        check_weights(student.model, student.revision)


def check_inputs(config: Config) -> tuple[list[Prompt], dict[str, int]]:
    """Checks the options of upstream libraries and the prompts, without reading any model.

    Returns:
        The prompts and their counts.

    Raises:
        ConfigError, PromptError: an option or a prompt cannot be used.
    """
    _check_upstream_options(config)
    prompts, counts = read_prompts(config.prompts)
    _check_prompts(config, prompts)
    check_recipes(config, prompts)
    check_filters(config, prompts)
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
        if isinstance(teacher, TeacherConfig)
    }
    apis = {
        teacher.endpoint.api
        for teacher in config.teachers.values()
        if isinstance(teacher, EndpointTeacherConfig) and teacher.scores
    }
    checks["student"] = partial(check_engine_arguments, config.student.vllm)
    checks["evaluation"] = partial(
        check_sampling_parameters, config.evaluation.sampling, endpoint_apis=apis
    )
    most = config.synthesis.max_sequence_tokens
    longest = config.evaluation.sampling.get("max_tokens", 0)
    if most is not None and most <= longest:
        raise ConfigError(
            f"evaluation.sampling.max_tokens ({longest}) leaves no room for a prompt in "
            f"synthesis.max_sequence_tokens ({most})"
        )
    for place, check in checks.items():
        try:
            check()
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    check_step_sampling(config)
    _check_attention(config.student.attn_implementation)
    if config.training.deepspeed:
        from students.deepspeed_options import check_deepspeed_options

        check_deepspeed_options(config.training.deepspeed)


def _check_attention(name: str) -> None:
    packages = {
        "flash_attention_2": ("flash_attn", "kernels"),
        "flash_attention_3": ("flash_attn_interface", "kernels"),
    }.get(name)
    if packages and not any(map(find_spec, packages)):
        raise ConfigError(
            f"student.attn_implementation {name} needs the package {' or '.join(packages)}, and "
            "none is installed here: choose sdpa, or add one to every node's environment"
        )


def _check_prompts(config: Config, prompts: Sequence[Prompt]) -> None:
    domains = {prompt.domain for prompt in prompts}
    splits = {prompt.split for prompt in prompts}
    advice = {"train": "lower the other splits' fractions", "holdout": "raise holdout_fraction"}
    for split, change in advice.items():
        if split not in splits:
            raise ConfigError(
                f"none of the {len(prompts)} prompts is in the {split} split: give a source "
                f"`split: {split}`, or in `prompts` {change}"
            )
    weights = config.combine.weights
    if isinstance(weights, ByDomainWeights) and (unnamed := domains - weights.domains.keys()):
        raise ConfigError(f"combine.weights.domains has no weights for {sorted(unnamed)}: add them")
    learnable = {prompt.domain for prompt in prompts if prompt.split == LEARNED_SPLIT}
    if isinstance(weights, LearnedWeights) and (unknown := domains - learnable):
        raise ConfigError(
            f"combine.weights are learned on the {LEARNED_SPLIT} split, which has no prompt of "
            f"{sorted(unknown)}: raise prompts.validation_fraction, or give a source `split: "
            f"{LEARNED_SPLIT}`"
        )


def _check_vocabulary_sizes(config: Config) -> None:
    used = max(load_tokenizer(config.student.files).get_vocab().values()) + 1
    models: dict[str, ModelFiles] = {"student": config.student.files}
    models |= {n: t.files for n, t in config.teachers.items() if t.files is not None}
    for name, model in models.items():
        size = text_config(model).vocab_size
        if size < used:
            raise ConfigError(
                f"{name}: the model has {size} rows in its vocabulary, and the tokenizer uses ids "
                f"up to {used - 1}: use the tokenizer that belongs to the model"
            )
        if name != "student" and size < config.scoring.num_logprobs:
            raise ConfigError(
                f"scoring.num_logprobs is {config.scoring.num_logprobs}, but teacher {name!r} has "
                f"only {size} tokens: lower it to at most {size}"
            )
