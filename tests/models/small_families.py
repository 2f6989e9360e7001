"""Folders of tiny random models of every tested family, with their own processors at a tiny scale.

The image processors run in their real modes: grids of tiles, splitting, any resolution. Templates
follow the published ones. The five families of ``small_vlms`` are among them.
"""

import transformers as hf

from tests.models.small_vlms import (
    ARCHITECTURES,
    QWEN,
    SEEN,
    TEXT,
    a_tokenizer,
    ids,
    save,
    with_weights,
)

# llava-hf/llava-v1.6-mistral-7b-hf
NEXT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
# Qwen/Qwen3-VL-4B-Instruct, without its tools
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}"
    "{%- for content in messages[0].content %}{%- if 'text' in content %}"
    "{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>user\n' }}"
    "{%- for content in message.content %}{%- if content.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{%- elif 'text' in content %}"
    "{{- content.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- for content in message.content %}{%- if 'text' in content %}{{- content.text }}"
    "{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# HuggingFaceM4/Idefics3-8B-Llama3
IDEFICS3 = (
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# google/gemma-3-4b-it
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{%- endif -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}"
    "{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}"
    "{%- endif -%}{%- endfor -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
# mistralai/Mistral-Small-3.1-24B-Instruct-2503, without its default system prompt with a date
MISTRAL3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'][0]['text'] %}"
    "{%- set loop_messages = messages[1:] %}"
    "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{{- '[INST]' }}"
    "{%- for block in message['content'] %}{%- if block['type'] == 'text' %}"
    "{{- block['text'] }}{%- else %}{{- '[IMG]' }}{%- endif %}{%- endfor %}{{- '[/INST]' }}"
    "{%- else %}{{- message['content'][0]['text'] + eos_token }}{%- endif %}{%- endfor %}"
)
# LiquidAI/LFM2-VL-1.6B
LFM2 = (
    "{{- bos_token -}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ROPE = {
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
    }
}  # fmt: skip
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def llava_next():
    """LLaVA-NeXT: a grid of tiles by the image's shape, a newline after every row, Mistral."""
    words = a_tokenizer(["</s>", "<image>"], begin="<s>", more="[]")
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**SEEN, image_size=16, patch_size=8, projection_dim=16),
        text_config=hf.MistralConfig(**TEXT, **ids(words), sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
    )  # fmt: skip
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    processor = hf.LlavaNextProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=NEXT,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration, config, processor


def _qwen_words():
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = a_tokenizer(["<|im_end|>", "<|im_start|>", *marks, "<|box_start|>", "<|box_end|>"])
    names = dict(zip(("vision_start", "vision_end", "image", "video"), marks, strict=True))
    return words, {f"{k}_token_id": words.convert_tokens_to_ids(v) for k, v in names.items()}


def qwen2_vl():
    """Qwen2-VL: as many tokens as the image has patches, positions in three dimensions."""
    words, marks = _qwen_words()
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={**TEXT, **ids(words), **ROPE}, **marks,
    )  # fmt: skip
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    processor = hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(**pixels), words, hf.Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration, config, processor


def qwen3_vl():
    """Qwen3-VL: features of the tower's inner layers are added in the first layers of the text."""
    words, marks = _qwen_words()
    rope = {"rope_parameters": {**ROPE["rope_parameters"], "mrope_interleaved": True}}
    config = hf.Qwen3VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
            "out_hidden_size": 16, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config={**TEXT, **ids(words), **rope, "head_dim": 8}, **marks,
    )  # fmt: skip
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**pixels), words,
        hf.Qwen3VLVideoProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        chat_template=QWEN3,
    )  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration, config, processor


def idefics3():
    """Idefics3: splitting into rows and columns with a token for each, Llama 3."""
    specials = [
        "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ]  # fmt: skip
    words = a_tokenizer(specials, begin="<|begin_of_text|>")
    config = hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**SEEN, image_size=16, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT, **ids(words)), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), **ids(words, "pad_token_id"),
    )  # fmt: skip
    images = hf.Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS3)
    return hf.Idefics3ForConditionalGeneration, config, processor


_GEMMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def gemma3():
    """Gemma 3: the tokens of an image attend to each other both ways; sliding windows."""
    named = {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }  # fmt: skip
    specials = ["<eos>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    words = a_tokenizer(specials, begin="<bos>", space="never", extra_special_tokens=named)
    number = words.convert_tokens_to_ids
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(
            **SEEN, image_size=16, patch_size=4, vision_use_head=False
        ),
        text_config=hf.Gemma3TextConfig(
            **_GEMMA, **ids(words), num_hidden_layers=6, num_key_value_heads=1, head_dim=8,
            sliding_window=24, max_position_embeddings=512,
        ),
        mm_tokens_per_image=4, boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"), image_token_index=number("<image_soft_token>"),
    )  # fmt: skip
    images = hf.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(images, words, chat_template=GEMMA3, image_seq_length=4)
    return hf.Gemma3ForConditionalGeneration, config, processor


