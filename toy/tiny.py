"""Tiny random models of the published classes, saved as real checkpoints are saved.

A SigLIP, a CLIP, a PaliGemma judge, a BLIP captioner. Each `build_*` writes a model with its
tokenizer and image processor into `folder`.
"""

from policy import declare_torchvision_ops

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
ALWAYS = ("\n", "?", ".", ",", "yes", "no")
SIDE = 32                                               # pixels of an image
HALVES = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # (x - 0.5) / 0.5
SMALL = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
VISION = dict(**SMALL, num_hidden_layers=3, image_size=SIDE, patch_size=8)


def word_tokenizer(vocabulary, *, append_eos, max_length):
    """A lower-casing word-level tokenizer; line breaks and punctuation are words."""
    declare_torchvision_ops()
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Sequence, Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    words = list(dict.fromkeys((*SPECIAL, *ALWAYS, *(word.lower() for word in vocabulary))))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([
        Split(Regex(r"[ \t]+"), "removed"), Split(Regex(r"\n|[?.,]"), "isolated")])
    if append_eos:
        tokenizer.post_processor = TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", words.index("<eos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", additional_special_tokens=["<image>"], model_max_length=max_length,
        model_input_names=["input_ids"])


def ids_of(tokenizer):
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def text_sizes(tokenizer, **more):
    return dict(**SMALL, vocab_size=len(tokenizer), **ids_of(tokenizer), **more)


def siglip_processor():
    """SigLIP's image processor at a small size, with bicubic resizing."""
    from transformers import SiglipImageProcessor
    return SiglipImageProcessor(
        size={"height": SIDE, "width": SIDE}, resample=3, do_convert_rgb=None,
        image_seq_length=(SIDE // 8) ** 2, **HALVES)


def build_siglip(folder, vocabulary):
    tokenizer = word_tokenizer(vocabulary, append_eos=True, max_length=24)
    from transformers import SiglipConfig, SiglipModel
    text = text_sizes(
        tokenizer, num_hidden_layers=2, max_position_embeddings=24, projection_size=64)
    config = SiglipConfig(text_config=text, vision_config=VISION)
    save(folder, SiglipModel(config), tokenizer, siglip_processor())


def build_clip(folder, vocabulary):
    tokenizer = word_tokenizer(vocabulary, append_eos=True, max_length=24)
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    text = text_sizes(tokenizer, num_hidden_layers=2, max_position_embeddings=24)
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=64)
    crop = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=crop, resample=3, **HALVES)
    save(folder, CLIPModel(config), tokenizer, processor)


def build_judge(folder, vocabulary):
    tokenizer = word_tokenizer(vocabulary, append_eos=False, max_length=128)
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    text = text_sizes(
        tokenizer, num_hidden_layers=3, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=256)
    vision = dict(**VISION, vision_use_head=False, projection_dim=64)
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=64,
        hidden_size=64, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **ids_of(tokenizer))
    save(folder, PaliGemmaForConditionalGeneration(config), tokenizer, siglip_processor())


def build_captioner(folder, vocabulary):
    tokenizer = word_tokenizer(vocabulary, append_eos=False, max_length=64)
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
    text = text_sizes(
        tokenizer, encoder_hidden_size=64, num_hidden_layers=2, max_position_embeddings=64,
        sep_token_id=tokenizer.eos_token_id)
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=64)
    processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3, **HALVES)
    save(folder, BlipForConditionalGeneration(config), tokenizer, processor)


def save(folder, model, tokenizer, processor):
    """The model's, the tokenizer's and the image processor's files, as a release has them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
