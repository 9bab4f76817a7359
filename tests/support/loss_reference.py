"""The losses by their definitions, one position at a time, with sets of ids and autograd; shares no
computation with `students/`, which has only the losses' parameters here.
"""

import math

import torch

from students.losses.divergences import (
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
)


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
    """The teachers' mixture: the mass of an id from the teachers that keep it, and the weighted
    tails.
    """
    kept, tail = {}, 0.0
    for m, weight in enumerate(targets.teacher_weights[:, j].tolist()):
        for i, p in kept_by(targets, m, j).items():
            kept[i] = kept.get(i, 0.0) + weight * p
        tail = tail + weight * targets.tail_mass[m, j].item()
    return kept, tail


def kl(p, q):
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def jensen_shannon(loss, p, q):
    middle = loss.beta * p + (1 - loss.beta) * q
    return loss.beta * kl(p, middle) + (1 - loss.beta) * kl(q, middle)


def skew_kl(loss, p, q):
    first, second = (p, q) if loss.direction == "forward" else (q, p)
    return kl(first, loss.alpha * first + (1 - loss.alpha) * second)


DEFINITIONS = {
    ForwardKL: lambda loss, p, q: kl(p, q),
    ReverseKL: lambda loss, p, q: kl(q, p),
    JensenShannon: jensen_shannon,
    SkewKL: skew_kl,
    TotalVariation: lambda loss, p, q: (p - q).abs().sum() / 2,
}


def divergence(loss, p, q, has_bucket):
    """The divergence of two distributions over outcomes; the last outcome is the bucket."""
    temperature = loss.temperature
    if isinstance(loss, ReverseKL) and has_bucket:
        p = torch.cat([p[:-1], p[-1:].clamp(min=loss.min_tail)])
    if temperature != 1:
        p, q = (x ** (1 / temperature) for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
    return temperature**2 * DEFINITIONS[type(loss)](loss, p, q)


def reference_loss(loss, logits_PV, targets):
    """Sum over positions of one loss without its weight, in float64."""
    q_PV = torch.softmax(logits_PV.double(), -1)
    if isinstance(loss, CrossEntropy):
        return -q_PV.gather(1, targets.gold_ids[:, None]).log().sum()
    total = torch.zeros((), dtype=torch.float64)
    for j, q_V in enumerate(q_PV):
        if isinstance(loss, ForwardKL) and loss.temperature == 1:
            for m, weight in enumerate(targets.teacher_weights[:, j].tolist()):
                tail = targets.tail_mass[m, j].item()
                outcomes = coarse_outcomes(kept_by(targets, m, j), tail, q_V)
                total = total + weight * divergence(loss, *outcomes)
        else:
            total = total + divergence(loss, *coarse_outcomes(*mixture(targets, j), q_V))
    return total
