"""The caches of a search: C2..C5 of all crops, and P3..P7 that a frozen neck makes of them.

A trial trains only a decoder, so it does not have to run the backbone (paper, section 4). Each
cache is named by a hash (:mod:`.keys`) of the weights that computed it, the annotations, the
content of the image files and the settings, so a stale one is never used. ``images.json`` beside
the caches stores the hashes of the image files.
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
