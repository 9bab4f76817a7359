"""Teachers: vLLM engines or endpoints behind Ray actors, which write answers and score tokens.

protocol    the contract between a teacher and the tasks that use it
canary      sequences that every engine scores first, and their comparison
tokenizing  the student's tokenizer, prompt ids, answer text
engine/     a teacher in a vLLM engine of this run
endpoint/   a teacher behind an OpenAI-compatible API
pool/       Ray actors, and the tasks that they share
tasks/      units of work: answer, rewrite, judge, score
preflight/  checks of models before any engine starts
"""

import logging

# The CPU build of vLLM says at every import, in every process, that it does without Triton.
logging.getLogger("vllm.triton_utils.importing").addFilter(
    lambda record: "CPU backend" not in record.msg
)
