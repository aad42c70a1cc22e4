"""Tiny random models of the published classes that reward real pictures, saved as their checkpoints are saved."""

from referees.detectors import NoLoss
from policy import declare_torchvision_ops
from toy.tiny import word_tokenizer

declare_torchvision_ops()                               # before transformers imports torchvision

from pytest import MonkeyPatch
from transformers import (BertConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, GroundingDinoConfig, GroundingDinoForObjectDetection,
                          GroundingDinoImageProcessor, GroundingDinoProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation,
                          Mask2FormerImageProcessor, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor,
                          PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor, Siglip2Config,
                          Siglip2ImageProcessor, Siglip2Model, SwinConfig)
from transformers.models.mask2former import modeling_mask2former

COCO = {0: "cat", 1: "dog", 2: "mouse"}
WORDS = "a photo of cat dog computer mouse red blue is there the in image answer yes no one two three how many are ?".split()


def swin(stages):
    return SwinConfig(image_size=64, embed_dim=8, depths=[1] * stages, num_heads=[1, 1, 2, 2][:stages], window_size=4,
                      out_features=[f"stage{i + 1}" for i in range(stages)])


def build_mask2former(folder):
    config = Mask2FormerConfig(backbone_config=swin(4), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
                               encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
                               id2label=COCO, label2id={name: i for i, name in COCO.items()})
    with MonkeyPatch.context() as patch:                        # transformers' loss wants scipy
        patch.setattr(modeling_mask2former, "Mask2FormerLoss", NoLoss)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 60, "longest_edge": 100}, size_divisor=32).save_pretrained(folder)


def tokenizer(length, **special):
    made = word_tokenizer(WORDS, append_eos=False, max_length=length)
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                   unk_token="<unk>", model_max_length=length, **special)


def build_clip(folder):
    words = tokenizer(16)
    text = dict(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


def build_owlv2(folder):
    words = tokenizer(16)
    text = dict(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), words).save_pretrained(folder)


def build_grounding_dino(folder):
    from transformers import BertTokenizerFast
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *WORDS[:-1], *(f"##{letter}" for letter in "s")]
    words = BertTokenizerFast(vocab={word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, model_max_length=64)
    text = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=64)
    config = GroundingDinoConfig(backbone_config=swin(3), text_config=text, d_model=32, num_queries=5, encoder_layers=1, decoder_layers=2,
                                 encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
                                 num_feature_levels=4, max_text_len=32)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoProcessor(GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), words).save_pretrained(folder)


def build_naflex(folder):
    words = word_tokenizer(WORDS, append_eos=True, max_length=16)
    text = dict(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, projection_size=32, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, num_patches=16)
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    words.save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)


CHAT = ("{% for m in messages %}<user> {% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} <eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def build_qwen(folder, kind=Qwen2_5_VLForConditionalGeneration, template=CHAT, extra=()):
    """Qwen2.5-VL or Qwen2-VL."""
    markers = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<user>", "<assistant>", *extra]
    words = tokenizer(256, additional_special_tokens=markers)
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), words.convert_tokens_to_ids(markers[:4])))
    ids = {f"{name}_token_id": i for name, i in ids.items()}
    new = kind is Qwen2_5_VLForConditionalGeneration
    text = dict(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                max_position_embeddings=256, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
                pad_token_id=0, bos_token_id=2, eos_token_id=1)
    vision = dict(depth=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2)
    vision |= dict(hidden_size=32, out_hidden_size=32, intermediate_size=32, window_size=16, fullatt_block_indexes=[1]) if new else \
        dict(embed_dim=32, hidden_size=32, mlp_ratio=1)
    config = (Qwen2_5_VLConfig if new else Qwen2VLConfig)(text_config=text, vision_config=vision, **ids)
    model = kind(config)
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024})
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    (Qwen2_5_VLProcessor if new else Qwen2VLProcessor)(images, words, videos, chat_template=template).save_pretrained(folder)
    return model


def build_hpsv3(folder):
    """A Qwen2-VL whose weights lie under the names of an older transformers, with the head beside them, as HPSv3's file has them."""
    import torch
    from preferences import hpsv3_head
    from safetensors.torch import save_file
    model = build_qwen(folder, Qwen2VLForConditionalGeneration, extra=("<|Reward|>",))
    old = lambda key: key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")  # noqa: E731
    head = hpsv3_head(32)
    torch.nn.init.normal_(head[5].weight)
    stored = {old(key): x for key, x in model.state_dict().items()} | {f"rm_head.{key}": x for key, x in head.state_dict().items()}
    save_file({key: x.contiguous().clone() for key, x in stored.items()}, folder / "HPSv3.safetensors")
    (folder / "model.safetensors").unlink()


def build_qwen3(folder):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor
    markers = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<user>", "<assistant>"]
    words = tokenizer(256, additional_special_tokens=markers)
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), words.convert_tokens_to_ids(markers[:4])))
    text = dict(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=1,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4})
    vision = dict(depth=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2, hidden_size=32, out_hidden_size=32,
                  intermediate_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **{f"{name}_token_id": i for name, i in ids.items()})
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024})
    Qwen3VLProcessor(images, words, Qwen3VLVideoProcessor(patch_size=4, merge_size=2), chat_template=CHAT).save_pretrained(folder)


def build_internvl(folder):
    from transformers import (GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor,
                              InternVLVideoProcessor)
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    words = tokenizer(256, additional_special_tokens=[*named.values(), "<user>", "<assistant>"], extra_special_tokens=named)
    text = dict(model_type="qwen2", vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"))
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    template = CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    InternVLProcessor(images, words, InternVLVideoProcessor(), image_seq_length=4, chat_template=template).save_pretrained(folder)
