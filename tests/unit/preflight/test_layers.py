"""Layers and sizes that losses on hidden states name, against the quickstart: teachers of 4 layers
and 128 dimensions, a student of 3 and 96.
"""

import pytest

from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from teachers.preflight.model_layers import check_layers, hidden_sizes
from tests.support.command_line import QUICKSTART


def check(loss: str, *more: str) -> None:
    overrides = [f"training.losses=[{{weight: 1.0, teacher: words, {loss}}}]", *more]
    check_layers(load_config(QUICKSTART / "config.yaml", overrides))


HIDDEN = "type: hidden_state, measure: mse, projection: {}, layers: {}"


def test_layers_that_exist_pass() -> None:
    check(HIDDEN.format("learned", "{4: 3, 0: 0}"))
    check("type: relation, relation: token_similarity, layers: {4: 3}")
    check(HIDDEN.format("none", "{4: 3}"), "scoring.features.dimensions=96")


def test_sizes_of_the_teachers_that_a_loss_names() -> None:
    loss = HIDDEN.format("learned", "{4: 3, 0: 0}")
    overrides = [f"training.losses=[{{weight: 1.0, teacher: words, {loss}}}]"]
    assert hidden_sizes(load_config(QUICKSTART / "config.yaml", overrides)) == {"words": 128}
    assert hidden_sizes(load_config(QUICKSTART / "config.yaml")) == {}


@pytest.mark.parametrize(
    ("loss", "dimensions", "facts"),
    [
        (HIDDEN.format("learned", "{5: 1}"), "null", "layer 5, but teacher 'words' has 4"),
        (HIDDEN.format("learned", "{1: 4}"), "null", "layer 4, but the student has 3"),
        (HIDDEN.format("none", "{1: 1}"), "null", r"128 stored .* student's 96.*learned"),
        (HIDDEN.format("learned", "{1: 1}"), "128", r"\(128\) is not below the hidden size"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused(loss: str, dimensions: str, facts: str) -> None:
    with pytest.raises(ConfigError, match=facts):
        check(loss, f"scoring.features.dimensions={dimensions}")
