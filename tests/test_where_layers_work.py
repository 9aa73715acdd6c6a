"""Where our layers work: the tests of the table in `docs/where-layers-work.md`.

The docstring of each test is the name of its row.
"""

import copy
import functools
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional, random_inputs
from versions import logs_of_batch, needs_keras, needs_newer

import keras_moe
from keras_moe.layers.base_layer import BaseMoeLayer
from keras_moe.utils.traversal import find_layers

BACKEND = keras.backend.backend()
on = {
    name: pytest.mark.skipif(name != BACKEND, reason=f"{name} only")
    for name in ("jax", "tensorflow", "torch")
}
E, F, H, T = 4, 8, 6, 10
# XLA takes long to compile: on TensorFlow one test has it.
JIT = BACKEND == "jax"
X = random_inputs((T, H))
Y = X[..., ::-1].copy()


def experts(**kwargs):
    return keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal", **kwargs)


def router(cls=keras_moe.MaskedRouter, **kwargs):
    return cls(
        kwargs.pop("num_experts", E),
        kernel_initializer="he_normal",
        **{"router_z_loss_weight": 0.02, **kwargs},
    )


def moe(name=None):
    tokens_choose = router(num_selected_experts=2, load_balancing_loss_weight=0.1)
    return keras_moe.MoeLayer(experts(), tokens_choose, name=name)


def dropless(name=None, **kwargs):
    balanced = router(
        keras_moe.BiasBalancedMaskedRouter,
        num_selected_experts=2,
        bias_update_rate=0.3,
        **kwargs,
    )
    return keras_moe.MoeLayerWithBackbone(
        keras_moe.MoeLayer(
            experts(gated=True),
            balanced,
            train_capacity_factor=None,
            eval_capacity_factor=None,
            name="moe",
        ),
        F,
        backbone_gate=True,
        name=name,
    )


def hierarchical(name=None, inner_losses=True):
    return keras_moe.HierarchicalMoeLayer(
        experts(),
        router(num_experts=2, load_balancing_loss_weight=0.1, name="outer"),
        router(
            keras_moe.Top2MaskedRouter,
            num_experts=2,
            load_balancing_loss_weight=0.1 * inner_losses,
            router_z_loss_weight=0.02 * inner_losses,
            second_policy_train="threshold",
            name="inner",
        ),
        name=name,
    )


def soft(name=None):
    return keras_moe.SoftMoeLayer(experts(), name=name)


LAYERS = [moe, dropless, hierarchical, soft]
every_layer = pytest.mark.parametrize("make", LAYERS)
# Without a capacity, sizes depend on data.
fixed_sizes = pytest.mark.parametrize(
    "make", LAYERS if BACKEND == "jax" else [moe, hierarchical, soft]
)
compiled_by_keras = pytest.mark.parametrize(
    # PyTorch's compiler has a test of its own.
    "make",
    {"jax": LAYERS, "tensorflow": [moe, hierarchical, soft], "torch": []}[BACKEND],
)


def new(make, wrap=lambda layer: layer, shape=(T, H)):
    """A model whose weights are the same every time."""
    keras.utils.set_random_seed(3)
    model = functional(wrap(make("moe")), shape)
    model.compile(jit_compile=JIT)
    return model


def train(model, steps=2, x=X, y=Y, rate=0.3, jit_compile=JIT):
    loss = keras.losses.MeanSquaredError()
    model.compile(keras.optimizers.SGD(rate), loss, jit_compile=jit_compile)
    for _ in range(steps):
        logs = logs_of_batch(model.train_on_batch, x, y)
    return logs


def weights(model):
    return [np.copy(w) for w in model.get_weights()]


def assert_same_weights(model, expected, atol=1e-5):
    """The weights of both models are the same, in order."""
    for w, a, b in zip(model.weights, weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=w.path)


def numpy(x):
    return ops.convert_to_numpy(x)


def outputs(model, x=X):
    return numpy(model(x, training=False))


def assert_still_works(model, make):
    """It predicts, and trains, as a model to which nothing has happened."""
    expected = new(make)
    np.testing.assert_allclose(
        model.predict(X, verbose=0), expected.predict(X, verbose=0), atol=1e-5
    )
    assert_trains_alike(model, expected)


