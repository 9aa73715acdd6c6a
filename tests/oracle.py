"""The layers in plain numpy, with loops: slow, and easy to be sure of.

Arrays are `[g, t, ...]`; a slot that holds no token holds -1.
"""

import itertools
import math

import numpy as np


def capacity(t, num_experts, factor, least=1):
    return min(max(round(factor * t / num_experts), least), t)


def groups(x, mask, examples_per_group):
    """Lists of (example, position) that are routed together."""
    batch, length = x.shape[:2]
    tokens = [[(b, s) for s in range(length)] for b in range(batch)]
    if examples_per_group is None:
        return [list(itertools.chain(*tokens))]
    if examples_per_group >= 1:
        n = int(examples_per_group)
        return [list(itertools.chain(*tokens[i : i + n])) for i in range(0, batch, n)]
    parts = round(1 / examples_per_group)
    t = math.ceil(length / parts)
    return [row[i : i + t] for row in tokens for i in range(0, length, t)]


def group_size(shape, examples_per_group):
    batch, length = shape[:2]
    if examples_per_group is None:
        return batch * length
    if examples_per_group >= 1:
        return int(examples_per_group) * length
    return math.ceil(length / round(1 / examples_per_group))


def softmax(logits):
    z = np.exp(logits - logits.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def best(scores, k):
    """The indices of the k largest, of equals the first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def tokens_choose(probs, valid, k, c, normalize=False, priority="choice"):
    """For one group: slots `[e][c]` of (token, weight), and wanted counts."""
    t, e = probs.shape
    wanted = []
    for token in range(t):
        chosen = best(probs[token], k) if valid[token] else []
        total = sum(probs[token][i] for i in chosen) if normalize else 1.0
        wanted.append([(i, probs[token][i] / total) for i in chosen])
    tokens = range(t)
    if priority == "probability":
        tokens = best(probs.max(-1), t)
    turns = [(token, choice) for choice in range(k) for token in tokens]
    if priority == "token":
        turns = [(token, choice) for token in tokens for choice in range(k)]
    return serve(wanted, turns, e, c)


def serve(wanted, turns, e, c):
    """Slots and counts for lists of (expert, weight), in turns."""
    slots = [[] for _ in range(e)]
    counts = np.zeros(e)
    for token, choice in turns:
        if choice < len(wanted[token]):
            expert, weight = wanted[token][choice]
            counts[expert] += 1
            if len(slots[expert]) < c:
                slots[expert].append((token, weight))
    return slots, counts


def top_two(probs, valid, c, keeps):
    """First choices, then second ones that `keeps(token, weight)` agrees to.

    The counts are those of the first choices.
    """
    t, e = probs.shape
    wanted = []
    counts = np.zeros(e)
    for token in range(t):
        chosen = best(probs[token], 2) if valid[token] else []
        total = sum(probs[token][i] for i in chosen)
        choices = [(i, probs[token][i] / total) for i in chosen]
        for expert, _ in choices[:1]:
            counts[expert] += 1
        wanted.append(choices[:1] + [x for x in choices[1:] if keeps(token, x[1])])
    turns = [(token, choice) for choice in range(2) for token in range(t)]
    return serve(wanted, turns, e, c)[0], counts


def bias_balanced(scores, bias, valid, k, c, groups=1, selected=1, scale=1.0):
    """The best scores plus bias, within the best groups of experts."""
    t, e = scores.shape
    size = e // groups
    wanted = []
    for token in range(t):
        biased = scores[token] + bias
        of_group = [
            sum(sorted(biased[i * size : (i + 1) * size])[-2:]) for i in range(groups)
        ]
        open_ = [i * size + j for i in best(of_group, selected) for j in range(size)]
        allowed = [biased[i] if i in open_ else -math.inf for i in range(e)]
        chosen = best(allowed, k) if valid[token] else []
        total = sum(scores[token][i] for i in chosen) if k > 1 else 1.0
        wanted.append([(i, scale * scores[token][i] / total) for i in chosen])
    turns = [(token, choice) for choice in range(k) for token in range(t)]
    return serve(wanted, turns, e, c)


def next_best(probs, valid, k, c, normalize=False):
    """One token after the other takes its k best experts that have room."""
    t, e = probs.shape
    slots = [[] for _ in range(e)]
    for token in range(t):
        if not valid[token]:
            continue
        open_ = [i for i in best(probs[token], e) if len(slots[i]) < c][:k]
        total = sum(probs[token][i] for i in open_) if normalize else 1.0
        for i in open_:
            slots[i].append((token, probs[token][i] / total))
    return slots


def experts_choose(probs, valid, c):
    t, e = probs.shape
    slots = []
    for expert in range(e):
        scores = [probs[token][expert] if valid[token] else -1 for token in range(t)]
        taken = [token for token in best(scores, c) if valid[token]]
        slots.append([(token, probs[token][expert]) for token in taken])
    return slots, np.array([float(len(s)) for s in slots])


def as_arrays(slots, c):
    """Slots `[e][c]` of one group as token_index `[e, c]` and weight."""
    index = np.full((len(slots), c), -1)
    weight = np.zeros((len(slots), c))
    for expert, row in enumerate(slots):
        for slot, (token, w) in enumerate(row):
            index[expert, slot], weight[expert, slot] = token, w
    return index, weight


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def feed_forward(x, weights, expert):
    w1, b1, w2, b2 = (w[expert] for w in weights)
    return gelu(x @ w1 + b1[0]) @ w2 + b2[0]


def balance_loss(groups):
    """Over groups: a list of probabilities, valid tokens and wanted counts."""
    loss, tokens = 0.0, 0
    for p, v, n in groups:
        if not any(v):
            continue
        f = n / n.sum()
        mean = np.mean([row for row, ok in zip(p, v, strict=True) if ok], axis=0)
        loss += sum(v) * p.shape[1] * float(np.sum(f * mean))
        tokens += sum(v)
    return loss / max(tokens, 1)


def moe(x, weights, *, factor, examples_per_group=1.0, mask=None, k=None, **how):
    """A whole layer: `k=None` for experts choose.

    Args:
        x: `[b, s, h]`.
        weights: kernel `[h, e]`, bias `[e]` of the gate, then the experts' four.

    Returns:
        outputs `[b, s, h]`, and a dict of the metrics.
    """
    x = np.asarray(x, "float64")
    kernel, bias, *experts = (np.asarray(w, "float64") for w in weights)
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    c = capacity(group_size(x.shape, examples_per_group), len(bias), factor)
    outputs = np.zeros_like(x)
    seen = []
    squares, served, filled, confidence, slot_count = [], 0, 0, 0.0, 0
    for tokens in groups(x, mask, examples_per_group):
        valid = [mask[token] for token in tokens]
        rows = np.stack([x[token] for token in tokens])
        rows = np.where(np.array(valid)[:, None], rows, 0)
        logits = rows @ kernel + bias
        probs = softmax(logits)
        if k is None:
            slots, counts = experts_choose(probs, valid, c)
        else:
            slots, counts = tokens_choose(probs, valid, k, c, **how)
        for expert, row in enumerate(slots):
            for token, weight in row:
                result = feed_forward(rows[token], experts, expert)
                outputs[tokens[token]] += weight * result
        seen.append((probs, valid, counts))
        log_z = np.log(np.exp(logits).sum(-1))
        squares += [z**2 for z, ok in zip(log_z, valid, strict=True) if ok]
        served += len({token for row in slots for token, _ in row})
        filled += sum(len(row) for row in slots)
        confidence += sum(weight for row in slots for _, weight in row)
        slot_count += len(bias) * c
    tokens = max(len(squares), 1)
    return outputs, {
        "unscaled_router_z_loss": sum(squares) / tokens,
        "load_balancing_loss": 0.0 if k is None else balance_loss(seen),
        "fraction_tokens_left_behind": (len(squares) - served) / tokens,
        "router_confidence": confidence / max(filled, 1),
        "expert_usage": filled / slot_count,
    }
