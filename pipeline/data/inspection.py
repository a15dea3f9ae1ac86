"""Inspection of every image while a dataset is prepared: whether it can be read, and whether it
occurs twice.

Identical files in two splits make a test result too good; identical files with two labels cannot
both be right. Both are detected by a hash of the encoded image, so a copy that was compressed again
is not noticed. Neither stops a preparation.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable

from pipeline.data.faults import Faults, printable
from pipeline.data.images import Images
from pipeline.data.index import SplitName
from pipeline.data.modality import Modality
from pipeline.data.names import shown_label
from pipeline.kinds import Label

_Named = tuple[Label, str]  # label, name


class Inspection:
    """Collects faults and repetitions of images."""

    def __init__(self, modality: type[Modality] = Images) -> None:
        self.faults = Faults(f"{modality.noun}s")
        self._modality = modality
        self._first: dict[SplitName, dict[bytes, _Named]] = defaultdict(dict)  # by hash
        self._shared: dict[tuple[SplitName, SplitName], list[tuple[_Named, _Named]]] = defaultdict(
            list
        )
        self._two_labels: dict[SplitName, dict[bytes, tuple[_Named, _Named]]] = defaultdict(dict)

    def look(
        self, split: SplitName, name: str, label: Label, load: Callable[[], bytes]
    ) -> bytes | None:
        """Return what shards keep of the file from `load`, or None if it cannot be read, which is a
        fault.

        Faults name it `name`.
        """
        with self.faults.gathered():
            content = load()
            stored = self._modality.stored(content, name)
            self._note_repetition(
                split, hashlib.blake2b(content, digest_size=16).digest(), (label, name)
            )
            return stored
        return None

    def check(self) -> None:
        """Raise DataError if images cannot be read, with their names sorted."""
        self.faults.messages.sort()
        self.faults.check()

    def _note_repetition(self, split: SplitName, content: bytes, image: _Named) -> None:
        first = self._first[split].setdefault(content, image)
        if first[0] != image[0]:
            self._two_labels[split].setdefault(content, (first, image))
        if first is image:
            for other, images in self._first.items():
                if other != split and content in images:
                    self._shared[other, split].append((images[content], image))

    def remarks(self, classes: list[str]) -> list[str]:
        """One sentence per pair of splits that share images, and per split with images that have
        two labels.
        """
        lines, noun = [], self._modality.noun
        for (split, other), pairs in self._shared.items():
            (_, name), (_, copy) = pairs[0]
            verb = f"{noun} is" if len(pairs) == 1 else f"{noun}s are"
            lines.append(
                f"{len(pairs):,} {verb} in both {split} and {other}; the first is {name}, the same"
                f" as {copy}"
            )
        for split, conflicts in self._two_labels.items():
            (label, name), (other_label, copy) = next(iter(conflicts.values()))
            verb = f"{noun} of {split} has" if len(conflicts) == 1 else f"{noun}s of {split} have"
            first = (
                f"{name} is {shown_label(label, classes)}, the same file {copy} is"
                f" {shown_label(other_label, classes)}"
            )
            lines.append(f"{len(conflicts):,} {verb} two labels; the first: {first}")
        return [printable(line) for line in lines]
