"""Procedural tasks of the quick start: two domains whose right answers are known exactly.

Each domain is enumerated in full, shuffled from a seed and cut, so that the hold-out shares no
prompt with anything that a teacher or a student is trained on.
"""

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("arithmetic", "words")
DIGITS = "01234"
ALPHABET = "abcdefgh"
WORD_LENGTH = 4


@dataclass(frozen=True)
class Task:
    """One prompt and its only right answer."""

    domain: str
    prompt: str
    reference: str

    def to_json(self, with_reference: bool) -> str:
        """Returns the task as one line of the prompt format that the pipeline reads."""
        row = {"messages": [{"role": "user", "content": self.prompt}], "domain": self.domain}
        return json.dumps(row | ({"reference": self.reference} if with_reference else {}))


@dataclass(frozen=True)
class Split:
    """One domain, cut: `pool` is all but the hold-out; `training` is the first part of the pool."""

    pool: list[Task]
    training: list[Task]
    holdout: list[Task]


def arithmetic_tasks() -> list[Task]:
    """Returns every sum of two three-digit numbers over `DIGITS`, so that no digit is carried."""
    numbers = [
        int("".join(digits)) for digits in itertools.product(DIGITS, repeat=3) if digits[0] != "0"
    ]
    pairs = itertools.product(numbers, repeat=2)
    return [Task("arithmetic", f"{a}+{b}", str(a + b)) for a, b in pairs]


def word_tasks() -> list[Task]:
    """Returns the reversal of every string of `WORD_LENGTH` letters over `ALPHABET`."""
    words = ["".join(letters) for letters in itertools.product(ALPHABET, repeat=WORD_LENGTH)]
    return [Task("words", f"reverse {word}", word[::-1]) for word in words]


def split_domain(domain: str, seed: int, num_training: int, num_holdout: int) -> Split:
    """Shuffles one domain and cuts it.

    Args:
        domain: One of `DOMAINS`.
        seed: Decides the order; the same seed gives the same cut everywhere.
        num_training: Prompts for the student's training.
        num_holdout: Prompts that nothing is trained on.

    Raises:
        ValueError: The domain is unknown, or has fewer tasks than asked for.
    """
    makers = {"arithmetic": arithmetic_tasks, "words": word_tasks}
    if domain not in makers:
        raise ValueError(f"unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    tasks = makers[domain]()
    if num_training + num_holdout > len(tasks):
        raise ValueError(
            f"{domain} has {len(tasks)} tasks, fewer than {num_training} + {num_holdout}"
        )
    random.Random(f"{seed}/{domain}").shuffle(tasks)
    pool = tasks[num_holdout:]
    return Split(pool=pool, training=pool[:num_training], holdout=tasks[:num_holdout])


def write_tasks(tasks: Sequence[Task], path: Path, with_references: bool) -> None:
    """Writes tasks as JSON lines."""
    lines = [task.to_json(with_references) + "\n" for task in tasks]
    path.write_text("".join(lines), encoding="utf-8")