def assert_trains_alike(model, expected, jit=JIT, expected_jit=JIT):
    """Both models have the same weights and logs after training."""
    logs = train(model, jit_compile=jit)
    plain = train(expected, jit_compile=expected_jit)
    assert_same_weights(model, expected)
    assert logs == pytest.approx(plain, abs=1e-5)


# Calls


@every_layer
def test_plain_call(make):
    """A plain call"""
    model = new(make)
    losses = []
    for _ in range(2):
        found = numpy(model(X, training=True))
        losses.append(len(model.losses))
    assert losses == [LOSSES[make]] * 2
    assert found.shape == X.shape
    assert_still_works(new(make), make)


LOSSES = {moe: 2, dropless: 1, hierarchical: 4, soft: 0}


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_jit_by_hand(make, training):
    """`jax.jit`, `tf.function` by hand"""
    model = new(make)
    expected = numpy(model(X, training=training))
    model = new(make)

    def call(x):
        return model(x, training=training)

    if BACKEND == "jax":
        import jax

        call = jax.jit(call)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        call = tf.function(call)
    if not training or BACKEND == "jax":  # Elsewhere, the bias has moved.
        for _ in range(2):
            np.testing.assert_allclose(numpy(call(X)), expected, atol=1e-5)
        model.reset_metrics()
        assert_still_works(model, make)


