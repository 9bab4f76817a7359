"""The `polystill cache` commands.

commands    arguments of the commands
run_caches  sequences and caches of one run, which every command is about
actions     status, retry, show, export, import, gc
regenerate  scores stale, missing or corrupt rows
verify      checks every shard and row, and scores some rows again
"""
