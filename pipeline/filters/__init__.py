"""Filters: the choice of the written answers to train on.

run           the filters of a config in their order, with counts
candidates    a sequence as filters see it, and what they know besides
similar_sets  search for earlier texts that are alike
text          filters that look at each answer alone
likeness      duplicates and contamination
words         texts as people see them, and their words
evaluated     texts that are evaluated, and the words by which they are found
groups        votes, best of n, shares of domains
"""
