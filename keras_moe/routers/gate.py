"""The gate: router probabilities for tokens."""

import keras

from keras_moe.kernels import matmul, ops
from keras_moe.utils import checks, initializers
from keras_moe.utils.composite import CompositeLayer

LEARNED = "learned"
MECHANISMS = ("softmax", "sigmoid", "sqrt_softplus", "gumbel")


@keras.saving.register_keras_serializable(package="keras_moe")
class Gate(CompositeLayer):
    """Computes router probabilities, always in float32.

    `softmax(x · kernel + bias)` over the experts, or another `mechanism`.

    Args:
        num_experts: int, the number of experts `e`.
        hidden_layers: int or list of ints, the sizes of ReLU layers before the output.
            Defaults to `None`, no hidden layers.
        mechanism: string. `"softmax"`; `"sigmoid"` or `"sqrt_softplus"`,
            `sqrt(log(1 + exp(logits)))`, independent scores; or `"gumbel"`, one expert
            with probability 1: in training a sample (hard Gumbel-softmax with a
            straight-through gradient), otherwise the best. Defaults to `"softmax"`.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training; or `"learned"`, `softplus(x · noise_kernel)` of each expert,
            with a kernel `[h, e]` that is 0 at first. Defaults to 0.
        jitter_noise: float in [0, 1). In training the inputs are multiplied by uniform
            noise from `[1 - jitter_noise, 1 + jitter_noise]`. Defaults to 0.
        input_norm_epsilon: float. The inputs are RMS-normalized with this epsilon, and
            multiplied by a learned scale `[h]` and by `h ** -0.5`. Defaults to `None`,
            no normalization.
        use_bias: bool. Defaults to `True`.
        kernel_initializer: initializer of the kernel `[h, e]`. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the bias `[e]`. Defaults to `"zeros"`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`, except `dtype`: the gate is float32
            under every dtype policy.

    Call arguments:
        inputs: `[batch, ..., h]`.
        training: bool, whether to add noise.
        return_logits: bool.
        return_noise: bool.

    Returns:
        float32 probabilities `[batch, ..., e]`, 1 in sum (except for independent
        scores). With `return_logits`, a pair of these and the logits without noise.
        With `return_noise`, four values: these two, the logits with noise, and the
        standard deviation of the noise, `[batch, ..., e]` if it is learned and
        otherwise a float.

    Raises:
        ValueError: if an argument is out of range, or the mechanism is unknown.
        TypeError: if an argument has another type.

    Example:

    ```python
    gate = keras_moe.Gate(num_experts=8, hidden_layers=32)
    gate(np.ones((2, 4, 16))).shape  # (2, 4, 8)
    ```

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.4, for float32
        and jitter;
        [Jang et al., 2017](https://arxiv.org/abs/1611.01144) for Gumbel-softmax;
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equation 4, for
        learned noise;
        [Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467), equation 4, for
        RMS normalization.
    """

    # If set by the layer that owns the gate: the number of gates in one, with a kernel
    # `[num_gates, h, e]`, for inputs `[batch, num_gates, t, h]`.
    num_gates = None

    def __init__(
        self,
        num_experts,
        *,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
        input_norm_epsilon=None,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        name=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        super().__init__(name=name, **kwargs)
        self.num_experts = checks.whole_number("num_experts", num_experts)
        self.hidden_layers = _hidden_sizes(hidden_layers)
        self.mechanism = checks.one_of("mechanism", mechanism, MECHANISMS)
        self.noise_std = noise_std
        if noise_std != LEARNED:
            self.noise_std = checks.number("noise_std", noise_std)
        self.jitter_noise = checks.number("jitter_noise", jitter_noise, below=1)
        self.input_norm_epsilon = None
        if input_norm_epsilon is not None:
            self.input_norm_epsilon = checks.number(
                "input_norm_epsilon", input_norm_epsilon, above=True
            )
        self.use_bias = checks.boolean("use_bias", use_bias)
        self.kernel_initializer = initializers.get(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = initializers.get("bias_initializer", bias_initializer)
        self._hidden = [
            UnquantizedDense(
                size,
                activation="relu",
                kernel_initializer=initializers.clone(self.kernel_initializer),
                bias_initializer=initializers.clone(self.bias_initializer),
                dtype="float32",
                name=f"hidden_{i}",
            )
            for i, size in enumerate(self.hidden_layers or ())
        ]
        if self.jitter_noise or self.noise_std or self.mechanism == "gumbel":
            self.seed_generator = keras.random.SeedGenerator()
        self.supports_masking = True

    def build(self, input_shape):
        size = input_shape[-1]
        for layer in self._hidden:
            layer.build((*input_shape[:-1], size))
            size = layer.units
        kernel_shape, bias_shape = (size, self.num_experts), (self.num_experts,)
        kernel = initializers.clone(self.kernel_initializer)
        bias = initializers.clone(self.bias_initializer)
        if self.num_gates is not None:
            kernel_shape = (self.num_gates, *kernel_shape)
            bias_shape = (self.num_gates, 1, *bias_shape)
            kernel = initializers.Stacked(kernel)
            bias = initializers.Stacked(bias, bias=True)
        self.kernel = self.add_weight(
            name="kernel", shape=kernel_shape, initializer=kernel
        )
        if self.input_norm_epsilon is not None:
            self.input_scale = self.add_weight(
                name="input_scale", shape=(input_shape[-1],), initializer="ones"
            )
        if self.noise_std == LEARNED:
            self.noise_kernel = self.add_weight(
                name="noise_kernel", shape=kernel_shape, initializer="zeros"
            )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=bias_shape, initializer=bias)
        self.restore_trainable()

    def call(self, inputs, training=None, return_logits=False, return_noise=False):
        x = self._features(self._jittered(inputs) if training else inputs)
        logits = matmul(x, ops.convert_to_tensor(self.kernel))
        if self.bias is not None:
            logits = logits + self.bias
        noisy, std = self._with_noise(logits, x) if training else (logits, 0.0)
        probs = self._probabilities(noisy, training)
        if return_noise:
            return probs, logits, noisy, std
        return (probs, logits) if return_logits else probs

    def _features(self, x):
        """Returns the inputs of the last layer."""
        if self.input_norm_epsilon is not None:
            x = _rms_normalized(x, self.input_norm_epsilon)
            x = x * self.input_scale * x.shape[-1] ** -0.5
        for layer in self._hidden:
            x = layer(x)
        return x

    def _probabilities(self, logits, training):
        if self.mechanism == "softmax":
            return _softmax(logits)
        if self.mechanism == "sigmoid":
            return ops.sigmoid(logits)
        if self.mechanism == "sqrt_softplus":
            # Below, the softplus is 0 in float32, and its root has no finite gradient.
            return ops.sqrt(ops.softplus(ops.maximum(logits, -80.0)))
        if training:
            uniform = keras.random.uniform(
                ops.shape(logits),
                minval=1e-20,
                dtype="float32",
                seed=self.seed_generator,
            )
            logits = logits - ops.log(-ops.log(uniform))
        soft = _softmax(logits)
        hard = ops.one_hot(
            ops.argmax(logits, axis=-1), self.num_experts, dtype="float32"
        )
        # Straight-through: the value of `hard`, the gradient of `soft`.
        return ops.stop_gradient(hard - soft) + soft

    def _jittered(self, inputs):
        if not self.jitter_noise:
            return inputs
        return inputs * keras.random.uniform(
            ops.shape(inputs),
            minval=1.0 - self.jitter_noise,
            maxval=1.0 + self.jitter_noise,
            dtype=inputs.dtype,
            seed=self.seed_generator,
        )

    def _with_noise(self, logits, x):
        """Returns logits with noise, and the standard deviation of the noise."""
        std = self.noise_std
        if not std:
            return logits, 0.0
        if std == LEARNED:
            std = ops.softplus(matmul(x, ops.convert_to_tensor(self.noise_kernel)))
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.seed_generator
        )
        return logits + std * noise, std

    def quantize(self, mode=None, type_check=True, config=None):
        """Does nothing, so that quantization does not change the routing."""

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.num_experts)

    def compute_output_spec(
        self, inputs, training=None, return_logits=False, return_noise=False
    ):
        if return_noise:
            return keras.Operation.compute_output_spec(
                self, inputs, training=training, return_noise=True
            )
        shape = self.compute_output_shape(inputs.shape)
        probs, logits = (keras.KerasTensor(shape, dtype="float32") for _ in range(2))
        return (probs, logits) if return_logits else probs

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return {
            **config,
            "num_experts": self.num_experts,
            "hidden_layers": self.hidden_layers,
            "mechanism": self.mechanism,
            "noise_std": self.noise_std,
            "jitter_noise": self.jitter_noise,
            "input_norm_epsilon": self.input_norm_epsilon,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
        }


