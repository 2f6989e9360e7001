"""Build the stream `scenes`: `python datasets/build_scenes.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("scenes")
