"""State of layers that is not a weight, and losses: where they are, when they change.

A layer may run in a training step, by itself, or inside an inner program: a loop, a
cell of an RNN, a rematerialized function, or a compiled function that Keras does not
manage. In an inner program, state must not change, and losses are out of reach.
"""

import weakref

import keras

from keras_moe.kernels import ForwardPasses, can_assign, loss_is_reachable, ops
from keras_moe.kernels.plain import current_scope


class OwnedVariable(keras.Variable):
    """A float32 variable of a layer that is not one of its weights.

    Its path begins with the path of the layer, once this is built. So it is unique in a
    model, as state trees and state dicts need.

    Args:
        owner: the layer.
        name: string.
        shape: tuple.
        value: float, the initial value of all elements. Defaults to 0.
        per_replica: bool, whether replicas have values of their own, whose sum is
            read. Defaults to `True`.
    """

    def __init__(self, owner, name, shape, value=0.0, per_replica=True):
        self._passes = ForwardPasses()
        self._owner_path = lambda: owner.path or owner.name
        super().__init__(
            # An initializer instead of an array, so that a layer can be created while
            # another is built symbolically.
            initializer=keras.initializers.Constant(value),
            shape=shape,
            dtype="float32",
            trainable=False,
            # bfloat16 cannot count beyond 256.
            autocast=False,
            # With other values, a replica that changes it waits for the others, and
            # discards losses that were already added.
            aggregation="sum" if per_replica else "none",
            synchronization="on_read" if per_replica else "auto",
            name=name,
        )

    @property
    def path(self):
        return f"{self._owner_path()}/{self.name}"

    def add(self, change):
        """Adds to the variable, unless a function runs again: see `add_to`."""
        is_second, _ = self._passes.next()
        return not is_second and add_to(self, change)


def add_to(variable, change):
    """Adds to a variable, if the running program may change it.

    Args:
        variable: variable.
        change: tensor; its gradient is ignored.

    Returns:
        Whether the variable has changed.
    """
    old = ops.convert_to_tensor(variable)
    new = ops.stop_gradient(old + change)
    if not can_assign(old, new):
        return False
    variable.assign(new)
    return True


class LossOutlet:
    """Adds the losses of a layer, also from within inner programs.

    Where `add_loss` cannot reach the training step, `attach_to` attaches the gradients
    of the losses to an output of the layer. Training is then as with `add_loss`, except
    that the loss is not reported, and not scaled by a `LossScaleOptimizer`.

    Args:
        layer: the layer.

    Reference:
        [Megatron-LM](https://github.com/NVIDIA/Megatron-LM), `MoEAuxLossAutoScaler`.
    """

    def __init__(self, layer):
        self._layer = layer
        self._passes = ForwardPasses()
        self._unreachable = []
        self._added = weakref.WeakKeyDictionary()  # By scope.

    def add(self, loss, add_loss):
        """Adds a loss.

        Args:
            loss: scalar tensor.
            add_loss: `add_loss` of the layer's base class.
        """
        is_second, _ = self._passes.next()
        if is_second and self._passes.first_has_gradient:
            return
        if is_second or not loss_is_reachable(loss):
            self._unreachable.append(loss)
            return
        scope = current_scope()
        if scope is not None:
            self._restore(scope, add_loss)
            self._added[scope].append(loss)
        add_loss(loss)

    def attach_to(self, x):
        """Returns a tensor that has the gradients of unreachable losses attached."""
        for loss in self._unreachable:
            x = attach_gradient(x, loss)
        self._unreachable.clear()
        return x

    def _restore(self, scope, add_loss):
        """Corrects the losses that Keras has for this layer in a scope.

        Keras recognizes the losses of a layer by `id`, which a loss of another scope
        may have had. And it removes those of the first call if a model calls the layer
        twice in `stateless_call`.
        """
        if scope not in self._added:
            self._added[scope] = []
            getattr(self._layer, "_loss_ids", set()).clear()
        present = set(map(id, scope.losses))
        for loss in self._added[scope]:
            if id(loss) not in present:
                add_loss(loss)


def attach_gradient(x, loss):
    """Returns `x`; its gradient adds that of `loss`.

    Args:
        x: tensor.
        loss: scalar tensor.
    """

    @ops.custom_gradient
    def identity(x, loss):
        return x, lambda upstream: (upstream, ops.ones_like(loss))

    return identity(x, loss)
