"""Build the stream `scenes_pretraining`: `python datasets/build_scenes_pretraining.py`."""

from mmcl.streams.registry import build_from_command_line

if __name__ == "__main__":
    build_from_command_line("scenes_pretraining")
