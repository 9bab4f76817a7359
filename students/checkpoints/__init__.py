"""Complete checkpoints, resume, and the refusal of a changed training.

checkpoint  saving and loading checkpoints, removing old ones
ranks       the files of every worker, and the workers whose files are missing
removal     removal of what a training has written, and of nothing else
resume      the checkpoint to resume from, compared with the training
universal   resume on other workers and at another ZeRO stage
attempts    the training that began last in a folder, and the end of all others
agreement   work that rank 0 does for all workers
"""
