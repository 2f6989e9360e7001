"""Build the stream `glyphs`: `python datasets/build_glyphs.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("glyphs")
