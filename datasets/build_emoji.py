"""Build the stream `emoji`: `python datasets/build_emoji.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("emoji")
