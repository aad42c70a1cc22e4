"""Published preference models that are CLIPs, PickScore and HPSv2, by `score(images, prompts)`.

Left out: ImageReward, whose layout only its own package reads; UnifiedReward and
HPSv3, whose scores depend on prompts that are not published whole.

Notation: N images (N, 3, H, W) in [0, 1].
"""

from dataclasses import dataclass

from torch import Tensor

from referees.siglip import Clip, load_clip
from rewards import prompt_cosine


@dataclass
class ClipPreference:
    """PickScore's score: exp(logit_scale) * cosine of image and prompt / 26, about 0.6 to 1.

    HPSv2's is the same cosine times another constant, which a group's advantage does not see.
    """

    clip: Clip

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scale = self.clip.model.logit_scale.exp().item() / 26
        return scale * prompt_cosine(self.clip, images, prompts)                    # (N,)


def load_preference(path: str, *, device="cpu", batch_size: int = 128) -> ClipPreference:
    """A frozen preference model: yuvalkirstain/PickScore_v1, adams-story/HPSv2-hf or the toy's.

    Errors: see referees.load.load_model.
    """
    return ClipPreference(load_clip(path, device=device, batch_size=batch_size))
