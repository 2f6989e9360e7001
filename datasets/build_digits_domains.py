"""Build the stream `digits_domains`: `python datasets/build_digits_domains.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("digits_domains")
