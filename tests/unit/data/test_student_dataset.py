"""The order of a student's data, its packing, and the refusals before it trains."""

import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.combine import CombineConfig, StaticWeights
from pipeline.errors import TrainingError
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.sequences import write_sequences
from students.data.batches import WINDOW_POSITIONS, WINDOW_SHARDS, DataOrder
from students.data.examples import Example, Examples
from students.data.packing import (
    NOTHING,
    group_size,
    pack,
    plan_groups,
    plan_micro_batches,
    refuse_groups_across_bounds,
    refuse_long_sequences,
)
from students.losses.chunk import figure_names
from students.losses.distillation import distillation_loss
from students.losses.divergences import CrossEntropy, ForwardKL, JensenShannon
from students.micro_batch import MicroBatch

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=120).map(
    lambda codes: [f"shard{code}" for code in codes]
)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)
DIGEST = "d" * 32
LOSSES = (
    ForwardKL(name="forward_kl", weight=1.0),
    CrossEntropy(name="cross_entropy", weight=1.0),
    JensenShannon(name="jensen_shannon", weight=1.0, temperature=2.0, beta=0.5),
)


def data_order(shards, *arguments, each=7, **options):
    """The order of sequences that have `each` positions."""
    return DataOrder(shards, [each] * len(shards), *arguments, **options)


