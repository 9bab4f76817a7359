"""The command line, the stages as Ray jobs, and the cluster that they run on.

__main__      the command line
console       the one place that writes to the terminal
faults        one line, and a log, for errors that nobody expected
distill       the whole run, every stage in order
dry_run       plan, resources and bytes, as text
bookkeeping/  what each stage has done and still has to do
stages/       what each stage's Ray job does
caches/       the `polystill cache` commands
cluster/      job server, local Ray head, submission
"""
