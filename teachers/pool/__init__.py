"""Ray actors of the teachers, and the tasks that they share.

pool       the pools of several teachers at once
actor      one engine in one Ray actor
dispatch   tasks to replicas: retry, halving, quarantine, replacement
placement  whether a node could hold an actor
"""
