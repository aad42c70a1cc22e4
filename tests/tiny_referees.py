"""Tiny random models of the published classes that rewards ask, saved as their checkpoints are saved."""

import json

import torch
import transformers as hf
from policy import declare_torchvision_ops
from safetensors.torch import save_file
from toy.tiny import word_tokenizer

declare_torchvision_ops()                       # before transformers loads torchvision
WORDS = (
    "a photo of cat dog computer mouse red blue is there the in image answer yes no how many are ?".split()
)
IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def tokenizer(length, **special):
    made = word_tokenizer(WORDS, append_eos=False, max_length=length)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", model_max_length=length, **special)


def build_clip(folder, size=16):
    words = tokenizer(16)
    text = dict(**SMALL, **IDS, vocab_size=len(words), max_position_embeddings=16)
    vision = dict(**SMALL, image_size=size, patch_size=8)
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(
        folder)
    words.save_pretrained(folder)
    crop = {"height": size, "width": size}
    hf.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)


def build_owlv2(folder):
    words = tokenizer(16)
    text = dict(**SMALL, **IDS, vocab_size=len(words), max_position_embeddings=16)
    vision = dict(**SMALL, image_size=32, patch_size=8)
    config = hf.Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    hf.Owlv2ForObjectDetection(config).save_pretrained(folder)
    hf.Owlv2Processor(hf.Owlv2ImageProcessor(size={"height": 32, "width": 32}), words).save_pretrained(folder)


# ---- chat models ----

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = (
    "{% for m in messages %}<user> {% for part in m['content'] %}{% if part['type'] == 'image' %}"
    + IMAGE
    + "{% else %}{{ part['text'] }}{% endif %}{% endfor %} <eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_TEXT = dict(**SMALL, **IDS, num_key_value_heads=1, max_position_embeddings=256)
PATCHES = dict(
    depth=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2, hidden_size=32,
    out_hidden_size=32, intermediate_size=32)


def qwen_parts():
    """A tokenizer with Qwen's markers, their ids by the names of the config, and an image processor."""
    names = ("image", "video", "vision_start", "vision_end")
    markers = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(256, additional_special_tokens=[*markers, "<user>", "<assistant>"])
    ids = dict(zip([f"{name}_token_id" for name in names], words.convert_tokens_to_ids(markers)))
    size = {"shortest_edge": 256, "longest_edge": 1024}
    return words, ids, hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size)


def build_qwen(folder, template=CHAT):
    """Qwen2.5-VL."""
    words, ids, images = qwen_parts()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = dict(**CHAT_TEXT, vocab_size=len(words), rope_parameters=rope)
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=dict(**PATCHES, window_size=16, fullatt_block_indexes=[1]), **ids)
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    videos = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    hf.Qwen2_5_VLProcessor(images, words, videos, chat_template=template).save_pretrained(folder)


def build_qwen3(folder):
    words, ids, images = qwen_parts()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
    text = dict(**CHAT_TEXT, vocab_size=len(words), head_dim=16, rope_parameters=rope)
    vision = dict(**PATCHES, num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    hf.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    videos = hf.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    hf.Qwen3VLProcessor(images, words, videos, chat_template=CHAT).save_pretrained(folder)


def build_internvl(folder):
    named = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>")
    words = tokenizer(
        256, additional_special_tokens=[*named.values(), "<user>", "<assistant>"], extra_special_tokens=named)
    text = dict(**CHAT_TEXT, vocab_size=len(words), model_type="qwen2")
    vision = dict(**SMALL, image_size=[32, 32], patch_size=[8, 8])
    config = hf.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"))
    hf.InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    template = CHAT.replace(IMAGE, "<IMG_CONTEXT>")
    hf.InternVLProcessor(
        images, words, hf.InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    ).save_pretrained(folder)


# ---- texts, and open_clip ----


def build_bert(folder):
    words = word_tokenizer(WORDS, append_eos=True, max_length=32)
    hf.BertModel(
        hf.BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=32, pad_token_id=0)
    ).save_pretrained(folder)
    words.save_pretrained(folder)


def build_open_clip(folder):
    """With CLIP's byte-pair tokenizer, which open_clip carries."""
    import open_clip

    tower = {"layers": 2, "width": 32}
    config = {
        "embed_dim": 32, "vision_cfg": {**tower, "image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {**tower, "context_length": 16, "vocab_size": 49408, "heads": 2}}
    preprocess = {
        "mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic", "resize_mode": "squash"}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    weights = {key: x.contiguous() for key, x in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


BUILDERS = {
    "clip": build_clip, "owlv2": build_owlv2, "qwen": build_qwen,
    "qwen3": build_qwen3, "internvl": build_internvl, "bert": build_bert, "open_clip": build_open_clip}


class Folders(dict):
    """name -> the folder of a tiny model, built when it is first asked for."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __missing__(self, name):
        torch.manual_seed(0)
        BUILDERS[name](self.base / name)
        self[name] = str(self.base / name)
        return self[name]
