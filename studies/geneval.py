"""GenEval's rules on pictures of any policy.

    python -m studies.geneval --policy BAGEL-7B-MoT --metadata evaluation_metadata.jsonl --detector google/owlv2-base-patch16-ensemble
"""

import hashlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flow_grpo
from tqdm import tqdm
from eval import mean_and_error, print_table
from policy import Policy
from referees.detectors import load_detector
from referees.geneval import geneval_check
from sample import SAMPLING, TOY, Draw, Read, images_of, sample_plan
from support.checkpoint import load_policy
from support.disk import read_json, write_atomic
from support.pictures import to_bytes
from support.rows import READERS, check_rules
from support.terminal import Arguments, one_line, the_device
from toy.world import detect


def geneval(policy: Policy, metadata: Path, detector, name: str, out: Path, samples: int = 4, size: int = 0, steps: int = 0,
            seed: int = 0, text_scale: float | None = None) -> dict[str, tuple[float, float]]:
    """Draw `samples` images of every prompt of a GenEval file into `out`, in GenEval's own folders (00000/metadata.jsonl, 00000/samples/
    0000.png, ...), so that the official script can be run on them elsewhere, and judge them by its rules over `detector`: tag -> (share
    of images that pass, standard error over prompts), and the mean of the tags, "overall". Goes on where it stopped.

    Errors: ValueError where `out` holds pictures of other settings."""
    rows = READERS["prompts"](str(metadata))
    scale = SAMPLING[policy.config.scale]
    size, steps = size or scale["size"], steps or scale["steps"]
    guidance = scale["guidance"] if text_scale is None else replace(scale["guidance"], text_scale=text_scale)
    prompts = hashlib.sha256(metadata.read_bytes()).hexdigest()[:16]
    begin_folder(out, dict(policy=name, prompts=prompts, samples=samples, size=size, steps=steps, guidance=guidance.text_scale, seed=seed))
    draw = Draw((size, size), flow_grpo.time_grid(steps, scale["shift"]))
    for i, row in enumerate(tqdm(rows, desc="drawing")):
        paths = [out / f"{i:05}" / "samples" / f"{j:04}.png" for j in range(samples)]
        if all(path.exists() for path in paths):
            continue
        r = sample_plan(policy, [Read([row["prompt"]]), draw], seed=seed, step=0, prompts=[i], G=samples,
                        guidance=guidance if guidance.text_scale > 1 else None)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(paths[0].parents[1] / "metadata.jsonl", json.dumps(row, ensure_ascii=False).encode())
        for path, image in zip(paths, to_bytes(images_of(policy, r))):
            write_atomic(path, png(image))
    results = []
    for i, row in enumerate(tqdm(rows, desc="judging")):
        images = torch.stack([read_bytes(out / f"{i:05}" / "samples" / f"{j:04}.png") for j in range(samples)])
        for j, found in enumerate(detector(images, [row] * samples)):
            right, reason = geneval_check(row, found, **getattr(detector, "settings", {}))
            results.append({"filename": f"{i:05}/samples/{j:04}.png", "tag": row.get("tag", ""), "prompt": row["prompt"], "correct": right,
                            "reason": reason})
    write_atomic(out / "results.jsonl", "\n".join(json.dumps(each, ensure_ascii=False) for each in results).encode())
    right = np.array([each["correct"] for each in results], dtype=float).reshape(len(rows), samples).mean(1)
    tags = dict.fromkeys(row.get("tag", "") for row in rows)
    table = {tag: mean_and_error([x for x, row in zip(right, rows) if row.get("tag", "") == tag]) for tag in tags}
    table["overall"] = (float(np.mean([m for m, _ in table.values()])), math.sqrt(sum(e * e for _, e in table.values())) / len(table))
    return table


def identity(*folders: str) -> str:
    """Folders with a hash of their weight files' names, sizes and times, so that a policy that was trained again is another."""
    files = sorted(file for folder in folders if folder for file in Path(folder).glob("*.safetensors"))
    stamp = json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return f"{' '.join(filter(None, folders))} {hashlib.sha256(stamp.encode()).hexdigest()[:16]}"


def begin_folder(out: Path, settings: dict) -> None:
    """Make a folder of pictures, or check that the one that is there is of the same settings."""
    path = out / "settings.json"
    if path.exists() and (held := read_json(path)) != settings:
        other = [f"{k} {held.get(k)!r}, not {v!r}" for k, v in settings.items() if held.get(k) != v]
        raise ValueError(f"{out} holds pictures of {', '.join(other)}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=1).encode())


def png(image: np.ndarray) -> bytes:
    from PIL import Image
    held = io.BytesIO()
    Image.fromarray(image).save(held, format="png")
    return held.getvalue()


def read_bytes(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    from PIL import Image
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.geneval", description="GenEval's rules on pictures of a policy.", allow_abbrev=False)
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--metadata", type=Path, required=True, help="prompts in GenEval's format, such as its evaluation_metadata.jsonl")
    ap.add_argument("--detector", default="", help="a Grounding DINO or OWLv2; the toy has its own")
    ap.add_argument("--colors", default="openai/clip-vit-large-patch14", help="CLIP that names colours: a folder or hub name")
    ap.add_argument("--guidance", type=float, help="text guidance scale (1 for the toy, 4 for BAGEL)")
    ap.add_argument("--samples", type=int, default=4, help="images of each prompt")
    ap.add_argument("--size", type=int, default=0, help="pixels per side (32 for the toy, 1024 for BAGEL)")
    ap.add_argument("--steps", type=int, default=0, help="denoising steps (10 for the toy, 49 for BAGEL)")
    ap.add_argument("--seed", type=int, default=0, help="of noise")
    ap.add_argument("--out", type=Path, default=Path("geneval"), help="the folder of pictures and results")
    a = ap.parse_args(argv)
    with one_line("studies.geneval"):
        print(run_geneval(a))


def run_geneval(a) -> str:
    if a.samples < 1:
        raise ValueError(f"--samples {a.samples}: must be at least 1")
    rows = READERS["prompts"](str(a.metadata))
    check_rules(rows, str(a.metadata), "prompts")
    policy = load_policy(a.policy, device=the_device(), adapter=a.adapter)
    if policy.config.scale != "toy" and not a.detector:
        raise ValueError("GenEval's rules need --detector, such as google/owlv2-base-patch16-ensemble")
    detector = lambda images, metadata: detect(images)
    if a.detector:
        detector = load_detector(a.detector, a.colors, device=policy.device)
        detector.check(rows)
    table = geneval(policy, a.metadata, detector, identity(a.policy, a.adapter), a.out, a.samples, a.size, a.steps, a.seed, a.guidance)
    return f"GenEval rules, detector {a.detector or 'the exact one of the toy'}\n{print_table(table)}\npictures and results in {a.out}"


if __name__ == "__main__":
    main()
