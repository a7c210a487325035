"""What the levers that are not exact do to accuracy: paired seeds on real data, each against the exact run of the same seed.

    python tests/benchmarks/quality.py [seeds [data set ...]]
    python tests/benchmarks/quality.py sizes FILE    # weights of tf_efficientnet_lite0
    python tests/benchmarks/quality.py strangers FILE

Every image is embedded once in 15 augmented views and clean, in fp32 and in bf16; all runs draw from these, so that a run is head
training alone and many seeds can be had. The seed draws split, order, weights of the head, and which views are the cached ones.
Accuracy is that of prototype matching on a test split of 30 %. A data set of 1,500 images takes 5 CPU minutes to embed, and each
run a second. Data and ImageNet weights (mobilenetv2_035) lie beside the repository, in shared/data.

`sizes` compares prototype matching at 160, 224 and 288 px, on the default split with four cached views and features in the match,
with logistic regression whose C is chosen on val: fitted on clean views, and on all.

`strangers` trains whole runs without a fifth of the classes, whose images are then the unknown objects, and prints what thresholds
are worth on test images and on these, by the share of unknown objects that they allow for and by the source of their scores.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
GROUPS = {"tools17": r"^(src\d+)_", "grocery40": None}
SPLIT = (0.5, 0.2, 0.3)
EXACT = "fresh views, fp32"
ARMS = {  # type of the backbone's forward; how many cached views, None = another view each epoch
    EXACT: (torch.float32, None),
    "fresh views, bf16": (torch.bfloat16, None),
    "--cache_views 1": (torch.float32, 1),
    "--cache_views 4": (torch.float32, 4),
    "--cache_views 8": (torch.float32, 8),
    "--cache_views 4, bf16": (torch.bfloat16, 4),
}

sys.path.insert(0, str(ROOT))
import lct_dino3 as lct

CPU = lct.Runtime(torch.device("cpu"), 0, torch.float32)


class Subject:
    """A data set whose images are embedded in every view: features[dtype] is float32 (1 + views, N, D), number 0 clean."""

    def __init__(
        self, name: str, num_views: int = 15, dtypes: tuple = (torch.float32, torch.bfloat16), **options
    ) -> None:
        half = (0.5, 0.5, 0.5)
        weights = SHARED / "weights" / "mobilenetv2_035.timm.pth"
        small = {"model_id": "mobilenetv2_035", "backbone_weights": weights, "mean": half, "std": half, "img_size": 160}
        self.config = lct.Config(
            data_root=SHARED / name, out_dir=Path(tempfile.gettempdir()) / "no_run", group_regex=GROUPS[name],
            workers=1, **(options or small),
        )  # fmt: skip
        self.dtypes = dtypes
        self.name, self.records = name, lct.scan_dataset(self.config).records
        self.backbone, self.info = lct.build_backbone(self.config, print)
        self.backbone.freeze()
        lct.keep_freed_memory()
        views = [self._embed(number) for number in range(num_views + 1)]
        self.features = {dtype: np.stack([view[dtype] for view in views]) for dtype in views[0]}

    def _embed(self, number: int) -> dict[torch.dtype, np.ndarray]:
        transform = lct.build_transform(self.config.img_size, number > 0)
        dataset = lct.CropDataset(self.records, transform)
        keys = [lct.SampleKey(row, (0, 3, number, row, 0), 0) for row in range(len(self.records.paths))]
        found = {dtype: [] for dtype in self.dtypes}
        with torch.inference_mode():
            for batch in lct.make_loader(dataset, lct.cut_batches(keys, 64), self.config, CPU):
                for dtype, parts in found.items():
                    self.backbone.dtype = dtype
                    parts.append(self.backbone(batch.images).numpy())
        return {dtype: np.concatenate(parts) for dtype, parts in found.items()}

    def split(self, seed: int, parts: tuple[float, float, float]) -> lct.Records:
        splits = lct.assign_splits(self.records.labels, self.records.groups, parts, seed)
        return dataclasses.replace(self.records, splits=splits)

    def run(self, seed: int, dtype: torch.dtype, num_cached: int | None) -> float:
        """Train a head as `fit` does, and return the accuracy of prototype matching on test."""
        config, records = dataclasses.replace(self.config, seed=seed), self.split(seed, SPLIT)
        model = self.train(config, records, dtype, num_cached)
        return self._score(config, records, model, self.features[dtype][0])

    def train(
        self, config: lct.Config, records: lct.Records, dtype: torch.dtype, num_cached: int | None
    ) -> lct.Recognizer:
        seed = config.seed
        model = lct.build_recognizer(config, len(records.class_names), self.backbone, self.info)
        state = lct.start_state(model, config, CPU)
        sampler = lct.EpochSampler(records.rows("train"), records.labels, config)
        order = 1 + np.random.default_rng((seed, 99)).permutation(len(self.features[dtype]) - 1)
        for epoch in range(config.epochs):
            sampler.start_at(epoch, 0)
            model.train()
            for keys in sampler:
                rows = np.array([key.row for key in keys])
                if num_cached is None:
                    features = self.features[dtype][order[epoch], rows]
                else:
                    turns = np.concatenate([[0], order[:num_cached]])[(rows + epoch) % (num_cached + 1)]
                    features = self.features[dtype][turns, rows].astype(np.float16).astype(np.float32)
                labels = torch.from_numpy(records.labels[rows].astype(np.int64))
                batch = lct.Batch(torch.from_numpy(features), labels, torch.from_numpy(rows), None, [])
                lct.set_learning_rate(state.optimizer, lct.lr_factor(config, state.step, len(sampler) * config.epochs))
                lct.train_step(config, CPU, torch.nn.Identity(), state, [batch])
        return model.eval()

    def _score(self, config: lct.Config, records: lct.Records, model: lct.Recognizer, clean: np.ndarray) -> float:
        with torch.inference_mode():
            values = model.embed(torch.from_numpy(clean)).numpy()
        every = np.arange(len(values))
        embedded = lct.Embedded(every, np.zeros(len(values), np.uint8), records.labels.astype(np.int64), values)
        train, val, test = (embedded.take(records.rows(split)) for split in lct.SPLIT_NAMES)
        gallery = lct.build_gallery(records, train, val, config)
        return float((gallery.scores(test.values).argmax(axis=1) == test.labels).mean())


def compare(name: str, seeds: int) -> dict[str, tuple[float, float]]:
    """Print and return of each arm the mean difference to the exact one in points, and its standard error."""
    subject = Subject(name)
    found = {arm: [subject.run(seed, *how) for seed in range(1, seeds + 1)] for arm, how in ARMS.items()}
    print(f"{name}, {seeds} paired seeds, {EXACT}: accuracy on test {statistics.mean(found[EXACT]):.3f}")
    rows = {}
    for arm, accuracies in found.items():
        gains = [100 * (own - exact) for own, exact in zip(accuracies, found[EXACT], strict=True)]
        rows[arm] = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
        each = " ".join(f"{gain:+.1f}" for gain in gains)
        print(f"  {arm:<22}{rows[arm][0]:+6.2f} points, standard error {rows[arm][1]:.2f}   ({each})", flush=True)
    return rows


def compare_sizes(name: str, weights: Path, num_seeds: int = 5) -> None:
    """Print the accuracy of matching and of logistic regression on test by size of the input, means of seeds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def regress(values: np.ndarray, labels: np.ndarray, val: lct.Embedded, test: lct.Embedded) -> float:
        fitted = [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(values, labels)
            for c in (0.001, 0.01, 0.1, 1.0)
        ]
        best = max(fitted, key=lambda classifier: classifier.score(val.values, val.labels))
        return best.score(test.values, test.labels)

    for size in (160, 224, 288):
        model = {"model_id": "tf_efficientnet_lite0", "backbone_weights": weights, "img_size": size}
        subject = Subject(name, 4, (torch.float32,), **model)
        views = subject.features[torch.float32]
        found = []
        for seed in range(1, num_seeds + 1):
            config, records = dataclasses.replace(subject.config, seed=seed), subject.split(seed, (0.7, 0.2, 0.1))
            every = np.arange(len(records.labels))
            clean = lct.Embedded(every, np.zeros(len(every), np.uint8), records.labels.astype(np.int64), views[0])
            features = {split: clean.take(records.rows(split)) for split in lct.SPLIT_NAMES}
            head = subject.train(config, records, torch.float32, 4)
            gallery, vectors = lct.export_gallery(head, records, features, config, {})
            matched = gallery.answer(vectors["test"].values)[0] == vectors["test"].labels
            train, val, test = features.values()
            of_all = views[:, records.rows("train")].reshape(-1, views.shape[2])
            regressions = [
                regress(train.values, train.labels, val, test),
                regress(of_all, np.tile(train.labels, len(views)), val, test),
            ]
            found.append([matched.mean(), *regressions])
        found = np.array(found)
        gains = 100 * (found[:, :1] - found[:, 1:])
        errors = gains.std(axis=0, ddof=1) / num_seeds**0.5
        print(
            f"{name}, {size} px: matching {found[:, 0].mean():.3f}; logistic regression, clean {found[:, 1].mean():.3f}"
            f" ({gains[:, 0].mean():+.1f} ± {errors[0]:.1f}), on all views {found[:, 2].mean():.3f}"
            f" ({gains[:, 1].mean():+.1f} ± {errors[1]:.1f})",
            flush=True,
        )


