"""Synthesis: prompts, the steps that write and answer them, and the records of finished work.

prompts          sources of prompts to one checked, split, deduplicated table
rows             rows of JSON Lines, JSON arrays, CSV, Parquet and dataset folders
stored_file      a stored file as a stream
parsing          a row to a checked prompt
rewriting        requests for new prompts, and new prompts from replies
steps            the recipes as steps: which author is asked which prompts
answered_shards  records of finished prompt shards
index            new prompts, counts and the dataset, from the answered shards
outcomes         outcomes of replies in words
rejected         rejected answers and replies, as Parquet for people
templates/       the shipped prompt templates
"""
