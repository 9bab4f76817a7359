"""List of losses in the config: names, and settings that are refused."""

import pytest
from pydantic import ValidationError

from pipeline.config.training import TrainingConfig

SCHEDULE = {
    "steps": 2,
    "sequences_per_step": 1,
    "tokens_per_micro_batch": 8,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "evaluate_every_steps": 1,
    "checkpoint_every_steps": 1,
}


def losses(*given):
    full = [{"weight": 1.0} | loss for loss in given]
    return TrainingConfig.model_validate({**SCHEDULE, "losses": full}).losses


def test_names_tell_apart_what_has_other_parameters():
    listed = losses(
        {"type": "forward_kl"},
        {"type": "forward_kl", "temperature": 2},
        {"type": "reverse_kl", "temperature": 0.5},
        {"type": "reverse_kl", "min_tail": 1e-6},
        {"type": "jensen_shannon", "beta": 0.5},
        {"type": "jensen_shannon", "beta": 0.9},
        {"type": "skew_kl", "alpha": 0.1, "direction": "forward"},
        {"type": "skew_kl", "alpha": 0.1, "direction": "reverse", "temperature": 2},
        {"type": "total_variation"},
        {"type": "cross_entropy"},
    )
    assert [loss.name for loss in listed] == [
        "forward_kl",
        "forward_kl_temperature_2",
        "reverse_kl_temperature_0.5",
        "reverse_kl_min_tail_1e-06",
        "jensen_shannon_beta_0.5",
        "jensen_shannon_beta_0.9",
        "skew_kl_alpha_0.1_direction_forward",
        "skew_kl_temperature_2_alpha_0.1_direction_reverse",
        "total_variation",
        "cross_entropy",
    ]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"type": "jensen_shannon"}, "beta"),
        ({"type": "jensen_shannon", "beta": 0.0}, "forward_kl"),
        ({"type": "jensen_shannon", "beta": 1.0}, "is 0 for every student"),
        ({"type": "jensen_shannon", "beta": float("nan")}, "finite number"),
        ({"type": "skew_kl", "alpha": 0.1}, "direction"),
        ({"type": "skew_kl", "alpha": 0.0, "direction": "reverse"}, "at 0 this is"),
        ({"type": "skew_kl", "alpha": 1.0, "direction": "forward"}, "between 0 and 1"),
        ({"type": "skew_kl", "alpha": 0.1, "direction": "sideways"}, "forward"),
        ({"type": "forward_kl", "temperature": 0.0}, "greater than 0"),
        ({"type": "forward_kl", "temperature": float("inf")}, "finite"),
        ({"type": "forward_kl", "beta": 0.5}, "Extra inputs"),
        ({"type": "reverse_kl", "min_tail": 0.0}, "greater than 0"),
        ({"type": "cross_entropy", "temperature": 2.0}, "Extra inputs"),
        ({"type": "forward_kl", "weight": 0.0}, "greater than 0"),
        ({"type": "kl"}, "'forward_kl', 'reverse_kl', 'jensen_shannon', 'skew_kl'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(loss, said):
    with pytest.raises(ValidationError, match=said):
        losses(loss)


def test_the_same_loss_twice_is_refused():
    twice = {"type": "jensen_shannon", "beta": 0.5}
    with pytest.raises(ValidationError, match=r"jensen_shannon_beta_0\.5.*add up the weights"):
        losses(twice, {"type": "cross_entropy"}, {**twice, "weight": 3.0})


STATES = {"teacher": "words", "layers": {4: 2}}
HIDDEN = {"type": "hidden_state", "measure": "cosine", "projection": "learned", **STATES}
RELATION = {"type": "relation", **STATES}


def test_losses_on_hidden_states_say_whose_and_which():
    listed = losses(
        HIDDEN,
        {**HIDDEN, "measure": "mse", "layers": {8: 4, 2: 1}},
        {**RELATION, "relation": "token_similarity", "teacher": "sums"},
    )
    assert [loss.name for loss in listed] == [
        "hidden_state_cosine_words_4_2",
        "hidden_state_mse_words_8_4_2_1",
        "relation_token_similarity_sums_4_2",
    ]
    config = TrainingConfig.model_validate({**SCHEDULE, "losses": listed})
    assert config.teacher_layers == {"words": (2, 4, 8), "sums": (4,)}
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{**HIDDEN, "layers": {}}], "at least 1 item"),
        ([{**HIDDEN, "layers": {4: -1}}], "greater than or equal to 0"),
        ([{**RELATION, "relation": "distance"}], "`sequences` of at least 2"),
        ([{**RELATION, "relation": "angle", "sequences": 2}], "`sequences` of at least 3"),
        ([{**RELATION, "relation": "token_similarity", "sequences": 2}], "leave `sequences` out"),
        ([{**RELATION, "relation": "distance", "sequences": 2}], "is no multiple of"),
        ([HIDDEN, {**HIDDEN, "weight": 3.0}], "words_4_2 stands twice in the list: add up"),
        ([HIDDEN, {**HIDDEN, "projection": "none"}], "with another projection, which its name"),
        (
            [
                {**RELATION, "relation": "distance", "sequences": 2},
                {**RELATION, "relation": "angle", "sequences": 4},
            ],
            r"groups of \[2, 4\] sequences",
        ),
    ],
)
def test_losses_on_hidden_states_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        losses(*given)
