"""The gate: from tokens to probabilities."""

import keras
from keras import ops

from keras_moe import checks, initializers


@keras.saving.register_keras_serializable(package="keras_moe")
class Gate(keras.layers.Layer):
    """Probabilities of experts for tokens, always in float32.

    `softmax(x · kernel + bias)` over the experts.

    Args:
        num_experts: int, the number of experts `e`.
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
        float32 probabilities `[batch, ..., e]`, 1 in sum; with `return_logits`
        a pair of these and the logits.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.4, on
        float32 and on the noise.
    """

    def __init__(
        self,
        num_experts,
        *,
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
        self.jitter_noise = checks.number("jitter_noise", jitter_noise, below=1)
        self.use_bias = checks.boolean("use_bias", use_bias)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        if self.jitter_noise:
            self.seed_generator = keras.random.SeedGenerator()
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=initializers.clone(self.kernel_initializer),
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer=initializers.clone(self.bias_initializer),
            )

    def call(self, inputs, training=None, return_logits=False):
        if training and self.jitter_noise:
            inputs = inputs * keras.random.uniform(
                ops.shape(inputs),
                minval=1.0 - self.jitter_noise,
                maxval=1.0 + self.jitter_noise,
                dtype=inputs.dtype,
                seed=self.seed_generator,
            )
        logits = ops.matmul(inputs, self.kernel)
        if self.bias is not None:
            logits = logits + self.bias
        probs = ops.softmax(logits, axis=-1)
        return (probs, logits) if return_logits else probs

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.num_experts)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return {
            **config,
            "num_experts": self.num_experts,
            "jitter_noise": self.jitter_noise,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
        }
