"""The description of one ranker: the public part of its manifest, with the limits of requests.

Called by: `http/models.py` and `local/ranker.py`.
"""

from __future__ import annotations

from slatewise.bundle.ranker import Ranker
from slatewise.ranking.admission import RequestLimits
from slatewise.schemas import Limits, ModelCard


def model_card(ranker: Ranker, limits: RequestLimits) -> ModelCard:
    manifest = ranker.manifest
    return ModelCard(
        name=ranker.name,
        version=manifest.version,
        trained_on=manifest.trained_on,
        heads=manifest.heads,
        exits=manifest.exits,
        default_exit=manifest.default_exit,
        default_variant=ranker.default_variant,
        set_wise="set" in manifest.exits,
        actions=manifest.actions,
        features=manifest.features,
        fields={name: field.values for name, field in manifest.fields.items()},
        limits=Limits(
            max_candidates=limits.max_candidates,
            max_history=limits.max_history,
            history_used=manifest.limits.history_used,
            set_wise=manifest.limits.set_wise,
        ),
        variants={name: manifest.variants[name].model_dump(exclude={"golden_scores"}) for name in ranker.engines},
        refused_variants=ranker.refused,
        verdict=manifest.verdict,
        report=ranker.report,
        example=manifest.example | {"ranker": ranker.name},  # accepted beside other rankers too
    )
