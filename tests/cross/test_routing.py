"""Equal weights give the same routing on every backend, without randomness."""

import numpy as np
from backends import BACKENDS, run

CLOSE, EXACT = {"rtol": 1e-5, "atol": 1e-7}, {"rtol": 0, "atol": 0}

ROUTE = """
import sys
import keras
import numpy as np
from keras import ops
from samples import E, H, ROUTERS

rng = np.random.default_rng(0)
# With so few values, many tokens have exactly tied router probabilities.
x = rng.integers(-1, 2, size=(3, 20, H)).astype("float32")
mask = rng.random((3, 20)) < 0.8
found = {}
for name, make in ROUTERS.items():
    router = make()
    router.build(x.shape)
    for weight in router.weights:
        weight.assign(rng.integers(-2, 3, size=weight.shape) / 4)
    for capacity in (1, 6, None):
        if capacity is None and not router.supports_dropless:
            continue
        routing = router.route(x, expert_capacity=capacity, mask=mask)
        for part, value in routing._asdict().items():
            found[f"{name}, {capacity}: {part}"] = ops.convert_to_numpy(value)
np.savez(f"{sys.argv[1]}/{keras.backend.backend()}.npz", **found)
"""


def test_all_backends_give_the_same_routing(tmp_path):
    for backend in BACKENDS:
        run(ROUTE, backend, tmp_path)
    first, *others = (np.load(tmp_path / f"{backend}.npz") for backend in BACKENDS)
    assert len(first) > 100
    for other in others:
        assert set(other) == set(first)
        for part, expected in first.items():
            np.testing.assert_allclose(
                other[part],
                expected,
                err_msg=part,
                **(CLOSE if expected.dtype.kind == "f" else EXACT),
            )
