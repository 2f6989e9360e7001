"""The built-in tiny LLaVA: a folder as transformers writes them, with weights.

``AutoModelForImageTextToText`` and ``AutoProcessor`` load it; ``words`` makes ``tokenizer.json``;
``README.md`` is the card.
"""
