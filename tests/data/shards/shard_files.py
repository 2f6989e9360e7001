"""What is inside of shards, read by the standard library."""

import tarfile


def read_samples(shards):
    """Return key -> {extension: content} of every sample, in order."""
    samples = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples
