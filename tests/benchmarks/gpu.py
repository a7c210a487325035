"""What only a GPU can tell of lct_dino3.py: speed, waits, rounding, memory, exact resume. One line a check.

    python tests/benchmarks/gpu.py                   on one large GPU; sized for nine minutes
    python tests/benchmarks/gpu.py --dry             the same logic on the CPU with a tiny model
    python tests/benchmarks/gpu.py resume torchrun   the checks whose names contain one of the words

Weights are random, pictures are drawn, nothing is fetched; one check needs sam2. A line is "VERDICT check: figure (seconds)": pass;
FAIL; skip, where this machine cannot tell; info, where nothing is expected of this GPU; dry, where the logic ran on the CPU, which
tells nothing of a GPU. Exit code 1 if a check FAILs. Checks that measure run alone, whole runs that are compared side by side.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
from killing import Nursery

import lct_dino3 as lct

SAM2_CFG = "configs/sam2.1/sam2.1_hiera_t.yaml"
RUN_SECONDS = 240  # that one start of the script may take
# By count of operations, 256 images take a frozen ViT-L 44 ms of matrix products on a GPU of 989 TFLOP/s in bf16, and 49 ms of
# elementwise traffic in autocast: 2,730 images/s, and 3,110 with bf16 weights. The limits leave room for what the count leaves out.
KNOWN_GPUS = ("H100", "H200")
LEAST_IMAGES = 1500  # a second, frozen
LEAST_TFLOPS = 200  # fine-tuned, without --compile
TRAINED = {"frozen": (), "fine-tuned": ("--no-freeze_backbone",)}
LOCKS = {kind: threading.Lock() for kind in TRAINED}  # of the runs that several checks compare with
FORK_LOCK = threading.Lock()  # the forking process takes one job at a time
Verdict = tuple[str, str]  # and the figure
Check = Callable[["Bench"], Verdict]


class Bench:
    """The device, a folder for files, sizes that suit both, and what several checks do with them."""

    def __init__(self, dry: bool, folder: Path) -> None:
        self.dry = dry
        self.folder = folder
        self.device = torch.device("cpu" if dry else "cuda")
        self.large = "test_vit" if dry else "vit_large_patch16_dinov3.lvd1689m"  # its speed is measured
        self.small = "test_vit" if dry else "vit_small_patch16_dinov3.lvd1689m"  # of runs that are compared
        self.img_size = 32 if dry else 224
        self.batches = (8, 12, 16, 20) if dry else (64, 128, 256, 512)
        self.num_classes = 3 if dry else 8  # with so few, a run trains no head without some of them
        self.per_class = 12 if dry else 300  # images
        self.epochs = 6 if dry else 3
        self.exact = () if dry else ("--deterministic",)  # torch imports its compiler for it, which takes a start 4 s

    def judge_speed(self, is_fast: bool) -> str:
        """Return the verdict of a speed; only GPUs of which it is known are held to it."""
        is_known = not self.dry and any(name in torch.cuda.get_device_name() for name in KNOWN_GPUS)
        return judge(is_fast) if is_known else "info"

    def draw_dataset(self) -> None:
        """Draw the images: coarse noise with a tint of each class."""

        def draw(job: tuple[int, int]) -> None:
            label, number = job
            noise = np.random.default_rng(job).integers(0, 216, (12, 12, 3))
            noise[..., label % 3] += 5 * label
            image = Image.fromarray(noise.astype(np.uint8)).resize([2 * self.img_size] * 2, Image.Resampling.BICUBIC)
            folder = self.folder / "data" / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:04}.jpg", quality=90)

        with ThreadPoolExecutor(lct.count_cores()) as pool:
            list(pool.map(draw, np.ndindex(self.num_classes, self.per_class)))

    def draw_batch(self, size: int) -> lct.Batch:
        """Draw a batch as a loader yields it: channels last, in pinned memory."""
        shape = (size, self.img_size, self.img_size, 3)
        images, labels = (
            torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2),
            torch.arange(size) % self.num_classes,
        )
        images, labels = (values if self.dry else values.pin_memory() for values in (images, labels))
        return lct.Batch(images=images, labels=labels, rows=labels, views=labels.byte(), failures=[])

    def draw_images(self, size: int) -> torch.Tensor:
        """Draw uint8 images (B, 3, H, W) on the device."""
        return self.draw_batch(size).images.to(self.device)

    def build(self, model_id: str) -> lct.Backbone:
        """Return a frozen backbone with random weights in float32, whatever the script makes of such a one later."""
        config = lct.Config(model_id=model_id, pretrained=False, img_size=self.img_size)
        return lct.build_backbone(config, lambda text: None)[0].to(self.device).eval().requires_grad_(False)

    @functools.cached_property
    def frozen(self) -> lct.Backbone:
        """The large one."""
        return self.build(self.large)

    @functools.cached_property
    def tflops(self) -> float:
        """Operations, in 1e12, of one image's way through it."""
        with FlopCounterMode(display=False) as counter:
            make_forward(self.frozen, torch.bfloat16)(self.draw_images(2))
        return counter.get_total_flops() / 2e12

    def measure_rate(self, call: Callable[[], object], num_images: int, seconds: float = 1.5) -> float:
        """Return images/s of a call, after two that warm it up."""
        synchronize = (lambda: None) if self.dry else torch.cuda.synchronize
        call()
        call()
        synchronize()
        started, count = time.perf_counter(), 0
        while count < 3 or (time.perf_counter() - started < seconds and not self.dry):
            call()
            count += 1
            if count % 8 == 0:  # or the calls would be queued far ahead of the clock
                synchronize()
        synchronize()
        return num_images * count / (time.perf_counter() - started)

    @functools.cached_property
    def nursery(self) -> Nursery:
        """The process that forks the runs of a dry start, which spares the imports of each."""
        return Nursery(self.folder)

    def start(self, name: str, *words: object, launcher: Sequence[str] = (), stops: bool = False) -> tuple[int, str]:
        """Do a run in the folder `name`; return exit code and output. One that stops gets SIGTERM in its second epoch."""
        flags = f"--no-pretrained --model_id {self.small} --img_size {self.img_size} --save_every 0".split()
        flags += f"--gpus {int(not self.dry)} --workers {0 if self.dry else 3}".split()
        flags += ["--batch", self.batches[0], "--epochs", self.epochs]
        flags += ["--data_root", self.folder / "data", "--out_dir", self.folder / name]
        if self.dry and not launcher and not stops:
            with FORK_LOCK:
                return self.nursery.run(*flags, *words)
        command = [sys.executable, *launcher, *map(str, (REPO / "lct_dino3.py", *flags, *words))]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        log, events = self.folder / f"{name}.log", self.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + RUN_SECONDS
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while stops and process.poll() is None and time.monotonic() < deadline:
                if events.exists() and b'"epoch_end"' in events.read_bytes():
                    process.terminate()
                    break
                time.sleep(0.01)
            code = process.wait(deadline - time.monotonic())
        finally:
            process.kill()
        return code, log.read_text(encoding="utf-8", errors="replace")

    def train(self, name: str, *words: object, **how: object) -> dict:
        """Do a run that has to end well; return the record of its last epoch."""
        code, text = self.start(name, *words, **how)
        if code:
            raise RuntimeError(f"run `{name}` ended with exit code {code}: {error_line(text)}")
        return [event for event in lct.read_events(self.folder / name) if event["event"] == "epoch_end"][-1]

    def compare(self, kind: str, name: str) -> tuple[float, float]:
        """Compare a run with a plain one, done when it is first asked for: largest difference of all values, least cosine."""
        with LOCKS[kind]:
            if not (self.folder / kind / "prototypes.npz").exists():
                self.train(kind, *self.exact, *TRAINED[kind])
        results = []
        for folder in (self.folder / kind, self.folder / name):
            weights = torch.load(folder / lct.LAST_NAME, map_location="cpu", weights_only=True)["model"]
            with np.load(folder / "prototypes.npz", allow_pickle=False) as gallery:
                results.append({"embeddings": torch.from_numpy(gallery["stacks"]), **weights})
        gaps = [
            (values.double() - results[1][key].double()).abs().max()
            for key, values in results[0].items()
            if values.numel()
        ]
        return torch.stack(gaps).max().item(), least_cosine(*(result["embeddings"] for result in results))


