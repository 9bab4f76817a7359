"""The files that every worker writes into a checkpoint, and the workers whose files are missing.

A checkpoint lacks a worker's files if that worker's node does not see the folder: the node then
writes them to a folder of its own under the same path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import TrainingError
from pipeline.run import shared_storage
from students.checkpoints.universal import TAG, Partitioning

WAIT_SECONDS = shared_storage.WAIT_SECONDS
"""Time in which the files of other nodes must show."""
PAUSE_SECONDS = 0.5


def missing_ranks(checkpoint: Path, partitioning: Partitioning) -> list[int]:
    """Ranks of the workers whose files a checkpoint lacks, in ascending order.

    Args:
        partitioning: workers and ZeRO block of the training that wrote the checkpoint.
    """
    return [
        rank
        for rank in range(partitioning.workers)
        if not (checkpoint / f"rng-{rank}.pt").exists()
        or (partitioning.stage > 0 and not any(_states(checkpoint, rank)))
    ]


def check_ranks(checkpoint: Path, partitioning: Partitioning, nodes: Sequence[str]) -> None:
    """Checks that the files of every worker show in a checkpoint, in `WAIT_SECONDS` at most.

    Args:
        nodes: names of the workers' nodes, by rank.

    Raises:
        TrainingError: files of a worker are missing; the message names the worker's node.
    """
    end = time.monotonic() + WAIT_SECONDS
    while missing := missing_ranks(checkpoint, partitioning):
        if time.monotonic() > end:
            ranks = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in missing)
            several = len(missing) > 1
            raise TrainingError(
                f"{ranks} {'do' if several else 'does'} not write to {checkpoint}, as rank 0 on "
                f"{nodes[0]} sees it: is the folder mounted there?"
            )
        time.sleep(PAUSE_SECONDS)


def _states(checkpoint: Path, rank: int) -> list[Path]:
    """ZeRO's files of a rank; their names begin with bf16_ in some dtypes."""
    return [*(checkpoint / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_*")]
