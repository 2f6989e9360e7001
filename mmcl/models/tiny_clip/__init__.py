"""The built-in tiny CLIP: architecture, vocabulary and weights that ship with the package.

``tiny-clip.json`` is an open_clip architecture, ``bpe.txt.gz`` its vocabulary (trained by
``tests/vocabularies/clip_vocabulary.py``), ``tiny-clip.safetensors`` its weights in half precision;
``README.md`` is the model card.
"""
