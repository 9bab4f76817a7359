"""Units of work that a teacher does, each over one shard.

answer    prompts to answers to sequences
rewrite   requests to replies to new prompts
judge     answers to grades
score     sequences to cache rows
siblings  rows that answers with a common beginning share
rescore   stored rows against the engine's numbers now
holdout   hold-out answers: exact match, speed, latency
"""
