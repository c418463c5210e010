"""The options of an evaluation and their defaults; imports no heavy library."""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.errors import RequestError

#: Family of the shapes teacher and its students.
FAMILY = "flux"
#: Network calls of a student per image.
STUDENT_STEPS = 2


@dataclass(frozen=True)
class EvaluationOptions:
    """How many images to generate, and with which steps.

    Args:
        count: number of prompts; half of them have shape and colour pairs that training never saw.
        seed: seed of the prompts; image i starts from the noise of seed + i.
        teacher_steps: numbers of Euler steps of the teacher; the largest is the reference for all others.

    Raises:
        RequestError: a number is out of range.
    """

    count: int = 1024
    seed: int = 0
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2)

    def __post_init__(self) -> None:
        if self.count < 4:
            raise RequestError(f"count must be at least 4, got {self.count}; intervals need a few hundred")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if not self.teacher_steps or min(self.teacher_steps) < 1 or max(self.teacher_steps) > 1000:
            raise RequestError(f"teacher steps must be between 1 and 1000, got {list(self.teacher_steps)}")
        object.__setattr__(self, "teacher_steps", tuple(sorted(set(self.teacher_steps), reverse=True)))

    @property
    def reference_steps(self) -> int:
        """The largest number of the teacher's steps."""
        return self.teacher_steps[0]
