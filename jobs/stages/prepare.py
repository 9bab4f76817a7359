"""Stage 1: reads prompts, checks models and vocabularies, and fixes all identities.

It needs no engine and no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from jobs.bookkeeping.stage_records import read_record
from jobs.stages.preference import CHOICES
from jobs.stages.preflight import check_inputs, steps_by_place, unread_references
from pipeline.checkers.answer_checkers import checker_identity
from pipeline.config.base import ModelFiles
from pipeline.config.filters import Filter, Judge
from pipeline.config.rounds import layout_of, round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT, Answering, GivenAnswers
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError
from pipeline.filters.run import filter_identity
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.rope import longest_context
from pipeline.run.identities import (
    cache_identities,
    judging_identity,
    sampling_of,
    synthesis_identity,
)
from pipeline.run.preparation import Prepared, change_times, preparation_key, save_prepared
from pipeline.run.prepared_run import Run
from pipeline.synthesis.prompts import write_prompts
from pipeline.synthesis.steps import planned_answers, steps_of, with_system_prompts
from students.architecture.positions import refuse_dynamic_scaling
from students.deepspeed_options import check_deepspeed_options
from teachers.engine.options import ServedModel, check_sampling_values
from teachers.preflight.boundary import check_bound_judges, check_boundaries
from teachers.preflight.identity import model_identity, student_identity
from teachers.preflight.model_layers import check_layers, hidden_sizes, text_config
from teachers.preflight.models import check_models
from teachers.preflight.template import answered_by_text, check_template, is_of_no_model
from teachers.preflight.vocabulary import check_vocabularies, further_ends
from teachers.preflight.weights import stored_shapes
from teachers.tasks.judge import GRADES, grade_tokens
from teachers.tokenizing import (
    chat_end,
    load_tokenizer,
    prompt_ids,
    repeats_bos,
    vocabulary_size,
)

logger = logging.getLogger(__name__)

Identities = Mapping[str, dict[str, str]]


def prepare(config: Config) -> Run:
    """Checks everything that can be checked without an engine, and writes `prepared.json`.

    Raises:
        PromptError, ConfigError, VocabularyMismatchError, TrainingError: a prompt, a model or a
            setting cannot be used; no hardware has been taken yet.
    """
    layout = layout_of(config)
    _check_start(config)
    prompts, counts = check_inputs(config)
    _check_values(config)
    check_models(config)
    asked_prompts = with_system_prompts(config, prompts)
    template_date = check_template(config)
    tokenizer_hash = check_vocabularies(config, asked_prompts)
    rows = _check_vocabulary_sizes(config)
    _check_requests(config, rows)
    check_layers(config)
    refuse_dynamic_scaling(text_config(config.student.files), config.synthesis.max_sequence_tokens)
    _check_student(config)
    tokenizer = load_tokenizer(config.student.files)
    _check_judges(config, tokenizer, any(prompt.messages is not None for prompt in prompts))
    lengths = {prompt.digest: len(prompt_ids(tokenizer, prompt)) for prompt in asked_prompts}
    given, needs_bos = answered_by_text(config, prompts), is_of_no_model(config)
    check_boundaries(tokenizer, asked_prompts, given, needs_bos=needs_bos)
    _check_lengths(config, prompts, lengths)
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
        vocabulary_size=_padded(rows, vocabulary_size(tokenizer)),
        own_end_token_ids=further_ends(config, {eos_token_id, end}),
        template_date=template_date,
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
        unread_references=unread_references(config, prompts),
        change_times=change_times(config),
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


def _check_values(config: Config) -> None:
    """Lets vLLM judge the values of all sampling parameters, and DeepSpeed its block.

    Raises:
        ConfigError: vLLM or DeepSpeed refuses a value, or DeepSpeed does not know a key.
    """
    _check_requests(config, {})
    if config.training.deepspeed:
        check_deepspeed_options(config.training.deepspeed)


def _check_requests(config: Config, rows: Mapping[str, int]) -> None:
    """Lets vLLM judge the parameters of every request for an answer.

    Args:
        rows: rows in the vocabulary of every model; models without are not read yet.

    Raises:
        ConfigError: vLLM would fail a request.
    """
    asked = [
        (f"evaluation, answers of {name}", name, config.evaluation.sampling)
        for name in (*config.scoring_teachers, STUDENT)
    ]
    for place, step in steps_by_place(config).items():
        if not isinstance(step.recipe, GivenAnswers):
            asked.append((place, step.author, sampling_of(step.recipe, step.author)))
    for place, name, sampling in asked:
        author = config.author(name)
        model = None
        if isinstance(author, TeacherConfig) and name in rows:
            model = ServedModel(rows[name], author.vllm)
        try:
            check_sampling_values(sampling, model)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error


def _check_student(config: Config) -> None:
    """Trains a small copy of the student's architecture for a step, and compares the shapes of its
    own weights with its config.

    Raises:
        TrainingError: the student cannot be trained as configured.
    """
    from students.architecture.skeleton import check_skeleton
    from students.architecture.stored import check_stored

    student = config.student
    check_skeleton(student, config.training.packing)
    if student.initialization == "pretrained" and student.initial_weights is None:
        check_stored(student, stored_shapes(student.model, student.revision))


def _check_judges(config: Config, tokenizer: PreTrainedTokenizerBase, chats: bool) -> None:
    """Checks that judges of this run's engines can reply with one digit and nothing else.

    Args:
        chats: whether some prompts are chats, about which judges are asked in chat form.

    Raises:
        ConfigError: a digit is not a single token, or the chat template opens thoughts.
    """
    digits: dict[str, tuple[int, ...]] = {
        rule.teacher: GRADES for rule in config.synthesis.filters if isinstance(rule, Judge)
    }
    if (judge := config.evaluation.judge) is not None:
        digits[judge.teacher] = (*digits.get(judge.teacher, ()), *CHOICES)
    bound = {name for name in digits if not config.teachers[name].returns_text}
    for name in bound:
        grade_tokens(tokenizer, digits[name])
    if chats:
        check_bound_judges(tokenizer, bound)


def _check_vocabulary_sizes(config: Config) -> dict[str, int]:
    """Rows in the vocabulary of every model whose tokens are exchanged, by name.

    Raises:
        ConfigError: a model has fewer rows than its tokenizer has ids, or a teacher has fewer than
            are captured.
    """
    used = vocabulary_size(load_tokenizer(config.student.files))
    rows: dict[str, int] = {}
    models: dict[str, ModelFiles] = {"student": config.student.files}
    models |= {n: t.files for n, t in config.teachers.items() if t.files is not None}
    for name, model in models.items():
        size = rows[name] = text_config(model).vocab_size
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
    return rows


def _padded(rows: Mapping[str, int], used: int) -> int | None:
    """Number of ids that the tokenizer has, if a teacher has rows for others; it is logged then.

    Args:
        rows: rows in the vocabulary of every model.
    """
    padded = {name: size for name, size in rows.items() if size > used}
    if not padded.keys() - {"student"}:
        return None
    logger.info(
        "the tokenizer has %d ids, and models have rows for more (%s): what a teacher gives the "
        "others counts as tail",
        used,
        ", ".join(f"{name}: {size}" for name, size in padded.items()),
    )
    return used


def _check_lengths(config: Config, prompts: Sequence[Prompt], tokens: Mapping[str, int]) -> None:
    """Checks that every engine that answers holds the longest of its prompts with an answer.

    Args:
        tokens: length of every prompt as it is asked, by its digest.

    Raises:
        ConfigError: an engine is too short, and the config does not let such prompts be dropped.
    """
    for of_round, step, answered in planned_answers(config, prompts):
        if isinstance(step.recipe, Answering):
            longest = max((tokens[prompt.digest] for prompt in answered), default=0)
            most = sampling_of(step.recipe, step.author)["max_tokens"]
            place = f"synthesis.recipes ({step.label})"
            _check_room(of_round, place, step.author, longest, most)
    sampling, system = config.evaluation.sampling, config.evaluation.system_prompt
    longest = max(tokens[p.under(system).digest] for p in prompts if p.split == "holdout")
    for name in [*config.scoring_teachers, STUDENT]:
        _check_room(config, "evaluation", name, longest, sampling["max_tokens"])


def _check_room(config: Config, place: str, name: str, prompt: int, answer: int) -> None:
    """Checks that an engine and its model hold `prompt` and `answer` tokens, the most of either.

    A sequence above `synthesis.max_sequence_tokens` is dropped, so the engine need not hold it.
    """
    teacher, bound = config.author(name), config.synthesis.max_sequence_tokens
    need = min(prompt + answer, bound or prompt + answer)
    if not teacher.returns_text and need > (teacher.max_model_len or need):
        raise ConfigError(
            f"{place}: {name} holds max_model_len = {teacher.max_model_len} tokens; the longest "
            f"prompt ({prompt}) and sampling.max_tokens ({answer}) need {need}: raise "
            "max_model_len, lower max_tokens, or set synthesis.max_sequence_tokens to at most "
            f"{teacher.max_model_len}: prompts that leave no room are then dropped and counted"
        )
    if isinstance(teacher, EndpointTeacherConfig) or "hf_overrides" in teacher.vllm:
        return
    files = config.student.files if name == STUDENT else teacher.files
    most = longest_context(text_config(files))
    if most is not None and need > most:
        raise ConfigError(
            f"{place}: the model of {name} has positions for {most} tokens; the longest prompt "
            f"({prompt}) and sampling.max_tokens ({answer}) need {need}: lower max_tokens, or set "
            f"synthesis.max_sequence_tokens to at most {most}"
        )


def synthesis_identities(
    config: Config, identities: Identities, tokenizer_hash: str, chat_end: int | None = None
) -> dict[str, dict[str, Any]]:
    """Identities of all steps, by their labels.

    Args:
        identities: identities of the authors' models.
        chat_end: token that ends an answer to a chat, if it is not the end-of-sequence token.
    """
    return {
        step.label: synthesis_identity(
            config,
            step.recipe,
            step.author,
            identities.get(step.author, {}),
            tokenizer_hash,
            chat_end,
        )
        for step in steps_of(config)
    }


def filter_identities(
    config: Config, rules: Sequence[Filter], identities: Identities, tokenizer_hash: str
) -> list[dict[str, Any]]:
    """Identities of filters: everything that decides which answers they keep.

    Args:
        identities: identities of the teachers' models.
    """
    return [
        filter_identity(
            rule,
            config.prompts.checker,
            judging_identity(config, rule, identities[rule.teacher], tokenizer_hash)
            if isinstance(rule, Judge)
            else None,
            config.teachers[rule.teacher].max_model_len if isinstance(rule, Judge) else None,
            config.prompts.wording,
        )
        for rule in rules
    ]
