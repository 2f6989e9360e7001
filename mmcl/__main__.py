"""``python -m mmcl <command>``: the command ``mmcl``."""

from mmcl.cli import script

if __name__ == "__main__":
    script()
