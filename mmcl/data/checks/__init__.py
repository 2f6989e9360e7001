"""Every sample of a stream gone through: ``mmcl data check`` and ``mmcl data show``."""
