"""The export: a finished training as a Hugging Face folder that loads anywhere.

folder      the folder, written and checked against the training
generation  end tokens and sampling defaults
card        the model card
"""
