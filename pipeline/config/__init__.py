"""Configuration: one module for each YAML section, and the modules that join them.

run        the whole config; sections storage, evaluation and cluster
checks     rules that concern several sections at once
base       section base class, resources, named types
prompts    `prompts`: sources, splits, checker
teachers   `teachers`: vLLM engines and endpoints
synthesis  `synthesis`: one model for each recipe
filters    `synthesis.filters`: one model for each filter
scoring    `scoring`: capture width, one model for each selection, storage of hidden states
combine    `combine`: method, one model for each weighting
student    `student`: model, start, serving
losses     `training.losses`: one model for each loss
training   `training`: steps, batches, workers
deepspeed  `training.deepspeed`: names of DeepSpeed's options
load       YAML file and overrides to a checked config with absolute paths
rounds     the config of each round
"""
