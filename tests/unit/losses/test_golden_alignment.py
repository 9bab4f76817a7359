"""One number through the whole path, against loops over plain lists.

    captured arrays -> rows of the spans -> selection -> shard -> combination -> packing -> loss

Everything here is written out by hand: tokens, loss spans, and for every token what each teacher
gave it. The expected loss looks up `input_ids[i]` and the logits at `i - 1` of each sequence alone.
"""

import asyncio
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.shard import read_shard
from pipeline.config.combine import CombineConfig, GoldLikelihoodWeights
from pipeline.config.scoring import Sampled, TopP
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.sequences import write_sequences
from students.data.examples import open_examples
from students.data.packing import pack
from students.losses.divergences import CrossEntropy, ForwardKL
from students.micro_batch import MicroBatch
from students.model import StudentModule
from teachers.engine.prompt_topk import PromptTopK
from teachers.tasks.score import CacheOutput, ScoreTask
from tests.support.tiny_models import tiny_llama

VOCABULARY, WIDTH = 8, 3
KL_WEIGHT, CE_WEIGHT = 1.0, 0.5
DRAWS = 5

TOKENS = {
    "a": [1, 4, 2, 5, 3],
    "b": [3, 7, 5, 1, 2, 4, 6, 2],
    "c": [2, 2, 5, 6],
}
SPANS = {
    "a": [(2, 5)],  # a prompt of two tokens
    "b": [(1, 3), (5, 7)],  # a prompt of one, two answers, and a last token without loss
    "c": [(3, 4)],  # a prompt of three, an answer of one
}

# Log-probabilities of the three captured entries, exact in float16, and how many of them the
# selection keeps: as many as reach a mass of 0.8.
SHARP = ([-0.125, -3.0, -4.0], 1)  # masses 0.88
CLEAR = ([-0.5, -1.5, -3.0], 2)  # 0.61 0.83
VAGUE = ([-1.0, -1.25, -1.75], 3)  # 0.37 0.65 0.83
MIXED = ([-0.75, -1.25, -2.5], 3)  # 0.47 0.76 0.84

# For every token but the first: what was captured over it, the log-probability of the token
# itself, the entries' shape, and their ids.
CAPTURED = {
    ("near", "a"): [
        (-2.0, VAGUE, [0, 1, 2]),
        (-0.125, SHARP, [2, 6, 1]),
        (-1.5, CLEAR, [7, 5, 3]),
        (-3.5, MIXED, [6, 1, 4]),
    ],
    ("far", "a"): [
        (-1.0, SHARP, [7, 3, 0]),
        (-1.25, VAGUE, [5, 2, 0]),
        (-0.5, CLEAR, [5, 4, 6]),
        (-0.75, MIXED, [3, 0, 7]),
    ],
    ("near", "b"): [
        (-1.0, VAGUE, [7, 2, 4]),
        (-0.125, SHARP, [5, 0, 1]),
        (-2.5, CLEAR, [6, 0, 3]),
        (-4.0, MIXED, [1, 3, 5]),
        (-1.5, CLEAR, [0, 4, 2]),
        (-0.75, MIXED, [6, 5, 1]),
        (-0.5, CLEAR, [2, 7, 3]),
    ],
    ("far", "b"): [
        (-3.0, CLEAR, [1, 6, 7]),
        (-2.0, MIXED, [4, 3, 2]),
        (-0.25, SHARP, [1, 2, 3]),
        (-0.5, VAGUE, [2, 0, 6]),
        (-1.25, VAGUE, [3, 4, 7]),
        (-4.5, SHARP, [0, 6, 5]),
        (-2.5, SHARP, [4, 1, 0]),
    ],
    ("near", "c"): [
        (-0.5, CLEAR, [2, 4, 1]),
        (-6.0, SHARP, [3, 0, 7]),
        (-1.75, VAGUE, [1, 0, 6]),
    ],
    # `far` has not scored c: there `near` weighs everything
}


