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
    extra = [math.log(float(covariance(k, v, t).norm()) + 1e-5) if bias else 0.0 for t in keys]
    means = [mean(k, tokens) for tokens in keys]
    return [
        [
            scale * float(mean(q, block) @ means[j]) + extra[j] if tokens else -math.inf
            for j, tokens in enumerate(keys)
        ]
        for block in queries
    ]


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


def probe(q, k, queries, keys, scale, rest="centroid", weight="second"):
    """e_ij = Σ_m |exp(s q̄_i·k_m) - w_ij|, each row over its largest term."""
    k_mean, var = [mean(k, t) for t in keys], [variance(k, t) for t in keys]
    table = []
    for block in queries:
        centre = mean(q, block)
        row, terms = [], []
        for j, tokens in enumerate(keys):
            exact = (scale * (k[tokens] @ centre)).exp().tolist()
            instead = 0.0
            if tokens and rest != "drop":
                logit = scale * float(centre @ k_mean[j]) + correction(
                    centre, var[j], scale, rest, weight
                )
                instead = math.exp(logit)
                terms.append(instead)
            terms += exact
            row.append(sum(abs(value - instead) for value in exact))
        table.append([error / max(terms, default=1.0) for error in row])
    return table


def within(table, keys, density):
    """Blocks by falling error for each key, while the keys fit the budget; at least one."""
    budget = math.floor(density * sum(map(len, keys)))
    code = []
    for row in table:
        some = [j for j, tokens in enumerate(keys) if tokens]
        order = sorted(some, key=lambda j: -row[j] / len(keys[j]))
        taken, chosen = 0, []
        for j in order:
            taken += len(keys[j])
            if taken > budget:
                break
            chosen.append(j)
        chosen = chosen or order[:1]
        code.append([EXACT if j in chosen else REST for j in range(len(keys))])
    return code


def selection(q, k, tokens, blocks, valid, threshold, scope, mode):
    """The blocks that each of some query tokens selects by its gate: rows of bools."""
    keys = only_valid(blocks, valid)
    own = {n: j for j, block in enumerate(blocks) for n in block}
    full = [j for j, block in enumerate(keys) if block]
    means = [mean(k, block) for block in keys]
    gate = {(n, j): float(q[n] @ means[j]) for n in tokens for j in full}
    chosen = {(n, own[n]) for n in tokens}
    if gate:
        low, high = min(gate.values()), max(gate.values())
        gate = {pair: (value - low) / ((high - low) or 1.0) for pair, value in gate.items()}
    groups = [list(gate)]
    if scope == "token":
        groups = [[(n, j) for j in full] for n in tokens]
    for group in groups:
        worth = {pair: gate[pair] if mode == "threshold" else 1.0 for pair in group}
        wanted = threshold * sum(worth.values())
        if mode == "topk":
            wanted = max(1, math.floor(wanted + 1e-9))
        have = sum(worth[pair] for pair in group if pair in chosen)
        for pair in sorted(group, key=lambda pair: -gate[pair]):
            if pair in chosen:
                continue
            if have >= wanted:
                break
            chosen.add(pair)
            have += worth[pair]
    return [[(n, j) in chosen for j in range(len(blocks))] for n in tokens]


