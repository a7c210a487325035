"""Read label files back with the tools that they are for, and print what was found as JSON.

A script, not a test: datumaro and label_studio_sdk want older numpy, Pillow and OpenCV than the recogniser is used with, so they
live in an environment of their own (tests/readers.txt), whose interpreter runs this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_with_datumaro(path: str, file_format: str) -> list[dict]:
    """Return every object that datumaro finds: image, label name, box as x, y, width, height, attributes."""
    import datumaro

    dataset = datumaro.Dataset.import_from(path, file_format)
    names = [item.name for item in dataset.categories()[datumaro.AnnotationType.label].items]
    return [
        {"image": item.id, "label": names[found.label], "box": list(found.get_bbox()), "attributes": found.attributes}
        for item in dataset
        for found in item.annotations
    ]


def read_with_label_studio(path: str) -> list[dict]:
    """Return every region, once its task and prediction have passed the SDK's validation against our labelling interface."""
    from urllib.parse import unquote

    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((Path(path) / "config.xml").read_text(encoding="utf-8"))
    interface.validate()
    found = []
    for task in json.loads((Path(path) / "tasks.json").read_text(encoding="utf-8")):
        assert interface.validate_task({"data": task["data"]})
        (prediction,) = task["predictions"]
        errors = interface.validate_prediction(prediction, return_errors=True)
        assert not errors, errors
        for region in prediction["result"]:
            value, sides = region["value"], (region["original_width"], region["original_height"])
            shares = [value[key] / 100 for key in ("x", "y", "width", "height")]
            (label,) = value["rectanglelabels"]
            box = [share * side for share, side in zip(shares, sides * 2, strict=True)]
            found.append({"image": unquote(task["data"]["image"].split("?d=")[1]), "label": label, "box": box})
    return found


if __name__ == "__main__":
    reader, source = sys.argv[1:]
    answer = read_with_label_studio(source) if reader == "labelstudio" else read_with_datumaro(source, reader)
    print("\n" + json.dumps(answer))
