"""A detection data set from nothing: drawn scenes with exact boxes, in COCO format.

Six kinds of shaded, textured objects (ball, crate, star, ring, leaf, bottle) lie on textured
grounds, from 16 to 200 pixels large and most of them in any direction. They overlap, hide parts of
each other and extend beyond the picture; some pictures are empty. A box encloses the visible part
of its object.
Every picture has its own random generator, made from (seed, split, number).
"""

from .objects import CLASSES
from .scene import draw_scene
from .writer import DemoSettings, make_demo_data

__all__ = ["CLASSES", "DemoSettings", "draw_scene", "make_demo_data"]
