"""Capture of a sequence's rows from a vLLM engine, with and without its prefix cache.

At start the capture proves itself on the canary: rows come as the engine's arrays if these equal
vLLM's public `flat_logprobs`, and prefixes are shared only if hidden states from the prefix cache
equal those computed anew.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor

from teachers.canary import CANARY_TOKENS, canary_ids, reason_not_to_share_prefixes
from teachers.engine import prompt_topk
from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK
from teachers.engine.running_engine import RunningEngine
from teachers.protocol import CapturedRows, EarlierRows, ScoringRequest

logger = logging.getLogger(__name__)


class RowCapture:
    """Captures rows from one engine; `choose_mode` comes first.

    Attributes:
        mode: `arrays` for the engine's own arrays, `flat` for vLLM's `flat_logprobs`, `none` if the
            engine only generates.
        reason: reason for the mode.
        width: number of entries captured per token.
        shares_prefixes: rows are scored with the prefix cache.
        sharing_reason: reason why they are not, although sequences share prompts; None otherwise.
    """

    def __init__(self, engine: RunningEngine) -> None:
        self._engine = engine
        self.width = min(engine.spec.num_logprobs, engine.vocabulary)
        has_prefix_cache = engine.config.cache_config.enable_prefix_caching
        self.shares_prefixes = has_prefix_cache and self.width > 0
        self.sharing_reason = None
        asked = engine.spec.vllm.get("enable_prefix_caching", engine.spec.share_prefixes)
        if self.width and asked and not has_prefix_cache:
            self._compute_each_prompt("vLLM keeps no prefix cache of this model on this device")
        self.mode, self.reason = "none", "the engine only generates"
        self._restore: Callable[[], None] | None = None

    async def choose_mode(self) -> CapturedRows:
        """Chooses the arrays if the canary shows that they equal vLLM's `flat_logprobs`.

        Returns:
            The rows of the canary in the mode chosen.
        """
        length = min(CANARY_TOKENS, self._engine.max_model_len - 1)
        canary = canary_ids(length, self._engine.vocabulary)

        async def request_flat() -> Any:
            parameters = scoring_parameters(self.width, flat=True, read_prefixes=False)
            output, _ = await self._engine.finish(canary, parameters)
            return output.prompt_logprobs

        self._restore, self.reason = await prompt_topk.install_if_equal(
            LogprobsProcessor, request_flat
        )
        self.mode = "arrays" if self._restore else "flat"
        level = logging.INFO if self._restore else logging.WARNING
        model = self._engine.spec.model
        logger.log(level, "%s: rows are captured as %s: %s", model, self.mode, self.reason)
        return await self.rows(ScoringRequest(canary, 1))

    async def check_shared_hidden_states(self) -> None:
        """Stops sharing prefixes if hidden states from the prefix cache differ from those computed
        anew.
        """
        if not self._engine.captures_hidden_states or not self.shares_prefixes:
            return
        # The cache holds whole blocks, and never the last token.
        block_size = self._engine.config.cache_config.block_size
        length = min(2 * block_size + 1, self._engine.max_model_len - 1)
        ids = canary_ids(length, self._engine.vocabulary)
        request = ScoringRequest(ids, 1, distributions=False, hidden_states=True)
        computed = await self.rows(request)
        cached = await self.rows(request, read_prefixes=True)
        reason = reason_not_to_share_prefixes(computed, cached, self._engine.rounding)
        if reason is not None:
            self._compute_each_prompt(reason)

    def _compute_each_prompt(self, reason: str) -> None:
        self.shares_prefixes, self.sharing_reason = False, reason
        model = self._engine.spec.model
        logger.warning("%s: prompts are computed once per answer: %s", model, reason)

    def restore(self) -> None:
        """Undoes the override of vLLM's method."""
        if self._restore:
            self._restore()

    async def score(self, request: ScoringRequest, earlier: EarlierRows | None) -> CapturedRows:
        """Captures what a request asks for, a second time without the prefix cache if the first
        rows are incomplete.
        """
        if not self.shares_prefixes:
            return await self.rows(request)
        try:
            return await self.rows(request, read_prefixes=True, earlier=earlier)
        except BrokenRowsError:
            captured = await self.rows(request)
            return dataclasses.replace(captured, is_rescored=True)

    async def rows(
        self,
        request: ScoringRequest,
        read_prefixes: bool = False,
        earlier: EarlierRows | None = None,
    ) -> CapturedRows:
        """Captures what a request asks for once. Rows inside the cached prefix come from an earlier
        answer; hidden states come from the engine for all tokens.

        Raises:
            BrokenRowsError: the engine's rows are incomplete or break an invariant.
        """
        input_ids, first_index = request.input_ids, request.first_index
        width = self.width if request.distributions else None
        parameters = scoring_parameters(width, self.mode == "flat", read_prefixes)
        span = (first_index - 1, len(input_ids) - 1) if request.hidden_states else None
        output, hidden_states = await self._engine.finish(input_ids, parameters, span)
        if hidden_states is not None and not np.isfinite(hidden_states).all():
            raise BrokenRowsError(f"hidden states of {len(input_ids)} tokens are not finite")
        num_cached, known = output.num_cached_tokens or 0, None
        if not request.distributions:
            rows = CapturedRows.without_distributions(len(input_ids) - first_index)
            return dataclasses.replace(
                rows, hidden_states=hidden_states, num_cached_tokens=num_cached
            )
        if earlier and first_index <= num_cached < len(input_ids) - 1:
            known = await earlier.rows(num_cached)
            if known is not None and np.isnan(known.gold_logprobs[-1]):
                gold = await self._next_logprob(input_ids[: num_cached + 1])
                known = known.with_last_gold(gold)
        rows = self._checked_rows(output, input_ids, num_cached + 1 if known else first_index)
        rows = known.followed_by(rows) if known else rows
        return dataclasses.replace(rows, hidden_states=hidden_states)

    async def _next_logprob(self, input_ids: list[int]) -> float:
        """Log-probability of the last token given the tokens before it, which may be cached."""
        *before, token = input_ids
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprob_token_ids=[token],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output, _ = await self._engine.finish(before, parameters)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None, "the parameters ask for it"
        return logprobs[0][token].logprob

    def _checked_rows(
        self, output: RequestOutput, input_ids: list[int], first_index: int
    ) -> CapturedRows:
        num_cached = output.num_cached_tokens or 0
        # After a preemption vLLM reports the first admission's number; then the rows tell.
        if num_cached >= first_index:
            raise BrokenRowsError(
                f"rows from token {first_index} on are needed, but {num_cached} tokens came from "
                "the prefix cache, which has no rows"
            )
        prompt_logprobs: Any = output.prompt_logprobs
        if isinstance(prompt_logprobs, FlatLogprobs):
            prompt_logprobs = PromptTopK.from_flat(prompt_logprobs)
        if not isinstance(prompt_logprobs, PromptTopK):
            raise BrokenRowsError(f"the engine returned no rows for {len(input_ids)} tokens")
        rows = prompt_logprobs.rows(input_ids, first_index, self.width)
        return dataclasses.replace(rows, num_cached_tokens=num_cached)


def scoring_parameters(width: int | None, flat: bool, read_prefixes: bool) -> SamplingParams:
    """Parameters of a request that scores its prompt.

    Args:
        width: number of entries per token; None for no distributions.
        flat: return vLLM's `FlatLogprobs`.
        read_prefixes: let the engine read its prefix cache.
    """
    # Both must reach the constructor: assigned later, vLLM reads its prefix cache unasked.
    return SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=width,
        flat_logprobs=flat,
        skip_reading_prefix_cache=not read_prefixes,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
