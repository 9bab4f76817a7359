"""One run: what it has prepared, what identifies its outputs, and its training.

preparation    the outcome of the prepare stage
identities     what decides an answer's or a row's bytes
training_spec  what a training is, and what decides its weights
costs          price of a stage
"""
