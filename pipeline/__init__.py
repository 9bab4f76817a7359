"""Data, contracts and pure functions of the distillation pipeline: no torch, no ray, no engine."""
