"""A copy of a bundle that can explore: each variant has a posterior of small, independent weights.

Called by: `faults.py`, because the demo has no posterior. Calls: `slatewise_train/bundle_writer.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from slatewise.bundle.manifest import EXPLORE_GRAPH, POSTERIOR, read_manifest
from slatewise_train.bundle_writer import CALIBRATION, write_exploration
from slatewise_train.evaluation.calibration import read_calibrations
from slatewise_train.rankers import families
from slatewise_train.rankers.weights import load_model

DEVIATION = 0.01  # of each weight


def exploring_copy(source: Path, root: Path) -> None:
    """Copy the bundle to <root>/<ranker>/<version>. Raises ValueError if its family does not explore."""
    manifest = read_manifest(source)
    folder = root / manifest.ranker / str(manifest.version)
    shutil.copytree(source, folder)
    model = load_model(folder, manifest)
    features = families.features(model, torch.zeros(1, manifest.width)).shape[-1] + 1  # with the bias
    factors = np.tile(DEVIATION * np.eye(features, dtype=np.float32), (len(manifest.heads), 1, 1))
    content = json.loads((folder / "manifest.json").read_text())
    for variant in manifest.variants:
        place = folder / "variants" / variant
        write_exploration(place, model, read_calibrations(place / CALIBRATION), factors)
        for name in (EXPLORE_GRAPH, POSTERIOR):
            digest = hashlib.sha256((place / name).read_bytes()).hexdigest()
            content["files"][f"variants/{variant}/{name}"] = digest
    (folder / "manifest.json").write_text(json.dumps(content))
