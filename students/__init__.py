"""The student: training on cached targets, its evaluation and its export.

trainer            the training loop, top to bottom
model              the module that DeepSpeed gets: body, LM head and losses
deepspeed_engine   DeepSpeed around the student
deepspeed_options  checks of the `deepspeed` block by DeepSpeed itself
progress           metrics, TensorBoard, progress lines
micro_batch        a packed micro-batch as tensors
training_data      a worker's data: steps read ahead, hold-out, probe
evaluation         hold-out loss, KL, agreement
reference          log-probabilities by transformers alone, and their noise
disk_space         one message for a full disk
departure          stop behind a checkpoint before a node goes away
surroundings       what a worker knows of the cluster
architecture/      how the student is built, its parts, and their checks
losses/            the losses, in closed form and bounded memory
data/              examples, batches and packing; numpy alone
export/            Hugging Face folder, checked against the training
checkpoints/       complete checkpoints, resume and its refusals
launching/         the start on the nodes of a cluster, and restarts
"""
