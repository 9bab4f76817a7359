"""The teacher caches on disk: shards of rows, their index, and what is kept of a capture.

shard          writer and reader of one cache shard
columns        cells of numbers, from and to Arrow
logprobs       columns of a cache of distributions
hidden_states  columns of a cache of hidden states
row_checks     invariants of one row of distributions
index          index, manifest, random access
generations    versions of a cache: which is used, which comes next
selection      which captured entries are kept or drawn
projection     which hidden states are kept, whole or projected
"""