class FromTheTables:
    """A teacher whose engine returns the rows of the tables, in vLLM's layout."""

    def __init__(self, name, captured):
        self.name, self.captured = name, captured

    def metadata(self):
        return {}

    async def score(self, request, earlier=None):
        input_ids = request.input_ids
        sequence = next(n for n, tokens in TOKENS.items() if tokens == input_ids)
        rows = self.captured[self.name, sequence]
        gold = zip(input_ids[1:], rows, strict=True)
        capture = PromptTopK(
            np.array([[token, *ids] for token, (_, _, ids) in gold]),
            np.array([[own, *shape[0]] for own, shape, _ in rows], np.float32),
        )
        return capture.rows(input_ids, request.first_index, WIDTH)


def written_sequence(name):
    return TokenSequence(
        name, np.array(TOKENS[name], np.int32), tuple(SPANS[name]), "p", "d", ("near",), "stop"
    )


KEPT = TopP(type="top_p", mass=0.8, max_entries=3)


def packed_rows(root, packing, captured, selection=KEPT):
    """Every sequence through capture, selection, shards and combination, packed as asked."""
    layout = Layout(str(root), "run")
    shard = write_sequences(layout, "d", [written_sequence(name) for name in TOKENS])
    caches = {}
    for teacher in ("near", "far"):
        caches[teacher] = layout.cache(teacher, "0" * 32)
        scored = tuple(name for name in TOKENS if (teacher, name) in captured)
        task = ScoreTask(
            sequence_shard=f"{root}/{shard}",
            sequence_ids=scored,
            outputs=(CacheOutput(teacher, caches[teacher], "0" * 32, selection, 8),),
        )
        asyncio.run(task.run(FromTheTables(teacher, captured)))
        for row in read_shard(caches[teacher].shard(digest_ids(scored))):
            kept = [
                captured[teacher, row.sequence_id][i - 1][1][1] for i in places(row.sequence_id)
            ]
            assert selection is not KEPT or row.num_entries.tolist() == kept
    weights = GoldLikelihoodWeights(type="gold_likelihood", temperature=1.0, per="token")
    entries = {
        name: DatasetEntry(
            name, "p", "d", "train", ("near",), shard, len(tokens), len(places(name))
        )
        for name, tokens in TOKENS.items()
    }
    examples = open_examples(
        layout,
        caches,
        ["near", "far"],
        CombineConfig(method="mixture", weights=weights),
        list(entries.values()),
        VOCABULARY,
    )
    return [MicroBatch.of(pack([examples[entries[name]] for name in row])) for row in packing]


def places(name):
    """The token indices i_j, one after another."""
    return [i for start, stop in SPANS[name] for i in range(start, stop)]


@pytest.fixture(scope="module")
def model():
    """A causal model whose logits differ much from place to place."""
    return tiny_llama(VOCABULARY, initializer_range=0.5)


def expected_loss(model, shift_logits=0, shift_rows=0, shift_gold=0, drawn=None):
    """The definition in loops; a shift moves one of the three by so many tokens.

    With `drawn`, what the teachers' draws stand for takes the place of entries and tail.
    """
    total = 0.0
    for name, tokens in TOKENS.items():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].double().tolist()
        for i in places(name):
            exponentials = [math.exp(x) for x in logits[(i - 1 + shift_logits) % len(tokens)]]
            q = [x / sum(exponentials) for x in exponentials]
            rows = {
                teacher: CAPTURED[teacher, name][(i - 1 + shift_rows) % (len(tokens) - 1)]
                for teacher in ("near", "far")
                if (teacher, name) in CAPTURED
            }
            likelihoods = sum(math.exp(own) for own, _, _ in rows.values())
            for teacher, (own, (logprobs, kept), ids) in rows.items():
                weight = math.exp(own) / likelihoods
                if drawn:
                    for token, p in drawn[teacher, name, i].items():
                        total += KL_WEIGHT * weight * p * math.log(p / q[token])
                    continue
                tail, outside, divergence = 1.0, 1.0, 0.0
                for k in range(kept):
                    p = math.exp(logprobs[k])
                    divergence += p * (logprobs[k] - math.log(q[ids[k]]))
                    tail -= p
                    outside -= q[ids[k]]
                divergence += tail * (math.log(tail) - math.log(outside))
                total += KL_WEIGHT * weight * divergence
            total -= CE_WEIGHT * math.log(q[tokens[(i + shift_gold) % len(tokens)]])
    return total


