"""Tiny random models of the published classes, saved as real checkpoints are saved: a SigLIP, a PaliGemma judge, a BLIP captioner."""

from policy import declare_torchvision_ops

declare_torchvision_ops()  # before anything that imports torchvision

from tokenizers import Regex, Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.normalizers import Lowercase  # noqa: E402
from tokenizers.pre_tokenizers import Sequence, Split  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import (  # noqa: E402
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
ALWAYS = ("\n", "?", ".", ",", "yes", "no")


def word_tokenizer(vocabulary, *, append_eos, max_length):
    """A lower-casing word-level tokenizer that keeps line breaks and punctuation as words of their own."""
    words = list(dict.fromkeys((*SPECIAL, *ALWAYS, *(word.lower() for word in vocabulary))))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"[ \t]+"), "removed"), Split(Regex(r"\n|[?.,]"), "isolated")])
    if append_eos:
        tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", words.index("<eos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=max_length, model_input_names=["input_ids"],
    )


def square_processor(image_size):
    """SigLIP's image processor at a small size: bicubic resize, then (x - 0.5) / 0.5."""
    return SiglipImageProcessor(size={"height": image_size, "width": image_size}, resample=3, do_convert_rgb=None,
                                image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=(image_size // 8) ** 2)


def vision_config(image_size, layers):
    return SiglipVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
                              image_size=image_size, patch_size=8)


def build_siglip(folder, vocabulary, image_size=32):
    """Make a random SigLIP, save it with its tokenizer and image processor into `folder`, return (model, tokenizer)."""
    tokenizer = word_tokenizer(vocabulary, append_eos=True, max_length=24)
    text = SiglipTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_size=64, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    vision = vision_config(image_size, layers=3)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    save(folder, model, tokenizer, square_processor(image_size))
    return model, tokenizer


def build_judge(folder, vocabulary, image_size=32):
    """Make a random PaliGemma, save it with its tokenizer and image processor into `folder`, return (model, tokenizer)."""
    tokenizer = word_tokenizer(vocabulary, append_eos=False, max_length=128)
    special = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                   eos_token_id=tokenizer.eos_token_id)
    text = GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, **special,
    )
    vision = vision_config(image_size, layers=3)
    vision.vision_use_head = False
    vision.projection_dim = 64
    config = PaliGemmaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64, hidden_size=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **special,
    )
    model = PaliGemmaForConditionalGeneration(config)
    save(folder, model, tokenizer, square_processor(image_size))
    return model, tokenizer


def build_captioner(folder, vocabulary, image_size=32):
    """Make a random BLIP captioner, save it with its tokenizer and image processor into `folder`, return (model, tokenizer)."""
    tokenizer = word_tokenizer(vocabulary, append_eos=False, max_length=64)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, encoder_hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, sep_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=image_size,
                  patch_size=8)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=64))
    processor = BlipImageProcessor(size={"height": image_size, "width": image_size}, resample=3, image_mean=[0.5] * 3,
                                   image_std=[0.5] * 3)
    save(folder, model, tokenizer, processor)
    return model, tokenizer


def save(folder, model, tokenizer, processor):
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json, preprocessor_config.json."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