def judge_thresholds(name: str, weights: Path, num_seeds: int = 4) -> None:
    """Print coverage, share of strangers that pass, and precision in a mix of both: means of runs by kind of threshold."""
    names = sorted(path.name for path in (SHARED / name).iterdir() if path.is_dir())
    found: dict[tuple, list[tuple[float, ...]]] = {}
    for seed in range(1, num_seeds + 1):
        left_out = sorted(np.random.default_rng(seed).choice(names, len(names) // 5, replace=False).tolist())
        with tempfile.TemporaryDirectory() as folder:
            class_map, unknown_dir = Path(folder) / "map.yaml", Path(folder) / "unknown"
            class_map.write_text(f"null: [{', '.join(left_out)}]\n")
            unknown_dir.mkdir()
            for class_name in left_out:
                (unknown_dir / class_name).symlink_to(SHARED / name / class_name)
            command = f"--model_id tf_efficientnet_lite0 --img_size 160 --gpus 0 --seed {seed}".split()
            command += ["--data_root", SHARED / name, "--class_map", class_map, "--out_dir", Path(folder) / "run"]
            command += ["--backbone_weights", weights, *(["--group_regex", GROUPS[name]] if GROUPS[name] else [])]
            subprocess.run([sys.executable, ROOT / lct.SCRIPT_NAME, *command], check=True, stdout=subprocess.DEVNULL)
            run = lct.load_run(Path(folder) / "run", CPU)
            options = lct.RunOptions(run=run.path)
            records, strangers = lct.scan_run_data(run, run.config), lct.unknown_records(unknown_dir, run.config)
            val, test = (
                lct.embed_records(run, records, records.rows(split), options, run.embed) for split in ("val", "test")
            )
            given, judged = (
                lct.embed_records(run, strangers, strangers.rows(split), options, run.embed)
                for split in ("val", "test")
            )
        judged = judged._replace(rows=judged.rows + len(records.paths))
        groups = np.append(records.groups, records.groups.max() + 1 + strangers.groups)
        for target, share, source in (
            *((target, share, "heads") for target in (0.95, 0.9) for share in (0.0, 0.05, 0.1, 0.2)),
            *((0.95, 0.2, source) for source in ("--unknown_dir", "classes out of the gallery")),
        ):
            config = dataclasses.replace(run.config, target_precision=target, unknown_share=share)
            vectors = given.values if source == "--unknown_dir" else None
            unseen = run.unseen if source == "heads" else {}
            gallery = lct.calibrate(run.gallery, val, config, vectors, unseen, torch.float32)
            figures = lct.measure_gallery(gallery, test, groups, judged)
            passed, coverage = figures["unknown_passed"]["value"], figures["thresholds"]["coverage"]["value"]
            right = coverage * (figures["thresholds"]["precision"]["value"] or 0.0)
            precisions = [(1 - mix) * right / ((1 - mix) * coverage + mix * passed) for mix in (share, 0.2)]
            found.setdefault((target, share, source), []).append((coverage, passed, *precisions))
    for (target, share, source), rows in found.items():
        coverage, passed, own, fifth = np.mean(rows, axis=0)
        print(
            f"{name}, {target:.0%} asked, {share:.0%} unknown ({source}): {coverage:.3f} of the known and {passed:.3f} of the"
            f" unknown get a class; right {own:.3f} at that share, {fifth:.3f} at 20 %",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["strangers"]:
        for data in GROUPS:
            judge_thresholds(data, Path(sys.argv[2]))
        sys.exit()
    if sys.argv[1:2] == ["sizes"]:
        for data in GROUPS:
            compare_sizes(data, Path(sys.argv[2]))
        sys.exit()
    for data in sys.argv[2:] or GROUPS:
        compare(data, int(sys.argv[1]) if len(sys.argv) > 1 else 8)
