"""Teachers: vLLM engines in Ray actors that write answers and score given tokens."""

import logging

# The CPU build of vLLM says at every import, in every process, that it does without Triton.
logging.getLogger("vllm.triton_utils.importing").addFilter(
    lambda record: "CPU backend" not in record.msg
)
