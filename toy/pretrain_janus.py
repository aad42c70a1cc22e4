"""How toy/janus is made, by `torchrun train.py --recipe pretrain` too.

What is not said here is as in toy/pretrain.

    tokenizer    the same closed vocabulary, with Janus's markers, the colon and line breaks
    vq           transformers' JanusVQVAE: 32x32x3 pixels to 4x4 codes, each one of 2048
    vision       the SigLIP encoder: it learns to name the object of each quadrant, then is frozen
    base         the policy: cross-entropy of texts and image tokens on the same wrong data, and of
                 pictures after padding, which guidance compares with. It is taught no edits

Legend: N pictures, P vectors, C codes, E entries of a code. Vectors and codes have length 1.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from janus import Janus, build_model
from policy import declare_torchvision_ops
from support.checkpoint import save_policy
from toy import shapes
from toy.pretrain import (
    BATCH, BOUND, EVEN, Readout, adamw, any_scene, begin_base, fit, render_both_splits, train_base)
from toy.tiny import ids_of
from toy.world import render_pixels

# Names of Janus-Pro's files.
NAMES = dict(
    bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>", pad_token="<｜▁pad▁｜>",
    boi_token="<begin_of_image>", eoi_token="<end_of_image>", image_token="<image_placeholder>",
    unk_token="<unk>")
ROLES = ("<|User|>", "<|Assistant|>")
SEPARATORS = (":", "\n\n", "\n")
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
PLAIN_STEPS = 3000                      # of the VQ autoencoder, before there are codes
VQ_STEPS = 7000                         # with codes
PICTURES = 16                           # of each of these steps
IDLE = 100                              # steps after which an unused code is drawn anew
VISION_STEPS = 1200
SCENES = 12000                          # that the vision encoder sees
# As toy.pretrain.ROUNDS; the third is of questions alone, in which letters are learned.
ROUNDS = ((1400, 2e-3, 2, 20, EVEN), (900, 1.5e-3, 3, 20, EVEN), (700, 1.5e-3, 4, 16, ()),
          (1200, 1e-3, 5, 20, BOUND))


def build_tokenizer():
    """Words of shapes.VOCABULARY, separators and the special tokens; the padding is id 0."""
    declare_torchvision_ops()
    from transformers import PreTrainedTokenizerFast
    special = sorted(NAMES.values(), key=lambda name: name != NAMES["pad_token"])
    words = [*special, *ROLES, *SEPARATORS, *shapes.VOCABULARY]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=NAMES["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(" +"), "removed"),
        pre_tokenizers.Split(Regex("|".join(SEPARATORS)), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False, **NAMES)


def build_config(tokenizer):
    """The JanusConfig of the toy's sizes, for the words of a tokenizer."""
    from transformers import JanusConfig
    text = LLM | {"vocab_size": len(tokenizer)} | ids_of(tokenizer)
    return JanusConfig(
        text_config=text, vision_config=VISION, vq_config=VQ,
        image_token_id=tokenizer.convert_tokens_to_ids(NAMES["image_token"]),
        tie_word_embeddings=False)


# ---- the VQ autoencoder ----


def vectors_of(vqmodel, pixels):
    """The vectors (N, E, 4, 4) of pictures, before a code is chosen."""
    return F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)), dim=1)


def nearest(vectors, codes):
    """The code of the least angle for each of (P, E) vectors: (P,)."""
    return torch.cat([(part @ codes.T).argmax(1) for part in vectors.split(4000)])


def cluster(vectors, count, generator):
    """The means' directions (C, E) of `count` clusters of vectors: 8 rounds of k-means."""
    codes = vectors[torch.randperm(len(vectors), generator=generator)[:count]]
    for _ in range(8):
        sums = torch.zeros_like(codes)
        sums.index_add_(0, nearest(vectors, codes), vectors)
        empty = (sums == 0).all(1, keepdim=True)
        codes = torch.where(empty, codes, F.normalize(sums, dim=1))
    return codes


