"""Checkers: is an answer right, given its reference?

answer_checkers  checkers by their names, and answers at which one raises
marked_parts     the part of an answer that is compared
prose            numbers in running text, with all that belongs to them
readings         readings of a part: a value, a list, or plain text
exact_values     exact values of short texts
number_words     words behind numbers: scales, units, words that alter
plain_text       one writing of mathematical texts
symbolic         the checker `math`, which asks math-verify
math_worker      the process in which math-verify runs
"""
