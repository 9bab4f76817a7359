"""One run: what it has prepared, what identifies its outputs, and its training.

preparation     what the prepare stage writes down for all later stages
prepared_run    a prepared run: config, paths and preparation together
identities      everything that decides the bytes of an answer or of a cache row
training_spec   one training, and everything that decides its weights
costs           price of a stage
shared_storage  proof that a node sees the storage that the driver sees
"""
