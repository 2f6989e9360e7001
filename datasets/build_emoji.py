"""Build the stream `emoji`: `python datasets/build_emoji.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("emoji")