@given(shards=SHARDS, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_epoch_holds_every_sequence_once_and_is_a_pure_function(shards, seed, epoch):
    order = data_order(shards, seed, DIGEST, 3).epoch(epoch)
    assert sorted(order) == list(range(len(shards)))
    used = data_order(shards, seed, DIGEST, 7)
    for other in (epoch + 2, 0, epoch + 1):  # what was asked for before leaves no trace
        used.epoch(other)
    assert np.array_equal(used.epoch(epoch), order)


def test_seed_epoch_and_digest_each_change_the_order():
    def order(seed=1, epoch=0, digest=DIGEST):
        return data_order(["shard"] * 50, seed, digest, 1).epoch(epoch).tolist()

    orders = [order(), order(seed=2), order(epoch=1), order(digest="e" * 32)]
    assert len({tuple(found) for found in orders}) == 4
    # pinned, so that a release does not change what a resumed training sees next
    assert order()[:6] == [37, 21, 18, 43, 39, 16]


@given(shards=SHARDS, size=st.integers(1, 40), steps=st.integers(1, 12))
def test_batches_cut_the_epochs_end_to_end(shards, size, steps):
    order = data_order(shards, 0, DIGEST, size)
    batches = [order.batch(step) for step in range(steps)]
    assert all(len(batch) == size for batch in batches)
    epochs = [order.epoch(n) for n in range(-(-steps * size // len(shards)))]
    assert np.array_equal(np.concatenate(batches), np.concatenate(epochs)[: steps * size])
    # a resumed training asks for a later batch first
    assert np.array_equal(data_order(shards, 0, DIGEST, size).batch(steps - 1), batches[-1])


@given(shards=SHARDS, sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_batches_of_another_size_go_on_where_those_before_ended(shards, sizes):
    before, after = sizes
    first = data_order(shards, 0, DIGEST, before)
    begun = np.concatenate([first.batch(step) for step in range(5)])
    order = data_order(shards, 0, DIGEST, after, origin=5 * before - 5 * after)
    found = np.concatenate([begun, *(order.batch(step) for step in range(5, 8))])
    epochs = [order.epoch(n) for n in range(-(-len(found) // len(shards)))]
    assert np.array_equal(found, np.concatenate(epochs)[: len(found)])


def test_sequences_are_shuffled_within_windows_of_shards():
    """A reader keeps a window's shards decoded; more shards would be read again and again."""
    shards = [f"shard{n // 4}" for n in range(4 * 3 * WINDOW_SHARDS)]
    order = data_order(shards, 0, DIGEST, 1).epoch(0)
    for window in np.split(order, 3):
        assert len({shards[i] for i in window}) == WINDOW_SHARDS
        runs = [shards[a] == shards[b] for a, b in pairwise(window)]
        assert np.mean(runs) < 0.2


@pytest.mark.parametrize(("each", "most"), [(WINDOW_POSITIONS // 12, 3), (WINDOW_POSITIONS, 1)])
def test_windows_of_large_shards_hold_fewer(each, most):
    """Shards have 4 sequences; whatever their size, an epoch holds every sequence once."""
    shards = [f"shard{n // 4}" for n in range(4 * 12)]
    order = data_order(shards, 0, DIGEST, 1, each=each).epoch(0)
    assert sorted(order) == list(range(len(shards)))
    for window in np.split(order, 12 // most):
        assert len({shards[i] for i in window}) == most


@given(lengths=LENGTHS, extra=st.integers(0, 100), world_size=st.integers(1, 5))
def test_plans_cover_each_sequence_once_within_the_budget_and_equally(lengths, extra, world_size):
    budget = max(lengths) + extra
    plan = plan_micro_batches(lengths, budget, world_size)
    assert len(plan) == world_size
    assert len({len(rows) for rows in plan}) == 1
    rows = [row for rank in plan for row in rank]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget for row in rows)
    # best fit leaves no two rows that would fit into one
    assert len(rows) <= 2 * -(-sum(lengths) // budget) + world_size


@given(lengths=LENGTHS, extra=st.integers(0, 100), world_size=st.integers(1, 5))
def test_padded_plans_count_padding_and_leave_a_rank_idle_only_without_work(
    lengths, extra, world_size
):
    budget = max(lengths) + extra
    plan = plan_micro_batches(lengths, budget, world_size, padded=True)
    assert len({len(groups) for groups in plan}) == 1 and len(plan) == world_size
    groups = [group for rank in plan for group in rank]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) * max(lengths[i] for i in g) <= budget for g in groups if g)
    assert groups.count([]) == 0 or max(map(len, groups)) == 1


@given(
    lengths=LENGTHS,
    extra=st.integers(0, 100),
    world_size=st.integers(1, 3),
    together=st.integers(1, 5),
    padded=st.booleans(),
)
@case([10] * 4 + [13, 13, 12], 40, 1, 4, True)
def test_groups_stay_together_within_the_budget(lengths, extra, world_size, together, padded):
    """The last group may be incomplete and still have the longest rows."""
    groups = [lengths[i : i + together] for i in range(0, len(lengths), together)]
    budget = max(group_size(group, padded) for group in groups) + extra
    plan = plan_groups(lengths, budget, world_size, padded, together)
    assert len({len(rows) for rows in plan}) == 1 and len(plan) == world_size
    batches = [row for rank in plan for row in rank]
    assert sorted(i for row in batches for i in row) == list(range(len(lengths)))
    where = {i: n for n, row in enumerate(batches) for i in row}
    assert all(where[i] == where[i - i % together] for i in range(len(lengths)))
    assert all(group_size([lengths[i] for i in row], padded) <= budget for row in batches if row)


@given(
    lengths=LENGTHS,
    bounds=st.lists(st.integers(1, 40), unique=True, max_size=2).map(sorted),
    world_size=st.integers(1, 3),
    padded=st.booleans(),
)
def test_sequences_on_two_sides_of_a_bound_are_never_computed_together(
    lengths, bounds, world_size, padded
):
    plan = plan_groups(lengths, max(lengths), world_size, padded, 1, bounds)
    assert len({len(rows) for rows in plan}) == 1 and len(plan) == world_size
    rows = [row for rank in plan for row in rank]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len({sum(lengths[i] > bound for bound in bounds) for i in row}) <= 1


def test_groups_across_a_bound_are_refused():
    refuse_groups_across_bounds([3, 10], [10], together=2)
    refuse_groups_across_bounds([3, 11], [10], together=1)
    with pytest.raises(TrainingError, match=r"above 10 tokens and the sequences have 3 to 11"):
        refuse_groups_across_bounds([3, 11], [10], together=2)


@given(lengths=LENGTHS, world_size=st.integers(1, 4))
def test_a_plan_does_not_depend_on_the_world_but_for_padding(lengths, world_size):
    """All ranks together compute the same sequences: the ranks do not shape the global batch."""
    alone = plan_micro_batches(lengths, 50, 1)[0]
    ranks = plan_micro_batches(lengths, 50, world_size)
    assert sum(map(len, ranks)) - len(alone) < world_size
    assert {i for rank in ranks for row in rank for i in row} == {i for row in alone for i in row}


def test_rows_are_spread_evenly_where_that_fits_and_tight_where_not():
    plan = plan_micro_batches([10] * 8, 30, 2)
    assert [[len(row) for row in rank] for rank in plan] == [[2, 2], [2, 2]]
    # longest first into the emptier row would need 13: 6+4+4 or 5+4+4
    tight = plan_micro_batches([5, 4, 6, 4, 4], 12, 2)
    assert sorted(sum([5, 4, 6, 4, 4][i] for i in row) for rank in tight for row in rank) == [
        11,
        12,
    ]


def test_many_sequences_are_packed_tightly_at_once():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(6, 0.7, 64_000).astype(int) + 1, 4096).tolist()
    started = time.process_time()
    [rows] = plan_micro_batches(lengths, 4096, 1)
    assert time.process_time() - started < 1  # a comparison with every row takes a minute
    assert len(rows) <= 1.001 * sum(lengths) / 4096


def test_too_long_sequences_are_named_and_never_cut():
    with pytest.raises(TrainingError, match=r"1 sequences .* \(9\): long \(10 tokens\): raise"):
        refuse_long_sequences([("short", 9), ("long", 10)], 9)
    with pytest.raises(TrainingError, match="longer than"):
        plan_micro_batches([3, 10], 9, 2)
    many = [(f"s{n}", 10) for n in range(12)]
    with pytest.raises(TrainingError, match=r"12 sequences .* and 2 more"):
        refuse_long_sequences(many, 9)
    refuse_long_sequences([("fits", 9)], 9)


def example(generator, num_tokens, num_teachers=2, num_entries=3, vocabulary=11):
    num_positions = int(generator.integers(1, num_tokens))
    shape = (num_teachers, num_positions, num_entries)
    logits = generator.normal(size=(*shape[:2], vocabulary))
    dense = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-dense, axis=-1)[..., :num_entries]
    logprobs = np.take_along_axis(dense, ids, axis=-1)
    weights = generator.dirichlet(np.ones(num_teachers), num_positions).T
    places = np.sort(generator.choice(num_tokens - 1, num_positions, replace=False))
    input_ids = generator.integers(0, vocabulary, num_tokens).astype(np.int32)
    return Example(
        input_ids=input_ids,
        logit_indices=places,
        gold_ids=input_ids[places + 1].astype(np.int64),
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float16),
        tail_mass=(1 - np.exp(logprobs).sum(-1)).astype(np.float16),
        teacher_weights=weights.astype(np.float32),
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 9),
    budget=st.integers(12, 60),
    world_size=st.integers(1, 4),
    padded=st.booleans(),
)
def test_packing_in_any_way_gives_the_same_sums(seed, count, budget, world_size, padded):
    """Hidden states are a function of token and place in the sequence, so that a row which mixed up
    its sequences, its places or its padding would sum to something else.
    """
    generator = np.random.default_rng(seed)
    examples = [
        example(
            generator,
            int(generator.integers(2, 13)),
            num_teachers=int(generator.integers(1, 4)),
            num_entries=int(generator.integers(1, 6)),
        )
        for _ in range(count)
    ]
    table = torch.from_numpy(generator.normal(size=(11, 20, 6)).astype(np.float32))
    head = torch.from_numpy(generator.normal(size=(11, 6)).astype(np.float32))

    def sums(rows, padded=False):
        found, positions = torch.zeros(len(figure_names(LOSSES)), dtype=torch.float64), 0
        for row in rows:
            batch = MicroBatch.of(pack([examples[i] for i in row], padded))
            assert (batch.position_ids is None) == padded
            places = torch.arange(batch.input_ids.shape[1]) if padded else batch.position_ids
            hidden = table[batch.input_ids, places].flatten(0, 1)[batch.logit_indices]
            found += distillation_loss(hidden, head, None, batch.targets, LOSSES).figures.double()
            positions += len(batch.logit_indices)
        assert positions == sum(len(e.gold_ids) for e in examples)
        return found

    lengths = [len(e.input_ids) for e in examples]
    plan = plan_micro_batches(lengths, budget, world_size, padded)
    apart = sums([[i] for i in range(count)])
    # float32 sums of up to 100 positions in another order
    for rows in ([r for rank in plan for r in rank], [list(range(count))[::-1]]):
        torch.testing.assert_close(sums(rows, padded), apart, rtol=1e-5, atol=0)


def test_an_empty_row_weighs_nothing():
    batch = MicroBatch.of(pack([]))
    assert batch.input_ids.shape == (1, 1)
    assert len(batch.logit_indices) == len(batch.targets.gold_ids) == 0
    hidden = torch.randn(1, 6, requires_grad=True)
    head = torch.randn(11, 6, requires_grad=True)
    loss = distillation_loss(hidden[batch.logit_indices], head, None, batch.targets, LOSSES)
    loss.total.backward()
    assert loss.total.item() == 0
    assert not hidden.grad.any() and not head.grad.any()
    filled = example(np.random.default_rng(0), 5)
    assert len(pack([filled, NOTHING]).logit_indices) == len(filled.gold_ids)


def stored(tmp_path, *sequences):
    """A layout with one shard of sequences named s0, s1, …, and their entries."""
    found = []
    for n, input_ids in enumerate(sequences):
        ids = np.array(input_ids, np.int32)
        found.append(TokenSequence(f"s{n}", ids, ((2, len(ids)),), "p", "d", ("t",), "stop"))
    layout = Layout(str(tmp_path), "run")
    shard = write_sequences(layout, "d", found)
    return layout, [
        DatasetEntry(
            s.sequence_id, "p", "d", "train", ("t",), shard, len(s.input_ids), s.num_positions
        )
        for s in found
    ]


class OneRow:
    """A cache that holds one row of one entry per position, and counts how often it is read."""

    def __init__(self, token_id, num_positions):
        half = np.full(num_positions, -0.5, np.float16)
        self.readings = 0
        self.found = SparseLogprobs(
            "s",
            np.ones(num_positions, np.uint8),
            np.full(num_positions, token_id, np.uint32),
            half,
            np.zeros(0, np.uint8),
            half,
            (1 - np.exp(half)).astype(np.float16),
            -half,
        )

    def row(self, sequence_id):
        self.readings += 1
        return self.found


COMBINE = CombineConfig(method="mixture", weights=StaticWeights(type="static", teachers={"t": 1.0}))


def test_ids_outside_the_students_vocabulary_are_refused(tmp_path):
    layout, (entry,) = stored(tmp_path, [1, 8, 2, 3])
    cache = OneRow(3, 2)
    with pytest.raises(TrainingError, match=r"sequence s0 .* token id 8, but .* has 8 rows"):
        Examples(layout, {"t": cache}, ["t"], COMBINE, 8)[entry]
    # one row more, as of a padded head, and the id is trained on as it is
    assert Examples(layout, {"t": cache}, ["t"], COMBINE, 9)[entry].input_ids.max() == 8


def test_cached_ids_outside_the_students_vocabulary_are_part_of_the_tail(tmp_path):
    layout, (entry,) = stored(tmp_path, [1, 4, 2, 3])
    logprobs, tails = np.log([0.5, 0.3, 0.5, 0.3]).astype(np.float16), np.array([0.2, 0.2])
    row = SparseLogprobs(
        sequence_id="s0",
        num_entries=np.array([2, 2], np.uint8),
        token_ids=np.array([3, 8, 2, 7], np.uint32),
        logprobs=logprobs,
        counts=np.zeros(0, np.uint8),
        gold_logprobs=logprobs[:2],
        tail_mass=tails.astype(np.float16),
        entropies=np.ones(2, np.float16),
    )
    cache = SimpleNamespace(row=lambda _: row)
    found = Examples(layout, {"t": cache}, ["t"], COMBINE, 8)[entry]
    np.testing.assert_allclose(found.tail_mass[0], [0.5, 0.2], atol=1e-3)
    padded = Examples(layout, {"t": cache}, ["t"], COMBINE, 9)[entry]
    np.testing.assert_allclose(padded.tail_mass[0], tails, atol=1e-3)


def test_examples_are_combined_once_while_they_fit_into_memory(tmp_path, monkeypatch):
    layout, (first, second) = stored(tmp_path, [1, 2, 3, 4], [4, 3, 2, 1])
    cache = OneRow(3, 2)
    examples = Examples(layout, {"t": cache}, ["t"], COMBINE, 8)
    for entry in (first, second, first, second):
        assert examples[entry].input_ids[0] == (1 if entry is first else 4)
    assert cache.readings == 2
    monkeypatch.setattr("students.data.examples.EXAMPLE_BYTES_KEPT", examples[first].num_bytes)
    crowded = Examples(layout, {"t": cache}, ["t"], COMBINE, 8)
    for entry in (first, first, second, first):
        assert crowded[entry].input_ids[0] == (1 if entry is first else 4)
    assert cache.readings == 2 + 3


def test_losses_on_text_alone_read_no_cache(tmp_path):
    layout, (entry,) = stored(tmp_path, [1, 2, 3, 4])
    found = Examples(layout, {}, ["t"], None, 8)[entry]
    assert found.token_ids.shape[0] == 0
    assert found.gold_ids.tolist() == [3, 4]
    assert found.logit_indices.tolist() == [1, 2]