def train_vq(vqmodel):
    """Fit a JanusVQVAE to rendered scenes, first as a plain autoencoder, then with codes.

    Loss: MSE + 0.1 L1, and with codes (code - vector)^2, of which the vector learns a quarter. The
    plain one's vectors are disturbed, so that decoding forgives the step to a code; k-means of
    them makes the codes. Gradients pass a code as if it were its vector."""
    generator = torch.Generator().manual_seed(0)
    pool = render_both_splits(6000)
    vqmodel = vqmodel.train().to(memory_format=torch.channels_last)
    book = vqmodel.quantize.embedding.weight                    # (C, E)
    idle = torch.zeros(len(book))                               # (C,) steps without a use

    def draw_pictures():
        return pool[torch.randint(len(pool), (PICTURES,), generator=generator)]

    def picture_losses(vectors, pixels):
        drawn = vqmodel.decoder(vqmodel.post_quant_conv(vectors))
        return dict(mse=F.mse_loss(drawn, pixels), l1=0.1 * F.l1_loss(drawn, pixels))

    def plain_losses():
        pixels = draw_pictures()
        vectors = vectors_of(vqmodel, pixels)
        noise = 0.1 * torch.randn(vectors.shape, generator=generator)
        return picture_losses(F.normalize(vectors + noise, dim=1), pixels)

    def replace_idle(vectors, chosen):
        """Give the codes that no picture has used for IDLE steps a random vector each."""
        idle.add_(1)
        idle[chosen] = 0
        (dead,) = (idle > IDLE).nonzero(as_tuple=True)
        new = torch.randint(len(vectors), dead.shape, generator=generator)
        book.data[dead] = vectors[new]
        idle[dead] = 0

    def code_losses():
        pixels = draw_pictures()
        vectors = vectors_of(vqmodel, pixels)
        flat = rearrange(vectors, "n e h w -> (n h w) e")
        codes = F.normalize(book, dim=1)
        chosen = nearest(flat.detach(), codes.detach())
        replace_idle(flat.detach(), chosen)
        code = codes[chosen]
        losses = {
            "code": F.mse_loss(code, flat.detach()),
            "vector": 0.25 * F.mse_loss(flat, code.detach())}
        step = rearrange(code - flat, "(n h w) e -> n e h w", h=4, w=4)
        return losses | picture_losses(vectors + step.detach(), pixels)

    fit("plain", plain_losses, adamw(vqmodel.parameters(), 3e-3), PLAIN_STEPS)
    with torch.no_grad():
        seen = vectors_of(vqmodel, pool[:2000])
        flat = rearrange(seen, "n e h w -> (n h w) e")
        book.copy_(cluster(flat, len(book), generator))
    fit("codes", code_losses, adamw(vqmodel.parameters(), 3e-3), VQ_STEPS)
    book.data = F.normalize(book.data, dim=1)
    return vqmodel.eval()


# ---- the base ----


def train_vision(tower):
    """Teach the vision encoder to name the object of each quadrant of scenes of both splits."""
    torch.manual_seed(0)
    readout = Readout(pooled=False)
    rng = np.random.default_rng(0)
    scenes = [any_scene(rng) for _ in range(SCENES)]
    pixels = render_pixels(scenes)
    generator = torch.Generator().manual_seed(0)

    def losses_of():
        i = torch.randint(SCENES, (BATCH,), generator=generator)
        seen = tower(pixels[i]).last_hidden_state
        return {"objects": readout.loss(seen, [scenes[j] for j in i])}

    tower.requires_grad_(True)
    optimizer = adamw([*tower.parameters(), *readout.parameters()], 2e-3)
    fit("vision", losses_of, optimizer, VISION_STEPS)
    tower.requires_grad_(False)


def new_base() -> Janus:
    """A policy of the toy's sizes with xavier matrices, whose VQ autoencoder comes later."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    policy = Janus(build_model(build_config(tokenizer)), tokenizer)
    begin_base(policy)
    policy.stored = torch.bfloat16      # in the file, as the published folders have it
    return policy


def main(folder: Path):
    """Make the policy folder janus/ in `folder` (toy)."""
    policy = new_base()
    core = policy.core
    train_vision(core.vision_model)
    core.aligner.requires_grad_(True)   # it learns here, and nowhere else
    torch.manual_seed(0)
    vq = train_vq(type(core.vqmodel)(core.config.vq_config))
    core.vqmodel.load_state_dict(vq.state_dict())
    core.generation_embeddings.weight.data.copy_(vq.quantize.embedding.weight)
    train_base(policy, ROUNDS)
    save_policy(policy.eval(), folder / "janus")
