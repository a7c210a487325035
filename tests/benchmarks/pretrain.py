"""What pre-training of crops without labels is worth, and how fast it is, on one CPU thread.

    python tests/benchmarks/pretrain.py quick                one dino of 235 steps: fails if it gains too little (a minute)
    python tests/benchmarks/pretrain.py table [SEEDS]        dino and ibot, `--preset small`, against random weights
    python tests/benchmarks/pretrain.py curves FILE          a picture of a run that learns and of two that collapse
    python tests/benchmarks/pretrain.py five [SEEDS]         lct_dino3.py with five labelled crops a class of grocery40
    python tests/benchmarks/pretrain.py speed                loader and step, against torchvision and DINO of `pip install lightly`

Unlabelled are grocery40 without its `test_*` files and every second photo of tools17 (shared/data beside the repository); queries
are the rest of both. The figures are those of the last epoch: none is chosen by what it is measured on.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
WORK = Path(tempfile.gettempdir()) / "lct_pretrain_benchmark"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
FIVE_FLAGS = (
    "--gpus 0 --workers 0 --test_split 0 --val_split 0.2 --near_dup_bits 0 --epochs 40 --batch 40 --save_every 0"
)
IMAGENET = "--model_id mobilenetv2_035 --img_size 96 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --backbone_weights"


def link(target: Path, source: Path) -> None:
    """Make a link in a folder that need not be there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        target.symlink_to(source)


def make_folders() -> tuple[Path, Path]:
    """Return the folders of the unlabelled crops, which answer for k-NN, and of the queries."""
    for path in sorted(SHARED.glob("grocery40/*/cropped/*")):
        part = "queries" if path.name.startswith("test_") else "gallery"
        link(WORK / part / f"g_{path.parts[-3]}" / path.name, path)
    paths = sorted(SHARED.glob("tools17/*/cropped/*.jpg"))
    photos = sorted({re.match(r"(src\d+)_", path.name)[1] for path in paths})
    unlabelled = set(photos[::2])
    for path in paths:
        part = "gallery" if path.name.partition("_")[0] in unlabelled else "queries"
        link(WORK / part / f"t_{path.parts[-3]}" / path.name, path)
    return WORK / "gallery", WORK / "queries"


