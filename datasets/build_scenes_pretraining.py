"""Build the stream `scenes_pretraining`: `python datasets/build_scenes_pretraining.py`."""

from mmcl.streams.script import main

if __name__ == "__main__":
    main("scenes_pretraining")
