"""Finding a colour-emoji font on this machine, and taking pictures out of it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

NAMES = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf", "TwitterColorEmoji*.ttf")
FOLDERS = (
    "~/.fonts",
    "~/.local/share/fonts",
    "~/Library/Fonts",
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
ADVICE = (
    "install one (Debian and Ubuntu: apt install fonts-noto-color-emoji; Fedora: "
    "dnf install google-noto-color-emoji-fonts) or name its file with --font"
)
# Bitmap fonts open at their own size only: 109 is Noto's, 160 and 96 are Apple's.
_SIZES = (109, 160, 136, 128, 96, 64)
_UNASSIGNED = "\U0010fffe"


def find_font() -> Path:
    """Find a colour-emoji font in the usual folders, or by ``fc-list`` where there is one.

    Returns:
        The first file that is there, by the order of `NAMES` and `FOLDERS`.

    Raises:
        FileNotFoundError: if there is none; the sentence says what to install.
    """
    for name in NAMES:
        for folder in FOLDERS:
            found = sorted(Path(folder).expanduser().rglob(name))
            if found:
                return found[0]
    listed = _listed_by_fontconfig()
    if listed:
        return listed[0]
    raise FileNotFoundError(f"no colour-emoji font found in the font folders: {ADVICE}")


def _listed_by_fontconfig() -> list[Path]:
    command = shutil.which("fc-list")
    if command is None:
        return []
    done = subprocess.run(
        [command, ":color=true:lang=und-zsye", "file"], capture_output=True, text=True, check=False
    )
    return sorted(Path(line.rstrip(": ")) for line in done.stdout.splitlines() if line.strip())


class EmojiFont:
    """Pictures of emoji from one font file.

    Args:
        path: a font with colour glyphs that Pillow draws (CBDT, sbix or COLR of version 0).

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if Pillow cannot draw a coloured face from it.
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

    def picture(self, text: str) -> Image.Image | None:
        """Draw one emoji as large as the font has it.

        Args:
            text: an emoji of one code point; U+FE0F behind it is not drawn.

        Returns:
            A square RGBA picture, the glyph in its middle; None if the font has no such glyph.
        """
        drawn = _draw(self._font, text[0])
        box = drawn.getchannel("A").getbbox()
        if box is None or drawn.tobytes() == self._missing:
            return None
        return _centred(drawn.crop(box))


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
    raise ValueError(f"font {path} has no coloured emoji that Pillow can draw: {ADVICE}")


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    canvas = Image.new("RGBA", (max(right - left, 1), max(bottom - top, 1)))
    draw = ImageDraw.Draw(canvas)
    draw.text((-left, -top), character, font=font, embedded_color=True)
    return canvas


def _centred(glyph: Image.Image) -> Image.Image:
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square
