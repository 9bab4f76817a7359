"""Teachers: vLLM engines in Ray actors that write answers and score given tokens."""
