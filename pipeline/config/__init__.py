"""The configuration: one module for each YAML section, and what joins them.

run        the whole config; storage, evaluation, cluster
checks     rules that concern several sections
base       section base class, resources, named types
prompts    `prompts`: sources, splits, checker
teachers   `teachers`: vLLM engines and endpoints
synthesis  `synthesis`: the recipes in their order
filters    `synthesis.filters`: one model for each filter
scoring    `scoring`: capture width, selection, hidden states
combine    `combine`: weighting of the teachers
student    `student`: model, start, serving
losses     `training.losses`: one model for each loss
training   `training`: steps, batches, workers
deepspeed  `training.deepspeed`: names of DeepSpeed's keys
load       YAML, overrides, absolute paths, error messages
rounds     the config of each round
"""
