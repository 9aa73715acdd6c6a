"""Damaged or malicious configs of our layers in `.keras` files are refused."""

import copy
import itertools
import json
import zipfile

import keras
import numpy as np
import pytest
from layer_check import functional
from samples import F, H, inputs

import keras_moe
from keras_moe import FeedForward, MaskedRouter, MoeLayer

CONFIG = "config.json"


def make_layer():
    """A layer with as many fields in its config as may be."""
    moe = MoeLayer(
        keras_moe.HeterogeneousExperts([FeedForward(F), FeedForward(3)]),
        keras_moe.BiasBalancedMaskedRouter(2, hidden_layers=[3]),
    )
    return keras_moe.MoeLayerWithBackbone(moe, F, backbone_gate=True)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The members of a good file, as bytes."""
    path = tmp_path_factory.mktemp("files") / "model.keras"
    functional(make_layer(), (8, H)).save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def is_object(value):
    return isinstance(value, dict) and "class_name" in value


def fields(value, path=()):
    """Paths to the fields of our layers' configs, with their values."""
    if is_object(value) and str(value.get("module")).startswith("keras_moe"):
        for key, part in value["config"].items():
            yield (*path, "config", key), part
    parts = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else parts:
        yield from fields(part, (*path, key))


def load_with(members, place, value, path):
    """Loads the file with another value in its config."""
    config = json.loads(members[CONFIG])
    part = config
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = copy.deepcopy(value)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(config) if name == CONFIG else content)
    return keras.models.load_model(path)


# For each type of a field's value, values of other types.
WRONG = {
    bool: (None, 1, "x", []),
    int: (None, True, 0.5, "4", [4], 2**31, 10**30),
    float: (True, "1.0", [1.0]),
    str: (True, 1, []),
    list: (True, 0.5, "x", [None], {}),
    dict: (True, 1, "x", [None], {}, {"class_name": "x"}),
}
# Right all the same, or read by Keras alone.
RIGHT = ("trainable", "export_metrics", "dtype", "build_config", "normalize_weights")


def test_values_of_other_types(members, tmp_path):
    found = list(fields(json.loads(members[CONFIG])))
    assert len(found) > 40
    for place, value in found:
        for wrong in WRONG.get(type(value), ()) if place[-1] not in RIGHT else ():
            try:
                load_with(members, place, wrong, tmp_path / "model.keras")
            except (TypeError, ValueError):
                continue
            pytest.fail(f"{wrong!r} at {place} was accepted")


def payloads(canary):
    """Configs of objects that would create a file."""
    command = f"touch {canary}"

    def named(module, name, config, registered=None):
        return {
            "module": module,
            "class_name": name,
            "config": config,
            "registered_name": registered,
        }

    function = keras.saving.serialize_keras_object(lambda *_: canary.touch())
    return [
        function,
        named("keras.layers", "Lambda", {"name": "l", "function": function}),
        named("os", "system", {"command": command}),
        named("builtins", "function", "os.system", "os.system"),
        named("subprocess", "Popen", {"args": command, "shell": True}),
        named("keras_moe.utils.checks", "numbers", {}),
        named("keras_moe.experts.os", "system", {"command": command}),
        named("keras.config", "function", "enable_unsafe_deserialization"),
        "os.system",
    ]


def test_objects_of_others_do_nothing(members, tmp_path):
    canary = tmp_path / "canary"
    places = [
        place
        for place, value in fields(json.loads(members[CONFIG]))
        if is_object(value) or place[-1] in ("activation", "experts")
    ]
    assert len(places) > 10
    for place, payload in itertools.product(places, payloads(canary)):
        # A dtype policy is read by Keras, before our layer.
        errors = (AttributeError,) if place[-1] == "dtype" else ()
        with pytest.raises((TypeError, ValueError, *errors)):
            load_with(members, place, payload, tmp_path / "model.keras")
    assert not canary.exists()
    # They would have worked, and none has switched the safe mode off.
    with pytest.raises(ValueError, match="disallowed"):
        keras.saving.deserialize_keras_object(payloads(canary)[0])
    keras.saving.deserialize_keras_object(payloads(canary)[0], safe_mode=False)()
    assert canary.exists()


def test_code_among_the_experts_is_refused(rng, tmp_path):
    experts = [keras.layers.Lambda(lambda x: 2 * x), FeedForward(8)]
    layer = MoeLayer(keras_moe.HeterogeneousExperts(experts), MaskedRouter(2))
    model = functional(layer, (4, H))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"Lambda.*arbitrary code"):
        keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"Lambda.*arbitrary code"):
        MoeLayer.from_config(layer.get_config())

    # It loads if the user trusts it.
    x = inputs(rng, 2, 4)
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    expected = model.predict_on_batch(x)
    np.testing.assert_allclose(loaded.predict_on_batch(x), expected, atol=1e-6)
