"""The cluster: its job server, a local Ray head, and the jobs that run on either.

stage_jobs     a stage or a cache command as a Ray job, followed to its end
upload         packages and config of a job
submit         submission, list, stop and logs of jobs
follow         log lines as they come, and the message of a failed job
connection     address and token of a job server
local_head     a Ray head that lives as long as one command
head_guardian  ends the local Ray head with its command, even if the command is killed
placement      whether the cluster has room for every stage
node_task      one function on a node that has the resources for it
run_lock       one command at a time in a run's folder
"""
