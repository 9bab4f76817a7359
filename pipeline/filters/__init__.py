"""Filters: which of the written answers are trained on.

run              runs a config's filters in order, with counts
candidates       a sequence as filters see it, and the evidence beside it
text             filters that judge each answer alone
likeness         duplicates and contamination
groups           votes, best of n, shares of domains
answer_checkers  whether an answer is right, given its reference
"""