def run(*words: object) -> str:
    """Run a program of ours; return what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def pretrain(algorithm: str, seed: int, *flags: object) -> tuple[Path, list[dict]]:
    """Pre-train, or find it done; return the folder, and the figures of the random weights and of each epoch."""
    gallery, queries = make_folders()
    out = WORK / "_".join([algorithm, str(seed), *map(str, flags)]).replace("--", "")
    places = ("--train-dir", gallery, "--knn-dir", gallery, queries, "--output-dir", out, "--device", "cpu")
    run("tools/pretrain_dino_face.py", "--preset", "small", "--algorithm", algorithm, "--seed", seed, *places, *flags)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return out, [record for record in records if record["event"] in ("start_end", "epoch_end")]


def gains(figures: list[dict]) -> dict[str, float]:
    """Return what the last epoch has gained over the random weights."""
    start, last = figures[0], figures[-1]
    return {
        "mean patch": last["knn_patch"] - start["knn_patch"],
        "class token": last["knn_class"] - start["knn_class"],
        "retrieval": last["retrieval"] / start["retrieval"],
    }


def measure_quick() -> None:
    """One short run of dino; ends with 1 if it gains less than it should."""
    found = gains(pretrain("dino", 0, "--epochs", 5)[1])
    print("  ".join(f"{name} {value:+.3f}" for name, value in found.items()))
    sys.exit(found["mean patch"] < 0.035 or found["class token"] < 0.025)


def measure_table(seeds: list[int]) -> None:
    """Both algorithms with all seeds, beside what needs no training."""
    for algorithm in ("dino", "ibot"):
        rows = [gains(pretrain(algorithm, seed)[1]) for seed in seeds]
        start = pretrain(algorithm, seeds[0])[1][0]
        for name in rows[0]:
            values = [row[name] for row in rows]
            print(f"{algorithm:5} {name:12} mean {statistics.mean(values):.3f}  least {min(values):.3f}  {values}")
        print({name: round(value, 3) for name, value in start.items() if name.startswith("knn")})


def draw_runs(path: Path) -> None:
    """Draw loss, two-view retrieval and k-NN by epoch of dino, seed 1: as it is, without Sinkhorn, with strong colours."""
    from meshes import draw_curves

    colours = "--aug-brightness .8 --aug-contrast .8 --aug-saturation .8 --aug-hue .4 --aug-grayscale-prob .5"
    colours += " --aug-solarize-prob .3 --aug-gaussian-blur-prob .5"
    runs = {"as it is": "", "no Sinkhorn": "--no-use-sinkhorn", "strong colours": colours}
    figures = {name: pretrain("dino", 1, *flags.split())[1][1:] for name, flags in runs.items()}
    keys = {"loss": "loss", "two-view retrieval": "retrieval", "k-NN, class token": "knn_class"}
    panels = {
        title: {name: [row[key] for row in rows] for name, rows in figures.items()} for title, key in keys.items()
    }
    draw_curves(panels).save(path, quality=90)


def export_weights(kind: str, seed: int) -> Path:
    """Return an export of the last teacher, or of the random weights that it began with."""
    import pretrain_utils
    import torch
    from slt.models import ARCHITECTURE
    from slt.options import apply_preset

    options = apply_preset(pretrain_utils.PretrainOptions(preset="small"))
    path = WORK / f"{kind}_{seed}.pt"
    if kind == "random":
        pretrain_utils.lct.seed_torch(seed, 0)
        weights = pretrain_utils.Networks(options).backbone.state_dict()
    else:
        payload = torch.load(pretrain(kind, seed)[0] / "checkpoint_last.pt", weights_only=True)
        prefix = "backbone."
        weights = {k.removeprefix(prefix): v for k, v in payload["teacher"].items() if k.startswith(prefix)}
    metadata = {"architecture": ARCHITECTURE, "geometry": options.geometry}
    metadata |= {"mean": list(options.aug_mean), "std": list(options.aug_std)}
    torch.save({"model": weights, "metadata": metadata}, path)
    return path


def measure_five(seeds: list[int]) -> None:
    """Train lct_dino3.py on five crops a class, and answer the test crops of grocery40 by centroids."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for folder in sorted(path for path in (SHARED / "grocery40").iterdir() if path.is_dir()):
            crops = sorted(folder.glob("cropped/*"))
            train = [path for path in crops if not path.name.startswith("test_")]
            for path in [train[row] for row in rng.permutation(len(train))[:5]]:
                link(WORK / f"five_{seed}" / folder.name / path.name, path)
            for path in set(crops) - set(train):
                link(WORK / "five_test" / folder.name / path.name, path)
        for kind in ("random", "dino", "ibot", "ImageNet CNN"):
            for mode in ("--freeze_backbone", "--no-freeze_backbone"):
                is_cnn = kind == "ImageNet CNN"
                if is_cnn and mode == "--no-freeze_backbone":
                    continue
                out = WORK / f"run_{kind}_{seed}{mode}".replace(" ", "_")
                cnn = [*IMAGENET.split(), SHARED / "weights" / "mobilenetv2_035.timm.pth"]
                model = cnn if is_cnn else ["--backbone_weights", export_weights(kind, seed)]
                places = ("--data_root", WORK / f"five_{seed}", "--out_dir", out, "--seed", seed, "--overwrite")
                run("lct_dino3.py", *places, *FIVE_FLAGS.split(), *model, mode)
                run(
                    "lct_dino3.py",
                    "evaluate",
                    "--run",
                    out,
                    "--data_root",
                    WORK / "five_test",
                    "--gpus",
                    0,
                    "--workers",
                    0,
                )
                found = json.loads((out / "evaluation.json").read_text("utf-8"))["closed"]["centroid"]["acc"]["value"]
                print(f"seed {seed}  {kind:12}  {mode:21} {found:.3f}", flush=True)


