"""Reasons for the death of an actor, in one line: Ray tells them in paragraphs."""

from __future__ import annotations

import re

BEGINNING = "The actor died unexpectedly before finishing this task."
LONGEST_REASON = 400
"""Characters; the text about a node out of memory goes on with a table of its processes."""
# Lines by which Ray names the actor: an id, a process and a namespace mean nothing to a user.
NAMES = re.compile(r"^\t(class_name|actor_id|pid|name|namespace): .*$", re.MULTILINE)
ADDRESS = re.compile(r"^\tip: (\S+)\s*$", re.MULTILINE)


def reason_in_words(error: str) -> str:
    """Address of the actor's node where Ray's message has it, and the reason, in one line."""
    text = error.removeprefix(BEGINNING) or error
    address = ADDRESS.search(text)
    reason = " ".join(ADDRESS.sub("", NAMES.sub("", text)).split())
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON].rsplit(" ", 1)[0] + " …"
    return f"node {address[1]}: {reason}" if address else reason
