"""Loader processes: the same batches as without them, an end with their trainer, and its errors."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from jobs.stages import score as score_module
from pipeline import storage
from pipeline.errors import CorruptShardError
from pipeline.run.training_spec import training_specs
from students.data.batches import Share
from students.data.loader import Loader
from tests.support.fabricated import VOCABULARY, FabricatedRun, FakePools

ROOT = Path(__file__).resolve().parents[3]
TRAINER = """
import pickle, sys
from students.data.loader import Loader
share, steps = pickle.load(open(sys.argv[1], "rb"))
loader = Loader(share, steps, 2)
loader.receive()
print(*loader.pids, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def share(tmp_path_factory) -> Share:
    """A rank of two, with the caches of two teachers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "run_pools", FakePools())
        run = FabricatedRun(
            tmp_path_factory.mktemp("storage"),
            overrides=[
                "training.sequences_per_step=6",
                "combine={method: mixture, weights: {type: gold_likelihood, temperature: 1, "
                "per: token}}",
            ],
        )
        run.write_answers(0, 9)
        run.score()
    dataset = storage.read_json(run.layout.stage_record("synthesize"))["dataset"]
    spec, *_ = training_specs(run.prepare(), dataset)
    return Share(spec, VOCABULARY, rank=1, world_size=2)


def batches(share, steps, num_processes):
    with Loader(share, steps, num_processes) as loader:
        return [loader.receive() for _ in steps]


@pytest.mark.parametrize("steps", [range(7), range(3, 7)], ids=["from the start", "resumed"])
def test_processes_change_nothing_in_any_batch(share, steps):
    alone = batches(share, steps, 0)
    assert [batch.step for batch in alone] == list(steps)
    for num_processes in (1, 3):
        found = batches(share, steps, num_processes)
        for one, other in zip(alone, found, strict=True):
            assert (one.step, one.num_positions, one.num_tokens) == (
                other.step,
                other.num_positions,
                other.num_tokens,
            )
            for packed, expected in zip(other.micro_batches, one.micro_batches, strict=True):
                for field in dataclasses.fields(packed):
                    a, b = getattr(packed, field.name), getattr(expected, field.name)
                    assert (a is None) == (b is None), field.name
                    if b is not None:
                        assert a.dtype == b.dtype and np.array_equal(a, b), field.name
                assert packed.token_ids.flags.writeable  # what torch shares it may write


def positions_of(packed_batches):
    """Gold id, weights, tails and kept probabilities of every position, in a fixed order."""
    found = []
    for packed in packed_batches:
        for j, gold in enumerate(packed.gold_ids.tolist()):
            numbers = [a[:, j].tolist() for a in (packed.teacher_weights, packed.tail_mass)]
            kept = packed.logprobs[:, j]
            found.append((gold, numbers, kept[kept > -np.inf].tolist()))
    return sorted(found)


def test_all_ranks_together_hold_the_global_batch_with_the_same_weights(share):
    """The same numbers to the bit, whoever computes them and whatever stands beside them."""
    whole = batches(dataclasses.replace(share, rank=0, world_size=1), range(3), 0)
    ranks = [batches(dataclasses.replace(share, rank=rank), range(3), 0) for rank in (0, 1)]
    training = share.spec.config.training.model_copy(update={"packing": False})
    config = share.spec.config.model_copy(update={"training": training})
    padded = dataclasses.replace(share, rank=0, world_size=1)
    padded = dataclasses.replace(padded, spec=dataclasses.replace(share.spec, config=config))
    apart = batches(padded, range(3), 0)
    for step, batch in enumerate(whole):
        expected = positions_of(batch.micro_batches)
        assert positions_of([p for rank in ranks for p in rank[step].micro_batches]) == expected
        assert positions_of(apart[step].micro_batches) == expected
        assert {rank[step].num_positions for rank in ranks} == {len(expected)}


def test_processes_die_with_a_trainer_that_is_killed(share, tmp_path):
    (tmp_path / "share").write_bytes(pickle.dumps((share, range(1_000_000))))
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "share")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as trainer:
        processes = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        assert len(processes) == 2 and all(process.is_running() for process in processes)
        trainer.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_processes_end_with_their_loader(share):
    with Loader(share, range(1_000_000), 2) as loader:
        processes = [psutil.Process(pid) for pid in loader.pids]
        loader.receive()
    assert not any(process.is_running() for process in processes)


def test_an_error_of_a_process_is_the_trainers(share, tmp_path):
    """A shard is damaged after the dataset was read: the first step that needs it names it."""
    cache = share.spec.caches["words"]
    (tmp_path / "g1").mkdir()
    for path in Path(cache.shards_folder).iterdir():
        (tmp_path / "g1" / path.name).write_bytes(path.read_bytes())
    moved = dataclasses.replace(cache, folder=str(tmp_path))
    damaged = next(path for path in Path(moved.shards_folder).iterdir())
    spec = dataclasses.replace(share.spec, caches=share.spec.caches | {"words": moved})
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CorruptShardError, match=damaged.name) as found:
        batches(dataclasses.replace(share, spec=spec), range(7), 2)
    assert found.value.path == str(damaged)


def test_a_bug_in_a_process_comes_with_its_traceback(share):
    with pytest.raises(RuntimeError, match=r"in a loader process:\n(.*\n)*.*in step"):
        batches(dataclasses.replace(share, rank=7), range(1), 1)


def test_a_process_that_was_killed_is_named(share):
    with Loader(share, range(1_000_000), 1) as loader:
        loader.receive()
        process = psutil.Process(*loader.pids)
        process.kill()
        with pytest.raises(RuntimeError, match=rf"loader process {process.pid} ended with code -9"):
            for _ in range(100):
                loader.receive()


def test_loader_processes_do_without_torch_and_ray():
    program = "import students.data.loader, sys; print({'torch', 'ray', 'vllm'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
