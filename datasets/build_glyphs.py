"""Build the stream `glyphs`: `python datasets/build_glyphs.py`."""

from mmcl.data.builders.script import main

if __name__ == "__main__":
    main("glyphs")
