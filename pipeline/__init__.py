"""Contracts and pure functions of the distillation pipeline: no torch, no Ray, no vLLM.

errors       errors that a user can act on
filesystems  which file system holds a path, its errors in words, other tries
storage      files on a local disk, NFS or an object store
layout       paths of all files below a storage root
fingerprint  stable hashes of everything that decides an output
records      frozen records that cross the boundaries between stages
sequences    sequence shards and the dataset
final_text   the part of an answer behind its thoughts
templating   arguments of chat templates, as Jinja text
rope         rotary settings in a model's config
messages     tables, shown values, spelling hints and foreign text for people
plain_json   JSON of people and of other programs to plain values
credentials  secrets in configs, and texts that show none
yaml_text    YAML that people write, with bounds and the place of every fault
child        a program that could hold up or flood its parent
config/      the configuration, one module for each YAML section
synthesis/   prompts, the steps that write and answer them, records of finished work
checkers/    is an answer right, given its reference?
filters/     the choice of the answers to train on
cache/       cache shards, their index and their generations
cache_care/  status, verification, repair, export and removal of caches
combine/     weights of the teachers and the product of their distributions
run/         preparation, identities and training of one run
report/      the report: statistics, tables, HTML page
"""
