"""A mixture of experts with one gate per task."""

import keras

from keras_moe.experts.adaptation import AdaptableLayer
from keras_moe.kernels import ops
from keras_moe.layers.base_layer import build_experts, check_mask_shape, count_experts
from keras_moe.routers import Gate
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class MultiGateMoeLayer(AdaptableLayer):
    """Experts that several tasks share, each with its own gate (MMoE).

    Every expert processes every input. For each task, a gate of its own weighs the
    experts' outputs, so tasks that have little in common can use different experts. Put
    a tower, such as a few `Dense` layers, on the output of each task.

    For few experts and many small inputs, as in tabular and recommender models. The
    cost is that of all experts.

    Args:
        experts: layer with `num_experts` that maps `[g, e, c, h]` to the same shape,
            such as `FeedForwardExperts` or `HeterogeneousExperts`.
        num_tasks: int, the number of gates.
        hidden_layers: int or list of ints, the sizes of ReLU layers in each gate.
            Defaults to `None`, no hidden layers.
        use_bias: bool, whether the gates have a bias. Defaults to `True`.
        kernel_initializer: initializer of the gates' kernels. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the gates' biases. Defaults to `"zeros"`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        mask: bool `[batch, ...]`, false for a masked token, whose outputs are 0.
            Defaults to `None`, the implicit Keras mask of the inputs.
        training: bool.

    Returns:
        A list of `num_tasks` tensors `[batch, ..., h]`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if an argument has another type.

    Example:

    ```python
    columns = keras.Input((32,))
    layer = keras_moe.MultiGateMoeLayer(keras_moe.FeedForwardExperts(6, 64), 2)
    click, purchase = layer(columns)
    towers = [keras.layers.Dense(1)(x) for x in (click, purchase)]
    model = keras.Model(columns, towers)
    ```

    Reference:
        [Ma et al., 2018](https://doi.org/10.1145/3219819.3220007), section 4.2.
    """

    serialized_sublayers = ("experts",)
    built_shape = None

    def __init__(
        self,
        experts,
        num_tasks,
        *,
        hidden_layers=None,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        name=None,
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self.num_experts = count_experts(experts)
        self.experts = experts
        self.num_tasks = checks.whole_number("num_tasks", num_tasks)
        self.gates = [
            Gate(
                self.num_experts,
                hidden_layers=hidden_layers,
                use_bias=use_bias,
                kernel_initializer=kernel_initializer,
                bias_initializer=bias_initializer,
                name=f"gate_{i}",
            )
            for i in range(self.num_tasks)
        ]
        self.supports_masking = True

    def build(self, input_shape):
        self.built_shape = tuple(input_shape)
        for gate in self.gates:
            if not gate.built:
                gate.build(input_shape)
        build_experts(self.experts, input_shape[-1], self.compute_dtype)
        self.restore_trainable()

    def call(self, inputs, mask=None, training=None):
        check_mask_shape(mask, inputs)
        inputs = ops.cast(inputs, self.compute_dtype)
        if mask is not None:
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)
            # The values of a masked token, NaN included, have no effect.
            inputs = ops.where(mask, inputs, 0)
        rows = ops.reshape(inputs, (1, 1, -1, inputs.shape[-1]))
        rows = ops.repeat(rows, self.num_experts, axis=1)
        results = self.experts(rows, training=training)[0]  # e n h
        results = ops.transpose(results, (1, 0, 2))
        weights = [gate(inputs, training=training) for gate in self.gates]
        weights = ops.reshape(
            ops.stack(weights, axis=-2), (-1, self.num_tasks, self.num_experts)
        )
        mixtures = ops.matmul(ops.cast(weights, results.dtype), results)  # n tasks h
        mixtures = ops.cast(mixtures, self.compute_dtype)
        outputs = [
            ops.reshape(mixtures[:, task], ops.shape(inputs))
            for task in range(self.num_tasks)
        ]
        return outputs if mask is None else [ops.where(mask, y, 0) for y in outputs]

    def compute_mask(self, inputs, previous_mask=None):
        return None if previous_mask is None else [previous_mask] * self.num_tasks

    def _adaptable_parts(self):
        return [self.experts]

    def compute_output_shape(self, input_shape):
        return [input_shape] * self.num_tasks

    def compute_output_spec(self, inputs, mask=None, training=None):
        check_mask_shape(mask, inputs)
        return [
            keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
            for _ in range(self.num_tasks)
        ]

    def get_build_config(self):
        # The owner of this layer builds it, so that its path begins with the owner's.
        return None

    def get_config(self):
        gate = self.gates[0].get_config()
        names = "hidden_layers", "use_bias", "kernel_initializer", "bias_initializer"
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "num_tasks": self.num_tasks,
            **{name: gate[name] for name in names},
        }
