"""Build the stream `scenes_pretraining`: `python datasets/build_scenes_pretraining.py`."""

from mmcl.data.builders.script import main

if __name__ == "__main__":
    main("scenes_pretraining")
