"""Complete checkpoints, resume, and the refusal of a changed training.

checkpoint  saving, finding, loading and comparing checkpoints
universal   resume on other workers and at another ZeRO stage
"""
