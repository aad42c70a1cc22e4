"""The plain way to score a rollout, as the oracle of the fast one."""

import torch
import torch.nn.functional as F
from torch import Tensor

import flow_grpo
from grpo import token_logp
from policy import Policy
from sample import Rollout


def plain_replay(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs of a think-then-draw rollout without sharing -> text (N, L), image (N, W).

    Prompt, thought and image are read again for every sample and every noisy step. The oracle of
    sample.replay_rollout: the same numbers and gradients, more seconds.
    """
    prompt, thought, drawn = rollout.segments
    tokens = prompt.tokens.repeat_interleave(rollout.G, 0)                              # (N, L)
    mask = prompt.mask.repeat_interleave(rollout.G, 0)
    flow, image = drawn.drawn, []
    for w in range(flow.logp.shape[1]):
        _, context = policy.append_text(policy.empty(len(tokens)), tokens, mask)
        logits, context = policy.append_text(context, thought.tokens, thought.mask)
        x, x_next = flow.latents[:, w].contiguous(), flow.latents[:, w + 1]             # (N, M, F)
        t, t_next = flow.times[flow.window[0] + w:][:2]
        v = policy.velocity(context, x, t, drawn.size)
        mean, std = flow_grpo.transition(
            x, v, t, t_next, noise_level=flow.noise_level, sampler=flow.sampler)
        image.append(flow_grpo.gaussian_logp(x_next, mean, std))                        # (N,)
    text = token_logp(logits[:, :-1], thought.tokens[:, 1:])                            # (N, L-1)
    text = torch.where(thought.chosen[:, 1:], text, 0.0)
    return F.pad(text, (1, 0)), torch.stack(image, 1)
