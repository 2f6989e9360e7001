"""Texts of every kind of tokenizer and text tower are embedded as by open_clip itself."""

import json
import pickle
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional

from mmcl import Batch, ImageCaptionCollate, collate_captions
from mmcl.core.padding import pad_id_of, real_tokens
from mmcl.data.batches.collate import Example, collate
from mmcl.models import OpenCLIP
from tests.models.small_clip import SMALL

TEXTS = ["!? a red bird", "!!", "a bird! on €!€ a green ground", "", "a", "red bird green ground"]
WORDS = ["a", "red", "bird", "on", "green", "ground", "!", "€", "?"]


def save_tokenizer(folder, specials, single, pad):
    """A tokenizer of words in transformers' form; ids of specials come first, in their order."""
    vocabulary = {token: index for index, token in enumerate([*specials, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    marks = [(token, vocabulary[token]) for token in specials if token in single]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    made.add_special_tokens(specials)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, sep_token="</s>", cls_token="<s>",
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def xlm_r_tokenizer(folder):
    # as XLM-R's: "<s>" is 0, the pad token 1
    return save_tokenizer(folder, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<pad>")


def t5_tokenizer(folder):
    # as SigLIP's: the end token is the pad token, 1
    return save_tokenizer(folder, ["<unk>", "</s>", "<s>"], "$A </s>", "</s>")


def bert_tokenizer(folder):
    return save_tokenizer(folder, ["<pad>", "<s>", "</s>", "<unk>"], "<s> $A </s>", "<pad>")


def save_hf_tower(folder, kind, **options):
    """A small random text model of transformers with its tokenizer, and open_clip's text_cfg."""
    sizes = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40,
    }  # fmt: skip
    make_tokenizer = bert_tokenizer if kind == "bert" else xlm_r_tokenizer
    make_tokenizer(folder)
    config = hf.AutoConfig.for_model(kind, **sizes, pad_token_id=0 if kind == "bert" else 1)
    hf.AutoModel.from_config(config).save_pretrained(folder)
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    return {**names, "hf_proj_type": "mlp", "context_length": 20, **options}


PLAIN = {"vocab_size": 16, "width": 16, "heads": 2, "layers": 2, "context_length": 20}
BPE = {**PLAIN, "vocab_size": 49408}


def clip_text(folder):
    return {"text_cfg": BPE}


def clip_text_as_custom_text(folder):
    return {"text_cfg": BPE, "custom_text": True}


def siglip(folder):
    text = {**PLAIN, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    tokenizer = {"hf_tokenizer_name": t5_tokenizer(folder)}
    return {"text_cfg": text | tokenizer, "custom_text": True, "init_logit_bias": -10.0}


def clipa(folder):
    text = {**PLAIN, "no_causal_mask": True, "pool_type": "last"}
    kwargs = {"tokenizer_kwargs": {"strip_sep_token": True}}
    return {"text_cfg": text | kwargs | {"hf_tokenizer_name": bert_tokenizer(folder)}}


def worldwide(folder):
    tokenizer = {"hf_tokenizer_name": xlm_r_tokenizer(folder)}
    return {"text_cfg": {**PLAIN, "pool_type": "eos", "eos_id": 2} | tokenizer}


def causal_with_another_pad_token(folder):
    return {"text_cfg": PLAIN | {"hf_tokenizer_name": xlm_r_tokenizer(folder)}}


def tokens_with_a_class_token_at_the_end(folder):
    text = {**PLAIN, "pool_type": "last", "tokenizer_mode": "clips"}
    return {"text_cfg": text | {"hf_tokenizer_name": xlm_r_tokenizer(folder)}}


def mobileclip(folder):
    return {"text_cfg": {**BPE, "no_causal_mask": True}, "custom_text": True}


def coca(folder):
    shared = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    decoder = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return {
        "vision_cfg": {**SMALL["vision_cfg"], **shared},
        "text_cfg": {**BPE, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**decoder, "attn_pooler_heads": 2},
        "custom_text": True,
    }


def xlm_r(folder):
    return {"text_cfg": save_hf_tower(folder, "xlm-roberta")}


def bert_of_class_token(folder):
    pooler = {"hf_pooler_type": "cls_last_hidden_state_pooler"}
    return {"text_cfg": save_hf_tower(folder, "bert", **pooler)}


def mt5(folder):
    bert_tokenizer(folder)  # pads with 0, as mT5's
    config = hf.MT5Config(
        vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    hf.MT5Model(config).save_pretrained(folder)
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    return {"text_cfg": {**names, "hf_proj_type": "mlp", "context_length": 20}}


TOWERS = [
    clip_text, clip_text_as_custom_text, siglip, clipa, worldwide, causal_with_another_pad_token,
    tokens_with_a_class_token_at_the_end, mobileclip, coca, xlm_r, bert_of_class_token, mt5,
]  # fmt: skip


@pytest.fixture(scope="module", params=TOWERS, ids=lambda make: make.__name__)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "tower.json").write_text(json.dumps({**SMALL, **request.param(folder / "text")}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' loading
        made = OpenCLIP(str(folder / "tower.json"), seed=3).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # initial weights are small: texts would hardly differ
        for parameter in made.tower("text"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return made


@torch.no_grad()
def theirs(model, texts):
    """Unit embeddings by open_clip alone, of tokens as its tokenizer pads them."""
    return functional.normalize(model.clip.encode_text(model._tokenizer(list(texts))), dim=-1)


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)


def test_texts_of_a_tokenizer_are_embedded_as_by_open_clip(model):
    ours = model.embed(Batch.from_texts(TEXTS, tokenizer=model.tokenizer), "text")
    close(ours, theirs(model, TEXTS))
    assert float((ours[0] - ours[5]).norm()) > 1e-3


def test_tokens_without_a_mask_are_padded_by_the_tokenizers_token(model):
    batch = Batch.from_texts(TEXTS, tokenizer=model.tokenizer)
    bare = Batch(None, batch.labels, batch.task_ids, input_ids=batch.input_ids)
    ours = model.embed(bare, "text")
    close(ours, theirs(model, TEXTS))


def test_collated_samples_are_embedded_as_by_open_clip(model):
    transform = model.transform(False)
    samples = [transform(None, text, 0) for text in TEXTS]
    batch = collate([Example(sample, -100, 0, 0, "key") for sample in samples])
    close(model.embed(batch, "text"), theirs(model, TEXTS))
    # and each alone, whatever the length of its neighbours
    for row in range(len(TEXTS)):
        close(model.embed(batch.take(torch.tensor([row])), "text")[0], theirs(model, TEXTS)[row])


def test_a_transform_can_be_sent_to_a_loaders_worker(model):
    transform = model.transform(False)
    sent = pickle.loads(pickle.dumps(transform))
    for text in TEXTS:
        assert torch.equal(sent(None, text, 0).input_ids, transform(None, text, 0).input_ids)


def test_the_ids_of_padding_do_not_count(model):
    batch = collate([Example(model.transform(False)(None, t, 0), -100, 0, 0, "k") for t in TEXTS])
    other = torch.where(batch.attention_mask, batch.input_ids, 7)
    changed = Batch(
        None, batch.labels, batch.task_ids, input_ids=other, attention_mask=batch.attention_mask
    )
    assert torch.equal(model.embed(changed, "text"), model.embed(batch, "text"))


def test_datasets_captions_are_embedded_as_by_open_clip(model):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pairs = [(image, text) for text in TEXTS]
    for batch in (
        collate_captions(pairs, tokenizer=model.tokenizer),
        ImageCaptionCollate(model.transform(False))(pairs),
    ):
        close(model.embed(batch, "text"), theirs(model, TEXTS))


def test_class_texts_are_embedded_as_by_open_clip(model):
    names = ["red", "bird", "!! green"]
    model.set_classes(names, ["a {}.", "!{}!"])
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    got = model(Batch.from_images(image)).text
    for name, embedded in zip(names, got, strict=True):
        mean = theirs(model, [f"a {name}.", f"!{name}!"]).mean(0)
        close(embedded, mean / mean.norm())


def test_joined_batches_keep_their_texts(model):
    one, two = (
        collate([Example(model.transform(False)(None, text, 0), -100, 0, 0, "k") for text in part])
        for part in (TEXTS[:2], TEXTS[2:])
    )
    close(model.embed(one.join(two), "text"), theirs(model, TEXTS))


@pytest.mark.parametrize(
    ("make", "pad"),
    [(clip_text, 0), (siglip, 1), (clipa, 0), (worldwide, 1), (xlm_r, 1), (bert_of_class_token, 0)],
)
def test_the_pad_token_is_the_tokenizers(tmp_path, make, pad):
    (tmp_path / "tower.json").write_text(json.dumps({**SMALL, **make(tmp_path / "text")}))
    model = OpenCLIP(str(tmp_path / "tower.json"))
    assert (model.pad_id, pad_id_of(model.tokenizer)) == (pad, pad)
    assert int(model.tokenizer(["a"])[0, -1]) == pad


def test_a_file_with_a_tower_of_transformers_needs_no_other_weights(tmp_path):
    (tmp_path / "tower.json").write_text(json.dumps({**SMALL, **xlm_r(tmp_path / "text")}))
    first = OpenCLIP(str(tmp_path / "tower.json"), freeze=["image", "text"])
    file = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in first.clip.state_dict().items()}, file)
    (tmp_path / "text" / "model.safetensors").unlink()
    again = OpenCLIP(str(tmp_path / "tower.json"), str(file), freeze=["image", "text"])
    assert again.fingerprint() == first.fingerprint()


def test_a_text_is_real_up_to_its_last_token_that_is_not_padding():
    tokens = torch.tensor([[0, 5, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [4, 4, 4, 4]])
    for pad in (0, 1):
        for row, mask in zip(tokens.tolist(), real_tokens(tokens, pad).tolist(), strict=True):
            length = max((place + 1 for place, token in enumerate(row) if token != pad), default=0)
            assert mask == [place < length for place in range(4)]


def test_a_tokenizer_without_a_stated_pad_token_pads_with_0():
    assert [pad_id_of(each) for each in (None, len, OpenCLIP("tiny").tokenizer)] == [0, 0, 0]


def test_token_0_within_a_text_is_a_token_and_no_padding():
    model = OpenCLIP("tiny", "built-in").eval()
    tokens = model.transform(False)(None, "!! a", 0).input_ids
    whole = model.tokenizer(["!! a"])[0]
    length = int(whole.argmax()) + 1
    assert (whole[:length] == 0).any()
    assert torch.equal(tokens, whole[:length])
    batch = Batch.from_texts(["!! a", "a"], tokenizer=model.tokenizer)
    assert batch.attention_mask.sum(1).tolist() == [length, int(whole.argmax()) - 1]