@every_layer
def test_gradient_by_hand(make):
    """Gradients by hand: `jax.value_and_grad`, `tf.GradientTape`, `backward`"""
    model, expected = new(make), new(make)
    train(expected, steps=1)
    before = weights(model)
    gradients, losses = gradients_of(model)
    assert losses == LOSSES[make]
    for w, old, gradient in zip(
        model.trainable_variables,
        [b for b, w in zip(before, model.weights, strict=True) if w.trainable],
        gradients,
        strict=True,
    ):
        w.assign(old - 0.3 * gradient)
    for w, v in zip(
        model.trainable_variables, expected.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(numpy(w), numpy(v), atol=1e-5, err_msg=w.path)


def gradients_of(model, call=None):
    """Gradients of a step without a compiled one, and the number of losses."""
    call = model if call is None else call
    if BACKEND == "jax":
        import jax

        values = [v.value for v in model.non_trainable_variables]

        def loss_of(trainable):
            y, _, losses = model.stateless_call(
                trainable, values, X, training=True, return_losses=True
            )
            return ops.mean((y - Y) ** 2) + sum(losses), losses

        trainable = [v.value for v in model.trainable_variables]
        (_, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return [numpy(g) for g in gradients], len(losses)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y = call(X, training=True)
            loss = ops.mean((y - Y) ** 2) + sum(model.losses)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        return [numpy(g) for g in gradients], len(model.losses)
    model.zero_grad()
    y = call(X, training=True)
    (ops.mean((y - ops.convert_to_tensor(Y)) ** 2) + sum(model.losses)).backward()
    return [v.value.grad.detach().numpy() for v in model.trainable_variables], len(
        model.losses
    )


@on["jax"]
def test_each_loss_once():
    """Gradients by hand: `jax.value_and_grad`, `tf.GradientTape`, `backward`"""
    # Eagerly, where new losses may have the ids of freed ones.
    model = new(hierarchical)
    counts = {gradients_of(model)[1] for _ in range(30)}
    assert counts == {LOSSES[hierarchical]}


@needs_newer("tensorflow", (2, 16))
@needs_newer("torch", (2, 6))
@fixed_sizes
def test_vmap(make):
    """`ops.vectorized_map`"""
    model = new(make)
    expected = outputs(model)

    def example(x):
        return model(ops.expand_dims(x, 0), training=False)[0]

    found = numpy(ops.vectorized_map(example, ops.convert_to_tensor(X)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert_still_works(model, make)


# Loops


class Repeated(keras.layers.Layer):
    """Applies a layer three times: by `ops.while_loop`, `ops.scan` or Python."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, x, training=None):
        if self.how == "while_loop":
            return ops.while_loop(
                lambda i, x: i < 3,
                lambda i, x: (i + 1, self.step(x, training)),
                (0, x),
            )[1]
        if self.how == "scan":
            return ops.scan(lambda x, _: (self.step(x, training), None), x, length=3)[0]
        for _ in range(3):
            x = self.step(x, training)
        return x

    def step(self, x, training):
        return ops.tanh(self.layer(x, training=training))


@every_layer
def test_while_loop(make):
    """`ops.while_loop`"""
    looped = new(make, lambda layer: Repeated(layer, "while_loop"))
    expected = new(make, lambda layer: Repeated(layer, "python"))
    for _ in range(2):
        np.testing.assert_allclose(
            looped.predict(X, verbose=0), outputs(expected), atol=1e-5
        )
    if BACKEND != "jax":  # It has no gradients of loops of any length.
        train(looped), train(expected)
        assert_same_weights(looped, expected)


@every_layer
def test_scan(make):
    """`ops.scan`"""
    compare_training(
        make,
        lambda layer: Repeated(layer, "scan"),
        lambda layer: Repeated(layer, "python"),
    )


def compare_training(make, wrap, wrap_expected, shape=(T, H), x=X, y=Y):
    """Predicts and trains alike, except for state where programs cannot change it."""
    model, expected = new(make, wrap, shape), new(make, wrap_expected, shape)
    if BACKEND == "jax":
        for router in find_layers(
            [model, expected], keras_moe.BiasBalancedMaskedRouter
        ):
            router.bias_update_rate = 0.0
    np.testing.assert_allclose(outputs(model, x), outputs(expected, x), atol=1e-5)
    train(model, x=x, y=y)
    train(expected, x=x, y=y)
    assert_same_weights(model, expected)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), expected.predict(x, verbose=0), atol=1e-5
    )


def fixed_bias(name=None):
    layer = dropless(name)
    layer.moe.router.bias_update_rate = 0.0
    return layer


class Cell(keras.layers.Layer):
    """A cell of an RNN: adds a layer's outputs to its state."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.state_size, self.output_size = layer, H, H

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, x, states, training=None):
        y = ops.tanh(self.layer(x + states[0], training=training))
        return y, [y]


@every_layer
def test_rnn_cell(make):
    """A cell of `keras.layers.RNN`"""

    def over_examples(name):
        layer = make(name)
        getattr(layer, "moe", layer).examples_per_group = None
        return layer

    compare_training(
        over_examples,
        lambda layer: keras.layers.RNN(Cell(layer), return_sequences=True),
        lambda layer: Unrolled(Cell(layer)),
        (3, H),
        X[:, :3],
        Y[:, :3],
    )


class Unrolled(keras.layers.Layer):
    """What `keras.layers.RNN` does, as a loop in Python."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def build(self, input_shape):
        self.cell.build((input_shape[0], input_shape[2]))

    def call(self, x, training=None):
        results, initial = [], [ops.zeros_like(x[:, 0])]
        if BACKEND != "jax":  # Keras calls the cell once more, for its shapes.
            self.cell(x[:, 0], initial, training=training)
        states = initial
        for i in range(x.shape[1]):
            y, states = self.cell(x[:, i], states, training=training)
            results.append(y)
        return ops.stack(results, axis=1)


@every_layer
@pytest.mark.parametrize("steps", [3, None])
def test_time_distributed(make, steps):
    """`keras.layers.TimeDistributed`"""
    if steps is None and make is dropless and BACKEND != "jax":
        pytest.skip("sizes depend on data")
    x = random_inputs((3, T, H), 2)
    model = new(make, keras.layers.TimeDistributed, (steps, T, H))
    layer = model.layers[-1].layer
    expected = np.stack([numpy(layer(x[:, i], training=False)) for i in range(3)], 1)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    logs = train(model, x=x, y=x)
    assert np.isfinite(list(logs.values())).all()
    np.testing.assert_allclose(
        model.predict(x, verbose=0), outputs(model, x), atol=1e-5
    )


# Rematerialization


class Block(keras.layers.Layer):
    """A residual block, rematerialized or not."""

    def __init__(self, layer, remat):
        super().__init__()
        self.layer, self.remat = layer, remat

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, x, training=None):
        def block(x):
            return x + self.layer(ops.tanh(x), training=training)

        return (keras.remat(block) if self.remat else block)(x)


@every_layer
def test_remat(make):
    """`keras.remat` of a block"""
    compare_training(
        make, lambda layer: Block(layer, True), lambda layer: Block(layer, False)
    )


@needs_keras((3, 13), "recomputes all layers", "torch")
@every_layer
@pytest.mark.parametrize(
    # Some layers; or all, with which no layer that has an argument `training` works on
    # JAX, and no functional model on TensorFlow.
    "names",
    [["layer"]] + [None] * (BACKEND == "torch"),
)
def test_remat_scope(make, names):
    """`keras.RematScope`"""
    scope = {"mode": "list_of_layers", "layer_names": names} if names else {}
    keras.utils.set_random_seed(3)
    with keras.RematScope(**scope):
        model = functional(make("layer"), (T, H))
    expected = new(lambda name: make("layer"))
    assert_trains_alike(model, expected)
    layers = find_layers(model, BaseMoeLayer)
    assert layers and all(layer.rematerializes for layer in layers)


# Training


@every_layer
def test_gradient_accumulation(make):
    """`gradient_accumulation_steps` of an optimizer"""
    make_half = make
    if make is dropless:
        make_half = functools.partial(dropless, bias_update_steps=2)
    if make is hierarchical:
        # These losses are not the mean of those of the parts of a batch.
        make = make_half = functools.partial(hierarchical, inner_losses=False)
    model, expected = new(make_half), new(make)
    optimizer = keras.optimizers.SGD(0.3, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse", jit_compile=JIT)
    for _ in range(2):
        model.train_on_batch(X[:2], Y[:2])
        model.train_on_batch(X[2:], Y[2:])
    train(expected)
    assert_same_weights(model, expected)


@compiled_by_keras
def test_jit_compile(make):
    """`jit_compile=True`"""
    model, expected = new(make), new(make)
    assert_trains_alike(model, expected, jit=True, expected_jit=False)


@on["torch"]
@needs_newer("torch", (2, 3))
@pytest.mark.parametrize("make", [dropless, soft])
def test_torch_compile(make):
    """`torch.compile`"""
    import torch

    model, expected = new(make), outputs(new(make))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        found = numpy(compiled(ops.convert_to_tensor(X), training=False))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@on["torch"]
@needs_newer("torch", (2, 3))
def test_torch_compile_for_training():
    """`torch.compile`"""
    import torch

    model = new(moe)
    model(X, training=True)  # Creates the metrics, which would take long to compile.
    gradients, losses = gradients_of(model, torch.compile(model, backend="eager"))
    plain, expected_losses = gradients_of(new(moe))
    assert losses == expected_losses
    for a, b in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@on["torch"]
@needs_newer("torch", (2, 9))
@pytest.mark.parametrize("num_experts", [4, 20])
@every_layer
def test_torch_export(make, num_experts, monkeypatch):
    """`torch.export`"""
    import torch

    if make is hierarchical:
        num_experts = 4
    monkeypatch.setitem(globals(), "E", num_experts)
    model = new(make)
    x = torch.from_numpy(X)
    program = torch.export.export(model, (x,)).module()
    np.testing.assert_allclose(numpy(program(x)), outputs(model), atol=1e-5)


@needs_keras((3, 14), "keeps the losses of both calls", "jax")
@every_layer
def test_two_calls(make):
    """Two calls of a layer in one step"""
    keras.utils.set_random_seed(3)
    layer, inputs = make("moe"), keras.Input((T, H))
    model = keras.Model(inputs, layer(ops.tanh(layer(inputs))))
    numpy(model(X, training=True))
    assert len(model.losses) == 2 * LOSSES[make]
    logs = train(model)
    assert np.isfinite(list(logs.values())).all()
    for name, value in logs.items():
        assert value >= 0, name
    assert_reported_loss(model)


def assert_reported_loss(model):
    """The reported loss is that of the task and all added losses."""
    if not model.losses and BACKEND != "jax":
        return
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = logs_of_batch(model.train_on_batch, X, Y)
    y = numpy(model(X, training=True))
    total = np.mean((y - Y) ** 2) + sum(float(x) for x in model.losses)
    assert logs["loss"] == pytest.approx(total, abs=1e-4)


@on["tensorflow"]
@every_layer
def test_tf_function_loops(make):
    """Loops and training loops in a `tf.function`"""
    import tensorflow as tf

    model, expected = new(make), new(make)

    @tf.function
    def repeat(x):
        for _ in tf.range(3):
            x = model(x, training=False)
        return x

    y = X
    for _ in range(3):
        y = outputs(expected, y)
    np.testing.assert_allclose(repeat(tf.constant(X)), y, atol=1e-5, rtol=1e-5)
    data = tf.data.Dataset.from_tensors((X, Y)).repeat(2)
    optimizer = keras.optimizers.SGD(0.3)
    optimizer.build(model.trainable_variables)

    @tf.function
    def epoch():
        for x, y in data:
            with tf.GradientTape() as tape:
                loss = ops.mean((model(x, training=True) - y) ** 2)
                loss += sum(model.losses)
            variables = model.trainable_variables
            gradients = tape.gradient(loss, [v.value for v in variables])
            optimizer.apply(gradients, variables)

    epoch()
    train(expected)
    assert_same_weights(model, expected)


@every_layer
def test_custom_training_loop(make):
    """The custom training loops of the Keras guides"""
    model, expected = new(make), new(make)
    optimizer = keras.optimizers.SGD(0.3)
    optimizer.build(model.trainable_variables)
    LOOPS[BACKEND](model, optimizer)
    train(expected)
    assert_same_weights(model, expected)
    np.testing.assert_allclose(
        model.predict(X, verbose=0), expected.predict(X, verbose=0), atol=1e-5
    )


def jax_loop(model, optimizer):
    import jax

    def loss_of(trainable, other, x, y):
        found, other, losses = model.stateless_call(
            trainable, other, x, training=True, return_losses=True
        )
        return ops.mean((found - y) ** 2) + sum(losses), other

    @jax.jit
    def step(state, x, y):
        trainable, other, slots = state
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (_, other), gradients = gradient(trainable, other, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return trainable, other, slots

    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    for _ in range(2):
        state = step(state, X, Y)
    for group, values in zip(variables, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)


def tensorflow_loop(model, optimizer):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y, model(x, training=True))
            loss += sum(model.losses)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    for _ in range(2):
        step(X, Y)


def torch_loop(model, optimizer):
    import torch

    for _ in range(2):
        loss = keras.losses.MeanSquaredError()(Y, model(X, training=True))
        loss += sum(model.losses)
        model.zero_grad()
        loss.backward()
        variables = model.trainable_variables
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)


LOOPS = {"jax": jax_loop, "tensorflow": tensorflow_loop, "torch": torch_loop}


@every_layer
def test_second_derivatives(make):
    """Second derivatives: a gradient penalty"""
    if make is dropless:
        make = fixed_bias
    model = new(make)
    _, gradients = gradient_penalty(model)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
    start = [np.copy(v) for v in model.trainable_variables]
    step, results = 1e-3, []
    for sign in (1, -1):
        for v, old, g in zip(model.trainable_variables, start, gradients, strict=True):
            v.assign(old + sign * step * g / norm)
        results.append(gradient_penalty(model)[0])
    difference = (results[0] - results[1]) / (2 * step)
    assert difference == pytest.approx(norm, rel=0.02)


def gradient_penalty(model):
    """The mean square of the inputs' gradient, and its gradient by the weights."""
    if BACKEND == "jax":
        import jax

        values = [v.value for v in model.non_trainable_variables]

        def penalty(trainable):
            def total(x):
                y, _ = model.stateless_call(trainable, values, x, training=True)
                return ops.sum(y**2)

            return ops.mean(jax.grad(total)(X) ** 2)

        trainable = [v.value for v in model.trainable_variables]
        value, gradients = jax.value_and_grad(penalty)(trainable)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.constant(X)
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                total = ops.sum(model(x, training=True) ** 2)
            value = ops.mean(inner.gradient(total, x) ** 2)
        variables = [v.value for v in model.trainable_variables]
        gradients = outer.gradient(value, variables, unconnected_gradients="zero")
    else:
        import torch

        x = torch.tensor(X, requires_grad=True)
        total = (model(x, training=True) ** 2).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        value = (gradient**2).mean()
        gradients = torch.autograd.grad(
            value,
            [v.value for v in model.trainable_variables],
            allow_unused=True,
            materialize_grads=True,
        )
    return float(value), [numpy(g) for g in gradients]


# Copies and files


def pair_of_layers(make):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((T, H))
    return keras.Model(inputs, make("second")(make("first")(inputs)))


@every_layer
def test_state_tree(make):
    """`get_state_tree`, `set_state_tree`"""
    model, other = pair_of_layers(make), pair_of_layers(make)
    train(model)
    tree = model.get_state_tree(value_format="numpy_array")
    other.compile(keras.optimizers.SGD(0.3), "mse")
    other.optimizer.build(other.trainable_variables)
    other.set_state_tree(tree)
    assert_same_weights(other, model, atol=0)
    assert len(set(names := [v.path for v in model.variables])) == len(names)


@on["jax"]
def test_orbax(tmp_path):
    """`OrbaxCheckpoint`"""
    pytest.importorskip("orbax.checkpoint", reason="needs Orbax: `make test-all`")
    keras.utils.set_random_seed(3)
    inputs = x = keras.Input((T, H))
    for make in LAYERS:
        x = ops.tanh(make(make.__name__)(x))
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.SGD(0.03), keras.losses.MeanSquaredError())
    checkpoint = keras.callbacks.OrbaxCheckpoint(str(tmp_path))
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[checkpoint])
    checkpoint.wait_until_finished()
    loaded = keras.models.load_model(tmp_path)
    assert_same_weights(loaded, model, atol=0)
    other = keras.models.clone_model(model)
    other.load_weights(tmp_path)
    assert_same_weights(other, model, atol=0)
    model.fit(X, Y, verbose=0), loaded.fit(X, Y, verbose=0)
    assert_same_weights(loaded, model)


@on["torch"]
@every_layer
def test_state_dict(make):
    """`state_dict`, `load_state_dict`"""
    model, other = pair_of_layers(make), pair_of_layers(make)
    train(model)
    state = model.state_dict()
    assert len(state) == len({id(v) for v in model.variables})
    other.load_state_dict(state)
    assert_same_weights(other, model, atol=0)


@every_layer
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_deepcopy_and_pickle(make, duplicate):
    """`copy.deepcopy`, `pickle`"""
    model = new(make)
    train(model)
    layer = model.layers[-1]
    other = duplicate(layer)
    np.testing.assert_allclose(
        numpy(other(X, training=False)), outputs(model), atol=1e-6
    )
    assert not {id(w) for w in other.weights} & {id(w) for w in layer.weights}
    np.testing.assert_allclose(outputs(duplicate(model)), outputs(model), atol=1e-6)
    fresh = duplicate(make("moe"))
    assert not fresh.built
    assert numpy(fresh(X)).shape == X.shape


def parts(layer):
    """The layer and all layers below it that have weights."""
    return [x for x in find_layers(layer, keras.layers.Layer) if x.weights]


@every_layer
def test_freeze(make, tmp_path):
    """Freeze a part, save and load, or clone"""
    model = new(make)
    all_trainable = [w.path for w in model.trainable_weights]
    for i, frozen in enumerate(parts(model.layers[-1])):
        frozen.trainable = False
        trainable = [w.path for w in model.trainable_weights]
        assert not {*trainable} & {w.path for w in frozen.weights}, frozen.path
        copied = keras.models.clone_model(model)
        assert [w.path for w in copied.trainable_weights] == trainable, frozen.path
        # What is frozen can thaw.
        for part in (frozen, parts(copied.layers[-1])[i]):
            part.trainable = True
        for thawed in (model, copied):
            assert [w.path for w in thawed.trainable_weights] == all_trainable
    parts(model.layers[-1])[-1].trainable = False
    train(model, steps=1)
    trainable = [w.path for w in model.trainable_weights]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.trainable_weights] == trainable
    for x in (model, loaded):
        x.train_on_batch(X, Y)
    assert_same_weights(loaded, model)


@every_layer
def test_ema(make):
    """`use_ema`, `SwapEMAWeights`"""
    model = new(make)
    optimizer = keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    logs = model.fit(
        X, Y, epochs=2, validation_data=(X, Y), callbacks=[swap], verbose=0
    )
    assert np.isfinite(logs.history["val_loss"]).all()
    assert np.isfinite(outputs(model)).all()


@every_layer
@pytest.mark.parametrize("name", ["x.weights.h5", "x.weights.json", "x.h5", "x.keras"])
def test_files(make, name, tmp_path):
    """`.keras`, `.h5`, weights in one file or sharded"""
    model = new(make)
    train(model)
    path = str(tmp_path / name)
    if "weights" in name:
        shards = {"max_shard_size": 1e-6} if name.endswith("json") else {}
        model.save_weights(path, **shards)
        other = new(make)
        other.load_weights(path)
    else:
        model.save(path)
        other = keras.models.load_model(path)
        assert train(other).keys() == train(model).keys()
    assert_same_weights(other, model, atol=1e-6)
    np.testing.assert_allclose(outputs(other), outputs(model), atol=1e-5)
