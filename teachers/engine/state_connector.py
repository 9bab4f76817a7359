"""vLLM's hidden-state connector for engines on a CPU; vLLM loads it in the engine's process.

vLLM's own connector copies through CUDA streams into pinned memory, which a CPU does not have.
Everything else is vLLM's code: at the end of a request it reads the hidden states of all prompt
tokens from the cache of keys and values, where `extract_hidden_states` put them, and writes them to
a file whose lock it holds from the request's first step on.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
)


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Connector that writes hidden states before it returns, so that no copy is in flight."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        assert self._kv_cache is not None, "caches are registered before the first request"
        num_tokens, size = len(pending.token_ids), self._block_size
        places = [(block, place) for block in pending.block_ids for place in range(size)][
            :num_tokens
        ]
        blocks, offsets = ([pair[i] for pair in places] for i in (0, 1))
        tensors = {"hidden_states": self._kv_cache[blocks, :, offsets].contiguous()}
        written: Any = _Written()
        lock = self._lock_fds.pop(pending.req_id, None)
        self._write_tensors(tensors, written, pending.filename, lock)
        self._req_copy_events[pending.req_id] = written


class _Written:
    """Stand-in for the CUDA event of a copy that is complete."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True
