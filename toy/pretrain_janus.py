"""How the files of toy/janus are made. Seeds are fixed; scenes and words are those of toy/pretrain.

    tokenizer    one word one token, with Janus's markers, the colon and line breaks
    vq           transformers' JanusVQVAE: 32x32x3 pixels to 4x4 codes, each one of 2048

Legend: N pictures, P vectors (16 a picture), C codes, E entries. Vectors and codes have length 1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from policy import declare_torchvision_ops
from toy import shapes
from toy.pretrain import adamw, fit, render_both_splits
from toy.tiny import ids_of

NAMES = dict(                           # the published ones
    pad_token="<｜▁pad▁｜>", bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>",
    boi_token="<begin_of_image>", eoi_token="<end_of_image>", image_token="<image_placeholder>",
    unk_token="<unk>")
ROLES = ("<|User|>", "<|Assistant|>")
SEPARATORS = (":", "\n\n", "\n")        # in the order in which they are looked for
LLM = dict(
    model_type="llama", hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-6,
    tie_word_embeddings=False)
VISION = dict(
    image_size=32, patch_size=8, num_image_tokens=16, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, mlp_ratio=2.0, projection_dim=128)
VQ = dict(
    base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=0, latent_channels=32,
    embed_dim=8, num_embeddings=2048, projection_dim=128, image_token_embed_dim=128)
PLAIN_STEPS, VQ_STEPS, VQ_BATCH = 4000, 12000, 16       # steps without codes and with; pictures
IDLE = 100                              # steps without a use after which a code is drawn anew


def build_tokenizer():
    """Words of shapes.VOCABULARY, the separators and the special tokens; the padding is id 0."""
    declare_torchvision_ops()
    from transformers import PreTrainedTokenizerFast
    words = [*NAMES.values(), *ROLES, *SEPARATORS, *shapes.VOCABULARY]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=NAMES["unk_token"]))
    blanks = pre_tokenizers.Split(Regex("[ \t]+"), "removed")
    separators = pre_tokenizers.Split(Regex("|".join(SEPARATORS)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blanks, separators])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False, **NAMES)


def build_config(tokenizer):
    """transformers' JanusConfig of the toy's sizes, for the words of a tokenizer."""
    declare_torchvision_ops()
    from transformers import JanusConfig
    text = LLM | {"vocab_size": len(tokenizer)} | ids_of(tokenizer)
    return JanusConfig(
        text_config=text, vision_config=VISION, vq_config=VQ,
        image_token_id=tokenizer.image_token_id, tie_word_embeddings=False)


# ---- the VQ autoencoder ----


def vectors_of(vqmodel, pixels):
    """The vectors (P, E) of pictures (N, 3, 32, 32), before codes are chosen."""
    z = vqmodel.quant_conv(vqmodel.encoder(pixels))
    return F.normalize(rearrange(z, "n e h w -> (n h w) e"), dim=1)


def picture_losses(vqmodel, vectors, pixels):
    """MSE and 0.1 L1 between pictures (N, 3, 32, 32) and what is decoded from vectors (P, E)."""
    z = rearrange(vectors, "(n h w) e -> n e h w", h=4, w=4)
    drawn = vqmodel.decoder(vqmodel.post_quant_conv(z))
    return {"mse": F.mse_loss(drawn, pixels), "l1": 0.1 * F.l1_loss(drawn, pixels)}


def nearest(vectors, codes):
    """The number of the code of least angle for each of the vectors: (P,)."""
    return (vectors @ codes.T).argmax(1)


def cluster(vectors, codes):
    """Codes (C, E) after eight rounds of k-means, by angle, over vectors (P, E)."""
    for _ in range(8):
        sums = torch.zeros_like(codes).index_add_(0, nearest(vectors, codes), vectors)
        empty = (sums == 0).all(1, keepdim=True)
        codes = torch.where(empty, codes, F.normalize(sums, dim=1))
    return codes


def train_vq(vqmodel):
    """Fit a JanusVQVAE to rendered scenes: first as a plain autoencoder, then with codes.

    Plain: vectors are disturbed, so that decoding forgives the step to a code. Then their clusters
    are the first codes, gradients pass a code as if it were the vector, a code learns to be near
    its vectors, and those to be near their code at a quarter of that weight."""
    generator = torch.Generator().manual_seed(0)
    pool = render_both_splits(6000, np.random.default_rng(0))
    vqmodel.train().requires_grad_(True).to(memory_format=torch.channels_last)
    book = vqmodel.quantize.embedding.weight                    # (C, E)
    idle = torch.zeros(len(book))                               # (C,) steps since the last use

    def pick_rows(rows, count):
        return rows[torch.randint(len(rows), (count,), generator=generator)]

    def plain_losses():
        pixels = pick_rows(pool, VQ_BATCH)
        vectors = vectors_of(vqmodel, pixels)
        noise = torch.randn(vectors.shape, generator=generator)
        return picture_losses(vqmodel, F.normalize(vectors + 0.1 * noise, dim=1), pixels)

    def code_losses():
        pixels = pick_rows(pool, VQ_BATCH)
        vectors = vectors_of(vqmodel, pixels)
        constant = vectors.detach()
        dead = idle >= IDLE
        book.data[dead] = pick_rows(constant, int(dead.sum()))
        codes = F.normalize(book, dim=1)
        chosen = nearest(constant, codes)
        idle.add_(1)
        idle[chosen] = 0
        codes = codes[chosen]                                   # (P, E)
        losses = picture_losses(vqmodel, vectors + (codes - vectors).detach(), pixels)
        losses["code"] = F.mse_loss(codes, constant)
        losses["vector"] = 0.25 * F.mse_loss(vectors, codes.detach())
        return losses

    fit("vq, plain", plain_losses, adamw(vqmodel.parameters(), 3e-3), PLAIN_STEPS)
    with torch.no_grad():
        vectors = vectors_of(vqmodel, pool[:2000])
        book.copy_(cluster(vectors, pick_rows(vectors, len(book))))
    fit("vq", code_losses, adamw(vqmodel.parameters(), 3e-3), VQ_STEPS)
    book.data = F.normalize(book.data, dim=1)
    vqmodel.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
