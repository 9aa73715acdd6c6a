"""Every argument of everything public, with values that it may not like.

An argument is either refused at once, by an error that names it, or what is made of
it trains.
"""

import collections
import functools
import inspect
import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_check import functional

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    Gate,
    HeterogeneousExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    SoftMoeLayer,
    Top2MaskedRouter,
    presets,
)

E, H, F = 4, 6, 5

POOL = [
    *(None, True, "x", "", -1, 0, 1, 2, 7, 0.5, -0.5, 1e30, 1e39, 10**12, 10**400),
    *(math.nan, math.inf, -math.inf, [], [None], {}, {"class_name": "x"}, object()),
]

pytestmark = pytest.mark.filterwarnings("ignore:A capacity factor")


def make_experts(num_experts=E):
    return FeedForwardExperts(num_experts, F)


def with_router(router):
    return MoeLayer(make_experts(router.num_experts), router, eval_capacity_factor=2.0)


def with_experts(experts):
    return MoeLayer(experts, MaskedRouter(experts.num_experts))


def as_it_is(layer):
    return layer


class Gated(keras.layers.Layer):
    """Makes of a gate a layer that keeps the shape."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def call(self, inputs):
        return inputs * keras.ops.max(self.gate(inputs), axis=-1, keepdims=True)


# What some arguments take besides.
NAMES = [
    *("softmax", "sigmoid", "gumbel", "choice", "token", "probability", "next_best"),
    *("all", "none", "threshold", "random", "relu", "ones", ("expert_usage",), [3, 2]),
    *(False, 3, 4, 0.25, 1.25),
]

# What is made, the arguments that it needs, and how it becomes a layer to train.
THINGS = {
    Gate: (lambda: {"num_experts": E}, Gated),
    MaskedRouter: (lambda: {"num_experts": E}, with_router),
    ExpertsChooseMaskedRouter: (lambda: {"num_experts": E}, with_router),
    BiasBalancedMaskedRouter: (lambda: {"num_experts": E}, with_router),
    Top2MaskedRouter: (lambda: {"num_experts": E}, with_router),
    FeedForward: (lambda: {"d_ff": F}, as_it_is),
    FeedForwardExperts: (lambda: {"num_experts": E, "d_ff": F}, with_experts),
    HeterogeneousExperts: (
        lambda: {"experts": [FeedForward(F) for _ in range(2)]},
        with_experts,
    ),
    MoeLayer: (
        lambda: {"experts": make_experts(), "router": MaskedRouter(E)},
        as_it_is,
    ),
    MoeLayerWithBackbone: (
        lambda: {"moe": with_router(MaskedRouter(E)), "backbone_d_ff": F},
        as_it_is,
    ),
    SoftMoeLayer: (lambda: {"experts": make_experts()}, as_it_is),
    HierarchicalMoeLayer: (
        lambda: {
            "experts": make_experts(),
            "outer_router": Top2MaskedRouter(2, name="outer"),
            "inner_router": Top2MaskedRouter(2, name="inner"),
        },
        as_it_is,
    ),
    presets.switch: (lambda: {"num_experts": E, "d_ff": F}, as_it_is),
    presets.gshard: (lambda: {"num_experts": E, "d_ff": F}, as_it_is),
    presets.mixtral: (lambda: {"num_experts": E, "d_ff": F}, as_it_is),
    presets.qwen3_moe: (lambda: {"num_experts": 8, "d_ff": F}, as_it_is),
    presets.olmoe: (lambda: {"num_experts": 8, "d_ff": F}, as_it_is),
    presets.deepseek_v3: (lambda: {"num_experts": 16, "d_ff": F}, as_it_is),
    presets.expert_choice: (lambda: {"num_experts": E, "d_ff": F}, as_it_is),
}
# Another argument that an error may name, where two do not go together.
ALSO = {
    "num_experts": ("num_selected_experts", "num_expert_groups"),
    "num_selected_groups": ("num_selected_experts",),
    "num_expert_groups": ("num_selected_groups",),
}
each_thing = pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)


def declared(part):
    """The names of the arguments that a class or function declares itself."""
    function = part.__init__ if inspect.isclass(part) else part
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


def find_arguments():
    """For each thing, its arguments: its own, those it inherits, and all."""
    arguments, seen = {}, set()
    for thing in THINGS:
        parts = thing.__mro__ if inspect.isclass(thing) else [thing]
        parts = [p for p in parts if p.__module__.startswith("keras_moe")]
        every = set().union(*map(declared, parts))
        # What another thing inherits too is tried with the first.
        new = set().union(*(declared(p) for p in parts if p not in seen))
        seen.update(parts)
        if not inspect.isclass(thing):
            every |= {"train_capacity_factor", "examples_per_group", "name"}
        arguments[thing] = sorted(new), sorted(every)
    return arguments


ARGUMENTS = find_arguments()


def attempt(make, names):
    """What `make` makes, or `None` where it is refused as it should be.

    Raises:
        AssertionError: for an error of another type, or that names no argument.
    """
    try:
        return make()
    except (TypeError, ValueError) as error:
        # Keras puts the whole config before what it ran into.
        message = str(error).rpartition("Exception encountered: ")[2]
        if any(f"`{name}{end}" in message for name in names for end in "`="):
            return None
        raise AssertionError(message) from error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def step(thing, layer, x):
    """A step of training."""
    model = functional(THINGS[thing][1](layer), x.shape[1:])
    # Op by op: compiling each of them would take longer.
    model.compile(keras.optimizers.SGD(1e-3), "mae", run_eagerly=True)
    loss = np.ravel(model.train_on_batch(x, x[..., ::-1]))[0]
    assert np.isfinite(loss), f"a loss of {loss}"


class Trials:
    """What was tried with a thing, in numbers, and what went wrong."""

    def __init__(self, thing, trains):
        self.thing, self.trains = thing, trains
        self.x = np.random.default_rng(0).normal(size=(2, 8, H)).astype("float32")
        self.count = collections.Counter()
        self.faults = []
        self._trained = set()
        self._config = self.make().get_config()

    def make(self, **arguments):
        return self.thing(**{**THINGS[self.thing][0](), **arguments})

    def trial(self, also=(), **arguments):
        """Tries values as arguments and in a config, and a step."""
        self.count["tried"] += 1
        names = {n for name in arguments for n in (name, *ALSO.get(name, ()))}
        names |= set(also)
        try:
            layer = attempt(lambda: self.make(**arguments), names)
            if inspect.isclass(self.thing):
                config = {**self._config, **arguments}
                again = attempt(lambda: self.thing.from_config(config), names)
                assert (again is None) == (layer is None), "a config decides otherwise"
            self.count["refused" if layer is None else "accepted"] += 1
            if layer is not None and self.trains:
                self._train(layer)
        except Exception as error:
            error = f"{type(error).__name__}: {error}"
            self.faults.append(f"{self.thing.__name__}({arguments}): {error[:500]}")

    def _train(self, layer):
        config = repr({**layer.get_config(), "name": None})
        # The same layer again, of 1 for 1.0 or of its own default.
        if config not in self._trained:
            self._trained.add(config)
            step(self.thing, layer, self.x)
            self.count["trained"] += 1


def report(trials, record_property):
    for name, number in trials.count.items():
        record_property(name, number)
    print(trials.thing.__name__, dict(trials.count))
    assert not trials.faults, "\n".join(trials.faults)
    assert trials.count["tried"] == (trials.count["refused"] + trials.count["accepted"])


@each_thing
def test_each_argument_is_refused_or_makes_a_layer(thing, record_property):
    new, _ = ARGUMENTS[thing]
    trials = Trials(thing, trains=False)
    for name, value in itertools.product(new, POOL):
        trials.trial(**{name: value})
    report(trials, record_property)
    # Most values suit no argument.
    assert trials.count["refused"] > trials.count["accepted"] > 0


# Which values are taken depends on no backend, and that what is taken trains is shown
# on each by the tests of each layer: this is a hundred models more, op by op.
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="on PyTorch alone")
@pytest.mark.thorough
@each_thing
def test_what_is_accepted_trains(thing, record_property):
    new, every = ARGUMENTS[thing]
    trials = Trials(thing, trains=True)
    for name, value in itertools.product(every, POOL):
        # What it inherits does in its place what it does in the first heir.
        trials.trains = name in new
        trials.trial(**{name: value})
    report(trials, record_property)
    assert trials.count["accepted"] >= trials.count["trained"] > 0


@functools.cache
def suitable(thing, name):
    """The values that an argument takes, if the others are as they are."""
    names = ARGUMENTS[thing][1]
    trials = Trials(thing, trains=False)
    values = []
    for value in (*POOL, *NAMES):
        make = functools.partial(trials.make, **{name: value})
        if attempt(make, names) is not None:
            values.append(value)
    return values


# Where nothing is compiled, they take seconds.
MANY = 50 if keras.backend.backend() == "torch" else 10


@pytest.mark.thorough
@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(st.data())
def test_several_arguments_at_once(data):
    """Each would do alone: together they do, or one of them is named."""
    thing = data.draw(st.sampled_from(list(THINGS)))
    names = data.draw(
        st.sets(st.sampled_from(ARGUMENTS[thing][1]), min_size=2, max_size=4)
    )
    values = {
        n: data.draw(st.sampled_from(suitable(thing, n) or [None]))
        for n in sorted(names)
    }
    trials = Trials(thing, trains=True)
    trials.trial(also=ARGUMENTS[thing][1], **values)
    assert not trials.faults, trials.faults
