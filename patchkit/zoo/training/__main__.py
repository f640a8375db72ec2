"""Train a model of the zoo from nothing: ``python -m patchkit.zoo.training video|image|dit|flux|vlm --out DIR``.

All stages one after another, each with its defaults: denoiser, decoder, assembly, evaluation. A stopped run continues
at its last checkpoint when the same command is given again. The packaged weights are replaced with ``--install`` only.
``image``, ``dit`` and ``flux`` have the same latents and can share a decoder (``--vae DIR``, trained there first if
need be). The plot of the loss needs the extra ``viz``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from patchkit import zoo
from patchkit.zoo.training import (
    assemble,
    evaluate,
    flow_assemble,
    flow_evaluate,
    image,
    image_assemble,
    image_evaluate,
    image_vae,
    plot,
    video,
    video_vae,
    vlm,
    vlm_assemble,
    vlm_evaluate,
    vlm_tower,
)


def train_video(out: Path, model: Path, vae: Path, threads: int) -> None:
    """``zoo/video``: about an hour on two cores."""
    denoiser, common = str(out / "denoiser"), ["--threads", str(threads)]
    video.main(["--out", denoiser, *common])
    video_vae.main(["--out", str(vae), *common])
    assemble.main(["--denoiser", denoiser, "--vae", str(vae), "--out", str(model)])
    evaluate.main(["--model", str(model), "--out", str(out / "evaluation"), *common])
    plot.main([str(out / "loss.png"), f"denoiser={out / 'denoiser' / 'log.jsonl'}"])


def train_image(out: Path, model: Path, vae: Path, threads: int) -> None:
    """``zoo/image``: some hours on two cores."""
    denoiser, common = str(out / "denoiser"), ["--threads", str(threads)]
    image.main(["--out", denoiser, *common])
    image_vae.main(["--out", str(vae), *common])
    image_assemble.main(["--denoiser", denoiser, "--vae", str(vae), "--out", str(model)])
    image_evaluate.main(["--model", str(model), "--out", str(out / "evaluation"), *common])
    plot.main([str(out / "loss.png"), f"denoiser={out / 'denoiser' / 'log.jsonl'}"])


def train_vlm(out: Path, model: Path, _vae: Path, threads: int) -> None:
    """``zoo/vlm``: one to two hours on one core. It draws nothing, so it needs no decoder."""
    tower, training, common = str(out / "tower"), str(out / "training"), ["--threads", str(threads)]
    vlm_tower.main(["--out", tower, *common])
    vlm.main(["--out", training, "--tower", tower, *common])
    vlm_assemble.main(["--run", training, "--out", str(model)])
    vlm_evaluate.main(["--model", str(model), "--out", str(out / "evaluation"), *common])
    logs = [f"{name}={out / name / 'log.jsonl'}" for name in ("tower", "training")]
    plot.main([str(out / "loss.png"), *logs])


def train_flow(name: str, out: Path, model: Path, vae: Path, threads: int) -> None:
    """``zoo/dit`` or ``zoo/flux``: an hour or two on two cores."""
    denoiser, common = str(out / "denoiser"), ["--threads", str(threads)]
    flow_assemble.MODELS[name].main(["--out", denoiser, *common])
    image_vae.main(["--out", str(vae), *common])
    flow_assemble.main([name, "--denoiser", denoiser, "--vae", str(vae), "--out", str(model)])
    flow_evaluate.main([name, "--model", str(model), "--out", str(out / "evaluation"), *common])
    plot.main([str(out / "loss.png"), f"denoiser={out / 'denoiser' / 'log.jsonl'}"])


Training = Callable[[Path, Path, Path, int], None]  # out, model, vae, threads
FLOWS: dict[str, Training] = {name: partial(train_flow, name) for name in flow_assemble.MODELS}
MODELS: dict[str, Training] = {"video": train_video, "image": train_image, **FLOWS, "vlm": train_vlm}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m patchkit.zoo.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and the evaluation")
    parser.add_argument("--vae", type=Path, help="folder of the decoder's training; a folder in --out by default")
    parser.add_argument("--install", action="store_true", help="write the result into the package")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = Path(zoo.__file__).parent / args.model if args.install else args.out / "model"
    MODELS[args.model](args.out, model, args.vae or args.out / "vae", args.threads)


if __name__ == "__main__":
    main()
