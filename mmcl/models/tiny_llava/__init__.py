"""The built-in tiny LLaVA: a folder as transformers writes them, with weights.

``AutoModelForImageTextToText`` and ``AutoProcessor`` load it; ``build.py`` builds the architecture,
``tests/vocabularies/llava_vocabulary.py`` writes ``tokenizer.json``; ``README.md`` is the model
card.
"""
