"""The export: a finished training as a Hugging Face folder that loads anywhere.

folder      the folder, written from the final weights
proof       the folder is the trained student: weights, buffers, log-probabilities
generation  end tokens and sampling defaults
card        the model card
"""
