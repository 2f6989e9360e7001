"""Search for images by the paths that an input states, in one or several folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmcl.data.shards.image_folder import (
    extension_of,
    inner_path,
    open_image_folder,
    read_file,
)
from mmcl.data.stored_sample import BadSample

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?=/)")


@dataclass(frozen=True)
class ImageSearch:
    """Folders in which images are searched, in their order; picklable.

    A stated path may be relative to a folder, or absolute and inside of one. ``file://`` is
    understood; where there is no file of the stated name, Windows' backslashes and the codes of
    addresses (``%20``) are tried too. Nothing outside of the folders is read.

    Args:
        folders: links resolved; see `open_images`.
        is_exact: whether paths are taken as they are stated, as a run in place does.
        follow_links: whether links below the folders may lead outside.
    """

    folders: tuple[str, ...]
    is_exact: bool = False
    follow_links: bool = False

    def read(self, stated: str, remarks: list[str] | None = None) -> tuple[str, bytes]:
        """Return the extension of an image's format, and its bytes.

        Args:
            stated: path.
            remarks: receives a sentence if another folder has a file of the same relative path.

        Raises:
            BadSample: if it is missing, remote, outside of the folders, or no readable image.
        """
        forms = [stated] if self.is_exact else list(_forms(stated))
        for form in forms:
            found = list(dict.fromkeys(path for path in self._paths(form) if os.path.exists(path)))
            if found:
                if len(found) > 1 and remarks is not None:
                    remarks.append("images are in several folders of --images: the first is taken")
                data = read_file(found[0], stated)
                return extension_of(data, stated), data
        tried = self._paths(forms[0])[0]
        raise BadSample(f"its image {stated[:200]!r} is missing (no file {tried[:300]!r})")

    def _paths(self, form: str) -> list[str]:
        """Return the paths inside of any folder that a path may mean.

        Raises:
            BadSample: if there is none.
        """
        try:
            found = [inner_path(folder, form, self.follow_links) for folder in self.folders]
        except ValueError:  # a byte 0, or half of a character
            raise BadSample(f"its image {form[:200]!r} is missing") from None
        roots = tuple(os.path.join(folder, "") for folder in self.folders)
        inside = [path for path in found if path.startswith(roots)]
        if not inside:
            what = "folder" if len(roots) == 1 else "folders"
            fix = ""
            if not self.follow_links and ".." not in form:
                fix = ": give --follow_links if links in it are meant to"
            raise BadSample(
                f"its image {form[:200]!r} leads outside of the image {what} "
                f"{', '.join(self.folders)}{fix}"
            )
        return inside


def open_images(
    folders: Path | Sequence[Path] | None,
    default: Path,
    *,
    is_exact: bool = False,
    follow_links: bool = False,
) -> ImageSearch:
    """Open the folders of images.

    Args:
        folders: one or several; None = ``default``.
        default: folder of the input.
        is_exact: see `ImageSearch`.
        follow_links: see `ImageSearch`.

    Raises:
        FileNotFoundError: if one is missing.
    """
    listed = [default] if folders is None else [folders] if isinstance(folders, Path) else folders
    return ImageSearch(
        tuple(dict.fromkeys(open_image_folder(folder).path for folder in listed)),
        is_exact,
        follow_links,
    )


def _forms(stated: str) -> Iterator[str]:
    """Yield the paths that a stated path may mean, as it is first.

    Raises:
        BadSample: if it is an address.
    """
    scheme = _SCHEME.match(stated)
    if scheme:
        if scheme[0].lower() != "file:":
            raise BadSample(
                f"its image {stated[:200]!r} is remote: download it, and name its folder with "
                "--images"
            )
        stated = unquote(urlsplit(stated).path)
    forms = [stated]
    if "\\" in stated:
        forms.append(stated.replace("\\", "/"))
    if "%" in stated:
        forms += [unquote(form) for form in forms]
    yield from dict.fromkeys(forms)
