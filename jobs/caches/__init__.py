"""The `polystill cache` commands.

commands    arguments of the commands
actions     status, retry, show, export, import, gc
regenerate  scores stale, missing or corrupt rows
verify      checks every shard and row, and scores some again
"""