def _paligemma(text_config):
    words = a_tokenizer(["<eos>", "<image>"], begin="<bos>", space="never")
    images = hf.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, words)  # adds <loc....> and <seg...> tokens
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(
            **SEEN, image_size=16, patch_size=8, vision_use_head=False, projection_dim=16
        ),
        text_config=text_config(words), image_token_index=words.convert_tokens_to_ids("<image>"),
        vocab_size=len(words), projection_dim=16, hidden_size=16,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration, config, processor


def paligemma():
    """PaliGemma: no chat; image and question attend both ways, the answer is a suffix; Gemma."""
    return _paligemma(
        lambda words: hf.GemmaConfig(
            **_GEMMA, **ids(words), num_hidden_layers=2, num_key_value_heads=1, head_dim=8,
            max_position_embeddings=512,
        )
    )  # fmt: skip


def paligemma2():
    """PaliGemma 2: Gemma 2, with sliding windows and capped scores, here at 2 and not at 30."""
    return _paligemma(
        lambda words: hf.Gemma2Config(
            **_GEMMA, **ids(words), num_hidden_layers=2, num_key_value_heads=1, head_dim=8,
            max_position_embeddings=512, sliding_window=24, final_logit_softcapping=2.0,
        )
    )  # fmt: skip


def _mistral_words():
    specials = ["</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return a_tokenizer([*specials, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"], begin="<s>")


def _pixtral_processor(words, merge):
    images = hf.PixtralImageProcessor(
        size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}
    )
    return hf.PixtralProcessor(
        images, words, patch_size=4, spatial_merge_size=merge, chat_template=MISTRAL3
    )


_PIXTRAL = {**SEEN, "image_size": 32, "patch_size": 4, "head_dim": 8}


def pixtral():
    """Pixtral: LLaVA's class around a tower of any resolution, a break after every row."""
    words = _mistral_words()
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
        text_config=hf.MistralConfig(**TEXT, **ids(words), sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), image_seq_length=1,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration, config, _pixtral_processor(words, 1)


def mistral3():
    """Mistral 3: Pixtral's tower, four patches merged to a token."""
    words = _mistral_words()
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**_PIXTRAL),
        text_config=hf.MistralConfig(**TEXT, **ids(words), sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration, config, _pixtral_processor(words, 2)


def lfm2_vl():
    """LFM2-VL: tiles and a thumbnail of its own size, a language model with convolutions."""
    specials = [
        "<|im_end|>", "<|im_start|>", "<image>", "<|image_start|>", "<|image_end|>",
        "<|img_thumbnail|>",
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
    ]  # fmt: skip
    words = a_tokenizer(specials, begin="<|startoftext|>")
    config = hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(
            **SEEN, patch_size=4, num_patches=16, vision_use_head=False
        ),
        text_config=hf.Lfm2Config(
            **TEXT, **ids(words), block_auto_adjust_ff_dim=False,
            layer_types=["conv", "full_attention"],
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"), projector_hidden_size=16,
        downsample_factor=2,
    )  # fmt: skip
    images = hf.Lfm2VlImageProcessor(
        tile_size=16, encoder_patch_size=4, min_image_tokens=1, max_image_tokens=4, max_tiles=4,
        max_pixels_tolerance=2.0,
    )  # fmt: skip
    processor = hf.Lfm2VlProcessor(images, words, chat_template=LFM2)
    return hf.Lfm2VlForConditionalGeneration, config, processor


def smolvlm_split():
    """SmolVLM with its splitting into rows and columns."""
    kind, config, processor = ARCHITECTURES["smolvlm"]()
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 32}
    return kind, config, processor


FAMILIES = {
    **{name: ARCHITECTURES[name] for name in ("llava", "llava_onevision", "qwen2_5_vl")},
    "smolvlm": smolvlm_split,
    "internvl": ARCHITECTURES["internvl"],
    **{
        made.__name__: made
        for made in (
            llava_next, qwen2_vl, qwen3_vl, idefics3, gemma3, paligemma, paligemma2, pixtral,
            mistral3, lfm2_vl,
        )
    },
}  # fmt: skip


SEEDS = {"gemma3": 8, "idefics3": 1, "lfm2_vl": 2}
"""Seeds whose random models give different answers to different samples; others have 4."""


def random_family(family):
    """A model of a family with random weights, see ``small_vlms.with_weights``; its processor."""
    kind, config, processor = FAMILIES[family]()
    # Words that are tied to the head, at the scale of the others, would repeat the last token.
    tied = {"embedding_scale": 3} if "gemma" in family else {}
    ends = ["<end_of_turn>"] if family == "gemma3" else []
    seed = SEEDS.get(family, 4)
    return with_weights(kind, config, processor, seed, ends=ends, **tied), processor


def write_family(folder, family):
    """Write the model of ``random_family`` and its processor."""
    save(folder, *random_family(family))
    return folder
