"""The cluster: its job server, a local Ray head, and jobs on it.

stage_jobs     a stage as a Ray job, followed to its end
submit         upload, submission, list, stop
follow         log lines as they come, the end of a failed job
connection     address and token of a job server
local_head     a Ray head that lives as long as one command
head_guardian  ends that head with the command, even a killed one
placement      whether the cluster has room for every stage
run_lock       one command at a time in a run's folder
"""
