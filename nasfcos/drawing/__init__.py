"""Pictures of searched architectures: the cells of the pyramid as a wiring plan, and the head.

Height stands for resolution: each stride has a band, the coarsest at the top. A node's output is a
wire that runs to the right in the node's row, up to the last cell that takes it. A cell takes its
inputs from the wires through vertical lanes in front of its column. So no line passes through a
box, whatever the genotype.
"""

from .architecture import FORMATS, draw_architecture, save_architecture
from .canvas import operation_color, short_name
from .layout import node_strides

__all__ = [
    "FORMATS",
    "draw_architecture",
    "node_strides",
    "operation_color",
    "save_architecture",
    "short_name",
]
