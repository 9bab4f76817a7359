"""The losses by their definitions, one position at a time, with sets of ids and autograd; shares no
code with `students/`.
"""

import math

import torch


def coarse_outcomes(kept, tail, q_V):
    """Probabilities of the kept ids and of one bucket, for target and student."""
    others = [i for i in range(len(q_V)) if i not in kept]
    p, q = list(kept.values()), q_V[list(kept)]
    if others:
        p, q = [*p, tail], torch.cat([q, q_V[others].sum()[None]])
    return torch.tensor(p, dtype=torch.float64), q, bool(others)


def kept_by(targets, m, j):
    ids, logprobs = targets.token_ids[m, j].tolist(), targets.logprobs[m, j].tolist()
    return {i: math.exp(x) for i, x in zip(ids, logprobs, strict=True) if x > -math.inf}


def mixture(targets, j):
    """Of the teachers: what an id gets from those that keep it, and the weighted tails."""
    kept, tail = {}, 0.0
    for m, weight in enumerate(targets.teacher_weights[:, j].tolist()):
        for i, p in kept_by(targets, m, j).items():
            kept[i] = kept.get(i, 0.0) + weight * p
        tail = tail + weight * targets.tail_mass[m, j].item()
    return kept, tail


def kl(p, q):
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def divergence(term, p, q, has_bucket):
    """Of two distributions over outcomes; the last is the bucket."""
    temperature = term.temperature
    if term.type == "reverse_kl" and has_bucket:
        p = torch.cat([p[:-1], p[-1:].clamp(min=term.min_tail)])
    if temperature != 1:
        p, q = (x ** (1 / temperature) for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
    if term.type == "forward_kl":
        value = kl(p, q)
    elif term.type == "reverse_kl":
        value = kl(q, p)
    elif term.type == "jensen_shannon":
        middle = term.beta * p + (1 - term.beta) * q
        value = term.beta * kl(p, middle) + (1 - term.beta) * kl(q, middle)
    elif term.type == "skew_kl" and term.direction == "forward":
        value = kl(p, term.alpha * p + (1 - term.alpha) * q)
    elif term.type == "skew_kl":
        value = kl(q, term.alpha * q + (1 - term.alpha) * p)
    else:
        value = (p - q).abs().sum() / 2
    return temperature**2 * value


def reference_loss(term, logits_PV, targets):
    """Sum over positions of one loss without its weight, in float64."""
    q_PV = torch.softmax(logits_PV.double(), -1)
    if term.type == "cross_entropy":
        return -q_PV.gather(1, targets.gold_ids[:, None]).log().sum()
    total = torch.zeros((), dtype=torch.float64)
    for j, q_V in enumerate(q_PV):
        if term.type == "forward_kl" and term.temperature == 1:
            for m, weight in enumerate(targets.teacher_weights[:, j].tolist()):
                tail = targets.tail_mass[m, j].item()
                outcomes = coarse_outcomes(kept_by(targets, m, j), tail, q_V)
                total = total + weight * divergence(term, *outcomes)
        else:
            total = total + divergence(term, *coarse_outcomes(*mixture(targets, j), q_V))
    return total
