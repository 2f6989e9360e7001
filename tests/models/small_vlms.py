"""Folders of tiny image-text-to-text models of five architectures, as transformers writes."""

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'\"-\n_<>|/()"
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
SEEN = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def a_tokenizer(specials, begin=None, pad="<pad>", more="", space="first", **named):
    """A tokenizer of single letters: GPT-2's way, or Llama's where texts begin with a token.

    ``more`` are letters besides the usual ones; Gemma's puts no space in front (``space="never"``).
    """
    if begin:
        marks = [pad, begin, *specials]
        letters = sorted({"▁" if letter == " " else letter for letter in LETTERS + more})
        vocabulary = {token: index for index, token in enumerate(["<unk>", *marks, *letters])}
        made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
        made.decoder = decoders.Metaspace(prepend_scheme=space)
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    else:
        marks = [pad, *specials]
        letters = sorted({{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in LETTERS})
        made = Tokenizer(
            models.BPE({token: index for index, token in enumerate([*marks, *letters])}, [])
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(marks)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin, eos_token=specials[0], pad_token=pad,
        additional_special_tokens=list(specials[1:]), clean_up_tokenization_spaces=False, **named,
    )  # fmt: skip


def llava():
    """LLaVA-1.5: CLIP at the last layer but one, Llama, texts that begin with <s>."""
    words = a_tokenizer(["</s>", "<image>"], begin="<s>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SEEN, image_size=16, patch_size=8, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT, **ids(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    images = hf.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = hf.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_15,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration, config, processor


def llava_onevision():
    """LLaVA-OneVision: SigLIP, a newline after every row of patches, Qwen2."""
    words = a_tokenizer(["<|im_end|>", "<|im_start|>", "<image>", "<video>"])
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SEEN, image_size=16, patch_size=8),
        text_config=hf.Qwen2Config(**TEXT, **ids(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = hf.LlavaOnevisionImageProcessor(
        size={"height": 16, "width": 16}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    videos = hf.LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16})
    processor = hf.LlavaOnevisionProcessor(
        images, words, videos, num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration, config, processor


def qwen2_5_vl():
    """Qwen2.5-VL: a tower of windows, positions in three dimensions."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = a_tokenizer(["<|im_end|>", "<|im_start|>", *marks])
    number = words.convert_tokens_to_ids
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
            "out_hidden_size": 16, "patch_size": 4, "spatial_merge_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1], "temporal_patch_size": 2,
        },
        text_config={
            **TEXT, **ids(words),
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0
            },
        },
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**pixels), words, hf.Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration, config, processor


def smolvlm():
    """SmolVLM: tokens around an image, an end of utterance."""
    specials = [
        "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<image>",
        "<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ]  # fmt: skip
    words = a_tokenizer(specials)
    config = hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**SEEN, image_size=16, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT, **ids(words)), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), **ids(words, "pad_token_id"),
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**sizes, do_image_splitting=False), words,
        hf.SmolVLMVideoProcessor(**sizes), image_seq_len=4, chat_template=SMOL,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration, config, processor


def internvl():
    """InternVL: patches shuffled four into one, a start and an end of the image."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    words = a_tokenizer(["<|im_end|>", "<|im_start|>", *named.values()], extra_special_tokens=named)
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**SEEN, image_size=16, patch_size=4),
        text_config=hf.Qwen2Config(**TEXT, **ids(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=size), words, hf.InternVLVideoProcessor(size=size),
        image_seq_length=4, chat_template=INTERN,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration, config, processor


ARCHITECTURES = {
    made.__name__: made for made in (llava, llava_onevision, qwen2_5_vl, smolvlm, internvl)
}  # fmt: skip


def ids(words, *names):
    wanted = names or ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(words, name) for name in wanted}
    return found if names else {"vocab_size": len(words), **found}


def write_model(folder, architecture, seed=4):
    """Write a model of an architecture with random weights, see ``with_weights``."""
    kind, config, processor = ARCHITECTURES[architecture]()
    save(folder, with_weights(kind, config, processor, seed), processor)
    return folder


def with_weights(kind, config, processor, seed=4, *, embedding_scale=12, ends=()):
    """A model with random weights of a size that makes answers differ.

    ``ends`` are tokens that end an answer besides the tokenizer's own.
    """
    torch.manual_seed(seed)
    lm = kind(config).eval()
    words = lm.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.24)  # Gemma 3's projector begins at zero
            elif parameter.ndim > 1:
                parameter.mul_(embedding_scale if parameter is words else 12)
    tokenizer = processor.tokenizer
    own, more = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(list(ends))
    lm.generation_config.eos_token_id = [own, *more] if more else own
    lm.generation_config.pad_token_id = tokenizer.pad_token_id
    return lm


def save(folder, lm, processor):
    """Write a model and its processor as transformers does."""
    lm.save_pretrained(folder)
    processor.save_pretrained(folder)
