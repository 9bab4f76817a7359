"""Synthesis: prompts, the steps that write and answer them, and what is finished.

prompts     prompt files to one checked, split, deduplicated table
rewriting   requests for new prompts, and new prompts from replies
steps       the recipes as steps: which teacher is asked what
index       finished prompt shards, and the dataset that follows
rejected    dropped answers and replies, as Parquet for people
templates/  the shipped prompt templates
"""
