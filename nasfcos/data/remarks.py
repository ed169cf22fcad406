"""What a reader of annotations repaired, dropped or guessed, counted for one line in the log."""

from collections import Counter
from enum import Enum


class Oddity(Enum):
    """Something that annotations should not have; the value completes "3 ..." in the log."""

    BAD_BOX = "boxes not finite, without area or outside of their image dropped"
    CLIPPED_BOX = "boxes clipped to their image"
    OTHER_SIZE = "images annotated with another size than their files have (which counts)"
    # COCO
    MALFORMED = "malformed annotations dropped"
    BAD_ID = "annotations dropped whose image_id or category_id is not a number"
    BAD_CROWD = "annotations dropped whose iscrowd is neither 0 nor 1"
    BAD_BBOX = "annotations dropped whose bbox is not four finite numbers"
    REPEATED_IMAGE = "image ids given twice (the last counts)"
    UNLISTED_IMAGE = "boxes of unlisted images dropped"
    UNKNOWN_CATEGORY = "boxes of unknown categories dropped"
    MISSING_CATEGORY = "classes without a category in the file, so without objects in it"
    INVENTED_ID = "classes without a category in the file, so with ids counted from 1 in results"
    # VOC
    SEVERAL_FILES = "names with several image files (the first is taken)"
    OTHER_CLASS = "boxes of other classes dropped"
    UNUSED_CLASS = "classes without an object"
    MISSING_FILE = "images without annotation file left out"


class Remarks:
    """The oddities of a data set's annotations: how often each was met, and details on some."""

    def __init__(self) -> None:
        self._counts: Counter[Oddity] = Counter()
        self._details: dict[Oddity, str] = {}

    def add(self, oddity: Oddity, count: int = 1, detail: str = "") -> None:
        """Count an oddity `count` more times (nothing happens for 0); `detail` says which."""
        if count:
            self._counts[oddity] += count
            self._details[oddity] = f" ({detail})" if detail else ""

    def __bool__(self) -> bool:
        return bool(self._counts)

    def lines(self) -> list[str]:
        """Count and description of each oddity, sorted by the description."""
        texts = {kind.value + self._details[kind]: n for kind, n in self._counts.items()}
        return [f"{count} {text}" for text, count in sorted(texts.items())]

    def __str__(self) -> str:
        return ", ".join(self.lines())
