"""GenEval's rules on pictures of any policy.

    python -m studies.geneval --policy BAGEL-7B-MoT --metadata evaluation_metadata.jsonl \\
        --detector google/owlv2-base-patch16-ensemble
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval import Table, print_table, table_of
from policy import Policy
from referees.detectors import Detector, load_detector
from referees.geneval import geneval_check
from sample import SAMPLING, TOY, Read, images_of, plain_draw, sample_plan
from support.checkpoint import load_policy
from support.disk import fingerprint, read_json, write_json, write_text
from support.pictures import save_grid
from support.rows import Metadata, check_rules, read_prompts
from support.terminal import Arguments, number, the_device
from toy.world import detect


def draw_pictures(
    policy: Policy, rows: list[Metadata], out: Path, samples: int, size: int, steps: int,
    text_scale: float
) -> None:
    """Draw pictures of every prompt that has none into GenEval's own folders.

    00000/metadata.jsonl, 00000/samples/0000.png and so on. The official script can judge them too.
    """
    draw = plain_draw(policy.config.scale, (size, size), steps)
    guidance = replace(                         # at every step, as the official script guides
        SAMPLING[policy.config.scale]["guidance"], text_scale=text_scale, interval=(0.0, 1.0))
    for i, row in enumerate(tqdm(rows, desc="drawing")):
        paths = paths_of(out, i, samples)
        if all(path.exists() for path in paths):
            continue
        rollout = sample_plan(policy, [Read([row["prompt"]]), draw], seed=0, step=0, index=[i],
                              G=samples, guidance=guidance)
        write_text(paths[0].parents[1] / "metadata.jsonl", json.dumps(row))
        for path, image in zip(paths, images_of(policy, rollout)):
            save_grid(image[None], path, columns=1)


def paths_of(out: Path, row: int, samples: int) -> list[Path]:
    return [out / f"{row:05}" / "samples" / f"{n:04}.png" for n in range(samples)]


def judge_pictures(
    rows: list[Metadata], out: Path, samples: int, detector: Detector | None
) -> Table:
    """Judge the pictures by GenEval's rules: tag -> (share that passes, standard error).

    The error is over prompts; "overall" is the mean of the tags. detector: None for the toy's exact
    one."""
    thresholds = detector.thresholds if detector else {}
    right = {}                                  # tag -> the share that passes, of each prompt
    for i, row in enumerate(tqdm(rows, desc="judging")):
        images = [np.array(Image.open(path)) for path in paths_of(out, i, samples)]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255   # (G, 3, H, W)
        found = detector(pixels, [row] * samples) if detector else detect(pixels)
        verdicts = [geneval_check(row, each, **thresholds)[0] for each in found]
        right.setdefault(row["tag"], []).append(np.mean(verdicts))
    values = {tag: [shares] for tag, shares in right.items()}
    return table_of(values | {"overall": sum(values.values(), [])})


def begin_folder(out: Path, settings: dict) -> None:
    """Note the settings of a folder of pictures. Errors: ValueError if its pictures have others."""
    path = out / "settings.json"
    if read_json(path, settings) != settings:
        raise ValueError(f"{path} is of other settings than these; give another --out")
    write_json(path, settings)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.geneval", description="GenEval's rules on pictures of a policy.")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--metadata", required=True,
                    help="prompts in GenEval's format, such as its evaluation_metadata.jsonl")
    ap.add_argument("--detector", default="",
                    help="an OWLv2: a folder or hub name; the toy has its own")
    ap.add_argument("--guidance", type=number(float, least=1),
                    help="text guidance scale (1 for the toys, 4 for BAGEL, 5 for Janus-Pro)")
    ap.add_argument("--samples", type=number(int, least=1), default=4, help="images of each prompt")
    ap.add_argument("--steps", type=number(int, least=1),
                    help="denoising steps (10 for the toy, 49 for BAGEL; image tokens have none)")
    ap.add_argument("--out", type=Path, default=Path("geneval"), help="the folder of pictures")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    rows = read_prompts(a.metadata)
    check_rules(rows, a.metadata, "prompt")
    policy = load_policy(a.policy, device=the_device())
    scale = SAMPLING[policy.config.scale]
    detector = None
    if a.detector:
        detector = load_detector(a.detector, device=policy.device)
        detector.check(rows)
    elif not policy.config.scale.startswith("toy"):
        raise ValueError("GenEval's rules need --detector, such as "
                         "google/owlv2-base-patch16-ensemble")
    settings = dict(
        samples=a.samples, size=scale["size"], steps=a.steps or scale["steps"],
        text_scale=a.guidance or scale["guidance"].text_scale)
    content = dict(policy=fingerprint(Path(a.policy)), prompts=fingerprint(Path(a.metadata)))
    begin_folder(a.out, settings | content)
    draw_pictures(policy, rows, a.out, **settings)
    table = judge_pictures(rows, a.out, a.samples, detector)
    head = f"GenEval rules, detector {a.detector or 'of the toy'}"
    return f"{head}\n{print_table(table)}\npictures in {a.out}"


if __name__ == "__main__":
    main()