class Trainee:
    """A model with random weights that is ready to be trained, as a run has it."""

    def __init__(self, bench: Bench, model_id: str, **options: object) -> None:
        self.config = lct.Config(model_id=model_id, pretrained=False, img_size=bench.img_size, **options)
        self.backbone, info = lct.build_backbone(self.config, lambda text: None)
        model = lct.build_recognizer(self.config, bench.num_classes, self.backbone, info).to(bench.device).train()
        self.runtime = lct.Runtime(bench.device, int(not bench.dry), torch.bfloat16)
        self.backbone = self.backbone.with_dtype(self.runtime.dtype)
        self.state = lct.start_state(model, self.config, self.runtime)

    def step(self, batch: lct.Batch, network: nn.Module | None = None) -> torch.Tensor:
        """Do one optimizer step, with the features of `network` if it is given; return the loss ()."""
        return lct.train_step(self.config, self.runtime, network or self.backbone, self.state, [batch])[0]


def judge(is_right: bool) -> str:
    """Return a verdict."""
    return "pass" if is_right else "FAIL"


def make_forward(backbone: lct.Backbone, dtype: torch.dtype, casts_weights: bool = False) -> Callable:
    """Return a function from uint8 images to float32 features, in autocast or with weights of `dtype`.

    Both are built here from the timm model, whichever of them the script uses.
    """
    model = copy.deepcopy(backbone.model).to(dtype) if casts_weights else backbone.model

    def forward(images: torch.Tensor) -> torch.Tensor:
        inputs = (images.float() - backbone.mean) / backbone.std
        if casts_weights:
            return model(inputs.to(dtype)).float()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return model(inputs).float()

    return forward


