"""The student: losses, packed batches from the caches, the DeepSpeed training loop, checkpoints,
evaluation, export.
"""
