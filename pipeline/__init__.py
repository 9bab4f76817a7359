"""Contracts and pure functions of the distillation pipeline: no torch, no Ray, no engine.

errors       errors that a user can act on
storage      files on a local disk, NFS or an object store
layout       every path below a storage root
fingerprint  stable hashes of what decides an output
records      frozen records that cross the boundaries between stages
sequences    sequence shards and the dataset
messages     tables and close names in what people read
config/      the configuration, one module for each YAML section
synthesis/   prompts, the steps that write and answer them, what is finished
filters/     which answers are trained on
cache/       cache shards, their index and their generations
cache_care/  status, verification, repair, export and removal of caches
combine/     weights of the teachers and the product of their distributions
run/         what one run has prepared, its identities and its training
report/      the report: statistics, tables, HTML page
"""