def measure_speed() -> None:
    """Images/s of one core in the loader against torchvision v2; ms of a step against lightly's DINO, taking turns."""
    import pretrain_utils
    import torch
    from slt.options import apply_preset
    from slt.views import Images, ViewDataset, ViewKey
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    small = apply_preset(pretrain_utils.PretrainOptions(preset="small"))
    for name, options, source in (("preset small", small, 64), ("defaults", pretrain_utils.PretrainOptions(), 256)):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (64, source, source, 3), dtype=np.uint8)
        pixels = np.stack([pretrain_utils.cv2.GaussianBlur(image, (0, 0), 3) for image in pixels])
        dataset = ViewDataset(Images([""] * 64, pixels), options.augmentation, 0, 4, 0.0)
        how = options.augmentation

        def multi_crop(side: int, scale: tuple[float, float], how: object = how) -> v2.Compose:
            jitter = v2.ColorJitter(how.brightness, how.contrast, how.saturation, how.hue)
            blur = v2.GaussianBlur(2 * (side // 20) + 1, (0.1 * side / 224 + 0.01, 2 * side / 224))
            steps = [v2.RandomResizedCrop(side, scale, antialias=True), v2.RandomHorizontalFlip()]
            steps += [v2.RandomApply([jitter], how.color_jitter_prob)]
            steps += [v2.RandomGrayscale(how.grayscale_prob)] if how.grayscale_prob else []
            steps += [v2.RandomApply([blur], how.gaussian_blur_prob)] if how.gaussian_blur_prob else []
            steps += [v2.RandomSolarize(128, how.solarize_prob)] if how.solarize_prob else []
            return v2.Compose(steps)

        to_global = multi_crop(how.image_size, how.global_crop_scale)
        to_local = multi_crop(how.local_crop_size, how.local_crop_scale)
        tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]

        def ours(index: int, dataset: ViewDataset = dataset) -> object:
            return dataset[ViewKey(1, index)]

        def theirs(index: int, tensors: list = tensors, large: object = to_global, little: object = to_local) -> object:
            return [large(tensors[index]) for _ in range(2)] + [little(tensors[index]) for _ in range(4)]

        rates = {key: [] for key in ("ours", "torchvision")}
        for _ in range(5):
            for key, make in (("ours", ours), ("torchvision", theirs)):
                began = time.perf_counter()
                for index in range(64):
                    make(index)
                rates[key].append(64 / (time.perf_counter() - began))
        print(name, "loader, images/s:", {key: round(statistics.median(values)) for key, values in rates.items()})
    measure_step(small)


def measure_step(options: object) -> None:
    """A step of dino as lightly's example has it, with our backbone, views and optimizer, and ours without KoLeo."""
    import copy

    import pretrain_utils
    import torch
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from slt.views import ViewBatch

    options = pretrain_utils.dataclasses.replace(options, koleo_weight=0.0, use_sinkhorn=False)
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    batch = ViewBatch(
        *(
            torch.randint(0, 256, (n, 32, 3, s, s), dtype=torch.uint8, generator=generator)
            for n, s in ((2, 32), (4, 16))
        ),
        torch.zeros(2, 32, 16, dtype=torch.bool),
    )
    state = pretrain_utils.build_state(options, device)
    job = pretrain_utils.Job(
        options, None, pretrain_utils.lct.Runtime(device, 0, torch.float32), pretrain_utils.Schedule(options, 50), None, {},
        None, None,
    )  # fmt: skip
    student = pretrain_utils.ViTSmallPatch16(**options.geometry)
    student_head = DINOProjectionHead(96, 256, 64, 256, freeze_last_layer=1)
    teacher, teacher_head = copy.deepcopy(student), DINOProjectionHead(96, 256, 64, 256)
    for module in (teacher, teacher_head):
        module.requires_grad_(False)
    criterion = DINOLoss(output_dim=256, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.AdamW([*student.parameters(), *student_head.parameters()], lr=1e-3)
    mean, std = torch.tensor(options.aug_mean).view(3, 1, 1), torch.tensor(options.aug_std).view(3, 1, 1)

    def theirs() -> None:
        update_momentum(student, teacher, m=0.99)
        update_momentum(student_head, teacher_head, m=0.99)
        crops = [(view.float() / 255 - mean) / std for part in batch[:2] for view in part]
        teacher_out = [teacher_head(teacher.encode(view)[:, 0]) for view in crops[:2]]
        student_out = [student_head(student.encode(view)[:, 0]) for view in crops]
        loss = criterion(teacher_out, student_out, epoch=0)
        loss.backward()
        student_head.cancel_last_layer_gradients(current_epoch=0)
        optimizer.step()
        optimizer.zero_grad()

    times = {key: [] for key in ("ours", "lightly")}
    for _ in range(30):
        for key, step in (("ours", lambda: pretrain_utils.train_step(job, state, batch)), ("lightly", theirs)):
            began = time.perf_counter()
            step()
            times[key].append(1000 * (time.perf_counter() - began))
    print("step of dino, ms:", {key: round(statistics.median(values), 1) for key, values in times.items()})


if __name__ == "__main__":
    command, *words = sys.argv[1:] or ["quick"]
    if command == "curves":
        draw_runs(Path(words[0]))
    elif command in ("quick", "speed"):
        {"quick": measure_quick, "speed": measure_speed}[command]()
    else:
        {"table": measure_table, "five": measure_five}[command]([int(word) for word in words] or [0, 1, 2])
