"""The methods' equations, token by token, in fp64, with no code shared with the library.

Works on one head: ``q, k, v`` are ``[L, D]`` and blocks are lists of token numbers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

EXACT, DROP, REST = 1, 0, -1


def lists(blocks, batch=0, head=0):
    """A `Blocks` as lists of tokens."""
    perm = (
        blocks.perm.expand(batch + 1, -1, -1)[batch]
        if blocks.perm.shape[0] == 1
        else blocks.perm[batch]
    )
    perm = perm[head if perm.shape[0] > 1 else 0].tolist()
    offsets = blocks.offsets[batch if blocks.offsets.shape[0] > 1 else 0]
    offsets = offsets[head if offsets.shape[0] > 1 else 0].tolist()
    return [perm[a:b] for a, b in pairwise(offsets)]


def only_valid(blocks, valid):
    return [[m for m in block if valid[m]] for block in blocks]


def mean(x, tokens):
    return x[tokens].mean(0) if tokens else torch.zeros(x.shape[1], dtype=x.dtype)


def covariance(k, v, tokens):
    """C_j = Σ (k_n - k̄) v_nᵀ."""
    total = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype)
    centre = mean(k, tokens)
    for n in tokens:
        total += torch.outer(k[n] - centre, v[n])
    return total


def variance(k, tokens):
    if not tokens:
        return torch.zeros(k.shape[1], dtype=k.dtype)
    return ((k[tokens] - mean(k, tokens)) ** 2).mean(0)


def scores(q, k, v, queries, keys, scale, bias):
    """score_ij over the blocks given; -inf for a key block without a valid key."""
    table = []
    for block in queries:
        centre = mean(q, block)
        row = []
        for tokens in keys:
            if not tokens:
                row.append(-math.inf)
                continue
            score = scale * float(centre @ mean(k, tokens))
            if bias:
                score += math.log(float(covariance(k, v, tokens).norm()) + 1e-5)
            row.append(score)
        table.append(row)
    return table


def topk(table, density):
    code = []
    for row in table:
        some = [j for j, score in enumerate(row) if score > -math.inf]
        count = min(len(some), max(1, math.floor(density * len(some))))
        best = sorted(some, key=lambda j: -row[j])[:count]
        code.append([EXACT if j in best else REST for j in range(len(row))])
    return code


def topp(table, keys, p):
    code = []
    for row in table:
        some = [j for j, score in enumerate(row) if score > -math.inf]
        peak = max((row[j] for j in some), default=0.0)
        mass = {j: len(keys[j]) * math.exp(row[j] - peak) for j in some}
        total, taken, chosen = sum(mass.values()), 0.0, []
        for j in sorted(some, key=lambda j: -mass[j]):
            if chosen and taken >= p * total:
                break
            chosen.append(j)
            taken += mass[j]
        code.append([EXACT if j in chosen else REST for j in range(len(row))])
    return code


def with_text(code, num_queries, num_keys):
    """A code over video blocks, with exact rows and columns for the text blocks."""
    columns = len(code[0]) if code else 0
    rows = [row + [EXACT] * (num_keys - columns) for row in code]
    return rows + [[EXACT] * num_keys for _ in range(num_queries - len(rows))]


def attend(
    q, k, v, queries, keys, code, scale, rest="drop", taylor=None, weight="second", video=None
):
    """Output ``[L, D]`` and lse ``[L]`` by the table of rests.

    ``keys`` hold valid tokens only; the first ``video`` of them are video blocks.
    """
    video = len(keys) if video is None else video
    length, depth = q.shape
    out = torch.zeros(length, v.shape[1], dtype=torch.float64)
    lse = torch.full((length,), -math.inf, dtype=torch.float64)
    k_mean, v_mean = [mean(k, t) for t in keys], [mean(v, t) for t in keys]
    var = [variance(k, t) for t in keys]
    cov = [covariance(k, v, t) for t in keys]
    for i, block in enumerate(queries):
        exact = [m for j, tokens in enumerate(keys) if code[i][j] == EXACT for m in tokens]
        left = [j for j, tokens in enumerate(keys) if code[i][j] == REST and tokens]
        left = [] if rest == "drop" else left
        for n in block:
            logits = [scale * float(q[n] @ k[m]) for m in exact]
            weights = []
            for j in left:
                logit = scale * float(q[n] @ k_mean[j])
                if rest == "moment":
                    sigma2 = scale**2 * float((q[n] ** 2 * var[j]).sum())
                    logit += math.log(1 + sigma2 / 2) if weight == "second" else sigma2 / 2
                weights.append(logit)
            if not logits and not weights:
                continue
            peak = max(logits + weights)
            top = torch.zeros(v.shape[1], dtype=torch.float64)
            bottom = 0.0
            for m, logit in zip(exact, logits, strict=True):
                top += math.exp(logit - peak) * v[m]
                bottom += math.exp(logit - peak)
            g = 0.0
            for j, logit in zip(left, weights, strict=True):
                w = math.exp(logit - peak)
                top += w * len(keys[j]) * v_mean[j]
                g += w * len(keys[j])
            if rest in ("taylor", "moment") and taylor and left:
                over = range(video) if taylor == "global" else left
                tokens = sum(len(keys[j]) for j in over)
                total = sum(
                    (cov[j] for j in over), torch.zeros(depth, v.shape[1], dtype=torch.float64)
                )
                top += scale * (q[n] @ total) * g / tokens
            bottom += g
            out[n] = top / bottom
            lse[n] = peak + math.log(bottom)
    return out, lse


def naive_low_precision(q, k, v, scale):
    """Dense attention computed naively in the inputs' own dtype: the yardstick of its rounding."""
    logits = (q @ k.mT) * scale
    return torch.softmax(logits, -1) @ v
