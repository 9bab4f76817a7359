"""Child process that renders chat templates, so that none can hold up its parent or flood it.

It reads lines of JSON from standard input, each a chat with its template, and writes one line for
each: `["text", text]`, `["refused", reason]` or `["flooded", reason]`. It imports nothing of ours,
since it is run by its path.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, pass_context
from jinja2.runtime import Context

MOST_MEMORY_BYTES = 1 << 29
"""Memory beyond that of the libraries."""
MOST_CHARACTERS = 1 << 22
"""Characters that a template may add to those of the chat, each of which it may write 4 times."""
SECONDS_WITHOUT_PARENT = 60
"""Seconds after which a rendering is given up, should the parent be gone that would have ended it.
"""


def main() -> None:
    """Answers until standard input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no reply
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as stream:
        most = int(stream.read().split()[0]) * resource.getpagesize() + MOST_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        signal.alarm(SECONDS_WITHOUT_PARENT)  # it ends the process, also within compiled code
        replies.write(json.dumps(_answer(render_jinja_template, line)) + "\n")
        replies.flush()
        signal.alarm(0)


def _answer(render_jinja_template: Any, line: str) -> tuple[str, str]:
    question = json.loads(line)
    date, default = question["date"]

    @pass_context
    def pinned_strftime(context: Context, pattern: str) -> str:
        return datetime.fromisoformat(context.get(date, default)).strftime(pattern)

    try:
        (text,), _ = render_jinja_template(
            conversations=[question["messages"]],
            chat_template=question["template"],
            strftime_now=pinned_strftime,
            **question["values"],
        )
    except TemplateError as error:
        return "refused", str(error)
    except MemoryError:
        return "flooded", f"more than {MOST_MEMORY_BYTES >> 20} MiB of memory"
    except Exception as error:  # whatever the template computes may fail
        return "refused", f"{type(error).__name__}: {error}"
    if len(text) > MOST_CHARACTERS + 4 * len(line):
        return "flooded", f"a text of {len(text)} characters"
    return "text", text


if __name__ == "__main__":
    main()
