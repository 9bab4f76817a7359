"""Control: a task that every sound teacher can do, run when items fail and no other task is left.

If the control fails as well, the teacher is at fault and not the items.
"""

from __future__ import annotations

from pipeline.records import Prompt
from teachers.canary import canary_ids
from teachers.protocol import ScoringRequest, Teacher

CONTROL_TOKENS, CONTROL_VOCABULARY = 4, 16  # few and low ids, which every model has
CONTROL_MESSAGE = {"role": "user", "content": "Say yes."}


class ControlTask:
    """A task without items: scores a few tokens, or generates one if the teacher cannot score."""

    label = "control task"

    def __len__(self) -> int:
        return 0

    async def run(self, teacher: Teacher) -> None:
        """Asks the teacher for the rows or the answer.

        Raises:
            TeacherError: the teacher cannot do it.
        """
        input_ids = canary_ids(CONTROL_TOKENS, CONTROL_VOCABULARY)
        if teacher.can_score:
            await teacher.score(ScoringRequest(input_ids, 1))
            return
        prompt = Prompt("control", "control", "train", messages=(CONTROL_MESSAGE,))
        await teacher.generate(input_ids, {"max_tokens": 1}, 1, prompt)
