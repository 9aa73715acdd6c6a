"""Files that are cut short, damaged or malicious are refused, and do nothing."""

import base64
import copy
import itertools
import json
import marshal
import pathlib
import pickle
import re
import tempfile
import zipfile

import h5py
import keras
import numpy as np
import pytest
from layer_check import functional

from keras_moe import (
    BiasBalancedMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    HeterogeneousExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    SoftMoeLayer,
    Top2MaskedRouter,
)

E, H, F = 4, 6, 5
WEIGHTS, CONFIG = "model.weights.h5", "config.json"
# What Keras, zipfile and h5py say of a file that they cannot read.
UNREADABLE = ValueError, OSError, KeyError, zipfile.BadZipFile


def make_moe():
    return MoeLayer(
        FeedForwardExperts(E, F, gated=True),
        BiasBalancedMaskedRouter(E, hidden_layers=[3], bias_update_rate=0.1),
    )


LAYERS = {
    "moe": make_moe,
    "backbone": lambda: MoeLayerWithBackbone(make_moe(), F, backbone_gate=True),
    "heterogeneous": lambda: MoeLayer(
        HeterogeneousExperts([FeedForward(F), FeedForward(3)]), MaskedRouter(2)
    ),
    "soft": lambda: SoftMoeLayer(FeedForwardExperts(E, F)),
    "two levels": lambda: HierarchicalMoeLayer(
        FeedForwardExperts(E, F),
        Top2MaskedRouter(2, name="outer"),
        Top2MaskedRouter(2, name="inner"),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good file with each layer: its members, as bytes."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, make in LAYERS.items():
        functional(make(), (8, H)).save(folder / "model.keras")
        with zipfile.ZipFile(folder / "model.keras") as archive:
            found[name] = {n: archive.read(n) for n in archive.namelist()}
    return found


def write(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# Damaged files.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with a state of every kind, and its file from before it had it."""
    inputs = keras.Input((8, H))
    x = keras.layers.Dense(H)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(H)(make_moe()(x)))
    model.compile("adam", "mse")
    data = np.random.default_rng(0).normal(size=(3, 8, H)).astype("float32")
    model.train_on_batch(data, data)
    folder = tmp_path_factory.mktemp("trained")
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.train_on_batch(data, data)
    return model, folder


def state_of(model):
    variables = [*model.weights, *model.optimizer.variables]
    return [np.copy(keras.ops.convert_to_numpy(v)) for v in variables]


def check_unchanged(model, before):
    for a, b in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(a, b)


LENGTHS = [0, 1, 100, 0.1, 0.5, 0.9, -200, -30, -1]


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("length", LENGTHS)
def test_cut_short(length, name, trained, tmp_path, record_property):
    record_property("tried", 1)
    model, folder = trained
    content = (folder / name).read_bytes()
    if isinstance(length, float):
        length = int(length * len(content))
    (tmp_path / name).write_bytes(content[:length])
    before = state_of(model)
    with pytest.raises(UNREADABLE, match=r"."):
        model.load_weights(tmp_path / name)
    check_unchanged(model, before)
    if name.endswith(".keras"):
        with pytest.raises(UNREADABLE, match=r"."):
            keras.models.load_model(tmp_path / name)


@pytest.mark.parametrize("member", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("length", [None, 0, 100, 0.5, 0.9, -1])
def test_a_member_cut_short(length, member, trained, tmp_path, record_property):
    """Or, with `None`, away; in a whole archive."""
    record_property("tried", 1)
    model, folder = trained
    with zipfile.ZipFile(folder / "model.keras") as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    if isinstance(length, float):
        length = int(length * len(members[member]))
    members[member] = members[member][:length]
    if length is None:
        del members[member]
    path = write(tmp_path / "model.keras", members)
    with pytest.raises(UNREADABLE, match=r"."):
        keras.models.load_model(path)
    before = state_of(model)
    if member == WEIGHTS:
        with pytest.raises(UNREADABLE, match=r"."):
            model.load_weights(path)
        check_unchanged(model, before)


def another_shape(group, name, tmp_path):
    value = group[name][()]
    del group[name]
    group[name] = np.zeros((*value.shape, 2), "float32")


def lacking(group, name, tmp_path):
    del group[name]


def text(group, name, tmp_path):
    del group[name]
    group[name] = "0"


def huge(group, name, tmp_path):
    del group[name]
    group.create_dataset(name, shape=(10**12, 10), chunks=(1000, 10))


def elsewhere(group, name, tmp_path):
    """The tensor itself, but in another file."""
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["0"] = group[name][()]
    del group[name]
    group[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "0")


def stored_elsewhere(group, name, tmp_path):
    """The same, by an older feature of the format."""
    value = group[name][()]
    value.tofile(tmp_path / "other.bin")
    del group[name]
    group.create_dataset(
        name,
        shape=value.shape,
        dtype=value.dtype,
        external=[(str(tmp_path / "other.bin"), 0, value.nbytes)],
    )


def damage(path, change, place, tmp_path):
    """Changes one tensor of a file of weights."""
    with h5py.File(path, "r+") as file:
        group, _, name = place.rpartition("/")
        change(file[group], name, tmp_path)


def places_of_tensors(path):
    places = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, x: places.append(name) if hasattr(x, "shape") else None
        )
    return [p for p in places if p.startswith("layers/")]


@pytest.mark.parametrize(
    "change", [another_shape, lacking, text, huge, elsewhere, stored_elsewhere]
)
def test_a_damaged_tensor(change, trained, tmp_path, record_property):
    """Each in turn; the way to load in one go changes nothing if it fails.

    `load_weights` itself loads layer by layer, any layer, and those that it has
    loaded before it fails are changed.
    """
    model, folder = trained
    places = places_of_tensors(folder / WEIGHTS)
    assert len(places) == len(model.weights)
    before = state_of(model)
    other = keras.models.clone_model(model)
    for place in places:
        path = tmp_path / WEIGHTS
        path.write_bytes((folder / WEIGHTS).read_bytes())
        damage(path, change, place, tmp_path)
        with pytest.raises(ValueError, match="could not be loaded"):
            other.load_weights(path)
            model.set_weights(other.get_weights())
    with zipfile.ZipFile(folder / "model.keras") as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    members[WEIGHTS] = path.read_bytes()
    with pytest.raises(ValueError, match="could not be loaded"):
        model.set_weights(
            keras.models.load_model(
                write(tmp_path / "model.keras", members)
            ).get_weights()
        )
    check_unchanged(model, before)
    record_property("tried", len(places) + 1)


def test_in_one_go(trained):
    """What the last test has fail does load a good file."""
    model, folder = trained
    for file in ("model.keras", "model.weights.h5"):
        before = model.get_weights()
        if file == "model.keras":
            other = keras.models.load_model(folder / file)
        else:
            other = keras.models.clone_model(model)
            other.load_weights(folder / file)
        model.set_weights(other.get_weights())
        for a, b in zip(before, model.get_weights(), strict=True):
            assert not np.array_equal(a, b)
        model.set_weights(before)


# Malicious files.


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def payloads(canary):
    """Configs of objects, each to run something that makes a file."""
    command = f"touch {canary}"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    function = eval(f"lambda *args, **kwargs: {code}")
    dumped = base64.b64encode(marshal.dumps(function.__code__)).decode()
    lambda_ = {"class_name": "__lambda__", "config": {"value": [dumped, None, None]}}
    pickled = base64.b64encode(pickle.dumps(Touch(canary))).decode()

    def named(module, name, config, registered=None):
        return {
            "module": module,
            "class_name": name,
            "config": config,
            "registered_name": registered,
        }

    return [
        lambda_,
        named("keras.layers", "Lambda", {"name": "l", "function": lambda_}),
        named(
            "keras.layers",
            "TorchModuleWrapper",
            {"module": {"class_name": "__bytes__", "config": {"value": pickled}}},
        ),
        named("keras.layers", "TFSMLayer", {"filepath": str(canary.parent)}),
        named("os", "system", {"command": command}),
        named("os", "system", {"command": command}, "os>system"),
        named("posix", "system", {"command": command}),
        named("os", "function", "system", "system"),
        named("builtins", "function", "os.system", "os.system"),
        named("subprocess", "Popen", {"args": ["touch", str(canary)]}),
        named("subprocess", "Popen", {"args": command, "shell": True}, "Popen"),
        named("builtins", "eval", {"source": code}),
        named("builtins", "function", "eval", "eval"),
        named("builtins", "function", "exec", "builtins>exec"),
        named("keras_moe.checks", "numbers", {}),
        named("keras_moe.experts.os", "system", {"command": command}),
        named("keras.src.utils.python_utils", "func_load", {"code": dumped}),
        named("keras.src.saving.saving_lib", "zipfile", {}),
        named("keras.utils", "function", "get_file", "get_file"),
        named("keras.config", "function", "enable_unsafe_deserialization"),
        named("keras.config", "enable_unsafe_deserialization", {}),
        "os.system",
        "subprocess.Popen",
        "eval",
        f"lambda *args: {code}",
    ]


def test_the_payloads_are_live(tmp_path):
    """Or else nothing that they do not do would mean anything."""
    canary = tmp_path / "canary"
    lambda_, *_ = payloads(canary)
    keras.saving.deserialize_keras_object(lambda_, safe_mode=False)()
    assert canary.exists()
    canary.unlink()
    pickle.loads(pickle.dumps(Touch(canary)))
    assert canary.exists()


def is_object(value):
    return isinstance(value, dict) and "class_name" in value


def ours(value):
    """Whether it is the config of a layer of this package."""
    return is_object(value) and str(value.get("module")).startswith("keras_moe")


def fields(value, path=()):
    """Paths to the fields of our layers' configs, with their values."""
    if ours(value):
        for key, part in value["config"].items():
            yield (*path, "config", key), part
            if isinstance(part, list):
                yield from (((*path, "config", key, i), x) for i, x in enumerate(part))
    parts = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else parts:
        yield from fields(part, (*path, key))


def layer_fields(members):
    """The fields of the one layer of ours in a file, from its config's root."""
    config = json.loads(members[CONFIG])
    layers = config["config"]["layers"]
    (index,) = (i for i, layer in enumerate(layers) if ours(layer))
    root = ("config", "layers", index)
    return [((*root, *path), value) for path, value in fields(layers[index], ())]


def with_field(members, path, value):
    """A file's members, with another value in its config."""
    config = json.loads(members[CONFIG])
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = copy.deepcopy(value)
    return {**members, CONFIG: json.dumps(config)}


class Attempts:
    """Files that are to be refused, counted."""

    def __init__(self, path):
        self.path, self.tried, self.faults = path, 0, []

    def load(self, members, what, also=(), message="."):
        """Loads a file with a bad field.

        Args:
            members: of the file.
            what: the path to the field, and what is in it.
            also: other errors than TypeError and ValueError.
            message: what the error must match.
        """
        self.tried += 1
        try:
            keras.models.load_model(write(self.path, members))
        except (TypeError, ValueError, *also) as error:
            if not re.search(message, str(error)):
                self.faults.append(f"{what}: {error}")
        except Exception as error:
            self.faults.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        else:
            self.faults.append(f"{what}: accepted")

    def report(self, name, record_property):
        record_property("tried", self.tried)
        print(name, self.tried, "files,", len(self.faults), "accepted by mistake")
        assert self.tried
        assert len(self.faults) == 0, "\n".join(self.faults)


# The others hold much the same.
each_layer = pytest.mark.parametrize(
    "name",
    [
        name if name == "backbone" else pytest.param(name, marks=pytest.mark.thorough)
        for name in LAYERS
    ],
)


def by_keras(path, value=None):
    """The other errors there may be at a field.

    A dtype policy is read by Keras, before the layer is made: what is none is an
    AttributeError there, in any layer. A TorchModuleWrapper imports torch, which
    may be missing.
    """
    dtype = (AttributeError,) if path[-1] == "dtype" else ()
    torch = is_object(value) and value["class_name"] == "TorchModuleWrapper"
    return (*dtype, ModuleNotFoundError) if torch else dtype


@each_layer
def test_objects_of_others_do_nothing(name, files, tmp_path, record_property):
    canary = tmp_path / "canary"
    attempts = Attempts(tmp_path / "model.keras")
    places = [
        path
        for path, value in layer_fields(files[name])
        if is_object(value) or path[-1] in ("activation", "experts")
    ]
    assert len(places) > 5
    for path, (i, payload) in itertools.product(places, enumerate(payloads(canary))):
        members = with_field(files[name], path, payload)
        attempts.load(members, f"payload {i} at {path}", by_keras(path, payload))
    attempts.report(name, record_property)
    assert not canary.exists()
    # Nor may any have switched safe mode off.
    with pytest.raises(ValueError, match="disallowed"):
        keras.saving.deserialize_keras_object(payloads(canary)[0])


# For each type of a field's value, values of other types.
WRONG = {
    bool: (None, 1, "x", [], {}),
    int: (None, True, 0.5, "4", [], [4], {}),
    float: (True, "1.0", [], [1.0], {}),
    str: (True, 1, 0.5, [], ["gelu"], {}),
    list: (True, 0.5, "x", [None], {}, {"class_name": "x"}),
    dict: (True, 1, 0.5, "", "x", [], [None], {}, {"class_name": "x"}, {"config": {}}),
}
# What is right all the same, or what Keras does not look at.
RIGHT = {"trainable": WRONG[bool], "export_metrics": ([],)}


@each_layer
def test_values_of_other_types(name, files, tmp_path, record_property):
    attempts = Attempts(tmp_path / "model.keras")
    for path, value in layer_fields(files[name]):
        for wrong in WRONG.get(type(value), ()):
            if wrong in RIGHT.get(path[-1], ()):
                continue
            members = with_field(files[name], path, wrong)
            attempts.load(members, f"{wrong!r} at {path}", by_keras(path))
    attempts.report(name, record_property)


@each_layer
def test_sizes_beyond_all_memory(name, files, tmp_path, record_property):
    """Refused for their size, before anything is made of it."""
    attempts = Attempts(tmp_path / "model.keras")
    places = [
        path
        for path, value in layer_fields(files[name])
        if type(value) is int or path[-1] == "examples_per_group"
    ]
    for path, size in itertools.product(places, (2**31, 10**12, 10**30)):
        members = with_field(files[name], path, size)
        attempts.load(members, f"{size} at {path}", message="at most")
    # In all places at once they would fit together.
    for key in ("num_experts", "d_ff"):
        members = files[name]
        for path in places:
            if path[-1] == key:
                members = with_field(members, path, 10**12)
        attempts.load(members, f"{key} everywhere", message="at most")
    attempts.report(name, record_property)


NAMES = [
    "../canary",
    "../../canary",
    "../../../../../../canary",
    "assets/../../canary",
    "assets/../../../canary",
    "assets/layers/../../../../canary",
    "..\\..\\canary",
    "assets\\..\\..\\canary",
    "{}/canary",
    "assets/{}/canary",
    "/{}/canary",
    "./../canary",
    "../config.json",
    "assets/canary/",
]


@pytest.mark.filterwarnings("ignore:Skipping invalid path")
def test_names_that_lead_out_of_the_archive(
    files, tmp_path, monkeypatch, record_property
):
    """Nothing is written outside the folder that Keras makes for the archive's own."""
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(inner))
    monkeypatch.chdir(inner)
    path = tmp_path / "model.keras"
    good = keras.models.load_model(write(path, files["moe"]))
    everything = set(tmp_path.rglob("*"))
    for name in NAMES:
        member = name.format(str(tmp_path / "a"))
        write(path, {**files["moe"], member: b"x", "assets/own": b"x"})
        # The rest of the file is as it was.
        loaded = keras.models.load_model(path)
        for a, b in zip(good.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert set(tmp_path.rglob("*")) == everything, name
    assert not any(path.exists() for path in map(pathlib.Path, ("/canary", "canary")))
    record_property("tried", len(NAMES))
