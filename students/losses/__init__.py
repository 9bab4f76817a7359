"""The losses, in closed form and bounded memory; torch alone.

distillation   losses from hidden states and LM head, a chunk at a time
divergences    value and gradient of each response-based loss
outcomes       logits to kept ids and bucket, and the gradient back
hidden_states  losses on hidden states and relations
inputs         the tensors that losses read
"""
