"""`mixture_of_experts.MoE` (PyTorch), and our layer with its weights."""

import torch
from mixture_of_experts import MoE

from keras_moe import FeedForwardExperts, MoeLayer, Top2MaskedRouter
from keras_moe.convert import load_weights


def pair(num_experts, hidden, d_ff, policy, threshold=0.2, train=1.25, evaluation=2.0):
    """Returns `(theirs, ours)`.

    Args:
        num_experts: int.
        hidden: int.
        d_ff: int.
        policy: the policy for second choices, in training and evaluation.
        threshold: float, the threshold of our policy; theirs is 0.2.
        train: float, the capacity factor in training.
        evaluation: float, the capacity factor in evaluation.
    """
    theirs = MoE(
        hidden,
        num_experts=num_experts,
        hidden_dim=d_ff,
        second_policy_train=policy,
        second_policy_eval=policy,
        capacity_factor_train=train,
        capacity_factor_eval=evaluation,
        loss_coef=1e-2,
    )
    enlarge_weights(theirs.experts)
    ours = MoeLayer(
        FeedForwardExperts(num_experts, d_ff, activation="relu", use_bias=False),
        Top2MaskedRouter(
            num_experts,
            use_bias=False,
            second_policy_train=policy,
            second_policy_eval=policy,
            second_threshold_train=threshold,
            second_threshold_eval=threshold,
        ),
        train_capacity_factor=train,
        eval_capacity_factor=evaluation,
        min_expert_capacity=4,
        name="moe",
    )
    ours.build((None, None, hidden))
    load_weights(ours, theirs, "lucidrains")
    return theirs, ours


def enlarge_weights(experts):
    """Assigns larger weights to their experts, whose initial weights are close to 0."""
    with torch.no_grad():
        for kernel in (experts.w1, experts.w2):
            kernel.normal_(std=kernel.shape[-2] ** -0.5)
