"""DeepSpeed around the student: gradients of any number of micro-batches, the learning rate, the
gradient norm and the full weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param

from pipeline.config.training import TrainingConfig
from pipeline.run.training_spec import TrainingSpec
from students.checkpoints.universal import partitioning
from students.micro_batch import MicroBatch
from students.model import StudentModule


class DeepSpeedStudent:
    """One student on all workers.

    Batches are cut by a token budget, so accumulation is done here: `accumulate` adds gradients of
    any number of micro-batches, an equal number on all ranks, and `step` applies them.

    Attributes:
        module: the student with its losses.
        deepspeed: DeepSpeed's wrapper of the module.
        device: device of the module's weights.
        parameter_shapes: shape of each whole parameter, by name.
    """

    def __init__(self, module: StudentModule, spec: TrainingSpec, universal: bool = False) -> None:
        """Hands the module to DeepSpeed.

        Args:
            universal: whether a checkpoint will be loaded in its universal form.
        """
        training, bf16 = spec.config.training, spec.config.student.dtype == "bfloat16"
        # DeepSpeed then steps the optimizer itself, without a gradient norm
        plain = spec.zero_stage == 0 and not bf16
        self.module, self._universal = module, universal
        self._optimizer = make_optimizer(module, training)
        self._norm: torch.Tensor | None = None
        # read before DeepSpeed partitions the parameters
        self.parameter_shapes = {name: list(p.shape) for name, p in module.named_parameters()}
        if plain:
            self._clip_before_update(training.gradient_clipping)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config={
                "steps_per_print": None,
                **training.deepspeed,
                "checkpoint": {
                    **training.deepspeed.get("checkpoint", {}),
                    "load_universal": universal,
                },
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": 0.0 if plain else training.gradient_clipping,
                "bf16": {"enabled": bf16},
            },
        )
        device = self.deepspeed.device
        assert isinstance(device, torch.device), "DeepSpeed knows it once it is initialised"
        self.device = device

    def load(self, folder: Path, tag: str) -> bool:
        """Restores weights and optimizer state; returns whether DeepSpeed found them. All ranks
        call it.

        The optimizer keeps the settings of the config. DeepSpeed takes them from the checkpoint,
        and at stage 3 it gives all groups the settings of the first group of a universal
        checkpoint.
        """
        groups = self._optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(values)
        wrapper: Any = self.deepspeed.optimizer
        if wrapper is not self._optimizer:
            wrapper.clip_grad = self.deepspeed.gradient_clipping()
        if self._universal:
            # at stage 3 all groups share one tensor, which each group's update would increment
            for state in self._optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        return loaded is not None

    def accumulate(self, batch: MicroBatch, factor: float) -> torch.Tensor:
        """Adds the gradients of `factor` times the total loss; returns `LossSums.figures`."""
        self.deepspeed.train()
        total, figures_F = self.deepspeed(batch)
        self.deepspeed.backward(total * factor)
        return figures_F

    def step(self, learning_rate: float) -> None:
        """Averages the gradients over the workers, clips them and updates the weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The fields of `PositionFigures`."""
        self.deepspeed.eval()
        return self.deepspeed(batch)

    def gradient_norm(self) -> float:
        """Gradient norm of the last step, over all weights, before clipping."""
        norm = self._norm if self._norm is not None else self.deepspeed.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """float32 master weights by their name in the Hugging Face model, on rank 0; tied weights
        stand once.

        All ranks call it. With bfloat16 at stage 0 DeepSpeed gives no access to its master weights:
        the bfloat16 weights take their place, and the export has bfloat16 in any case.
        """
        model, weights = self.module.model, {}
        for name, parameter in model.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state: dict[str, torch.Tensor] = model.state_dict()
        return weights | {name: x.cpu() for name, x in state.items() if name not in parameters}

    def _clip_before_update(self, bound: float) -> None:
        """Clips between DeepSpeed's all-reduce and the optimizer's update."""

        def clip(*_: Any) -> None:
            self._norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), bound)

        self._optimizer.register_step_pre_hook(clip)


def make_optimizer(module: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; DeepSpeed's own AdamW on the CPU if the config
    offloads the optimizer there.
    """
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if partitioning(training).offloads_optimizer:
        return DeepSpeedCPUAdam(
            groups, lr=training.learning_rate, betas=training.betas, adamw_mode=True
        )
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)
