"""One hidden state through the whole path, against loops over single sequences.

    captured states -> rows of the spans -> shard -> micro-batch -> loss

The expected value compares the teacher's state of token `i - 1` with the student's of token `i - 1`
for every index `i` of the loss spans.
"""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.cache.index import load_index
from pipeline.cache.kinds import hidden_states_of
from pipeline.cache.projection import HiddenStatesRule
from pipeline.config.losses import HiddenState
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.sequences import write_sequences
from students.data.examples import open_examples
from students.data.hidden_states import TeacherHiddenStates
from students.data.packing import pack
from students.losses.divergences import CrossEntropy
from students.losses.hidden_states import HiddenStatesLosses, layer_loss_from_config
from students.micro_batch import MicroBatch
from students.model import StudentModule
from teachers.protocol import CapturedRows
from teachers.tasks.score import CacheOutput, ScoreTask

SPANS = {"a": [(2, 5)], "b": [(1, 3), (5, 7)], "c": [(3, 4)]}
TOKENS = {"a": [1, 4, 2, 5, 3], "b": [3, 7, 5, 1, 2, 4, 6, 2], "c": [2, 2, 5, 6]}
HIDDEN = 16
STATES = {  # of layers 1 and 3, exact in bfloat16
    name: np.random.default_rng(len(tokens)).integers(-8, 9, (len(tokens), 2, HIDDEN)) / 4
    for name, tokens in TOKENS.items()
}


class FromTheTable:
    """A teacher whose states are those above."""

    def metadata(self):
        return {}

    async def score(self, request, earlier):
        assert request.hidden_states and not request.distributions
        name = next(n for n, tokens in TOKENS.items() if tokens == request.input_ids)
        rows = STATES[name][request.first_index - 1 : -1].astype(np.float32)
        nothing = CapturedRows.without_distributions(len(rows))
        return CapturedRows(nothing.token_ids, nothing.logprobs, nothing.gold_logprobs, rows)


@pytest.mark.parametrize("padded", [False, True])
def test_states_before_the_tokens_meet(tmp_path, padded):
    layout = Layout(str(tmp_path), "run")
    sequences = [
        TokenSequence(n, np.array(t, np.int32), tuple(SPANS[n]), "p", "d", ("t",), "stop")
        for n, t in TOKENS.items()
    ]
    shard = write_sequences(layout, "d", sequences)
    cache = layout.cache(hidden_states_of("t"), "0" * 32)
    output = CacheOutput(
        hidden_states_of("t"), cache, "0" * 32, HiddenStatesRule((1, 3), None, 0), 8
    )
    task = ScoreTask(f"{tmp_path}/{shard}", tuple(TOKENS), (output,))
    asyncio.run(task.run(FromTheTable()))  # pyright: ignore[reportArgumentType]
    assert load_index(cache)[0].positions == (3, 4, 1)

    entries = [
        DatasetEntry(s.sequence_id, "p", "d", "train", ("t",), shard, len(s.input_ids), n)
        for s, n in zip(sequences, (3, 4, 1), strict=True)
    ]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    loss = HiddenState(
        type="hidden_state",
        weight=2.0,
        teacher="t",
        layers={3: 1},
        measure="mse",
        projection="none",
    )
    states = TeacherHiddenStates({hidden_states_of("t"): cache}, ["t"], entries)
    on_hidden_states = (layer_loss_from_config(loss.name, loss.model_dump(), (1, 3)),)
    module = StudentModule(
        model,
        (CrossEntropy(name="cross_entropy", weight=1.0),),
        HiddenStatesLosses(on_hidden_states, HIDDEN, states.widths, seed=0),
    )
    examples = open_examples(layout, {}, ["t"], None, entries, 8)
    order = [entries[i] for i in (2, 0, 1)]
    packed = pack([examples[entry] for entry in order], padded)
    hidden_states = states.batch(order, [0, 0, 0])
    total, figures = module(MicroBatch.of(replace(packed, hidden_states=hidden_states)))

    expected = 0.0
    for name, tokens in TOKENS.items():
        with torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        for start, stop in SPANS[name]:
            for i in range(start, stop):
                teacher = torch.tensor(STATES[name][i - 1, 1], dtype=torch.float32)
                student = output.hidden_states[1][0, i - 1]
                expected += ((student - teacher) ** 2).mean().item()
    assert module.figure_names == ("cross_entropy", "hidden_state_mse_t_3_1")
    assert figures[1].item() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(figures[0].item() + 2 * expected, rel=1e-5)
    assert module.total(figures).item() == pytest.approx(total.item(), rel=1e-6)
