"""Reference implementation of the layers in numpy, with loops: slow, easy to verify.

Arrays are `[g, t, ...]`; -1 marks an empty slot.
"""

import itertools
import math

import numpy as np


def capacity(t, num_experts, factor, minimum=1):
    return min(max(round(factor * t / num_experts), minimum), t)


def groups(x, mask, examples_per_group):
    """Returns the groups, as lists of (example, position)."""
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


def top_k(scores, k):
    """Returns the indices of the k largest scores; ties go to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def tokens_choose(probs, valid, k, c, normalize=False, priority="choice"):
    """Token-choice routing of one group.

    Returns:
        Slots `[e][c]` of (token, weight), and the assignments to each expert before
        dropping.
    """
    t, e = probs.shape
    choices = []
    for token in range(t):
        selected = top_k(probs[token], k) if valid[token] else []
        total = sum(probs[token][i] for i in selected) if normalize else 1.0
        choices.append([(i, probs[token][i] / total) for i in selected])
    tokens = range(t)
    if priority == "probability":
        tokens = top_k(probs.max(-1), t)
    order = [(token, rank) for rank in range(k) for token in tokens]
    if priority == "token":
        order = [(token, rank) for token in tokens for rank in range(k)]
    return assign_slots(choices, order, e, c)


def assign_slots(choices, order, e, c):
    """Assigns slots to each token's choices in the given order.

    Args:
        choices: for each token, a list of (expert, weight).
        order: (token, rank) pairs, where rank is an index of a token's choices.
        e: int, the number of experts.
        c: int, the number of slots of each expert.

    Returns:
        Slots `[e][c]` of (token, weight), and the assignments to each expert before
        dropping.
    """
    slots = [[] for _ in range(e)]
    counts = np.zeros(e)
    for token, rank in order:
        if rank < len(choices[token]):
            expert, weight = choices[token][rank]
            counts[expert] += 1
            if len(slots[expert]) < c:
                slots[expert].append((token, weight))
    return slots, counts


def top_two(probs, valid, c, keeps):
    """Top-2 routing, with the second choices for which `keeps(token, weight)` is true.

    The counts are those of the first choices.
    """
    t, e = probs.shape
    choices = []
    counts = np.zeros(e)
    for token in range(t):
        selected = top_k(probs[token], 2) if valid[token] else []
        total = sum(probs[token][i] for i in selected)
        pair = [(i, probs[token][i] / total) for i in selected]
        for expert, _ in pair[:1]:
            counts[expert] += 1
        choices.append(pair[:1] + [x for x in pair[1:] if keeps(token, x[1])])
    order = [(token, rank) for rank in range(2) for token in range(t)]
    return assign_slots(choices, order, e, c)[0], counts


def bias_balanced(scores, bias, valid, k, c, groups=1, selected=1, scale=1.0):
    """Top-k routing by score plus bias, limited to the best groups of experts."""
    t, e = scores.shape
    size = e // groups
    choices = []
    for token in range(t):
        biased = scores[token] + bias
        group_scores = [
            sum(sorted(biased[i * size : (i + 1) * size])[-2:]) for i in range(groups)
        ]
        best_groups = top_k(group_scores, selected)
        allowed = [i * size + j for i in best_groups for j in range(size)]
        limited = [biased[i] if i in allowed else -math.inf for i in range(e)]
        experts = top_k(limited, k) if valid[token] else []
        total = sum(scores[token][i] for i in experts) if k > 1 else 1.0
        choices.append([(i, scale * scores[token][i] / total) for i in experts])
    order = [(token, rank) for rank in range(k) for token in range(t)]
    return assign_slots(choices, order, e, c)


def next_best(probs, valid, k, c, normalize=False):
    """Assigns each token, in order, to its k best experts with empty slots."""
    t, e = probs.shape
    slots = [[] for _ in range(e)]
    for token in range(t):
        if not valid[token]:
            continue
        selected = [i for i in top_k(probs[token], e) if len(slots[i]) < c][:k]
        total = sum(probs[token][i] for i in selected) if normalize else 1.0
        for i in selected:
            slots[i].append((token, probs[token][i] / total))
    return slots


def experts_choose(probs, valid, c):
    """Expert-choice routing of one group; returns slots and counts."""
    t, e = probs.shape
    slots = []
    for expert in range(e):
        scores = [probs[token][expert] if valid[token] else -1 for token in range(t)]
        selected = [token for token in top_k(scores, c) if valid[token]]
        slots.append([(token, probs[token][expert]) for token in selected])
    return slots, np.array([float(len(s)) for s in slots])


def as_arrays(slots, c):
    """Converts the slots `[e][c]` of one group to arrays: token_index and weight."""
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
    """Load-balancing loss of groups, tuples of probabilities, valid tokens, counts."""
    loss, tokens = 0.0, 0
    for p, v, n in groups:
        if not any(v):
            continue
        f = n / n.sum()
        mean = np.mean([row for row, ok in zip(p, v, strict=True) if ok], axis=0)
        loss += sum(v) * p.shape[1] * float(np.sum(f * mean))
        tokens += sum(v)
    return loss / max(tokens, 1)


def max_load(groups):
    """Mean over the groups with a token of the largest load over the mean load."""
    found = [len(n) * n.max() / n.sum() for _, _, n in groups if n.sum()]
    return float(np.mean(found)) if found else 0.0


def moe(x, weights, *, factor, examples_per_group=1.0, mask=None, k=None, **options):
    """A whole MoE layer.

    Args:
        x: `[b, s, h]`.
        weights: kernel `[h, e]` and bias `[e]` of the gate, then the kernels and
            biases of both layers of the experts.
        factor: float, the capacity factor.
        examples_per_group: as in `MoeLayer`.
        mask: bool `[b, s]`, or `None`.
        k: int, the number of experts per token, or `None` for expert choice.
        **options: arguments of `tokens_choose`.

    Returns:
        Outputs `[b, s, h]`, and a dict of the metrics.
    """
    x = np.asarray(x, "float64")
    kernel, bias, *experts = (np.asarray(w, "float64") for w in weights)
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    c = capacity(group_size(x.shape, examples_per_group), len(bias), factor)
    outputs = np.zeros_like(x)
    groups_seen = []
    squares, routed, filled, confidence, slot_count = [], 0, 0, 0.0, 0
    for tokens in groups(x, mask, examples_per_group):
        valid = [mask[token] for token in tokens]
        rows = np.stack([x[token] for token in tokens])
        rows = np.where(np.array(valid)[:, None], rows, 0)
        logits = rows @ kernel + bias
        probs = softmax(logits)
        if k is None:
            slots, counts = experts_choose(probs, valid, c)
        else:
            slots, counts = tokens_choose(probs, valid, k, c, **options)
        for expert, row in enumerate(slots):
            for token, weight in row:
                result = feed_forward(rows[token], experts, expert)
                outputs[tokens[token]] += weight * result
        groups_seen.append((probs, valid, counts))
        log_z = np.log(np.exp(logits).sum(-1))
        squares += [z**2 for z, ok in zip(log_z, valid, strict=True) if ok]
        routed += len({token for row in slots for token, _ in row})
        filled += sum(len(row) for row in slots)
        confidence += sum(weight for row in slots for _, weight in row)
        slot_count += len(bias) * c
    tokens = max(len(squares), 1)
    return outputs, {
        "unscaled_router_z_loss": sum(squares) / tokens,
        "load_balancing_loss": 0.0 if k is None else balance_loss(groups_seen),
        "fraction_tokens_left_behind": (len(squares) - routed) / tokens,
        "router_confidence": confidence / max(filled, 1),
        "expert_usage": filled / slot_count,
        "max_load": max_load(groups_seen),
    }
