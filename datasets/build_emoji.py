"""Build the stream `emoji`: `python datasets/build_emoji.py`."""

from mmcl.data.builders.script import main

if __name__ == "__main__":
    main("emoji")
