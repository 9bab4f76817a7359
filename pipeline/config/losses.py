"""`training.losses`: one model for each loss.

A new loss needs its model here, in the union `Loss`, and its value and gradient in
`students/losses/`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Name, Positive, Real, Section, Whole

Layer = Annotated[Whole, Field(ge=0)]


class LossSection(Section):
    """Fields and properties that all losses share."""

    takes_draws: ClassVar[bool] = False
    """Whether the loss is unbiased if the teachers' probabilities are estimated by draws, because
    it is linear in them or does not use them. A loss that does not say so is refused for draws."""

    if TYPE_CHECKING:  # each subclass has its field, behind the shared ones
        type: str

    weight: Positive
    """Factor of this loss in the sum of all losses that is minimised. Only the ratio to the weights
    of the other losses and the learning rate matter."""

    @property
    def name(self) -> str:
        """Name in logs: the type, and each parameter that is given or has no default.

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
        return "_".join([self.type, *parts])

    @property
    def sequences_together(self) -> int:
        """Number of consecutive sequences of a batch that must share one micro-batch."""
        return 1


class TeacherLoss(LossSection):
    """Fields that all losses against the teachers' targets share."""

    temperature: Positive = 1.0
    """Temperature of both distributions, the teachers' and the student's. It applies to the kept
    entries and the tail, and the loss is multiplied by its square, so that gradients keep their
    size. Values above 1 stress unlikely tokens, values below 1 likely ones. With selections that
    draw it must stay 1."""


class ForwardKL(TeacherLoss):
    """KL(teachers || student): the student learns to cover all that the teachers may say."""

    takes_draws: ClassVar[bool] = True

    type: Literal["forward_kl"]


class ReverseKL(TeacherLoss):
    """KL(student || teachers): the student learns to say only what the teachers find likely."""

    type: Literal["reverse_kl"]
    min_tail: Annotated[Real, Field(gt=0, lt=1)] = 1e-4
    """Smallest tail probability that the teachers have in this loss; the tail is all probability
    outside the kept entries. A smaller tail counts as this value, since a stored 0 may come from
    rounding, and the divergence to an outcome of probability 0 is infinite. The share of such
    positions is logged; raise the value if the loss is unstable."""


class JensenShannon(TeacherLoss):
    """beta KL(teachers || m) + (1 - beta) KL(student || m) with m = beta teachers + (1 - beta)
    student: a compromise between forward and reverse KL.
    """

    type: Literal["jensen_shannon"]
    beta: Real
    """Share of the teachers in the mixture m, between 0 and 1, both excluded. Small values behave
    like forward KL, large ones like reverse KL; 0.5 is the symmetric Jensen-Shannon divergence."""

    @field_validator("beta")
    @classmethod
    def _lies_inside(cls, beta: float) -> float:
        if not 0 < beta < 1:
            raise ValueError(
                f"beta ({beta:g}) must lie between 0 and 1, both excluded: at either end this "
                "divergence is 0 for every student; use forward_kl or reverse_kl, which others "
                "call its ends"
            )
        return beta


class SkewKL(TeacherLoss):
    """KL to a mixture of both distributions, which is finite and more stable than plain KL.

    `forward` is KL(teachers || alpha teachers + (1 - alpha) student), and `reverse` is
    KL(student || alpha student + (1 - alpha) teachers).
    """

    type: Literal["skew_kl"]
    alpha: Real
    """Share of the divergence's first distribution in the mixture, between 0 and 1, both excluded.
    Small values such as 0.1 stay close to the plain KL."""
    direction: Literal["forward", "reverse"]
    """Direction of the divergence: `forward` from the teachers to the student, which covers all
    that the teachers may say, or `reverse`, which keeps to what they find likely."""

    @field_validator("alpha")
    @classmethod
    def _lies_inside(cls, alpha: float) -> float:
        if not 0 < alpha < 1:
            raise ValueError(
                f"alpha ({alpha:g}) must lie between 0 and 1, both excluded: at 0 this is "
                "forward_kl or reverse_kl, at 1 it is 0 for every student"
            )
        return alpha


