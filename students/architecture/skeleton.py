"""A small copy of a student's architecture, tried before anything is paid for.

It has the real class and every kind of layer, few layers, small sizes where the class allows it,
short windows, and weights so large that every path shows in the logits. All that a training does
with the model is done once: its checks in float32, and a step of a loss in its own dtype.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import DistillationError, TrainingError
from students.architecture.body import body_hidden_states
from students.architecture.build import read_config
from students.architecture.checks import check_architecture
from students.architecture.dtypes import DTYPES, as_loaded
from students.architecture.head import lm_head_of, logit_step
from students.losses.distillation import distillation_loss
from students.losses.divergences import CrossEntropy
from students.losses.inputs import Targets

logger = logging.getLogger(__name__)

WINDOWS: dict[str, int] = {
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("window_size", "local_attention", "attention_chunk_size"), 8),
    "original_max_position_embeddings": 8,
    # state-space and linear layers compute a shorter sequence in another way than a longer one
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 8),
    # keys that sparse attention chooses, and what it compresses into one of them
    **dict.fromkeys(("index_topk", "index_block_size", "indexer_budget", "compress_rates"), 8),
    "indexer_compress_ratio": 4,
    "index_topk_blocks": 2,
}
"""Settings that sequences of the checks shall exceed, with their largest values here."""
INDEX_HEADS = 32
"""Heads at least of an index by which tokens are chosen: it is the sum of what is above 0 in each,
and with few heads it is 0 for many tokens, so that rounding and places choose among these.
"""
WIDTHS = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 512),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 128),
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("linear_num_heads", "o_groups"), 4),
}
"""Widths that other settings do not depend on, with their largest values here."""
HEADS = {"num_attention_heads": 4, "hidden_size": 256}
"""Heads at most; their groups, the hidden size, and what is a multiple of it follow. The hidden
size at most where there are no heads of attention.
"""
MULTIPLES = (
    *("attention_hidden_size", "embedding_dim", "num_heads"),
    *("mamba_d_ssm", "mamba_n_heads", "n_mamba_heads", "mamba_num_heads"),
)
"""Settings that keep their ratio to the hidden size."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
LEAST_DEPTH, MOST_DEPTH = 2, 16
MOST_WEIGHTS = 300_000_000
"""Weights of a skeleton that are still computed in a few seconds."""
SPREAD = 1.2
"""Size of what a matrix makes of inputs of size 1: softmaxes and gates are then far from flat."""


def check_skeleton(student: StudentConfig, packing: bool) -> None:
    """Builds the skeleton of a student, and does with it what a training does.

    Raises:
        TrainingError: the student cannot be built, checked or trained; the message names the
            setting to change.
    """
    started, failure, is_certain = time.monotonic(), None, False
    with explained(student), torch.random.fork_rng():
        config = read_config(student)
        for small in _shrunk_configs(config, student):
            try:
                model = _checked(small, student, packing)
            except DistillationError:
                raise
            except Exception as error:
                # fewer heads may break what a forward ties together, and say nothing then
                failure = error
                is_certain = _width(small) == _width(config)
                continue
            # sizes that fit together in the checks do so in a step
            model = as_loaded(model, DTYPES[student.dtype])
            _take_step(model, student.gradient_checkpointing)
            logger.info(
                "student %s: a copy of %d layers and %.1f M weights trains, tried in %.1f s",
                type(model).__name__,
                _depth(model.config),
                sum(p.numel() for p in model.parameters()) / 1e6,
                time.monotonic() - started,
            )
            return
        if failure is not None and is_certain:
            raise failure
    logger.warning("student %s is too large to be tried beforehand", student.model)


@contextmanager
def explained(student: StudentConfig) -> Iterator[None]:
    """Turns every exception of a model's own code into one sentence that names what to change."""
    try:
        yield
    except DistillationError:
        raise
    except Exception as error:
        # transformers goes on to list all classes that it knows
        reason = " ".join(str(error).partition(" for this kind of AutoModel")[0].split())[:200]
        reason = f"{type(error).__name__}: {reason}"
        raise TrainingError(
            f"student.model {student.model!r} cannot be trained ({reason}): "
            f"{_remedy(str(error), student)}"
        ) from error


def _remedy(reason: str, student: StudentConfig) -> str:
    if "attention implementation" in reason and student.attn_implementation != "eager":
        return "set student.attn_implementation: eager"
    if "does not support gradient checkpointing" in reason:
        return "set student.gradient_checkpointing: false"
    if "dtype" in reason and student.dtype != "float32":
        return "set student.dtype: float32"
    if "trust_remote_code" in reason:
        return "set student.trust_remote_code: true if you trust its code"
    if "Unrecognized configuration class" in reason:
        return "transformers has no causal language model for its config, so choose another one"
    return "choose another one"


def _checked(config: PretrainedConfig, student: StudentConfig, packing: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    model = _build(config, student)
    _enlarge(model)
    check_architecture(model, packing)
    return model


def _build(config: PretrainedConfig, student: StudentConfig) -> PreTrainedModel:
    attention = student.attn_implementation
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config),
        trust_remote_code=student.trust_remote_code,
        dtype=torch.float32,
        # the flash variants need a GPU: they are tried when the training starts
        attn_implementation="sdpa" if attention.startswith("flash") else attention,
    )


