"""Build the stream `digits_domains`: `python datasets/build_digits_domains.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("digits_domains")