class TotalVariation(TeacherLoss):
    """Half the sum of the absolute differences of the probabilities."""

    type: Literal["total_variation"]


class CrossEntropy(LossSection):
    """Cross-entropy with the text's own tokens; it uses no teacher."""

    takes_draws: ClassVar[bool] = True

    type: Literal["cross_entropy"]


class HiddenStatesLoss(LossSection):
    """Fields that all losses between hidden states of one teacher and of the student share.

    Both are taken at the indices whose logits are trained. The teacher's hidden states are captured
    while it scores.
    """

    takes_draws: ClassVar[bool] = True

    teacher: Name
    """Teacher whose hidden states the student learns from. It may have any weight in `combine`, and
    must run on engines of this run (`model`, no `endpoint`)."""
    layers: Annotated[dict[Layer, Layer], Field(min_length=1)]
    """Pairs `teacher layer: student layer` that are compared, such as `{8: 4, 16: 8}`. Layer `l` is
    transformers' `hidden_states[l]`: 0 is the embedding, and the teacher's last layer is taken
    before its final norm. The loss is the mean over all pairs. Each teacher layer costs disk, see
    `scoring.features`."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Kind of comparison, which is part of the name."""
        ...

    @property
    def name(self) -> str:
        """Name in logs, such as `hidden_state_cosine_words_8_4` or `relation_angle_words_8_4`."""
        layers = [f"{teacher}_{student}" for teacher, student in self.layers.items()]
        return "_".join([self.type, self.kind, self.teacher, *layers])


class HiddenState(HiddenStatesLoss):
    """Distance between the hidden states of student and teacher at each position."""

    type: Literal["hidden_state"]
    measure: Literal["mse", "cosine"]
    """Measure of the distance: mean squared difference (`mse`), or 1 - cosine similarity
    (`cosine`), which ignores the length of the hidden states."""
    projection: Literal["learned", "none"]
    """Map from the student's hidden size to the stored size: `learned` is a matrix that is trained
    with the student and not exported; `none` compares directly and needs equal sizes."""

    @property
    def kind(self) -> str:
        return self.measure


class Relation(HiddenStatesLoss):
    """Difference between student and teacher in the relations among hidden states.

    Relations need no equal sizes and no projection.
    """

    type: Literal["relation"]
    relation: Literal["distance", "angle", "token_similarity"]
    """Relation that is compared: the `distance` of pairs of sequences or the `angle` of triples of
    sequences, both by their mean hidden states, or `token_similarity`, the cosine similarities
    among the tokens of each sequence."""
    sequences: Annotated[Whole, Field(ge=2)] | None = None
    """Number of sequences in a group, for `distance` (at least 2) and `angle` (at least 3). The
    sequences of a batch form groups in their order; `training.sequences_per_step` must be a
    multiple of it. A group stays in one micro-batch, so that results do not depend on the number of
    workers. Larger groups compare more pairs and need larger micro-batches."""

    @property
    def kind(self) -> str:
        return self.relation

    @property
    def sequences_together(self) -> int:
        return self.sequences or 1

    @model_validator(mode="after")
    def _groups_fit_the_relation(self) -> Relation:
        least = {"distance": 2, "angle": 3, "token_similarity": 0}[self.relation]
        if least == 0 and self.sequences is not None:
            raise ValueError(
                "relation token_similarity compares the tokens of single sequences: leave "
                "`sequences` out"
            )
        if least and (self.sequences is None or self.sequences < least):
            raise ValueError(f"relation {self.relation} needs `sequences` of at least {least}")
        return self


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
    """Number of consecutive sequences of a batch that must share one micro-batch."""
    return max([1, *(loss.sequences_together for loss in losses)])
