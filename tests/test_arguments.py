"""Arguments of everything public: refused by an error that names them, or accepted."""

import inspect
import itertools
import math

import keras
import numpy as np
import pytest
from layer_check import functional
from samples import E, F, H, inputs

import keras_moe
from keras_moe import FeedForward, FeedForwardExperts, MaskedRouter, presets

POOL = [
    *(None, True, "x", "", -1, 0, 1, 2, 7, 0.5, -0.5, 1e30, 1e39, 10**12, 10**400),
    *(math.nan, math.inf, -math.inf, [], [None], {}, {"class_name": "x"}, object()),
]


def experts():
    return FeedForwardExperts(E, F)


def with_router(router):
    parts = FeedForwardExperts(router.num_experts, F), router
    return keras_moe.MoeLayer(*parts, eval_capacity_factor=2.0)


def with_experts(experts):
    return keras_moe.MoeLayer(experts, MaskedRouter(experts.num_experts))


def with_gate(gate):
    inputs = keras.Input((8, H))
    probs = gate(inputs)
    return keras.Model(inputs, inputs * keras.ops.max(probs, axis=-1, keepdims=True))


def with_activation(activation):
    return FeedForward(F, activation=activation, gated=True)


def two_routers():
    routers = [keras_moe.Top2MaskedRouter(2, name=name) for name in ("outer", "inner")]
    return {
        "experts": experts(),
        "outer_router": routers[0],
        "inner_router": routers[1],
    }


# Each class or function, the arguments that it requires, and how its result becomes a
# layer that can be trained.
SIZES, ITSELF = {"d_ff": F}, (lambda x: x)
CASES = {
    keras_moe.Gate: (lambda: {"num_experts": E}, with_gate),
    MaskedRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.ExpertsChooseMaskedRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.BiasBalancedMaskedRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.Top2MaskedRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.SparseMixerRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.TopPMaskedRouter: (lambda: {"num_experts": E}, with_router),
    keras_moe.activations.ClampedSwiGLU: (dict, with_activation),
    FeedForward: (lambda: SIZES, ITSELF),
    FeedForwardExperts: (lambda: {"num_experts": E, **SIZES}, with_experts),
    keras_moe.HeterogeneousExperts: (
        lambda: {"experts": [FeedForward(F) for _ in range(2)]},
        with_experts,
    ),
    keras_moe.MoeLayer: (
        lambda: {"experts": experts(), "router": MaskedRouter(E)},
        ITSELF,
    ),
    keras_moe.MoeLayerWithBackbone: (
        lambda: {"moe": with_router(MaskedRouter(E)), "backbone_d_ff": F},
        ITSELF,
    ),
    keras_moe.SoftMoeLayer: (lambda: {"experts": experts()}, ITSELF),
    keras_moe.HierarchicalMoeLayer: (two_routers, ITSELF),
    **{
        getattr(presets, name): (lambda n=n: {"num_experts": n, **SIZES}, ITSELF)
        for name, n in {
            **dict.fromkeys(("switch", "gshard", "mixtral", "expert_choice"), E),
            **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"), 8),
            **dict.fromkeys(("kimi_k2", "minimax_m2", "ernie4_5", "granite"), 8),
            **dict.fromkeys(("gpt_oss", "llama4"), E),
            **dict.fromkeys(("deepseek_v2", "deepseek_v3"), 16),
        }.items()
    },
}
# Another argument that an error may name, where two do not fit together.
ALSO = {
    "num_experts": ("num_selected_experts", "num_expert_groups"),
    "num_selected_groups": ("num_selected_experts",),
    "num_expert_groups": ("num_selected_groups",),
    "load_loss_weight": ("noise_std",),
}


def arguments_of(thing):
    names = set(inspect.signature(thing).parameters) - {"kwargs"}
    # Keras's own, and dicts that are forwarded to classes of this table.
    return sorted(names - {"name", "router_kwargs", "experts_kwargs"})


def make(thing, **arguments):
    return thing(**{**CASES[thing][0](), **arguments})


def accepted(thing, names=None):
    """What each argument makes of each value of the pool, if it is not refused."""
    names = arguments_of(thing) if names is None else names
    for name, value in itertools.product(names, POOL):
        try:
            yield name, value, make(thing, **{name: value})
        except (TypeError, ValueError) as error:
            names = (name, *ALSO.get(name, ()))
            assert any(f"`{n}`" in str(error) for n in names), (
                f"{name}={value!r}: {error}"
            )


each = pytest.mark.parametrize("thing", CASES, ids=lambda thing: thing.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:A capacity factor")


@each
def test_an_argument_is_refused_by_name_or_accepted(thing):
    found = list(accepted(thing))
    # Most values suit no argument.
    assert len(found) < len(POOL) * len(arguments_of(thing)) / 2
    if inspect.isclass(thing):
        config = make(thing).get_config()
        for name, value, _ in found:
            thing.from_config({**config, name: value})


# That what is accepted trains is shown on each backend by the tests of each layer; here
# hundreds of models train, op by op.
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="compiles nothing")
@pytest.mark.thorough
@each
def test_what_is_accepted_trains(thing, rng):
    # An argument is tried in the first class that has it.
    things = list(CASES)
    earlier = map(arguments_of, things[: things.index(thing)])
    names = set(arguments_of(thing)).difference(*earlier)
    x = inputs(rng, 2, 8)
    for name, value, result in accepted(thing, sorted(names)):
        model = functional(CASES[thing][1](result), x.shape[1:])
        model.compile(keras.optimizers.SGD(1e-3), "mae", run_eagerly=True)
        loss = np.ravel(model.train_on_batch(x, x[..., ::-1]))[0]
        assert np.isfinite(loss), f"{name}={value!r}: a loss of {loss}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: with_router(MaskedRouter(E, top_k=2)), "use `num_selected_experts`"),
        (
            lambda: keras_moe.MoeLayer(experts(), MaskedRouter(E), num_experts=E),
            "`num_experts` of the experts and of the router",
        ),
        (
            lambda: keras_moe.MoeLayer(experts(), MaskedRouter(E), top_k=2),
            "`num_selected_experts` of the router",
        ),
        (
            lambda: presets.mixtral(E, F, top_k=2),
            "`num_selected_experts` of the router",
        ),
        (
            lambda: keras_moe.SoftMoeLayer(experts(), capacity_factor=1.0),
            "`train_capacity_factor` and `eval_capacity_factor`",
        ),
        (
            lambda: presets.mixtral(E, F, router_kwargs=3),
            "`router_kwargs` must be a dict",
        ),
    ],
)
def test_arguments_of_other_packages(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_the_signatures_show_every_argument():
    """`help()` and editors show them: no layer hides its arguments in `**kwargs`."""
    for thing in CASES:
        shown = set(inspect.signature(thing).parameters)
        if inspect.isclass(thing):
            hidden = {n for n in make(thing).get_config() if not n.startswith("seed")}
            assert hidden - shown <= {"dtype", "trainable"}, thing.__name__
