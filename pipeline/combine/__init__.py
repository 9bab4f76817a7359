"""Combination of several teachers into the targets of one sequence.

weights  how much each teacher weighs at each position
product  normalised weighted geometric mean of the teachers
learned  weights learned on the validation split
"""