# The name of the class is in files, as that of every layer that a list holds.
class UnquantizedDense(keras.layers.Dense):
    """A hidden layer of a gate, which `quantize` does not change."""

    def quantize(self, mode=None, type_check=True, config=None):
        pass


def _rms_normalized(x, epsilon):
    """Computes `x / sqrt(mean(x ** 2) + epsilon)` over the last axis.

    `x` and the root are divided by the largest value, so that squares stay finite.
    """
    largest = ops.max(ops.abs(ops.stop_gradient(x)), axis=-1, keepdims=True)
    largest = ops.maximum(largest, 1.0)
    x = x / largest
    mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(mean_square + epsilon / ops.square(largest))


def _softmax(logits):
    """Computes a softmax that is exactly 1 where all other experts have 0.

    There `ops.softmax` is 0.99999994 on TensorFlow, on some CPUs. For a large token
    with a large output, the gradient would be infinite instead of 0.
    """
    return ops.exp(ops.log_softmax(logits, axis=-1))


def _hidden_sizes(hidden_layers):
    """Returns the sizes of the hidden layers as a list, or `None`."""
    if hidden_layers is None:
        return None
    if not isinstance(hidden_layers, (list, tuple)):
        hidden_layers = [hidden_layers]
    return [checks.whole_number("hidden_layers", size) for size in hidden_layers]
