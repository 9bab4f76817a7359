"""Care of the caches: status, verification, repair, exchange and removal.

status        figures of each teacher's cache
verify        checksums and invariants of shards and rows
show          a sequence's rows, token by token
gc            files that no run names
ownership     names and marks of what polystill has written
entries       listing and removal that follow no link
runs_at_hand  are all runs there that may name a cache?
regeneration  missing or damaged rows, and rows that a new generation takes over
long_table    long Parquet tables for analysis
distillkit    DistillKit's datasets of logits
"""
