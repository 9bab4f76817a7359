"""Units of work for a teacher, each over one shard.

answer    prompts to answers to sequences
rewrite   requests to replies to new prompts
judge     answers to grades
score     sequences to cache rows
siblings  rows that answers with a common beginning share
rescore   stored rows against the engine's numbers now
holdout   hold-out answers: exact match, speed, latency
control   check that a teacher is sound
items     halves of a task's items, seeds of prompts
"""