def least_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the least cosine of a row (N, D) with that of another tensor."""
    return F.cosine_similarity(one.double(), other.double()).min().item()


def error_line(text: str) -> str:
    """Return the last line of an output that speaks of an error, or the last one, cut short."""
    lines = text.splitlines() or [""]
    return ([line for line in lines if "rror" in line] or lines)[-1][:250]


# --- checks that measure


def frozen_forward(bench: Bench) -> Verdict:
    """Compare autocast with bf16 weights, which spare the casts of each pass."""
    forwards = [make_forward(bench.frozen, torch.bfloat16, casts_weights) for casts_weights in (False, True)]
    rates = {}
    for size in bench.batches:
        images = bench.draw_images(size)
        with torch.inference_mode():
            rates[size] = [bench.measure_rate(functools.partial(run, images), size) for run in forwards]
    shown = [f"{size}: {one:,.0f} and {two:,.0f}" for size, (one, two) in rates.items()]
    autocast, weights = rates[bench.batches[2]]
    figure = f"images/s in autocast and with bf16 weights: {'; '.join(shown)}; {weights * bench.tflops:.0f} TFLOP/s"
    return bench.judge_speed(autocast >= LEAST_IMAGES and weights >= autocast), figure


def fine_tuning(bench: Bench) -> Verdict:
    """Measure whole steps; a backward pass has twice the operations of a forward pass."""
    trainee, size = Trainee(bench, bench.large, freeze_backbone=False), bench.batches[1]
    batch = bench.draw_batch(size)
    rate = bench.measure_rate(lambda: trainee.step(batch), size, seconds=3)
    tflops = 3 * rate * bench.tflops
    peak = torch.cuda.max_memory_allocated() / 1e9
    figure = f"batch {size}: {rate:,.0f} images/s, {tflops:.0f} TFLOP/s, peak {peak:.0f} GB"
    return bench.judge_speed(tflops >= LEAST_TFLOPS), figure


def waits_a_step(bench: Bench) -> Verdict:
    """Count how often a step waits for the GPU, which then runs dry, and say at which lines; no step should."""
    kinds = {"frozen": {}, "mixup": {"mixing": "mixup", "mixing_p": 1.0}, "fine-tuned": {"freeze_backbone": False}}
    batch, counts, places = bench.draw_batch(bench.batches[0]), [], set()
    for kind, options in kinds.items():
        trainee = Trainee(bench, bench.small, **options)
        trainee.step(batch)  # the first one sets things up
        if bench.dry:
            continue
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                trainee.step(batch)
        torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        counts.append(f"{kind} {len(waits) / 10:g}")
        places |= {f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits}
    if bench.dry:
        return "skip", "no GPU to wait for; the steps ran"
    return judge(not places), f"{', '.join(counts)}; at {', '.join(sorted(places)) or 'no line'}"


def features_against_the_cpu(bench: Bench) -> Verdict:
    """Compare with fp32 on the CPU: fp32 up to the order of sums, bf16 up to its rounding."""
    backbone, images, bf16 = bench.frozen, bench.draw_images(4), torch.bfloat16
    with torch.inference_mode():
        expected = make_forward(copy.deepcopy(backbone).cpu(), torch.float32)(images.cpu())
        exact = make_forward(backbone, torch.float32)(images).cpu()
        rounded = [make_forward(backbone, bf16, casts_weights)(images).cpu() for casts_weights in (False, True)]
    gap = ((exact - expected).abs().max() / expected.abs().max()).item()
    autocast, weights = (least_cosine(features, expected) for features in rounded)
    figure = (
        f"fp32 within {gap:.1e} of the largest; least cosine {autocast:.5f} in autocast, bf16 weights {weights:.5f}"
    )
    return judge(gap < 1e-4 and min(autocast, weights) > 0.995), figure


def cosines_against_the_cpu(bench: Bench) -> Verdict:
    """Compare the cosines of embeddings with float64: unless told otherwise, cuDNN rounds what it convolves to TF32."""
    model = Trainee(bench, bench.small).state.model.eval()
    features = torch.randn(1000, model.head.hidden.in_features)
    with torch.inference_mode():
        embeddings = model.embed(features.to(bench.device)).cpu().double()
        expected = copy.deepcopy(model).cpu().double().embed(features.double())
    gap = (embeddings @ embeddings.T - expected @ expected.T).abs().max().item()
    return judge(gap < 1e-5), f"within {gap:.1e} in float32; cudnn.allow_tf32 is {torch.backends.cudnn.allow_tf32}"


def compiled_forward(bench: Bench) -> Verdict:
    """Compare the compiled forward pass with the plain one, and see how often it is compiled anew for batches of other sizes."""
    backbone, size = copy.deepcopy(bench.frozen), bench.batches[2]
    images, forward = bench.draw_images(size), make_forward(backbone, torch.bfloat16)
    run = functools.partial(forward, images)
    with torch.inference_mode():
        plain, expected = bench.measure_rate(run, size), run()
        backbone.model.compile(backend="eager" if bench.dry else "inductor")
        started = time.perf_counter()
        cosine = least_cosine(run(), expected)
        seconds = time.perf_counter() - started
        gain = bench.measure_rate(run, size) / plain
        for smaller in (size - 1, size // 2):
            forward(images[:smaller])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    figure = f"{gain:.2f} times as fast after {seconds:.0f} s, {graphs} graphs for 3 sizes, least cosine {cosine:.5f}"
    return bench.judge_speed(gain > 1) if cosine > 0.999 else "FAIL", figure


def data_parallel(bench: Bench) -> Verdict:
    """Compare two replicas on one device with the plain backbone: features of a frozen one, losses of one that is trained."""
    # The script may have a class of its own for frozen backbones.
    ours = [item for item in vars(lct).values() if isinstance(item, type) and issubclass(item, nn.DataParallel)]
    images, frozen = bench.draw_images(9), Trainee(bench, bench.small).backbone
    with torch.inference_mode():
        network = (ours or [nn.DataParallel])[0](frozen, device_ids=[0, 0])
        features = [network(images) for _ in range(2)]  # such a class makes its replicas in the first call
        expected = torch.cat([frozen(half) for half in images.chunk(2)])
    cosine = min(least_cosine(values, expected) for values in features)
    batch, losses = bench.draw_batch(bench.batches[1]), []
    for is_split in (False, True):
        trainee = Trainee(bench, bench.small, freeze_backbone=False)
        network = nn.DataParallel(trainee.backbone, device_ids=[0, 0]) if is_split else trainee.backbone
        losses.append([trainee.step(batch, network).item() for _ in range(3)])
    gap = np.abs(np.subtract(*losses)).max()
    figure = f"least cosine of frozen features {cosine:.6f}; losses of three steps of a trained one within {gap:.1e}"
    return judge(cosine > 0.9999 and gap < 0.05), figure


def sam2_in_bf16(bench: Bench) -> Verdict:
    """Draw masks with random weights in fp32 and in bf16: how far apart the logits are, and the IoUs that SAM-2 predicts."""
    sys.path.append(str(REPO / "tools"))
    import masks

    try:
        from sam2.build_sam import build_sam2
    except ImportError:
        return "skip", "sam2 is not installed"
    options = masks.MaskOptions(sam2_cfg=SAM2_CFG, sam2_ckpt=bench.folder / "sam2.pt")
    torch.save({"model": build_sam2(options.sam2_cfg, None, device="cpu").state_dict()}, options.sam2_ckpt)
    answers, rates = [], []
    dtypes = (torch.float32,) if bench.dry else (torch.float32, torch.bfloat16)  # which takes a CPU twice as long
    for dtype in dtypes:
        sam2 = masks.Sam2(options, lct.Runtime(bench.device, int(not bench.dry), dtype))
        crop = np.random.default_rng(0).integers(0, 256, (sam2.side, sam2.side, 3), dtype=np.uint8)
        answers.append(sam2.propose(crop))
        rates.append(0.0 if bench.dry else bench.measure_rate(functools.partial(sam2.propose, crop), 1))
    (scores, logits), (rounded_scores, rounded_logits) = answers[0], answers[-1]
    cosine = least_cosine(*(torch.from_numpy(values).flatten(1) for values in (logits, rounded_logits)))
    gap = float(np.abs(scores - rounded_scores).max())
    figure = f"{rates[-1]:.1f} crops/s, {rates[0]:.1f} in fp32; predicted IoU within {gap:.1e}, least cosine of logits {cosine:.4f}"
    return judge(gap < 0.05 and cosine > 0.98), figure


def data_wait(bench: Bench) -> Verdict:
    """Measure a frozen run that reads with all cores, in its last epoch: workers are up then, and crops decoded."""
    words = ("--model_id", bench.large, "--batch", bench.batches[2], "--workers", 0 if bench.dry else lct.count_cores())
    words += ("--balanced_per_class", "--samples_per_class", 5 * bench.per_class)
    pace = bench.train("data wait", *words)["pace"]
    is_fast = pace["images_per_s"] >= LEAST_IMAGES and pace["data_wait"] <= lct.MAX_DATA_WAIT
    figure = f"{pace['images_per_s']:,.0f} images/s, {pace['data_wait']:.1%} of the time without data"
    return bench.judge_speed(is_fast), figure


def out_of_memory(bench: Bench) -> Verdict:
    """Fine-tune with all images in one batch, whose activations take some 280 GB."""
    if bench.dry:
        return "skip", "a CPU has no such limit"
    words = ("--model_id", bench.large, "--epochs", 1, "--batch", 4096, "--val_batch", 64, "--no-freeze_backbone")
    code, text = bench.start("out of memory", *words)
    is_told = code == lct.EXIT_USER and "error: out of memory" in text
    return judge(is_told), f"exit code {code}, {error_line(text)}"


# --- whole runs that are compared


def deterministic_resume(bench: Bench) -> Verdict:
    """Stop and continue runs with --deterministic, and compare with runs that were left alone: the same bits, and no warning."""

    def interrupt(kind: str) -> tuple[int, float, bool]:
        name, words = f"{kind}, stopped", (*bench.exact, *TRAINED[kind])
        code, text = bench.start(name, *words, stops=True)
        bench.train(name, *words)
        return code, bench.compare(kind, name)[0], "deterministic implementation" in text

    kinds = list(TRAINED)[-1:] if bench.dry else list(TRAINED)  # torchrun compares with a run of the last, too
    with ThreadPoolExecutor(len(kinds)) as pool:
        answers = dict(zip(kinds, pool.map(interrupt, kinds), strict=True))
    shown = [
        f"{kind}: exit code {code}, then within {gap:.1e}, warned: {w}" for kind, (code, gap, w) in answers.items()
    ]
    return judge(all(answer == (143, 0, False) for answer in answers.values())), "; ".join(shown)


def torchrun(bench: Bench) -> Verdict:
    """Compare a fine-tuned run that torchrun has started as one process with a plain one."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    bench.train("torchrun", "--deterministic", *TRAINED["fine-tuned"], launcher=launcher)
    gap, cosine = bench.compare("fine-tuned", "torchrun")
    return judge(cosine > 0.99), f"within {gap:.1e} of a plain run, least cosine of embeddings {cosine:.6f}"


