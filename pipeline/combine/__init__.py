"""Combination of several teachers into the targets of one sequence.

weights  weight of each teacher at each position
product  normalised weighted geometric mean of the teachers' distributions
learned  weights learned from the validation split
"""
