"""Names of columns and keys that the field uses, by what they are for."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Collection, Iterable
from pathlib import PurePath

from mmcl.data.image_formats import OTHER_IMAGE_EXTENSIONS
from mmcl.data.shards.tar_index import IMAGES

NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "path": (
        ("path", "paths", "filepath", "filepaths", "imagepath", "imagepaths", "imgpath",
         "imagefilepath", "relativepath", "relpath"),
        ("image", "images", "img", "filename", "filenames", "file", "imagefile", "imgfile",
         "imagefilename", "imagename", "imgname", "photo", "jpg", "jpeg", "png", "webp"),
    ),
    "text": (
        ("text", "texts", "caption", "captions", "title", "sentence", "sentences", "alttext",
         "alt", "description", "descriptions", "imagecaption", "imagedescription", "rawcaption"),
        ("raw", "prompt"),
    ),
    "label": (
        ("label", "labels", "class", "classes", "classname", "category", "categories",
         "categoryname", "target", "targets", "targetname", "labelname", "labeltext",
         "classlabel", "finelabel", "finelabels", "coarselabel", "coarselabels", "species",
         "speciesname", "breed", "superclass", "supercategory"),
        ("classid", "labelid", "categoryid", "targetid", "classindex", "labelindex", "classidx",
         "labelidx"),
    ),
    "question": (("question",), ("query",), ("prompt",), ("instruction",)),
    "answer": (
        ("answer",), ("multiplechoiceanswer",), ("response",), ("completion",), ("output",),
        ("answers",), ("correctanswer",), ("correctchoiceidx",), ("answerindex",), ("answeridx",),
    ),
    "turns": (("conversations", "conversation"), ("messages",)),
    "options": (("choices", "options"),),
    "hint": (("hint", "context"),),
    "system": (("system", "systemprompt"),),
    "history": (("history",),),
    "input": (("input",),),
    "task": (("task",),),
    "split": (
        ("split", "splits", "splitname", "datasplit"),
        ("set", "partition", "subset", "dataset", "fold", "phase", "usage", "part", "settype",
         "istrain", "istraining", "istrainingimage", "istrainingimg", "isval", "isvalid", "istest"),
    ),
}  # fmt: skip
"""Use -> names that are accepted for it, in letters and digits; an earlier group is preferred."""
NEEDS = {
    "captioning": ("path", "text"),
    "retrieval": ("path", "text"),
    "classification": ("path", "label"),
    "instruction": ("question", "answer"),
}
COLUMN_OPTIONS = {"path": "image_column", "text": "text_column", "label": "label_column",
            "split": "split_column", "task": "task_column"}  # fmt: skip
NUMBERED = {
    "path": frozenset({"image", "images", "img", "imagepath", "imgpath"}),
    "text": frozenset({"caption", "captions", "description", "rawcaption", "imagecaption"}),
}
"""Use -> names that are several of it with a number behind: ``caption_0``, ``caption_1``."""
QUESTION_USES = ("options", "hint", "system", "history")
"""Uses that a question may have beside its image."""
ADDRESSES = ("url", "urls", "imageurl", "imageurls", "imgurl", "imagelink", "photourl", "link")
TASKS = ("tasks", "taskid", "taskname", "taskindex", "domain", "domains", "session", "experience",
          "environment", "timestep")  # fmt: skip
_OF_QUESTIONS = frozenset({
    "system", "systemprompt", "choices", "options", "hint", "tools", "functions", "history",
    "video", "videos", "audio", "audios", "imagepath", "imagepaths", "imageurl", "imageurls",
    "rejected", "rejectedresponse", "chosen",
})  # fmt: skip
"""Names that count for a question or a conversation."""
_MEANINGFUL = {
    "": {"bbox", "bboxes", "box", "boxes", "mask", "masks", "segmentation", "objects", "keypoints",
         "polygon", "roi", "weight", "weights", "negative", "negatives"},
    "record": {"mask", "masks", "weight", "weights", "negative", "negatives"},
    "text": {"caption", "captions", "sentence", "sentences"},
    "label": {"label", "labels", "class", "classes", "category", "species"},
}  # fmt: skip
"""Use -> words in a name that a user may expect to count; "" for tables, "record" for questions,
whose records often keep the boxes that they were made from."""
_ABOUT = {"id", "ids", "len", "length", "num", "count", "url", "score", "similarity", "hash",
          "lang", "language", "source", "index", "idx", "name"}  # fmt: skip
"""Words in a name of a column about a text or label that is none itself."""
_MIME = mimetypes.MimeTypes()


def key_of(name: str) -> str:
    """Return a column's name by which it is known: its letters and digits in lower case."""
    return re.sub(r"[\W_]+", "", name.lower())


def is_image_name(name: str) -> bool:
    """Return whether a file's name has the extension of an image, readable or not."""
    ending = PurePath(name).suffix.lower()
    kind = _MIME.types_map[True].get(ending) or _MIME.types_map[False].get(ending, "")
    return ending[1:] in (*IMAGES, *OTHER_IMAGE_EXTENSIONS) or kind.startswith("image/")


def numbered_names(names: Iterable[str], stems: Collection[str]) -> list[str]:
    """Return the names that are a stem and a number, by number: ``caption_0``, ``caption_1``.

    Names of more than one stem are several uses, so they give [].
    """
    found: list[tuple[int, str]] = []
    used: set[str] = set()
    for name in names:
        matched = re.fullmatch(r"(.*?\D)[ _-]?([0-9]{1,3})", name)
        if matched is not None and key_of(matched[1]) in stems:
            found.append((int(matched[2]), name))
            used.add(key_of(matched[1]))
    return [name for _, name in sorted(found)] if len(used) == 1 else []


def is_part_of_question(name: str) -> bool:
    """Return whether a user may expect a column or key of this name to count for a question."""
    key = key_of(name)
    return (
        key in _OF_QUESTIONS or re.fullmatch("(option|choice)([a-z]|[0-9]{1,2})", key) is not None
    )


def is_meaningful(name: str, use: str = "") -> bool:
    """Return whether a user may expect a column or key of this name to count for a use."""
    words = set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()))
    return bool(words & _MEANINGFUL.get(use, set())) and not (use and words & _ABOUT)
