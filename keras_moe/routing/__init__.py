"""Routings and the pure functions that make and apply them: the parts of a router.

May import: kernels.

Everything here works on tensors and has no state. `Slots`, `Rows` and `RouterMask` are
what a router returns; `top_k` selects experts for tokens, and `assign_slots` turns a
`Selection` into a routing.
"""

from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import Selection, nonfinite_to_zero, top_k
from keras_moe.routing.values import RouterMask, Rows, Slots

__all__ = [
    "RouterMask",
    "Rows",
    "Selection",
    "Slots",
    "assign_slots",
    "nonfinite_to_zero",
    "top_k",
]
