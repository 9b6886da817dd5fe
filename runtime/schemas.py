"""The JSON schemas of the files that resq-deploy writes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from resq_deploy.manifest import Manifest
from resq_deploy.report.model import Report
from resq_deploy.runtime.plan import PlanMap

_MODELS: dict[str, type[BaseModel]] = {"manifest": Manifest, "report": Report, "weights": PlanMap}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(which: str) -> dict[str, Any]:
    """The schema of a bundle's `manifest`, of a `report`, or of a plan's `weights` map; JSON Schema 2020-12."""
    return {"$schema": DRAFT, **_MODELS[which].model_json_schema()}