def compiled_run(bench: Bench) -> Verdict:
    """Do a whole run with a compiled backbone."""
    if bench.dry:
        return "skip", "takes minutes on a CPU"
    return "pass", f"loss {bench.train('compiled', '--compile')['train']['loss']:.3f}"


def fp16_overflow(bench: Bench) -> Verdict:
    """Fine-tune in fp16, with scaled gradients; and have activations overflow, as those of DINOv3 do: exit code 3 says so."""
    backbone = bench.build(bench.small)
    with torch.inference_mode():
        for name, weight in backbone.model.named_parameters():
            weight *= 1e7 if name.endswith("mlp.fc2.weight") else 1
        images = bench.draw_images(4)
        half, brain = (make_forward(backbone, dtype)(images) for dtype in (torch.float16, torch.bfloat16))
    overflows = bool(brain.isfinite().all()) and not half.isfinite().all()
    if bench.dry:
        return judge(overflows), "features overflow in fp16 and not in bf16; a CPU has no run in fp16"
    weights = bench.folder / "overflow.pth"
    torch.save(backbone.model.state_dict(), weights)
    words = ("--pretrained", "--backbone_weights", weights, "--epochs", 1, "--precision")
    bench.train("no overflow", *words, "bf16")
    code, text = bench.start("overflow", *words, "fp16")
    loss = bench.train("fp16", "--precision", "fp16", *TRAINED["fine-tuned"])["train"]["loss"]
    is_told = overflows and code == lct.EXIT_DIVERGED and "Traceback" not in text
    return judge(is_told), f"fine-tuned to loss {loss:.3f}; overflow: exit code {code}, {error_line(text)}; bf16 trains"


