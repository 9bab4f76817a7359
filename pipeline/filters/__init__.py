"""Filters: the choice of the written answers to train on.

run              the filters of a config in their order, with counts
candidates       a sequence as filters see it, and what they know besides
text             filters that look at each answer alone
likeness         duplicates and contamination
words            texts as people see them, and their words
evaluated        texts that are evaluated, and the words by which they are found
groups           votes, best of n, shares of domains
answer_checkers  functions that compare an answer with its reference
symbolic         the checker `math`, which asks math-verify
math_worker      the process in which math-verify runs
marked_parts     the part of an answer that is compared
prose            numbers in running text, with all that belongs to them
readings         readings of a part: a value, a list, or plain text
exact_values     exact values of short texts
plain_text       one writing of mathematical texts
"""
