"""Checks of models before any engine starts.

identity      a model's hub commit, or the hash of its weights
vocabulary    whether all models mean the same by a token id
model_layers  whether models have the layers that losses name
"""
