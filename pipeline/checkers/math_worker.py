"""Child process that lets math-verify compare formulas, so that none can hold up its parent.

It reads lines of JSON from standard input, each a list of a reference and an answer in LaTeX, and
writes one line for each: whether they are equal, or None if the reference cannot be parsed. It
imports nothing of ours, since it is run by its path.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys

MOST_MEMORY_BYTES = 4 << 30
DIGITS = 15
"""Digits to which decimals are compared, those of a double."""


def main() -> None:
    """Answers until standard input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no reply
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    from math_verify import parse, verify

    for line in sys.stdin:
        # The parent bounds the time, so the timeouts of math-verify are off.
        gold, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in json.loads(line))
        # Fewer digits would let 1.570796 be half of pi.
        equal = bool(gold) and verify(gold, found, float_rounding=DIGITS, timeout_seconds=0)
        verdict = bool(equal) if gold else None
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
