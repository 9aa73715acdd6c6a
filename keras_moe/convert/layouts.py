"""The tensors of the models of transformers, in files and in modules."""

import dataclasses

from keras_moe.convert.formats import (
    EXPERT,
    EXPERT_BIAS,
    GATE,
    INNER,
    INNER_BIAS,
    OUTPUT,
    OUTPUT_BIAS,
    ROUTER,
    ROUTER_BIAS,
    SHARED_GATE,
    SHARED_INNER,
    SHARED_OUTPUT,
    TensorSpec,
    gpt_oss_experts,
    linear,
)

# Where a name differs, it is a pair: that in files, and that in modules.

NAMES = ("gate_proj", "up_proj", "down_proj")
W_NAMES = ("w1", "w3", "w2")
FUSED = (
    linear("experts.gate_up_proj", GATE, INNER),
    linear("experts.down_proj", OUTPUT),
)


def _per_expert(gate, inner, output):
    names = {gate: GATE, inner: INNER, output: OUTPUT}
    return [linear(f"experts.{EXPERT}.{n}.weight", p) for n, p in names.items()]


def _shared_specs(name, names=NAMES):
    paths = (SHARED_GATE, SHARED_INNER, SHARED_OUTPUT)
    biases = [path.replace("kernel", "bias") for path in paths]
    return [
        *(
            linear(f"{name}.{n}.weight", path, optional=True)
            for n, path in zip(names, paths, strict=True)
        ),
        *(
            TensorSpec(f"{name}.{n}.bias", (path,), optional=True)
            for n, path in zip(names, biases, strict=True)
        ),
    ]


def layouts_of(
    *others,
    gate="gate.weight",
    bias=None,
    shared=None,
    experts=NAMES,
    modules=FUSED,
    inserted=(),
):
    """Returns the layouts of files and of modules.

    Args:
        *others: further `TensorSpec`s.
        gate: name of the gate's weight, or a pair.
        bias: name of the bias for the selection, or a pair. Defaults to `None`, none.
        shared: name of the shared expert, or a pair. Defaults to `None`, none.
        experts: tuple of names of the experts' weights in files, or `TensorSpec`s.
        modules: tuple of the `TensorSpec`s of the experts in modules.
        inserted: axes of size 1 of the bias.
    """
    if isinstance(experts[0], str):
        experts = _per_expert(*experts)
    result = []
    for i, specs in enumerate((experts, modules)):
        gate_i, bias_i, shared_i = (
            x[i] if isinstance(x, tuple) else x for x in (gate, bias, shared)
        )
        layout = [linear(gate_i, ROUTER), *specs, *others]
        if bias_i:
            layout.append(
                TensorSpec(bias_i, (EXPERT_BIAS,), inserted=inserted, optional=True)
            )
        if shared_i:
            layout += _shared_specs(
                *([shared_i] if isinstance(shared_i, str) else shared_i)
            )
        result.append(layout)
    return result


DEEPSEEK = layouts_of(bias="gate.e_score_correction_bias", shared="shared_experts")
_SHARED_GATE = linear("shared_expert_gate.weight", "backbone_gate/kernel")
QWEN_SHARED = layouts_of(_SHARED_GATE, shared="shared_expert")
TRANSPOSED = [
    TensorSpec("experts.gate_up_proj", (GATE, INNER)),
    TensorSpec("experts.down_proj", (OUTPUT,)),
]
GPT_OSS = gpt_oss_experts("experts.")
DBRX = [
    linear("experts.mlp.w1", GATE, merged=True),
    linear("experts.mlp.v1", INNER, merged=True),
    TensorSpec("experts.mlp.w2", (OUTPUT,), merged=True),
]


def granite(prefix=""):
    return layouts_of(
        linear(
            "shared_mlp.input_linear.weight", SHARED_GATE, SHARED_INNER, optional=True
        ),
        linear("shared_mlp.output_linear.weight", SHARED_OUTPUT, optional=True),
        gate=(f"{prefix}router.layer.weight", f"{prefix}router.weight"),
        experts=(
            linear(f"{prefix}input_linear.weight", GATE, INNER),
            linear(f"{prefix}output_linear.weight", OUTPUT),
        ),
        modules=(
            linear(f"{prefix}experts.gate_up_proj", GATE, INNER),
            linear(f"{prefix}experts.down_proj", OUTPUT),
        ),
    )


NEMOTRON = layouts_of(
    linear("fc1_latent_proj.weight", "latent_input/kernel", optional=True),
    linear("fc2_latent_proj.weight", "latent_output/kernel", optional=True),
    bias="gate.e_score_correction_bias",
    shared="shared_experts",
    experts=(
        linear(f"experts.{EXPERT}.up_proj.weight", INNER),
        linear(f"experts.{EXPERT}.down_proj.weight", OUTPUT),
    ),
    modules=(linear("experts.up_proj", INNER), linear("experts.down_proj", OUTPUT)),
)


def longcat(weights):
    """Their inner layers have unused rows for the identity experts."""
    total = weights[ROUTER].shape[-1]
    gate, inner, output = _per_expert(*NAMES)
    padded = (dataclasses.replace(spec, num_rows=total) for spec in (gate, inner))
    fused, down = FUSED
    return layouts_of(
        gate="router.classifier.weight",
        bias="router.e_score_correction_bias",
        experts=(*padded, output),
        modules=(dataclasses.replace(fused, num_rows=total), down),
    )


def one_by_one(inner, output):
    """Experts that modules, too, have one by one."""
    names = {inner: (INNER, INNER_BIAS), output: (OUTPUT, OUTPUT_BIAS)}
    specs = []
    for name, (kernel, bias) in names.items():
        name = f"experts.expert_{EXPERT}.{name}"
        specs.append(linear(f"{name}.weight", kernel))
        specs.append(TensorSpec(f"{name}.bias", (bias,), dropped=(1,), optional=True))
    return layouts_of(
        TensorSpec("router.classifier.bias", (ROUTER_BIAS,), optional=True),
        gate="router.classifier.weight",
        experts=specs,
        modules=specs,
    )
