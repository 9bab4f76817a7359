"""Complete checkpoints, resume, and the refusal of a changed training.

checkpoint  saving and loading checkpoints, removing old ones
resume      the checkpoint to resume from, compared with the training
universal   resume on other workers and at another ZeRO stage
"""
