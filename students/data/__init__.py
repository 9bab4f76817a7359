"""The student's data: examples, batches and packing; numpy alone, so loaders start fast.

examples       sequences with their combined targets
batches        order of the data, cut into steps and ranks
packing        micro-batches by a token budget, as arrays
hidden_states  the teachers' hidden states of a micro-batch
loader         processes that make the coming batches beside the training
"""