def found_loss(model, rows):
    losses = (
        ForwardKL(name="forward_kl", weight=KL_WEIGHT),
        CrossEntropy(name="cross_entropy", weight=CE_WEIGHT),
    )
    module = StudentModule(model, losses)
    return sum(module(row)[0].item() for row in rows)


@pytest.mark.parametrize(
    "packing",
    [
        [["a", "b", "c"]],
        [["c", "a"], ["b"]],
        [["a"], ["b"], ["c"], []],
    ],
    ids=["one row", "two rows", "apart, and an empty row"],
)
def test_the_whole_path_gives_the_number_of_the_definition(tmp_path, model, packing):
    rows = packed_rows(tmp_path, packing, CAPTURED)
    assert sum(len(row.logit_indices) for row in rows) == 3 + 4 + 1
    # the cache keeps tails and weights in float16
    assert found_loss(model, rows) == pytest.approx(expected_loss(model), rel=5e-4)


def drawn_in(root):
    """The shards' rows of every token, decoded by hand; draws lie among the captured ids."""
    found = {}
    for teacher in ("near", "far"):
        scored = tuple(name for name in TOKENS if (teacher, name) in CAPTURED)
        shard = Layout(str(root), "run").cache(teacher, "0" * 32).shard(digest_ids(scored))
        for row in pq.read_table(shard).to_pylist():
            name, k = row["sequence_id"], 0
            tails = np.frombuffer(row["tail_mass"], "<f2").tolist()
            for i, tail, num_entries in zip(places(name), tails, row["num_entries"], strict=True):
                _, (logprobs, _), ids = CAPTURED[teacher, name][i - 1]
                assert tail == pytest.approx(1 - sum(map(math.exp, logprobs)), abs=1e-3)
                tokens = np.frombuffer(row["token_ids_low"], "<u2")[k : k + num_entries].tolist()
                counts = row["counts"][k : k + num_entries]
                assert set(tokens) <= set(ids) and sum(counts) == DRAWS
                shares = [(1 - tail) * count / DRAWS for count in counts]
                found[teacher, name, i] = dict(zip(tokens, shares, strict=True))
                k += num_entries
    return found


def test_draws_take_the_same_path(tmp_path, model):
    rows = packed_rows(
        tmp_path, [["c", "a"], ["b"]], CAPTURED, Sampled(type="sampled", num_draws=DRAWS)
    )
    drawn = drawn_in(tmp_path)
    # only the teachers' weights are rounded: their log-likelihoods are kept in float16
    assert found_loss(model, rows) == pytest.approx(expected_loss(model, drawn=drawn), rel=5e-4)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("what", ["shift_logits", "shift_rows", "shift_gold"])
def test_a_shift_by_one_token_gives_another_number(model, what, by):
    assert abs(expected_loss(model, **{what: by}) / expected_loss(model) - 1) > 0.02


def test_what_teachers_say_outside_the_loss_spans_counts_nowhere(tmp_path, model):
    changed = {
        (teacher, name): [
            row if i in places(name) else (-5.0, VAGUE, [5, 6, 7])
            for i, row in enumerate(rows, start=1)
        ]
        for (teacher, name), rows in CAPTURED.items()
    }
    assert changed != CAPTURED
    before, after = (
        found_loss(model, packed_rows(tmp_path / name, [["a", "b", "c"]], captured))
        for name, captured in (("before", CAPTURED), ("after", changed))
    )
    assert before == after
