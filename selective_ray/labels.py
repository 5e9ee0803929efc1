"""Labels of images: answers put together and merged, which image a name means, class names that are near."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from selective_ray.errors import UserError, named
from selective_ray.label_files import Answer

# Names that are longer are not compared for slips.
_LONG_NAME = 64


@dataclass(frozen=True)
class Labels:
    """The labels of images by image id, and the images that were skipped; no image is in both."""

    labels: Mapping[int, str]
    skipped: frozenset[int]

    @staticmethod
    def none() -> Labels:
        """Return the identity of `merge`."""
        return Labels({}, frozenset())

    def merge(self, other: Labels) -> Labels:
        """Keep what either says; a label outweighs a skip. Raises ValueError where two labels differ."""
        if self.differing(other):
            raise ValueError("two labels for one image")
        labels = {**self.labels, **other.labels}
        return Labels(labels, (self.skipped | other.skipped) - labels.keys())

    def replaced_by(self, other: Labels) -> Labels:
        """Keep what the other says of its images, and what this one says of the rest."""
        labels = {image: label for image, label in self.labels.items() if image not in other.skipped} | dict(
            other.labels
        )
        return Labels(labels, (self.skipped | other.skipped) - labels.keys())

    def differing(self, other: Labels) -> list[int]:
        """Return the images that have another label in the other, ascending."""
        both = self.labels.keys() & other.labels.keys()
        return sorted(image for image in both if self.labels[image] != other.labels[image])


def gather(image_ids: Iterable[int], answers: Iterable[Answer], name: str) -> Labels:
    """Put the answers of a file together; raises UserError where two of them label one image differently."""
    said: dict[int, Answer] = {}
    skipped = set()
    contradictions = []
    for image, answer in zip(image_ids, answers, strict=True):
        if answer.skipped:
            skipped.add(image)
        elif answer.label is not None:
            first = said.setdefault(image, answer)
            if first.label != answer.label:
                contradictions.append(
                    f"image {image}{f' ({answer.uri!r})' if answer.uri else ''} is {first.label!r} "
                    f"({first.where}) and {answer.label!r} ({answer.where})"
                )
    if contradictions:
        raise UserError(
            f"{name} has two labels for one image: {named(contradictions)}; decide for one and import the "
            "file again"
        )
    return Labels({image: answer.label for image, answer in said.items()}, frozenset(skipped - said.keys()))


# Which image is meant


def find(wanted: Iterable[str], parts: Iterable[pa.Table]) -> dict[str, list[tuple[int, str]]]:
    """Find what names in a file may mean among parts of a listing (image_id int64, uri string).

    A name means the image whose uri it is, else images whose uris end with it, from a `/` or a `#` on.
    Returns for each name the image ids and uris; those that mean none are not there.
    """
    tails = defaultdict(list)
    for name in wanted:
        tails[name].append(name)
        if (tail := _tail(name)) and tail != name:
            tails[tail].append(name)
    lasts = pa.array({_last(tail) for tail in tails}, pa.string())
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for part in parts:
        last = pc.struct_field(pc.extract_regex(part["uri"], r"(?P<last>[^/#]*)$"), "last")
        some = part.filter(pc.is_in(last, lasts))
        for image, uri in zip(some["image_id"].to_pylist(), some["uri"].to_pylist(), strict=True):
            for place in (0, *(match.end() for match in re.finditer("[/#]", uri))):
                for name in tails.get(uri[place:], ()):
                    if place == 0 or _tail(name) == uri[place:]:
                        found[name].append((image, uri))
    return {name: _closest(name, images) for name, images in found.items()}


def _closest(name: str, images: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Keep the best of what a name may mean: its own uri, else the object with that key of its bucket."""
    for means in (name, None):
        best = [one for one in images if (one[1] if means else _key(one[1])) == (means or _tail(name))]
        if best:
            return sorted(set(best))
    return sorted(set(images))


def means(name: str, uri: str) -> bool:
    """Whether a name in a file may mean the image with this uri."""
    tail = _tail(name)
    return uri == name or bool(tail and re.search(rf"(^|[/#]){re.escape(tail)}\Z", uri))


def _key(uri: str) -> str:
    return re.sub(r"^[A-Za-z][\w+.-]*://[^/]*/", "", uri)


def _last(uri: str) -> str:
    return re.split("[/#]", uri)[-1]


def _tail(name: str) -> str | None:
    """Return the end of a uri that a name in a file may be; None where only the whole uri can be meant.

    Tools write names below the folder or bucket that they were given, and addresses of their own.
    """
    if "?d=" in name and "/data/local-files" in name:
        return unquote(name.split("?d=", 1)[1]).lstrip("/") or None
    if name.startswith("azure-blob://"):
        return name.removeprefix("azure-blob://") or None
    if name.startswith(("http://", "https://")):
        try:
            return unquote(urlsplit(name).path).lstrip("/") or None
        except ValueError:
            return None
    return None if "://" in name or name.startswith("/") else name


# Classes


def near_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """Find pairs of class names that one slip of the pen tells apart, sorted.

    Case, spaces, hyphens and underscores do not count; beyond that, one letter more, fewer, another, or two
    swapped. Names under four letters are too often one letter apart, and names that differ in a digit are
    numbered.
    """
    alike = defaultdict(list)
    for name in sorted(set(names)):
        alike[_folded(name)].append(name)
    pairs = {(a, b) for group in alike.values() for i, a in enumerate(group) for b in group[i + 1 :]}
    # Two words one slip apart are equal after a deletion in one or both.
    near = defaultdict(set)
    for word in alike:
        if 4 <= len(word) <= _LONG_NAME:
            for shorter in {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}:
                near[shorter].add(word)
    for words in near.values():
        for a in words:
            for b in words:
                if a < b and _one_slip(a, b):
                    pairs |= {tuple(sorted((x, y))) for x in alike[a] for y in alike[b]}
    return sorted(pairs)


def _folded(name: str) -> str:
    """Leave out what nobody sees or means: case, spaces, marks of the direction of writing."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in text if not (c in "_-" or c.isspace() or unicodedata.category(c) == "Cf"))


def _one_slip(a: str, b: str) -> bool:
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    if any(character.isdigit() for character in a + b):
        return False
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])
