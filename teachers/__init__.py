"""Teachers: vLLM engines or endpoints behind Ray actors, which write answers and score tokens.

protocol         contract between a teacher and the tasks that use it
canary           sequences that every engine scores first, and their comparison
noise            how far rounding alone can move log-probabilities
rope             which factors a model with LongRoPE is served with
concurrency      asyncio helpers: cancel tasks, ask for all items at once
tokenizing       the student's tokenizer, ids of prompts and answers
reading          errors of libraries that read a model's files
rendering        chats as the template writes them, with data kept text
template_worker  child process in which chat templates run
engine/          a teacher in a vLLM engine of this run
endpoint/        a teacher behind an OpenAI-compatible API
pool/            Ray actors, and the tasks that they share
tasks/           units of work: answer, rewrite, judge, score
preflight/       checks of models before any engine starts
"""

import logging

# The CPU build of vLLM logs at every import, in every process, that it runs without Triton.
logging.getLogger("vllm.triton_utils.importing").addFilter(
    lambda record: "CPU backend" not in record.msg
)
