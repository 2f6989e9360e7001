"""Names of WordNet ids as they are in prompts; a file of its own, as only a command needs them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

_ID = re.compile(r"n\d{8}")
_ALL = "imagenet-22k"


def wordnet_names(ids: Iterable[str]) -> dict[str, str]:
    """Return the names of WordNet ids that name ImageNet's classes.

    The 1,000 classes of ILSVRC have the names of Radford et al. 2021, arXiv:2103.00020, as in
    open_clip; the order of their ids is that of timm. The others have WordNet's first lemma.

    Args:
        ids: of classes, such as n01440764; others are passed over.

    Returns:
        id -> name of those that are known, such as "tench".
    """
    wanted = [each for each in ids if _ID.fullmatch(each)]
    if not wanted:
        return {}
    known = _imagenet_names()
    lemmas = _lemmas() if any(each not in known for each in wanted) else {}
    found = {each: known.get(each) or lemmas.get(each) for each in wanted}
    return {each: name for each, name in found.items() if name}


@cache
def _imagenet_names() -> dict[str, str]:
    ids = ImageNetInfo().label_names()
    return dict(zip(ids, IMAGENET_CLASSNAMES, strict=True))


@cache
def _lemmas() -> dict[str, str]:
    described = ImageNetInfo(_ALL).label_descriptions(as_dict=True)
    return {own: lemmas.split(",")[0].strip() for own, lemmas in dict(described).items()}
