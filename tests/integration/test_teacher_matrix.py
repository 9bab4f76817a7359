"""Teachers of many architectures: rows of the real engine beside transformers.

The engines run in the test's own process, one after another, which takes seconds each.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import TeacherError
from teachers.canary import check_cache_canaries
from teachers.pool.actor import CPU_ENV_VARS, ENGINE_ENV_VARS
from teachers.protocol import Canary, EngineSpec, ScoringRequest
from tests.support.architectures import (
    ARCHITECTURES,
    REFUSED_TEACHERS,
    TEACHERS,
    Architecture,
    RefusedTeacher,
)

pytestmark = pytest.mark.timeout(300)
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
"""vLLM's attention on a CPU has no smaller heads."""
BY_NAME = {each.name: each for each in ARCHITECTURES}


class InThisProcess:
    """vLLM's engine without a process of its own, with the face of the one that has."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments)
        self.vllm_config = self._llm.llm_engine.vllm_config

    async def generate(self, prompt: Any, parameters: Any, _: str) -> AsyncIterator[Any]:
        (output,) = self._llm.generate([prompt], parameters, use_tqdm=False)
        yield output


def save(architecture: Architecture, folder: Path) -> None:
    torch.manual_seed(0)
    own = {} if architecture.whole else HEADS
    config = AutoConfig.for_model(architecture.kind, **(architecture.config | own))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.to(torch.float32).save_pretrained(folder)


def know_the_classes(folder: Path) -> None:
    """Tells vLLM about the model's classes, for each of which it would else start a process."""
    from vllm import ModelRegistry

    own = AutoConfig.from_pretrained(folder).architectures or ()
    for name in (*own, "TransformersForCausalLM"):
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


async def largest_difference(folder: Path, block: dict[str, Any]) -> tuple[float, Canary]:
    """Largest difference in nats from transformers over a text and over a prompt of two answers,
    and the engine's canary with the product's own comparison.

    Args:
        block: keys of the teacher's `vllm:` block.
    """
    from vllm.engine.arg_utils import EngineArgs

    from teachers.engine.arguments import cpu_arguments, engine_arguments
    from teachers.engine.running_engine import RunningEngine
    from teachers.engine.vllm_teacher import VllmTeacher

    spec = EngineSpec(
        model=str(folder),
        min_model_len=200,
        vllm={"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4} | block,
        num_logprobs=16,
        share_prefixes=True,
    )
    know_the_classes(folder)
    chosen = engine_arguments(spec)
    has_state = EngineArgs(**chosen).create_model_config().has_inner_state
    llm: Any = InThisProcess(cpu_arguments(spec, chosen, has_state))
    teacher = VllmTeacher(RunningEngine(spec, llm, None, 0.0))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 128, 40).tolist()
    asked = [(rng.integers(3, 128, 60).tolist(), 1)]
    asked += [(prompt + rng.integers(3, 128, 12).tolist(), 40) for _ in range(2)]
    try:
        canary = Canary.of(await teacher.capture.choose_mode(), teacher.metadata())
        assert teacher.capture.mode == "arrays"
        worst = 0.0
        for ids, first in asked:
            rows = await teacher.score(ScoringRequest(ids, first))
            with torch.no_grad():
                logs = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            dense = logs.numpy()[first - 1 : -1]
            gold = dense[np.arange(len(dense)), ids[first:]]
            top = -np.sort(-dense, axis=1)[:, :16]
            worst = max(worst, float(np.abs(rows.gold_logprobs - gold).max()))
            worst = max(worst, float(np.abs(rows.logprobs - top).max()))
        return worst, replace(canary, comparison=await teacher.compare_with_transformers())
    finally:
        teacher.capture.restore()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key, value in (ENGINE_ENV_VARS | CPU_ENV_VARS).items():
        monkeypatch.setenv(key, value)
    # vLLM looks at every name of every module, and a web server's names answer in a request alone.
    for name, module in list(sys.modules.items()):
        if any(type(value).__name__ == "LocalProxy" for value in vars(module).values()):
            monkeypatch.delitem(sys.modules, name)
    from vllm.model_executor.models.transformers.base import Base

    # This backend alters transformers' own classes, which a run has in another process.
    monkeypatch.setattr(Base, "_decorate_for_torch_compile", lambda _: None)
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("name", TEACHERS)
def test_rows_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    save(BY_NAME[name], tmp_path)
    worst, canary = asyncio.run(largest_difference(tmp_path, {}))
    check_cache_canaries([], name, canary)
    assert canary.comparison is not None and canary.comparison.reason is None
    assert canary.comparison.mean < 1e-5 and worst < 1e-4


@pytest.mark.parametrize("refused", REFUSED_TEACHERS, ids=lambda refused: refused.name)
def test_other_rows_are_refused(refused: RefusedTeacher, tmp_path: Path) -> None:
    save(BY_NAME[refused.name], tmp_path)
    worst, canary = asyncio.run(largest_difference(tmp_path, refused.block))
    assert worst > 0.1
    with pytest.raises(TeacherError, match="vLLM computes another model than transformers"):
        check_cache_canaries([], refused.name, canary)
