"""The caches of a search: C2..C5 of all crops, and P3..P7 that a frozen neck makes of them.

A trial trains a decoder only, so the backbone need not run in it (paper, section 4). Each cache is
called by a hash (:mod:`.keys`) over the weights that computed it, the annotations and the content
of the image files, the settings. So a stale one is never used. ``images.json`` beside the caches
remembers the hashes of the image files.
"""

from .build import build_caches, cache_features, cache_pyramid, feature_shapes
from .features import CacheError, FeatureCache

__all__ = [
    "CacheError",
    "FeatureCache",
    "build_caches",
    "cache_features",
    "cache_pyramid",
    "feature_shapes",
]
