"""Train a vision-language model on a stream of tasks: ``python train.py --config X``."""

from mmcl.cli import script

if __name__ == "__main__":
    script()
