"""Build the stream `digits`: `python datasets/build_digits.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("digits")
