"""Checks of models before any engine starts.

models        the files of all models of a run
folder        the small files in a model folder
weights       headers and indices of safetensors
identity      a model's hub commit, or the hash of its weights
vocabulary    whether all models mean the same by a token id
boundary      whether prompt and answer meet as the chat template writes them
template      settings of the chat template, and the answers that it has to suit
forms         text that a chat template writes around the messages of a prompt
model_layers  whether models have the layers that losses name
"""