def _shrunk_configs(config: PretrainedConfig, student: StudentConfig) -> Iterator[PretrainedConfig]:
    """Configs of models with every kind of layer that the student has, the smallest first."""
    with torch.device("meta"):
        kinds = _kinds(_build(config, student))
    for settings in (WIDTHS | HEADS | WINDOWS, WIDTHS | WINDOWS, WINDOWS, {}):
        for depth in [*range(LEAST_DEPTH, min(_depth(config), MOST_DEPTH)), _depth(config)]:
            try:
                small = _shrunk(config, settings, depth)
                with torch.device("meta"):
                    model = _build(small, student)
            except Exception:
                continue  # settings that the class ties together
            if _kinds(model) == kinds:
                if sum(p.numel() for p in model.parameters()) <= MOST_WEIGHTS:
                    yield small
                break


def _shrunk(config: PretrainedConfig, settings: dict[str, int], depth: int) -> PretrainedConfig:
    """A copy of a config with `depth` layers, and with settings that are at most the given ones."""
    small = copy.deepcopy(config)
    text, layers = small.get_text_config(), _depth(config)
    known = text.to_dict()
    for name, most in (settings | _width_of_heads(known, settings)).items():
        value = known.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            setattr(text, name, most)
        elif isinstance(value, list) and all(isinstance(each, int) for each in value):
            setattr(text, name, [min(each, most) for each in value])
        elif isinstance(value, dict) and all(isinstance(each, int) for each in value.values()):
            setattr(text, name, {key: min(each, most) for key, each in value.items()})
    if "index_topk" in known and "index_topk" in settings:
        text.index_n_heads = max(known["index_n_heads"], INDEX_HEADS)
    rope = getattr(text, "rope_parameters", None) or {}
    for values in [rope, *rope.values()]:
        name = "original_max_position_embeddings"
        if isinstance(values, dict) and name in values and name in settings:
            values[name] = settings[name]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(known.get(name), int) and known[name] >= getattr(text, "vocab_size", 2**31):
            setattr(text, name, 0)
    for name, value in known.items():
        of_layers = isinstance(value, list) or (isinstance(value, str) and "pattern" in name)
        if of_layers and len(value) == layers and name not in ("time_step_limit", "eos_token_id"):
            setattr(text, name, getattr(text, name)[:depth])
    for name in DEPTHS:
        if known.get(name) == layers:
            setattr(text, name, depth)
    return small


def _width_of_heads(known: dict[str, Any], settings: dict[str, int]) -> dict[str, int]:
    """Hidden size, groups of heads and multiples that go with fewer heads."""
    heads, hidden = known.get("num_attention_heads"), known.get("hidden_size")
    if "num_attention_heads" not in settings or not isinstance(hidden, int):
        return {}
    if isinstance(heads, int):
        fewer = min(heads, settings["num_attention_heads"])
        groups = known.get("num_key_value_heads") or heads
        width = fewer * (known.get("head_dim") or hidden // heads)
    else:
        fewer = groups = heads = 1
        width = min(hidden, settings["hidden_size"])
    multiples = {
        name: max(1, known[name] * width // hidden)
        for name in MULTIPLES
        if isinstance(known.get(name), int)
    }
    return multiples | {
        "hidden_size": width,
        "num_key_value_heads": max(1, groups * fewer // heads),
    }


def _width(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "hidden_size", None)


def _depth(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    return next((n for name in DEPTHS if (n := getattr(text, name, None))), 1)


def _kinds(model: PreTrainedModel) -> set[str]:
    """The kinds of layers of a model: the modules that they hold, and the flags of these."""
    depth = _depth(model.config)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return {_kind(layer) for stack in stacks for layer in stack}


def _kind(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        if "experts." in name:
            continue  # there may be fewer of them
        flags = {k: v for k, v in vars(module).items() if isinstance(v, bool) and k != "training"}
        flags |= {k: vars(module)[k] is None for k in WINDOWS if k in vars(module)}
        types = {k: v for k, v in vars(module).items() if "type" in k and isinstance(v, str)}
        parts.append((name, type(module).__name__, sorted(flags.items()), sorted(types.items())))
    return str(parts)


@torch.no_grad()
def _enlarge(model: PreTrainedModel) -> None:
    """Draws all matrices so large that nothing hides behind small weights."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point():
            parameter.normal_(std=SPREAD / parameter.shape[-1] ** 0.5)


def _take_step(model: PreTrainedModel, recomputed: bool) -> None:
    """Computes a loss and its gradients.

    Raises:
        TrainingError: a number is not finite, or no gradient reaches the layers.
    """
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    lm_head = lm_head_of(model)
    ids_RT = torch.arange(24).view(2, 12) % lm_head.out_features
    of_no_teacher = torch.zeros(0, ids_RT.numel())
    targets = Targets(
        gold_ids=ids_RT.flatten(),
        token_ids=of_no_teacher[..., None].long(),
        logprobs=of_no_teacher[..., None],
        tail_mass=of_no_teacher,
        teacher_weights=of_no_teacher,
    )
    hidden_TH = body_hidden_states(model, ids_RT, None)
    losses = [CrossEntropy(name="cross_entropy", weight=1.0)]
    head = (lm_head.weight, lm_head.bias)
    total = distillation_loss(hidden_TH, *head, targets, losses, logit_step(model)).total
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not total.isfinite() or not all(g.isfinite().all() for g in gradients.values()):
        raise TrainingError(
            f"the first step of a {type(model).__name__} gives numbers that are not finite: choose "
            "another student.model or student.dtype"
        )
    of_head = {name for name, p in model.named_parameters() if p is lm_head.weight}
    if not any(g.any() for name, g in gradients.items() if name not in of_head):
        raise TrainingError(
            f"no gradient reaches the body of a {type(model).__name__}: choose another "
            "student.model"
        )
