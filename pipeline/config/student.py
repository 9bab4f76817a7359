"""`student`: the model that is trained, and how it is served."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.base import Count, ModelFiles, Section


class StudentConfig(Section):
    """The student: a Hugging Face causal language model, trained with DeepSpeed."""

    model: str
    """Folder or hub id; its tokenizer and chat template are those of the whole run."""
    initialization: Literal["pretrained", "random"]
    """Load weights, or start from the config alone."""
    initial_weights: str | None = None
    """Complete training checkpoint or exported folder whose weights a new training starts from, in
    place of those of `initialization`; `polystill train CONFIG --from-checkpoint` sets it."""
    revision: str | None = None
    """Hub revision."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights while training; `bfloat16` turns on DeepSpeed's bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention of transformers."""
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of the hardware of one serving engine."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Engine arguments of vLLM when the student writes or is evaluated, verbatim."""
    replicas: Count = 1
    """Number of engines when it writes."""

    @property
    def files(self) -> ModelFiles:
        """Where its tokenizer and config are read."""
        return ModelFiles(self.model, self.revision, self.trust_remote_code)
