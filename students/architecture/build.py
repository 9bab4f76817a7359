"""The student from its config, and any model from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import DistillationError, TrainingError
from pipeline.messages import foreign
from students.architecture.dtypes import DTYPES, as_loaded
from students.architecture.initial_weights import load_initial_weights
from students.architecture.noise import switch_off_noise
from students.architecture.routers import refuse_ignored_balance

SHOWN = 10
"""Most tensors that a message lists."""


def read_config(student: StudentConfig) -> PretrainedConfig:
    """The model config of a student.

    Raises:
        TrainingError: it cannot be read, is that of a quantised model, or asks for a loss that is
            not computed.
    """
    try:
        config = AutoConfig.from_pretrained(
            student.model, revision=student.revision, trust_remote_code=student.trust_remote_code
        )
    except (OSError, ImportError) as error:
        raise TrainingError(f"student.model {student.model!r} cannot be loaded: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        unquantized = "choose a copy of it whose weights are not quantised"
        if student.initialization == "random" or student.initial_weights is not None:
            unquantized = "remove quantization_config from its config.json"
        raise TrainingError(
            f"the config of student.model {student.model!r} has a quantization_config, and only "
            f"weights that are not quantised are trained: {unquantized}"
        )
    refuse_ignored_balance(config)
    return config


def build_student(config: StudentConfig, seed: int) -> PreTrainedModel:
    """The student on the CPU in its training dtype; random weights depend on the seed alone, not on
    the rank.

    Raises:
        TrainingError: the student cannot be loaded, or the weights to start from do not fit it.
    """
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": config.attn_implementation}
    try:
        model_config = read_config(config)
        if config.initialization == "pretrained" and config.initial_weights is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.model, use_safetensors=True, output_loading_info=True, **source, **options
            )
            model, loading = loaded
            parameters = dict(model.named_parameters())
            refuse_missing(config, [n for n in loading["missing_keys"] if n in parameters])
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                trust = config.trust_remote_code
                # drawn in float32 and then cast, so that the dtype does not change the draw
                drawn = AutoModelForCausalLM.from_config(
                    model_config, trust_remote_code=trust, **options | {"dtype": torch.float32}
                )
                model = as_loaded(drawn, options["dtype"])
    except DistillationError:
        raise
    except (OSError, ImportError, RuntimeError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"student.model {config.model!r} cannot be loaded: {foreign(error, 1000)}"
        ) from error
    if config.initial_weights is not None:
        load_initial_weights(model, config.initial_weights, config.trust_remote_code)
    if not config.dropout:
        switch_off_noise(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def refuse_missing(student: StudentConfig, missing: Sequence[str]) -> None:
    """Refuses weights that lack tensors.

    Args:
        missing: names of the tensors.

    Raises:
        TrainingError: there are some.
    """
    if missing:
        shown = ", ".join(sorted(missing)[:SHOWN])
        raise TrainingError(
            f"the weights of student.model {student.model!r} lack {len(missing)} tensors of its "
            f"config.json, which would be drawn at random ({shown}): fetch config and weights "
            "again, from one revision, or choose a causal language model with its head"
        )


def load_model(
    folder: str | Path, trust_remote_code: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """The model in a Hugging Face folder, in its own dtype, for inference."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    nn.Module.to(model, torch.device(device))
    return model.eval()
