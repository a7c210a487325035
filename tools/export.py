"""Export a finished run: ONNX that answers crops as PyTorch does, the weights as safetensors, or the files of lct-dino-3.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lct_dino3 as lct  # before torch, because it sets variables that torch reads on import

# isort: split
import numpy as np
import torch
from torch import nn

TOLERANCE = 1e-4  # largest difference of cosines between PyTorch and the exported file
# Bytes of the metadata key in each format, by which an earlier export is recognised.
EXPORT_MARKS = {"onnx": b"\n\tlct_dino3\x12", "safetensors": b'{"__metadata__":{"lct_dino3":'}
MAX_ONNX_BYTES = 2_000_000_000  # of weights: a protobuf, and so an ONNX file, has less than 2 GiB
OPSET = 18  # the oldest that torch exports
MIN_ONNXRUNTIME = "1.14"  # the first that reads OPSET
NUM_CROPS = 32  # most references that an export is checked on
OUTPUT_NAMES = ["embeddings", "scores", "probability", "labels"]  # of the ONNX file


@dataclass(frozen=True)
class ExportOptions(lct.Options):
    """Write a finished run for other programs, once it is known to answer as PyTorch does."""

    starts_anew: ClassVar[bool] = True
    # fmt: off
    run: Path | None = lct.option(None, "out_dir of the finished run", "export", metavar="DIR", needed=True, folder=True)
    format: str = lct.option("onnx", "what to write", "export", choices=("onnx", "safetensors", "predecessor"))
    out: Path | None = lct.option(None,
        "file to write, or folder for predecessor (default: model.onnx, model.safetensors, predecessor/ in the run)",
        "export", metavar="PATH")
    data_root: Path | None = lct.option(None, "where the run's crops are now: an ONNX file is checked on some of them",
        "export", metavar="DIR", folder=lct.DATA_TREE)
    backbone_weights: Path | None = lct.option(None, "weights of its frozen backbone, if the run does not find them any more",
        "export", metavar="FILE", file=True)
    # fmt: on
    debug: bool = lct.same_option("debug")


class ExportedModel(nn.Module):
    """Recognises square crops: normalisation, backbone, embedder, and the gallery's matcher and thresholds."""

    def __init__(self, run: lct.TrainedRun) -> None:
        super().__init__()
        self.recognizer = run.model
        self.fusion = run.gallery.fusion
        self.matcher = run.gallery.module
        self.register_buffer("thresholds", torch.from_numpy(run.gallery.thresholds))
        self.register_buffer("log_odds", torch.from_numpy(run.gallery.log_odds).float())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Answer images uint8 (N, H, W, 3 or 4).

        Returns:
            embeddings (N, D) unit norm, fused with features as in the gallery; scores (N, C) similarity; probability (N,) that the
            best class is right; labels (N,), -1 for `unknown`.
        """
        features = self.recognizer.backbone(images.permute(0, 3, 1, 2))
        embeddings = self.fusion(features, self.recognizer.embed(features))
        scores = self.matcher(embeddings)
        best, labels = scores.max(dim=1)
        slope, intercept = self.log_odds[labels].unbind(dim=1)
        labels = torch.where(best >= self.thresholds[labels], labels, torch.full_like(labels, -1))
        return embeddings, scores, torch.sigmoid(slope * best + intercept), labels


class References(NamedTuple):
    """References of the gallery, and their crops."""

    positions: np.ndarray  # (n,) int64, rows of `Gallery.stacks`
    crops: np.ndarray  # uint8 (n, img_size, img_size, 3 or 4), as the model sees them


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says, and return the exit code."""
    return lct.run_program("export", ExportOptions, export_run, argv)


