"""The gate: from tokens to probabilities."""

import keras
from keras import ops

from keras_moe import checks, initializers

MECHANISMS = ("softmax", "sigmoid", "gumbel")


@keras.saving.register_keras_serializable(package="keras_moe")
class Gate(keras.layers.Layer):
    """Probabilities of experts for tokens, always in float32.

    `softmax(x · kernel + bias)` over the experts, or another `mechanism`.

    Args:
        num_experts: int, the number of experts `e`.
        hidden_layers: an int or a list of ints: the widths of ReLU layers
            before the gate; `None` for none.
        mechanism: `"softmax"`; `"sigmoid"`, each expert for itself; or
            `"gumbel"`, all on one expert: in training a sample (the hard
            Gumbel-softmax, with the gradient of the soft one), otherwise the
            best.
        noise_std: float, the standard deviation of Gaussian noise that is
            added to the logits in training.
        jitter_noise: float in [0, 1). In training the input is multiplied by
            uniform noise from `[1 - jitter_noise, 1 + jitter_noise]`.
        use_bias: bool.
        kernel_initializer: initializer of the kernel `[h, e]`;
            `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of the bias `[e]`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`, except `dtype`: the gate
            is float32 under every dtype policy.

    Call arguments:
        inputs: `[batch, ..., h]`.
        training: bool, whether to add noise.
        return_logits: bool.

    Returns:
        float32 probabilities `[batch, ..., e]`, 1 in sum (but for `"sigmoid"`);
        with `return_logits` a pair of these and the logits, without noise.

    Raises:
        ValueError: for an unknown mechanism, and numbers out of range.
        TypeError: for arguments of another type.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.4, on
        float32 and on the jitter;
        [Jang et al., 2017](https://arxiv.org/abs/1611.01144) on Gumbel-softmax.
    """

    def __init__(
        self,
        num_experts,
        *,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        name=None,
        **kwargs,
    ):
        kwargs["dtype"] = "float32"
        super().__init__(name=name, **kwargs)
        self.num_experts = checks.whole_number("num_experts", num_experts)
        self.hidden_layers = _widths(hidden_layers)
        self.mechanism = checks.one_of("mechanism", mechanism, MECHANISMS)
        self.noise_std = checks.number("noise_std", noise_std)
        self.jitter_noise = checks.number("jitter_noise", jitter_noise, below=1)
        self.use_bias = checks.boolean("use_bias", use_bias)
        self.kernel_initializer = initializers.get(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = initializers.get("bias_initializer", bias_initializer)
        self._hidden = [
            UnquantizedDense(
                width,
                activation="relu",
                kernel_initializer=initializers.clone(self.kernel_initializer),
                bias_initializer=initializers.clone(self.bias_initializer),
                dtype="float32",
                name=f"hidden_{i}",
            )
            for i, width in enumerate(self.hidden_layers or ())
        ]
        if self.jitter_noise or self.noise_std or self.mechanism == "gumbel":
            self.seed_generator = keras.random.SeedGenerator()
        self.supports_masking = True

    # A gate for each entry of the inputs' third axis from the end, with a
    # kernel `[num_gates, h, e]`; set by a layer that holds several.
    num_gates = None

    def build(self, input_shape):
        width = input_shape[-1]
        gates = () if self.num_gates is None else (self.num_gates,)
        for layer in self._hidden:
            layer.build((*input_shape[:-1], width))
            width = layer.units
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*gates, width, self.num_experts),
            initializer=initializers.clone(self.kernel_initializer),
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(*gates, 1, self.num_experts) if gates else (self.num_experts,),
                initializer=initializers.clone(self.bias_initializer),
            )

    def call(self, inputs, training=None, return_logits=False):
        logits = self._logits(self._jittered(inputs) if training else inputs)
        probs = self._probabilities(
            self._noisy(logits) if training else logits, training
        )
        return (probs, logits) if return_logits else probs

    def _logits(self, x):
        for layer in self._hidden:
            x = layer(x)
        logits = ops.matmul(x, self.kernel)
        return logits if self.bias is None else logits + self.bias

    def _probabilities(self, logits, training):
        if self.mechanism == "softmax":
            return _softmax(logits)
        if self.mechanism == "sigmoid":
            return ops.sigmoid(logits)
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
        # The value of the hard one, the gradient of the soft one.
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

    def _noisy(self, logits):
        if not self.noise_std:
            return logits
        return logits + keras.random.normal(
            ops.shape(logits),
            stddev=self.noise_std,
            dtype="float32",
            seed=self.seed_generator,
        )

    def quantize(self, mode=None, type_check=True, config=None):
        """Leaves the gate as it is, so that the routing stays what it was."""

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.num_experts)

    def compute_output_spec(self, inputs, training=None, return_logits=False):
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
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
        }


class UnquantizedDense(keras.layers.Dense):
    """A dense layer of a gate, which `quantize` leaves as it is."""

    def quantize(self, mode=None, type_check=True, config=None):
        pass


def _softmax(logits):
    """A softmax that is 1, not nearly 1, where it is sure.

    `ops.softmax` is 0.99999994 there on TensorFlow, on some CPUs; that times a
    large token and its large output is a gradient of infinity instead of 0.
    """
    return ops.exp(ops.log_softmax(logits, axis=-1))


def _widths(hidden_layers):
    """The widths of the hidden layers as a list, or `None`."""
    if hidden_layers is None:
        return None
    if not isinstance(hidden_layers, (list, tuple)):
        hidden_layers = [hidden_layers]
    return [checks.whole_number("hidden_layers", width) for width in hidden_layers]
