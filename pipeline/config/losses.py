"""`training.losses`: one model for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Name, Positive, Section


class LossSection(Section):
    """What all losses share."""

    weight: Positive
    """Factor in the sum of losses."""

    @property
    def name(self) -> str:
        """Under which it is logged: its type, and the parameters that are given or have no default.

        Example: `skew_kl_alpha_0.1_direction_reverse_temperature_2`.
        """
        fields = type(self).model_fields
        chosen = {
            key: value
            for key, value in self
            if key not in ("type", "weight") and value != fields[key].default
        }
        parts = [
            f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"
            for key, value in chosen.items()
        ]
        return "_".join([self.model_dump()["type"], *parts])


class TeacherLoss(LossSection):
    """A loss against the teachers' targets."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of teachers and student; tempers the kept ids and the tail bucket, times its square."""


class ForwardKL(TeacherLoss):
    """KL(teachers || student): the student covers all that the teachers may say."""

    type: Literal["forward_kl"]


class ReverseKL(TeacherLoss):
    """KL(student || teachers): the student keeps to what the teachers find likely."""

    type: Literal["reverse_kl"]
    min_tail: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """A smaller tail of the teachers counts as this: a stored 0 may be rounding, and KL to an
    outcome of probability 0 is infinite. The share of such positions is logged."""


class JensenShannon(TeacherLoss):
    """beta KL(teachers || m) + (1 - beta) KL(student || m), where m is beta parts teachers and
    1 - beta parts student.
    """

    type: Literal["jensen_shannon"]
    beta: float
    """Between 0 and 1."""

    @field_validator("beta")
    @classmethod
    def _inside(cls, beta: float) -> float:
        if not 0 < beta < 1:
            raise ValueError(
                f"beta ({beta:g}) must lie between 0 and 1, both excluded: at either end this "
                "divergence is 0 for every student; forward_kl and reverse_kl are what others call "
                "its ends"
            )
        return beta


class SkewKL(TeacherLoss):
    """KL to a mixture of both: forward KL(teachers || alpha teachers + (1 - alpha) student),
    reverse KL(student || alpha student + (1 - alpha) teachers).
    """

    type: Literal["skew_kl"]
    alpha: float
    """Share of the first distribution in the mixture, between 0 and 1."""
    direction: Literal["forward", "reverse"]
    """`forward` from teachers to student, `reverse` the other way."""

    @field_validator("alpha")
    @classmethod
    def _inside(cls, alpha: float) -> float:
        if not 0 < alpha < 1:
            raise ValueError(
                f"alpha ({alpha:g}) must lie between 0 and 1, both excluded: at 0 this is "
                "forward_kl or reverse_kl, at 1 it is 0 for every student"
            )
        return alpha


class TotalVariation(TeacherLoss):
    """Half the sum of absolute differences of probabilities."""

    type: Literal["total_variation"]


class StateLoss(LossSection):
    """A loss between hidden states of one teacher and of the student, both at the indices whose
    logits are trained. They are captured while the teacher scores.
    """

    teacher: Name
    """Whose states; any teacher, whatever it weighs in the mixture."""
    layers: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], Field(min_length=1)
    ]
    """Teacher layer: student layer; `l` is transformers' `hidden_states[l]`, but a teacher's last
    layer comes before its final norm. The loss is the mean over these pairs."""

    @property
    def name(self) -> str:
        """Under which it is logged: `hidden_state_cosine_words_8_4`, `relation_angle_words_8_4`."""
        fields = self.model_dump()
        layers = [f"{teachers}_{students}" for teachers, students in self.layers.items()]
        kind = fields["measure"] if "measure" in fields else fields["relation"]
        return "_".join([fields["type"], kind, self.teacher, *layers])


class HiddenState(StateLoss):
    """Distance of the student's hidden state from the teacher's."""

    type: Literal["hidden_state"]
    measure: Literal["mse", "cosine"]
    """Mean square of the differences, or 1 - cosine."""
    projection: Literal["learned", "none"]
    """A matrix from the student's size to the stored one, trained along and not exported; `none`
    needs equal sizes."""


class Relation(StateLoss):
    """Distance of relations: between the sequences of a group, or the tokens of a sequence."""

    type: Literal["relation"]
    relation: Literal["distance", "angle", "token_similarity"]
    """`distance` of pairs and `angle` of triples of sequences, by their mean states;
    `token_similarity`: cosines between the tokens of a sequence."""
    sequences: Annotated[int, Field(ge=2)] | None = None
    """Size of the groups for `distance` and `angle`: sequences that follow one another in a step's
    batch. A group stays in one micro-batch, so that it does not depend on workers or packing."""

    @model_validator(mode="after")
    def _sequences_where_needed(self) -> Relation:
        least = {"distance": 2, "angle": 3, "token_similarity": 0}[self.relation]
        if least == 0 and self.sequences is not None:
            raise ValueError("token_similarity looks at single sequences: leave `sequences` out")
        if least and (self.sequences is None or self.sequences < least):
            raise ValueError(f"{self.relation} needs `sequences` of at least {least}")
        return self


class CrossEntropy(LossSection):
    """Cross-entropy with the tokens of the text."""

    type: Literal["cross_entropy"]


Loss = Annotated[
    ForwardKL
    | ReverseKL
    | JensenShannon
    | SkewKL
    | TotalVariation
    | CrossEntropy
    | HiddenState
    | Relation,
    Field(discriminator="type"),
]


def sequences_together(losses: Sequence[Loss]) -> int:
    """How many sequences in a row of a step's batch stay in one micro-batch."""
    sizes = [loss.sequences for loss in losses if isinstance(loss, Relation)]
    return max([1, *(size for size in sizes if size)])
