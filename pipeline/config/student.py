"""`student`: the model that is trained, and its serving."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from pipeline.config.base import Given, Handful, ModelFiles, Price, Section, Verbatim
from pipeline.templating import checked_arguments, prelude


class StudentConfig(Section):
    """The student: a Hugging Face causal language model that DeepSpeed trains and vLLM serves."""

    model: Given
    """Folder or hub id of the student. Its tokenizer and chat template are used for the whole run,
    and the vocabularies of all teachers must equal its own. A value that begins with `.`, `~` or
    `/` is a folder."""
    initialization: Literal["pretrained", "random"]
    """Weights that training starts from: the model's own (`pretrained`), or `random` ones, for
    which only the model's config and tokenizer are read."""
    initial_weights: Given | None = None
    """Training checkpoint or exported model folder whose weights training starts from, in place of
    those that `initialization` names. `polystill train CONFIG --from-checkpoint PATH` sets it, and
    later rounds start from the student of the round before by it."""
    revision: Given | None = None
    """Branch, tag or commit of the model on the hub; the default branch without it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Set it only for models whose code you trust."""
    eos_token: Annotated[Given | None, Field(exclude_if=lambda token: token is None)] = None
    """Token that ends sequences, such as `<|im_end|>`, in place of the tokenizer's own
    end-of-sequence token. A base student without a chat template needs it if its teachers end
    answers by another token. Answers to chats end as the chat template says. The exported student
    keeps it."""
    chat_template: Annotated[Given | None, Field(exclude_if=lambda path: path is None)] = None
    """File with a chat template (Jinja), such as a teacher's `chat_template.jinja`, in place of the
    student's own. It turns a base student without one into a chat model, and is exported with
    it."""
    template_arguments: Annotated[
        dict[str, JsonValue],
        Field(exclude_if=lambda arguments: not arguments),
        BeforeValidator(checked_arguments),
    ] = Field(default_factory=dict)
    """Values of variables that the chat template reads, such as `{enable_thinking: false}`. They
    hold wherever the run renders a chat, with teachers' own templates as well, and are part of
    every identity. The exported template has them as defaults. A server with `api: openai` renders
    chats itself and has `endpoint.template_arguments`."""
    template_date: Annotated[date | None, Field(exclude_if=lambda day: day is None)] = None
    """Day that a chat template with `strftime_now` writes as today, such as `2026-11-30`. Without
    it the day is 2025-01-01 in every run, so that a prompt has the same ids on every day. Another
    day is another identity. The exported template writes the day of its use."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights in training. `bfloat16` turns on DeepSpeed's bf16 mode, which
    takes half the memory and is faster on GPUs; its master weights stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass and do not keep them. It saves memory and
    costs about a third more time; set it if a micro-batch does not fit."""
    dropout: Annotated[bool, Field(exclude_if=lambda dropout: dropout)] = True
    """Whether dropout, layer drop and jitter of the model's own config act in training; the log of
    a training begins with those that do. `false` sets them to 0 in training, and leaves the
    exported config as it is. Routers that draw their experts (PhiMoE) draw them in any case."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation of transformers in training. The flash variants need their package,
    a GPU and `dtype: bfloat16`."""
    cost_per_hour: Price = 0.0
    """Price per hour of the hardware of one engine that serves the student, in any currency. The
    report adds it up; it changes nothing else."""
    vllm: Verbatim = Field(default_factory=dict)
    """Engine arguments of vLLM for the student when it writes answers or is evaluated, passed as
    they are, such as `{max_model_len: 4096, gpu_memory_utilization: 0.8}`."""
    replicas: Handful = 1
    """Number of engines that serve the student when it writes answers (`by: student`). Each takes
    `evaluation.resources`."""

    @model_validator(mode="after")
    def _flash_attention_has_its_dtype(self) -> StudentConfig:
        if self.attn_implementation.startswith("flash") and self.dtype == "float32":
            raise ValueError(
                f"attn_implementation {self.attn_implementation} computes in half precision only, "
                "and dtype is float32: set dtype: bfloat16, or choose sdpa"
            )
        return self

    @property
    def files(self) -> ModelFiles:
        """Source of the student's tokenizer and config."""
        return ModelFiles(
            self.model,
            self.revision,
            self.trust_remote_code,
            self.eos_token,
            self.chat_template,
            prelude(self.template_arguments, self.template_date),
        )