# --- the table

# fmt: off
MEASURED = [
    frozen_forward, fine_tuning, waits_a_step, features_against_the_cpu, cosines_against_the_cpu, compiled_forward, data_parallel,
    sam2_in_bf16, data_wait, out_of_memory,
]
COMPARED = [deterministic_resume, torchrun, compiled_run, fp16_overflow]
# fmt: on


def run_check(bench: Bench, check: Check) -> Verdict:
    """Run one check; return its verdict and its line."""
    started = time.monotonic()
    try:
        verdict, figure = check(bench)
    except Exception as error:
        traceback.print_exc()
        verdict, figure = "FAIL", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if bench.dry and verdict in ("pass", "info"):
        verdict = "dry"
    return verdict, f"{verdict:<4} {check.__name__}: {figure} ({time.monotonic() - started:.0f} s)"


def run_checks(bench: Bench, wanted: Sequence[str]) -> Iterator[Verdict]:
    """Yield verdict and line of each check: first those that measure, then the others side by side, as they end."""
    for check in MEASURED:
        if check.__name__ in wanted:
            yield run_check(bench, check)
            torch.cuda.empty_cache()
    with ThreadPoolExecutor(2 if bench.dry else 4) as pool:
        beside = [pool.submit(run_check, bench, check) for check in COMPARED if check.__name__ in wanted]
        yield from (future.result() for future in as_completed(beside))


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print a line a check, and return 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CHECK", help="only checks whose names contain one of these")
    parser.add_argument("--dry", action="store_true", help="run the logic on the CPU with a tiny model")
    options = parser.parse_args(argv)
    checks = [check.__name__ for check in MEASURED + COMPARED]
    wanted = [name for name in checks if any(word in name for word in options.words or [""])]
    if not wanted:
        parser.error(f"no such check; there are {', '.join(checks)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the logic on the CPU")
    if options.dry:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the runs
    bench, started, verdicts = Bench(options.dry, Path(tempfile.mkdtemp(prefix="gpu_"))), time.monotonic(), []
    name = "CPU"
    if not options.dry:
        name = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    print(f"{name}, {lct.count_cores()} cores, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    bench.draw_dataset()
    for verdict, line in run_checks(bench, wanted):
        verdicts.append(verdict)
        print(line, flush=True)
    if "nursery" in vars(bench):
        bench.nursery.close()
    has_failed = "FAIL" in verdicts
    if not has_failed:
        shutil.rmtree(bench.folder, ignore_errors=True)
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
    logs = f"; logs in {bench.folder}" if has_failed else ""
    print(f"{counts}, in {time.monotonic() - started:.0f} s{logs}", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
