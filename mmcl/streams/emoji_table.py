"""Emoji of the stream: the table by group and year, names by language, images from a font."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import emoji
from PIL import Image, ImageDraw, ImageFont

from mmcl.streams.stream_files import read_table

GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "symbols",
}
"""From Unicode's group to our task; the five flags of one code point are too few for their own."""

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "id", "ru", "ja", "zh")
"""ISO 639-1 codes, in the order of the tasks."""

_STRAIGHT = str.maketrans({"_": " ", "’": "'", "“": '"', "”": '"'})


@dataclass(frozen=True)
class Emoji:
    """One emoji of one code point.

    Args:
        text: the character, followed by U+FE0F where Unicode asks for it.
        group: our name of its group, a value of `GROUPS`.
        subgroup: Unicode's subgroup, for example ``animal-bug``.
        version: of Emoji in which it came, for example ``3.0``.
        year: in which that version was published.
    """

    text: str
    group: str
    subgroup: str
    version: str
    year: int

    @property
    def slug(self) -> str:
        """The code point in hex, for example ``1f98b``."""
        return f"{ord(self.text[0]):x}"


def read_emoji() -> list[Emoji]:
    """Read the table of the package: every emoji of one code point up to Emoji 15.0.

    Returns:
        The emoji in Unicode's order.
    """
    table = []
    for code_points, group, subgroup, version, year in read_table("emoji_table.tsv"):
        text = "".join(chr(int(point, 16)) for point in code_points.split())
        table.append(Emoji(text, GROUPS[group], subgroup, version, int(year)))
    return table


def choose(table: Sequence[Emoji], per_group: int | None) -> list[Emoji]:
    """Choose at most ``per_group`` emoji of every group, as different as possible.

    The years of a group take turns, and within a year its subgroups do, so that every year is
    represented and a group is not twelve clock faces. The choice is the same for every seed.

    Args:
        table: emoji in Unicode's order.
        per_group: classes per group, at least 1; None takes all.

    Returns:
        The chosen ones by group, inside a group by year, inside a year in Unicode's order.

    Raises:
        ValueError: if ``per_group`` is less than 1.
    """
    if per_group is not None and per_group < 1:
        raise ValueError(f"per_group is {per_group}: give 1 or more, or None for every emoji")
    chosen: list[Emoji] = []
    for group in dict.fromkeys(GROUPS.values()):
        members = sorted((one for one in table if one.group == group), key=lambda one: one.year)
        years = [_take_turns(_grouped(year, "subgroup")) for year in _grouped(members, "year")]
        kept = set(_take_turns(years)[:per_group])
        chosen += [one for one in members if one in kept]
    return chosen


def _grouped(table: Sequence[Emoji], field: str) -> list[list[Emoji]]:
    """Group a list by the value of a field; groups in the order of their first member."""
    groups: dict[object, list[Emoji]] = {}
    for one in table:
        groups.setdefault(getattr(one, field), []).append(one)
    return list(groups.values())


def _take_turns(lists: Sequence[Sequence[Emoji]]) -> list[Emoji]:
    """Interleave lists: the first of each, then the second of each."""
    return [one for turn in zip_longest(*lists) for one in turn if one is not None]


def names_of(one: Emoji) -> dict[str, str] | None:
    """Return the names of an emoji, those of CLDR as the `emoji` package has them.

    Args:
        one: any emoji of the table.

    Returns:
        From each of `LANGUAGES` to the name, such as ``red apple``; None if one language has none.
    """
    emoji.config.load_language(list(LANGUAGES))  # a second call costs nothing
    entry = emoji.EMOJI_DATA.get(one.text, {})
    names = {language: _clean(entry.get(language, "")) for language in LANGUAGES}
    return names if all(names.values()) else None


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip(":").translate(_STRAIGHT)).strip()


NAMES = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf", "TwitterColorEmoji*.ttf")
FOLDERS = (
    "~/.fonts", "~/.local/share/fonts", "~/Library/Fonts", "/usr/share/fonts",
    "/usr/local/share/fonts", "/System/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
ADVICE = (
    "install one (Debian and Ubuntu: apt install fonts-noto-color-emoji; Fedora: "
    "dnf install google-noto-color-emoji-fonts) or name its file with --font"
)
# Bitmap fonts open at their own size only: 109 is Noto's, 160 and 96 are Apple's.
_SIZES = (109, 160, 136, 128, 96, 64)
_UNASSIGNED = "\U0010fffe"


def find_font() -> Path:
    """Find a color-emoji font in the usual folders, or by ``fc-list`` where there is one.

    Returns:
        The first file that is there, by the order of `NAMES` and `FOLDERS`.

    Raises:
        FileNotFoundError: if there is none; the message says what to install.
    """
    for name in NAMES:
        for folder in FOLDERS:
            found = sorted(Path(folder).expanduser().rglob(name))
            if found:
                return found[0]
    command = shutil.which("fc-list")
    if command is not None:
        query = [command, ":color=true:lang=und-zsye", "file"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        listed = sorted(line.rstrip(": ") for line in done.stdout.splitlines() if line.strip())
        if listed:
            return Path(listed[0])
    raise FileNotFoundError(f"no color-emoji font found in the font folders: {ADVICE}")


class EmojiFont:
    """Images of emoji from one font file.

    Args:
        path: a font with color glyphs that Pillow draws (CBDT, sbix or COLR of version 0).

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if Pillow cannot draw a colored face from it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"font {path} is not a file: {ADVICE}")
        self.path = path
        self._font = _open_font(path)
        self._missing = _draw(self._font, _UNASSIGNED).tobytes()

    def sha256(self) -> str:
        """Return the hash of the font file, in hex."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def image(self, text: str) -> Image.Image | None:
        """Draw one emoji as large as the font has it.

        Args:
            text: an emoji of one code point; U+FE0F behind it is not drawn.

        Returns:
            A square RGBA image, the glyph in its middle; None if the font has no such glyph.
        """
        drawn = _draw(self._font, text[0])
        box = drawn.getchannel("A").getbbox()
        if box is None or drawn.tobytes() == self._missing:
            return None
        glyph = drawn.crop(box)
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        return square


def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    for size in _SIZES:
        try:
            # The basic engine draws a code point the same way on every machine, without ligatures.
            font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
            face = _draw(font, "\U0001f600")
        except OSError:
            continue
        red, _, blue, alpha = face.split()
        if alpha.getbbox() and red.tobytes() != blue.tobytes():
            return font
    raise ValueError(f"font {path} has no colored emoji that Pillow can draw: {ADVICE}")


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    canvas = Image.new("RGBA", (max(right - left, 1), max(bottom - top, 1)))
    draw = ImageDraw.Draw(canvas)
    draw.text((-left, -top), character, font=font, embedded_color=True)
    return canvas
