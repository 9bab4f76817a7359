"""A teacher in a vLLM engine of this run.

vllm_teacher     the teacher: scores tokens, writes answers
running_engine   the engine: start, requests, limits, shutdown
row_capture      rows of a sequence, with and without the prefix cache
options          checks against the options that the installed vLLM knows
arguments        the user's keys, our keys, our defaults
prompt_topk      vLLM's arrays of log-probabilities, kept and proved
state_connector  writes hidden states on a CPU; vLLM loads it
hidden_states    hidden states from the engine's process, file by file
reference        comparison of the engine with transformers on the CPU
hardware         device, memory and size of a model
"""
