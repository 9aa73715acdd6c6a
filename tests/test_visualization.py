import numpy as np
import pytest
from keras import ops
from matplotlib.colors import to_hex
from matplotlib.image import imread
from samples import prefer_first

from keras_moe import ExpertsChooseMaskedRouter, MaskedRouter, SoftMoeLayer
from keras_moe import FeedForwardExperts as Experts
from keras_moe.visualization import (
    DROPPED,
    MASKED,
    draw_loads,
    draw_routing,
    token_weights,
)

E, H, T = 3, 4, 5


@pytest.fixture
def tokens(rng):
    return ops.convert_to_tensor(rng.normal(size=(2, T, H)).astype("float32"))


@pytest.mark.parametrize("capacity", [2, T, None])
def test_weights_of_token_choice(tokens, capacity):
    router = MaskedRouter(E, num_selected_experts=2, kernel_initializer="he_normal")
    mask = ops.convert_to_tensor(np.arange(2 * T).reshape(2, T) != 7)
    routing = router.route(tokens, expert_capacity=capacity, mask=mask)
    weights = token_weights(routing)
    probs = ops.convert_to_numpy(routing.probs)
    chosen = np.argsort(-probs, axis=-1)[..., :2]
    for g in range(2):
        for t in range(T):
            if g * T + t == 7:
                expected = {}
            else:
                expected = {e: probs[g, t, e] for e in chosen[g, t]}
            found = {e: weights[g, t, e] for e in np.flatnonzero(weights[g, t])}
            if capacity == 2:  # Some assignments are dropped.
                assert found.items() <= expected.items()
            else:
                assert found == pytest.approx(expected)
    assert np.count_nonzero(weights) == ops.sum(routing.assignments)


def test_weights_of_expert_choice(tokens):
    routing = ExpertsChooseMaskedRouter(E).route(tokens, expert_capacity=2)
    weights = token_weights(routing)
    probs = ops.convert_to_numpy(routing.probs)
    assert np.all(np.count_nonzero(weights, axis=1) == 2)
    assigned = weights > 0
    np.testing.assert_array_equal(weights[assigned], probs[assigned])


def test_weights_of_soft_moe(tokens):
    layer = SoftMoeLayer(Experts(E, 4), slots_per_expert=2)
    weights = token_weights(layer.route(tokens))
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_draw_routing(tokens, tmp_path):
    routing = MaskedRouter(E).route(tokens, expert_capacity=None)
    figure = draw_routing(routing, labels=list("abcde"), group=1)
    axes, _ = figure.axes
    assert axes.get_title() == "group 1: 5 tokens, 0 dropped, 0 masked"
    assert [t.get_text() for t in axes.get_yticklabels()] == list("abcde")
    np.testing.assert_array_equal(axes.images[0].get_array(), token_weights(routing)[1])
    figure.savefig(tmp_path / "routing.png")
    assert imread(tmp_path / "routing.png").std() > 0.05
    with pytest.raises(ValueError, match="each of 5 tokens"):
        draw_routing(routing, labels=["a"])


@pytest.mark.parametrize(
    ("experts", "batches", "edges", "label"),
    [
        (2, [None] * 3, [-0.5, 0.5, 1.5, 2.5], "epoch"),
        (128, [9, 19, 9], [0, 10, 20, 35], "training step"),
    ],
)
def test_draw_loads(experts, batches, edges, label, tmp_path, rng):
    records = [
        {
            "layer": name,
            "batch": batch,
            "epoch": 0,
            "step": step,
            "load": rng.dirichlet(np.ones(experts)),
        }
        for batch, step in zip(batches, (10, 20, 35), strict=True)
        for name in ("block_0/moe", "block_1/moe")
    ]
    figure = draw_loads(records)
    mesh = figure.axes[0].collections[0]
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], edges)
    assert figure.axes[0].get_xlabel() == label
    titles = [axes.get_title() for axes in figure.axes]
    last = "step 35" if label == "training step" else "epoch 2"
    assert titles[:4] == ["block_0/moe", last, "block_1/moe", last]
    np.testing.assert_allclose(mesh.get_array()[:, 0], experts * records[0]["load"])
    figure.savefig(tmp_path / "loads.png")
    assert imread(tmp_path / "loads.png").std() > 0.05
    # All layers have one color scale, centered at the mean load.
    norms = [axes.collections[0].norm for axes in figure.axes[:4:2]]
    assert [(n.vmin, n.vcenter, n.vmax) for n in norms] == [(0, 1, 3)] * 2
    with pytest.raises(ValueError, match="at least one record"):
        draw_loads([])


def test_dropped_and_masked_tokens_look_different(tokens):
    mask = ops.convert_to_tensor(np.array([[True, True, True, True, False]] * 2))
    router = MaskedRouter(E, bias_initializer=prefer_first)
    routing = router.route(tokens, expert_capacity=1, mask=mask)
    figure = draw_routing(routing)
    axes, _ = figure.axes
    assert axes.get_title() == "group 0: 5 tokens, 3 dropped, 1 masked"
    rows = [(p.get_y() + 0.5, to_hex(p.get_facecolor())) for p in axes.patches]
    assert rows == [(1, DROPPED), (2, DROPPED), (3, DROPPED), (4, MASKED)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dropped", "masked"]


def test_the_figure_of_a_long_text_has_a_limited_size(rng):
    x = ops.convert_to_tensor(rng.normal(size=(1, 128, H)).astype("float32"))
    figure = draw_routing(MaskedRouter(E).route(x, expert_capacity=None))
    assert max(figure.get_size_inches() * figure.dpi) <= 1000
