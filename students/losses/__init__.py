"""The losses, in closed form and bounded memory; torch alone.

distillation   losses from hidden states and LM head, a chunk at a time
chunk          all losses of one chunk of logits, and the gradient back
outcomes       logits and targets to kept ids and a bucket
divergences    one parameter object per loss: value and gradient
hidden_states  losses on hidden states and relations
inputs         the tensors that losses read

A new loss on distributions: a model in `pipeline/config/losses.py`, a class and its line of
`LOSSES` in `divergences.py`, and an oracle in `tests/support/loss_reference.py`. A new loss on
hidden states: a model there, a class and its line of `LAYER_LOSSES` in `hidden_states.py`, and an
oracle in its test.
"""
