"""The architecture: how a model is built, where its parts are, and if it can be trained.

build            the student from its config, and a model from a folder
dtypes           number formats as transformers loads them
initial_weights  old weights that a training starts from
stored           the names and shapes of a pretrained student's files
body             hidden states of packed or padded sequences
noise            dropout and jitter of the model's config
routers          the balance loss that a model's config asks for
positions        rotary frequencies that depend on length
head             the LM head, and what follows it
checks           head and neighbours measured before training
skeleton         a small copy that is tried before anything is paid for
"""
