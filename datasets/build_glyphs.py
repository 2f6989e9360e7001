"""Build the stream `glyphs`: `python datasets/build_glyphs.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("glyphs")
