"""The benchmark of quality in its shortest form: every method is there, and work is done once."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import quality
from benchmarks.common import write_json
from benchmarks.quality import TINY, measure
from benchmarks.quality_study import material
from benchmarks.quality_study.material import DOMAINS
from benchmarks.quality_study.students import METHODS, Cell, train_student
from benchmarks.quality_study.training import FORWARD_KL, dense_kl, logprobs_of, micro_batch
from pipeline.cache.selection import select
from pipeline.config.scoring import TopK
from pipeline.records import CombinedTargets, TokenSequence
from students.data.examples import Example, example_of
from students.model import StudentModule

pytestmark = pytest.mark.timeout(300)
DATA = Path(__file__).resolve().parents[1] / "data/gsm8k"
CACHED = {name for name, method in METHODS.items() if method.selection is not None}
INTERRUPTED_AFTER = 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On cores that other tests keep busy, waiting for a second thread takes longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_method_has_its_row_and_nothing_is_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Cell] = []

    def interrupted(cell: Cell) -> str:
        if len(trained) == INTERRUPTED_AFTER:
            raise KeyboardInterrupt
        trained.append(cell)
        return train_student(cell)

    def refused(*_: object, **__: object) -> str:
        raise AssertionError("all of this is there")

    monkeypatch.setattr(quality, "train_student", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(DATA, tmp_path, TINY, processes=1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(quality, "train_student", train_student)
    rows, ratios = measure(DATA, tmp_path, TINY, processes=2)
    assert {path: path.read_bytes() for path in files} == files
    assert len(list(tmp_path.glob("*/students/*"))) == len(METHODS) * TINY.seeds
    for module, name in ((quality, "train_student"), (material, "train")):
        monkeypatch.setattr(module, name, refused)
    monkeypatch.setattr(material, "logprobs_of", refused)
    assert measure(DATA, tmp_path, TINY, processes=1) == (rows, ratios)

    write_json(tmp_path / "found.json", rows, ratios)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratios"].keys() >= {"sampled_over_full_loss", "combined_over_best_single_loss"}
    assert all(0.9 < ratio < 1.1 for ratio in found["ratios"].values())
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    for row in found["rows"]:
        losses = [row[f"{domain}_loss"] for domain in DOMAINS]
        assert all(math.isfinite(loss) and 0 < loss < 1.01 * math.log(512) for loss in losses)
        assert row["loss"] == pytest.approx(sum(losses) / 2) and row["spread"] > 0
        assert (row["bytes_per_token"] is not None) == (row["method"] in CACHED)
    by_name = {row["method"]: row for row in found["rows"]}
    assert by_name["top_k renormalised"]["entries"] == 12
    assert by_name["sampled"]["loss"] != by_name["full"]["loss"]


def test_full_kd_is_the_forward_kl_of_the_product_with_every_entry_kept() -> None:
    vocabulary, generator = 128, np.random.default_rng(0)
    torch.manual_seed(0)
    student, teacher = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                initializer_range=0.3,
            )
        )
        for _ in range(2)
    )
    sequences = [
        TokenSequence(
            sequence_id=str(length),
            input_ids=generator.integers(0, vocabulary, length).astype(np.int32),
            loss_spans=((start, length),),
            prompt_id="",
            domain="code",
            authors=("dataset",),
            finish_reason="dataset",
        )
        for length, start in ((12, 5), (7, 1))
    ]
    every = TopK(type="top_k", max_entries=vocabulary)
    examples: list[Example] = []
    for i, logprobs_PV in sorted(logprobs_of(teacher, sequences), key=lambda found: found[0]):
        top, ids = (each.numpy() for each in logprobs_PV.topk(vocabulary))
        row = select(sequences[i].sequence_id, ids, top, top[:, 0], every, teacher="code")
        weights = np.ones((1, row.num_positions), np.float32)
        examples.append(example_of(CombinedTargets(sequences[i], (row,), weights)))
    module, batch = StudentModule(student, FORWARD_KL), micro_batch(examples)
    losses = [module.train()(batch)[0], dense_kl(student, teacher, batch)]
    ours, full = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
        for loss in losses
    )
    # float16 of the stored log-probabilities: 2^-11 of their size
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
    assert (ours - full).norm() < 2e-3 * full.norm()
