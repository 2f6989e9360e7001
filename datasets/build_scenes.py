"""Build the stream `scenes`: `python datasets/build_scenes.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("scenes")
