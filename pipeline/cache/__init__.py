"""The teacher caches on disk: shards of rows, their index, and the selection of what is kept.

shard          writer and reader of one cache shard
columns        cells of numbers, from and to Arrow
logprobs       columns of a cache of distributions
hidden_states  columns of a cache of hidden states
row_checks     invariants of one row of distributions
index          index of the shards; missing and quarantined sequences
manifest       totals and engines of a cache, published with its index
reader         random access to rows
generations    versions of a cache: the one in use, the current one, the next one
selection      captured entries that are kept or drawn
kinds          kinds of caches, told by their names
projection     hidden states that are kept, whole or projected
"""
