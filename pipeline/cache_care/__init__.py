"""Care of the caches: status, verification, repair, export and removal.

status        figures of each teacher's cache
verify        checksums and invariants of shards and rows
show          a sequence's rows, token by token
gc            files that no run names
regeneration  missing or damaged rows, and what a new generation takes over
exchange      long Parquet tables and DistillKit's datasets
"""
