"""Words for classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo

_IDENTIFIER = re.compile(r"n\d{8}")


def readable_class_names(names: Sequence[str]) -> list[str]:
    """ImageNet's identifiers (``n01440764``) as words (``tench``); other names as they are.

    The first synonym is used where that is unambiguous among all of ImageNet, otherwise all of
    them, and with the identifier where even these are (``crane``, bird and machine). So no two
    classes share a name, and a subset of ImageNet is named as the whole.
    """
    if not names or not all(_IDENTIFIER.fullmatch(name) for name in names):
        return list(names)  # and timm's tables, which take a while to read, are not needed
    info = ImageNetInfo()
    wnids = info.label_names()
    if not set(names) <= set(wnids):
        return list(names)
    described = {wnid: info.label_name_to_description(wnid) for wnid in wnids}
    first = {wnid: description.split(", ")[0] for wnid, description in described.items()}
    uses_of_first, uses_of_all = Counter(first.values()), Counter(described.values())
    return [
        first[name]
        if uses_of_first[first[name]] == 1
        else described[name]
        if uses_of_all[described[name]] == 1
        else f"{described[name]} ({name})"
        for name in names
    ]


def difference_of_classes(names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first difference between two lists of classes, in words; None if they are the same.

    Names compare in Unicode's NFC and, where that tells the classes of each list apart, by their first synonym in
    any case.
    """
    if len(names) != len(others):
        return f"{len(names)} classes here, {len(others)} there"

    def exact(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    def loose(name: str) -> str:
        return exact(name).split(",")[0].split(" (n")[0].casefold()

    unambiguous = all(len(set(map(loose, each))) == len(each) for each in (names, others))
    spelled = loose if unambiguous else exact
    for index, (ours, theirs) in enumerate(zip(names, others, strict=True)):
        if spelled(ours) != spelled(theirs):
            return f"class {index} is {ours!r} here, {theirs!r} there"
    return None


def have_one_order(names: Sequence[str]) -> bool:
    """Whether classes in natural order are in torchvision's too, by characters, or are ImageNet's, which have one."""
    if list(names) == sorted(names):
        return True
    return set(names) <= set(readable_class_names(ImageNetInfo().label_names()))
