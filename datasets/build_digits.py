"""Build the stream `digits`: `python datasets/build_digits.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("digits")
