"""Write a finished run as one file for other programs: ONNX, which answers crops as PyTorch does, or safetensors, its weights."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lct_dino3 as lct  # before torch: it sets what torch reads when it is imported

# isort: split
import numpy as np
import torch
from torch import nn

TOLERANCE = 1e-4  # of cosines, between PyTorch and the exported file
OPSET = 18  # the oldest that torch exports to
MIN_ONNXRUNTIME = "1.14"  # the first that reads it
NUM_CROPS = 16  # real ones that an export is checked on


@dataclass(frozen=True)
class ExportOptions(lct.Options):
    """Write a finished run as one file for other programs, once it is known to answer as PyTorch does."""

    run: Path | None = lct.option(None, "out_dir of the finished run", "export", metavar="DIR", needed=True)
    format: str = lct.option("onnx", "what to write", "export", choices=("onnx", "safetensors"))
    out: Path | None = lct.option(
        None, "file to write (default: model.onnx or model.safetensors in the run)", "export", metavar="FILE"
    )
    data_root: Path | None = lct.option(
        None, "where the run's crops are now: an ONNX file is checked on some of them", "export", metavar="DIR"
    )
    backbone_weights: Path | None = lct.option(
        None,
        "weights of its frozen backbone, where they are no longer where the run found them",
        "export",
        metavar="FILE",
    )
    debug: bool = lct.same_option("debug")


class ExportedModel(nn.Module):
    """From crops fitted to a square to answers: normalisation, embedder, and the gallery's own matcher."""

    def __init__(self, run: lct.TrainedRun) -> None:
        super().__init__()
        self.recognizer = run.model
        self.fusion = run.gallery.fusion
        self.matcher = run.gallery.module
        self.temperature = run.gallery.temperature
        self.register_buffer("thresholds", torch.from_numpy(run.gallery.thresholds))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Answer images uint8 (N, H, W, 3 or 4).

        Returns:
            embeddings (N, D) unit norm, with the gallery's share of features; scores (N, C) similarity; probabilities (N, C);
            labels (N,), -1 for `unknown`.
        """
        features = self.recognizer.backbone(images.permute(0, 3, 1, 2))
        embeddings = self.fusion(features, self.recognizer.embed(features))
        scores = self.matcher(embeddings)
        best, labels = scores.max(dim=1)
        labels = torch.where(best >= self.thresholds[labels], labels, torch.full_like(labels, -1))
        return embeddings, scores, (scores / self.temperature).softmax(dim=1), labels


def export_onnx(run: lct.TrainedRun, path: Path, crops: np.ndarray) -> float:
    """Write the run as one ONNX file with dynamic batch, and return the largest cosine difference from PyTorch on real crops.

    Args:
        crops: uint8 (N, img_size, img_size, 3 or 4), as the transform of the run makes them.

    Raises:
        UserError: a package is missing, or the file answers otherwise than PyTorch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        remedy = "pip install onnx onnxscript onnxruntime"
        raise lct.UserError(f"needs the package {error.name}", "--format onnx", remedy) from error
    model = ExportedModel(run).cpu().eval()
    example = torch.from_numpy(crops[:2] if len(crops) > 1 else np.repeat(crops, 2, axis=0))
    names = ["embeddings", "scores", "probabilities", "labels"]
    for package in ("torch.onnx", "onnxscript"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=names,
        )
    meta = run.meta | {"classes": run.gallery.class_names, "thresholds": run.gallery.thresholds}
    meta["min_onnxruntime"] = MIN_ONNXRUNTIME
    proto = program.model_proto
    clear_notes(proto)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    onnx.helper.set_model_props(proto, {"lct_dino3": json.dumps(lct.to_json(meta), ensure_ascii=False)})
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    differences = []
    for batch in (crops, crops[:1]):  # the batch is dynamic
        with torch.inference_mode():
            embeddings, scores, *_ = (output.numpy() for output in model(torch.from_numpy(batch)))
        exported_embeddings, exported_scores, *_ = session.run(names, {"images": batch})
        differences.append(np.abs(exported_scores - scores).max())
        differences.append((1 - (exported_embeddings * embeddings).sum(axis=1)).max())
    difference = float(np.max(differences))
    if not difference <= TOLERANCE:  # NaN too
        reason = f"the file answers otherwise than PyTorch: cosines differ by {difference:.2g}"
        raise lct.UserError(reason, str(path), "try --format safetensors, and tell us model_id and versions")
    lct.write_bytes(path, data)
    return difference


def clear_notes(message: Any) -> None:
    """Take out of a protobuf what torch notes of its work: stack traces among it, with paths of this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                clear_notes(part)


def export_safetensors(run: lct.TrainedRun, path: Path) -> None:
    """Write all weights of the run, backbone included, with the metadata that rebuilding needs, and read them back.

    Raises:
        UserError: the bytes do not read back as the weights.
    """
    from safetensors.torch import load, save

    weights = {key: value.detach().cpu().contiguous() for key, value in run.model.state_dict().items()}
    arguments = {"model_name": lct.split_model_id(run.config.model_id)[0], **lct.probe_model(run.config)[0]}
    meta = run.meta | {"classes": run.gallery.class_names, "options": run.config.as_plain(), "timm": arguments}
    data = save(weights, metadata={"lct_dino3": json.dumps(lct.to_json(meta), ensure_ascii=False)})
    again = load(data)
    if again.keys() != weights.keys() or not all(torch.equal(again[key], weights[key]) for key in weights):
        raise lct.UserError("what was written is not what is read", str(path), "try again")
    lct.write_bytes(path, data)


def load_crops(run: lct.TrainedRun, data_root: Path) -> np.ndarray:
    """Return some of the gallery's own crops as the model sees them, uint8 (n, img_size, img_size, 3 or 4).

    Raises:
        UserError: none of them is there.
    """
    paths = run.gallery.stack_paths
    transform = run.transform()
    crops = []
    for index in np.linspace(0, len(paths) - 1, min(len(paths), NUM_CROPS)).astype(int).tolist():
        with contextlib.suppress(lct.ImageError):
            crops.append(transform(lct.load_image(data_root / paths[index], run.config.image_bits), None, 0))
    if not crops:
        reason = f"none of the run's crops is left in {run.config.data_root} to check the file with"
        raise lct.UserError(reason, f"--run {run.path}", "give --data_root DIR, where they are now")
    return np.stack(crops)


def export_run(options: ExportOptions) -> None:
    """Write a finished run as one file for other programs, once it is known to answer as PyTorch does."""
    lct.check_run_paths(options)
    run = lct.load_run(options.run, lct.make_runtime(0, "fp32"), options.backbone_weights)
    lct.merge_lora(run.model.backbone.model)
    path = options.out or run.path / f"model.{options.format}"
    if path.is_dir():
        raise lct.UserError("is a folder", f"--out {path}", "give the path of a file")
    lct.create_out_dir(path.absolute().parent, "--out")
    if options.format == "onnx":
        difference = export_onnx(run, path, load_crops(run, options.data_root or run.config.data_root))
        lct.show(f"checked on real crops: cosines differ from PyTorch by {difference:.1g} at most")
        lct.show(f"read by onnxruntime {MIN_ONNXRUNTIME} and newer (opset {OPSET})")
    else:
        export_safetensors(run, path)
    if transforms := lct.production_transforms(run.config):
        lct.show(f"warning: a crop must go through these before it is fitted: {json.dumps(transforms)}")
    lct.show(f"written: {path}, {path.stat().st_size:,} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says, and return the exit code."""
    return lct.run_program("export", ExportOptions, export_run, argv)


if __name__ == "__main__":
    lct.exit_process(main())