def sampled(tokens):
    """A quarter of the tokens: the middle one of as many equal stretches."""
    count = -(-len(tokens) // 4)
    return [tokens[(2 * i + 1) * len(tokens) // (2 * count)] for i in range(count)]


def levels(q, k, queries, keys, scale, ratios, mode, caps=None, min_exact=0.0):
    """PSA's level of every pair, by the importance of sampled tokens."""
    every = [m for tokens in keys for m in sampled(tokens)]
    full = [j for j, tokens in enumerate(keys) if tokens]
    code = []
    for row in queries:
        importance = dict.fromkeys(full, 0.0)
        for n in sampled(row) if every else ():
            share = (scale * (k[every] @ q[n])).softmax(0).tolist()
            share = dict(zip(every, share, strict=True))
            for j in full:
                importance[j] += sum(share[m] for m in sampled(keys[j]))
        total, before, line = sum(importance.values()), 0.0, [0] * len(keys)
        for rank, j in enumerate(sorted(full, key=lambda j: -importance[j])):
            place = before / total if mode == "threshold" else rank / len(full)
            level = next(
                (p for p, bound in zip((1, 2, 4, 8), ratios, strict=True) if place < bound), 0
            )
            level = 1 if rank / len(full) < min_exact else level
            while caps and level > 1 and not alike(k, keys[j], level, caps[level]):
                level //= 2
            line[j] = level
            before += importance[j]
        code.append(line)
    return code


def alike(k, tokens, level, cap):
    cosines = [
        float(torch.cosine_similarity(k[a], k[b], dim=0))
        for i in range(0, len(tokens), level)
        for a, b in zip(tokens[i : i + level], tokens[i + 1 : i + level], strict=False)
    ]
    return not cosines or sum(cosines) / len(cosines) >= cap


def correction(query, var, scale, rest, weight):
    """What `moment` adds to the logarithm of a weight."""
    if rest != "moment":
        return 0.0
    half = scale**2 * float((query**2 * var).sum()) / 2
    return math.log1p(half) if weight == "second" else half


def pooled(x, tokens, level):
    """Means of ``level`` consecutive tokens, and how many each is of."""
    groups = [tokens[i : i + level] for i in range(0, len(tokens), level)]
    counts = torch.tensor([len(group) for group in groups], dtype=x.dtype)
    if level == 1:
        return x[tokens], counts
    return torch.stack([x[group].mean(0) for group in groups]), counts


def attend(
    q, k, v, queries, keys, code, scale, rest="drop", taylor=None, weight="second", video=None
):
    """Output ``[L, D]`` and lse ``[L]`` by the table of rests and the definition of levels.

    ``keys`` hold valid tokens only; the first ``video`` of them are video blocks. A code above 0
    is a level: so many consecutive keys are averaged into one, and 1 is exact.
    """
    video = len(keys) if video is None else video
    length, depth = q.shape
    out = torch.zeros(length, v.shape[1], dtype=torch.float64)
    lse = torch.full((length,), -math.inf, dtype=torch.float64)
    k_mean, v_mean = [mean(k, t) for t in keys], [mean(v, t) for t in keys]
    var = [variance(k, t) for t in keys]
    first = rest in ("taylor", "moment") and taylor is not None
    cov = [covariance(k, v, t) for t in keys] if first else []
    for i, block in enumerate(queries):
        parts = [(tokens, code[i][j]) for j, tokens in enumerate(keys) if tokens and code[i][j] > 0]
        if parts:
            k_found, counts = zip(*(pooled(k, *part) for part in parts), strict=True)
            v_found, _ = zip(*(pooled(v, *part) for part in parts), strict=True)
            k_found, v_found, bias = torch.cat(k_found), torch.cat(v_found), torch.cat(counts).log()
        left = [j for j, tokens in enumerate(keys) if code[i][j] == REST and tokens]
        left = [] if rest == "drop" else left
        for n in block:
            logits = (scale * (k_found @ q[n]) + bias).tolist() if parts else []
            weights = [
                scale * float(q[n] @ k_mean[j]) + correction(q[n], var[j], scale, rest, weight)
                for j in left
            ]
            if not logits and not weights:
                continue
            peak = max(logits + weights)
            top = torch.zeros(v.shape[1], dtype=torch.float64)
            bottom = 0.0
            if logits:
                exact = (torch.tensor(logits, dtype=q.dtype) - peak).exp()
                top += exact @ v_found
                bottom += float(exact.sum())
            g = 0.0
            for j, logit in zip(left, weights, strict=True):
                w = math.exp(logit - peak)
                top += w * len(keys[j]) * v_mean[j]
                g += w * len(keys[j])
            if first and left:
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