def export_run(options: ExportOptions) -> None:
    """Load a finished run and write it in the chosen format."""
    path = check_output_path(options)
    run = lct.load_run(options.run, lct.make_runtime(0, "fp32"), options.backbone_weights)
    lct.merge_lora(run.model.backbone.model)
    if options.format == "predecessor":
        export_predecessor(run, path)
        lct.show(f"written: {path / lct.BEST_NAME}, {path / 'prototypes.npz'}")
        return
    lct.create_out_dir(path.absolute().parent, "--out")
    if options.format == "onnx":
        checks = export_onnx(run, path, load_references(run, options.data_root or run.config.data_root))
        lct.show(format_checks(checks, run, options))
        lct.show(f"read by onnxruntime {MIN_ONNXRUNTIME} and newer (opset {OPSET})")
    else:
        export_safetensors(run, path)
    if transforms := lct.production_transforms(run.config):
        lct.show(f"warning: a crop must go through these before it is fitted: {json.dumps(transforms)}")
    lct.show(f"written: {path}, {path.stat().st_size:,} bytes")


def check_output_path(options: ExportOptions) -> Path:
    """Return the file to write, or the folder of the predecessor's files.

    Raises UserError if a file there is no earlier export, if a folder given for the predecessor is not empty, or if --out lies
    among crops or in a run.
    """
    is_folder = options.format == "predecessor"
    path = default_path = options.run / ("predecessor" if is_folder else f"model.{options.format}")
    if options.out is not None and options.out.resolve() != default_path.resolve():
        path = options.out
        data_root = options.data_root or lct.read_run_config(options.run).data_root
        lct.check_outside(path, options.describe("out"), {"data_root": data_root})
    if is_folder and path != default_path and path.exists() and (not path.is_dir() or lct.visible_entries(path)):
        raise lct.UserError("is no empty folder", f"--out {path}", "choose a new one")
    if path.is_dir() and not is_folder:
        raise lct.UserError("is a folder", f"--out {path}", "give the path of a file")
    if not is_folder:
        lct.check_replaceable(path, f"--out {path}", EXPORT_MARKS[options.format])
    parent = lct.existing_folder(path.absolute().parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise lct.UserError("cannot be written to", str(parent), "give --out FILE elsewhere")
    return path


def export_predecessor(run: lct.TrainedRun, folder: Path) -> None:
    """Write checkpoint_best.pth and prototypes.npz into a folder as lct-dino-3.py does, for the programs that read its runs.

    The vectors hold the embedding only, without the features that a gallery may append. Raises UserError if its network cannot be
    that of the run.
    """
    config = run.config
    defaults = run.model.backbone.model.pretrained_cfg
    is_usual = [run.info.mean, run.info.std] == [tuple(defaults[key]) for key in ("mean", "std")]
    # Its EmbedNet is a timm model of three channels, normalised as timm does, whose class token goes through one head.
    needs = (
        (lct.count_heads(config) == 1, f"has {lct.count_heads(config)} heads side by side", "--heads 1"),
        (run.info.pool == "token", f"pools by {run.info.pool}", "--pool token, with a ViT"),
        (config.in_channels == 3, f"sees {config.in_channels} channels", "--in_channels 3"),
        (is_usual, f"normalises by mean {run.info.mean} and deviation {run.info.std}", "neither --mean nor --std"),
    )
    for is_met, problem, flag in needs:
        if not is_met:
            raise lct.UserError(f"{problem}, which lct-dino-3.py does not", f"--run {run.path}", f"train with {flag}")
    names = run.gallery.class_names
    label_of = {name: label for label, name in enumerate(names)}
    layer_index = {"hidden": "0", "norm": "1", "output": "3"}  # index of each layer in EmbedNet's head
    weights = {f"backbone.{key}": value for key, value in run.model.backbone.model.state_dict().items()}
    for key, value in run.model.head.state_dict().items():
        layer, _, kind = key.partition(".")
        weights[f"head.{layer_index[layer]}.{kind}"] = value[:, :, 0] if value.ndim == 3 else value
    stacks, centroids = (
        nn.functional.normalize(torch.from_numpy(vectors[:, : config.emb_dim])).numpy()
        for vectors in (run.gallery.stacks, run.gallery.centroids)
    )
    payload = {
        "model": weights,
        "arc": {"W": torch.from_numpy(centroids)},  # class directions, in place of ArcFace's weights
        "cls2id": label_of,
        "model_name": config.model_id,
        "emb_dim": config.emb_dim,
        "img_size": config.img_size,
        "freeze_backbone": config.freeze_backbone,
        "data_cfg": {"input_size": (3, config.img_size, config.img_size), "mean": run.info.mean, "std": run.info.std},
    }
    stacks_by_class = {name: stacks[run.gallery.stack_labels == label] for name, label in label_of.items()}
    filled = {name: rows for name, rows in stacks_by_class.items() if len(rows)}
    tables = {"centroids": {name: centroids[label_of[name]] for name in filled}, "stacks": filled}
    lct.create_out_dir(folder, "--out")
    with lct.SIGNALS.hold():
        with lct.atomic_file(folder / lct.BEST_NAME) as file:
            torch.save(payload, file)
        with lct.atomic_file(folder / "prototypes.npz") as file:
            np.savez_compressed(file, **tables, cls2id=label_of, id2cls=dict(enumerate(names)))


def export_onnx(run: lct.TrainedRun, path: Path, references: References) -> dict[str, float]:
    """Write the run as one ONNX file with dynamic batch; return its difference from PyTorch and the figures of `compare_stored`.

    Raises UserError if a package is missing, or if the file differs from PyTorch by more than TOLERANCE.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        remedy = "pip install onnx onnxscript onnxruntime"
        raise lct.UserError(f"needs the package {error.name}", "--format onnx", remedy) from error
    model = ExportedModel(run).cpu().eval()
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > MAX_ONNX_BYTES:
        problem = f"has {num_bytes:,} bytes of weights, more than one ONNX file holds"
        raise lct.UserError(problem, f"--run {run.path}", "give --format safetensors")
    crops = references.crops
    example = torch.from_numpy(crops[:2] if len(crops) > 1 else np.repeat(crops, 2, axis=0))
    for package in ("torch.onnx", "onnxscript"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch's exporter warns about its own code
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=OUTPUT_NAMES,
        )
    proto = program.model_proto
    clear_metadata(proto)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    differences = []
    for batch in (crops[:1], crops):  # two batch sizes, as it is dynamic
        with torch.inference_mode():
            embeddings, scores, *_ = (output.numpy() for output in model(torch.from_numpy(batch)))
        exported_embeddings, exported_scores, *_ = session.run(OUTPUT_NAMES, {"images": batch})
        differences.append(np.abs(exported_scores - scores).max())
        differences.append((1 - (exported_embeddings * embeddings).sum(axis=1)).max())
    difference = float(np.max(differences))
    if not difference <= TOLERANCE:  # also if NaN
        reason = f"the file answers otherwise than PyTorch: cosines differ by {difference:.2g}"
        raise lct.UserError(reason, str(path), "try --format safetensors, and tell us model_id and versions")
    checks = {"difference": difference, **compare_stored(run.gallery, references.positions, exported_embeddings)}
    meta = run.meta | {"classes": run.gallery.class_names, "thresholds": run.gallery.thresholds}
    meta |= {"min_onnxruntime": MIN_ONNXRUNTIME, "checks": checks}
    onnx.helper.set_model_props(proto, {"lct_dino3": json.dumps(lct.to_json(meta), ensure_ascii=False)})
    lct.write_bytes(path, proto.SerializeToString())
    return checks


def clear_metadata(message: Any) -> None:
    """Remove torch's notes from a protobuf, recursively: they contain stack traces with paths of this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type:
            for child in [value] if hasattr(value, "ListFields") else value:
                clear_metadata(child)


def compare_stored(gallery: lct.Gallery, positions: np.ndarray, embeddings: np.ndarray) -> dict[str, float]:
    """Compare references as stored in the gallery, `positions` (n,), with `embeddings` (n, D) of their crops from an exported file.

    Returns:
        references n; mean_cosine and least_cosine of the pairs; changed_answers, including to or from `unknown`, of a gallery
        without these references, so that none matches itself.
    """
    stored = gallery.stacks[positions]
    cosines = (stored * embeddings).sum(axis=1)
    rows = np.delete(np.arange(len(gallery.stacks)), positions)
    reduced = dataclasses.replace(gallery, stacks=gallery.stacks[rows], stack_labels=gallery.stack_labels[rows])
    answers = []
    for queries in (stored, embeddings):
        labels, best = reduced.answer(queries)
        answers.append(np.where(best >= gallery.thresholds[labels], labels, -1))
    figures = {"references": len(positions), "mean_cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}
    return figures | {"changed_answers": int((answers[0] != answers[1]).sum())}


def load_references(run: lct.TrainedRun, data_root: Path) -> References:
    """Return half of the gallery's references, NUM_CROPS at most, in the views that they were embedded in.

    Raises UserError if none of their crops can be read.
    """
    gallery = run.gallery
    views = gallery.stack_views.tolist()
    # Not masked views of enrolled crops (absolute paths): their masks are not where those of the training data are.
    usable = [row for row, path in enumerate(gallery.stack_paths) if not (views[row] and Path(path).is_absolute())]
    count = min(NUM_CROPS, -(-len(usable) // 2))
    positions = [usable[index] for index in np.linspace(0, len(usable) - 1, count).astype(int)]
    config = dataclasses.replace(run.config, data_root=data_root)
    paths = [gallery.stack_paths[position] for position in positions]
    choices, _ = lct.find_masks(config, paths)
    masks = [next(iter(choices[path]), path) for path in paths]
    tables = [np.array(column, dtype=lct.STRINGS) for column in (paths, masks)]
    zeros = np.zeros(len(paths), np.int32)
    records = lct.Records(
        data_root, ("reference",), tables[0], zeros, zeros, zeros, config.masks_dirname, config.image_bits, tables[1]
    )
    dataset = lct.CropDataset(records, run.transform())
    crops = [dataset[lct.SampleKey(row, (), views[position])][0] for row, position in enumerate(positions)]
    readable = [index for index, crop in enumerate(crops) if crop is not None]
    if not readable:
        reason = f"none of the run's crops is left in {data_root} to check the file with"
        raise lct.UserError(reason, f"--run {run.path}", "give --data_root DIR, where they are now")
    return References(np.array(positions)[readable], np.stack([crops[index] for index in readable]))


def format_checks(checks: dict[str, float], run: lct.TrainedRun, options: ExportOptions) -> str:
    """Return a line on how far a file is from PyTorch and from the gallery, and a warning with a remedy if the gallery differs."""
    cosines = f"mean cosine {checks['mean_cosine']:.4f}, least {checks['least_cosine']:.4f}"
    text = f"checked on {checks['references']} references: cosines differ from PyTorch by {checks['difference']:.1g} at most; with"
    text += f" what the gallery has stored, {cosines}, {checks['changed_answers']} of their answers change"
    precision = run.meta.get("precision", "float32")
    if precision == "float32" and checks["least_cosine"] > 1 - TOLERANCE:
        return text
    cause = f"it was embedded in {precision}" if precision != "float32" else "they have changed"
    flags = lct.format_flags(options, ("run", "data_root"))
    remedy = shlex.join(["python", lct.SCRIPT_NAME, "prototypes", *flags, "--precision", "fp32"])
    return f"{text}\nwarning: the gallery is not what the file makes of its crops: {cause}; {remedy} makes it anew"


def export_safetensors(run: lct.TrainedRun, path: Path) -> None:
    """Write all weights of the run, backbone included, with the metadata that rebuilding the model needs.

    Raises UserError if the bytes do not read back as the same weights.
    """
    from safetensors.torch import load, save

    weights = {key: value.detach().cpu().contiguous() for key, value in run.model.state_dict().items()}
    arguments = {"model_name": lct.split_model_id(run.config.model_id)[0], **lct.probe_model(run.config)[0]}
    # Without paths of this machine.
    options = {
        name: value for name, value in run.config.as_plain().items() if not isinstance(getattr(run.config, name), Path)
    }
    meta = run.meta | {"classes": run.gallery.class_names, "options": options, "timm": arguments}
    data = save(weights, metadata={"lct_dino3": json.dumps(lct.to_json(meta), ensure_ascii=False)})
    read_back = load(data)
    if read_back.keys() != weights.keys() or not all(torch.equal(read_back[key], weights[key]) for key in weights):
        raise lct.UserError("what was written is not what is read", str(path), "try again")
    lct.write_bytes(path, data)


if __name__ == "__main__":
    lct.exit_process(main())
