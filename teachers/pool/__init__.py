"""Ray actors of the teachers, and the tasks that these actors share.

contracts    what a task and a replica must do; the pool's report
pool         the pools of several teachers at once
actor        one teacher in one Ray actor
dispatch     replicas: start, tasks in flight, death, replacement
task_ledger  tasks: retry, halving, quarantine
placement    whether nodes could hold an actor, and what one waits for
deaths       why an actor died, in one line
"""
