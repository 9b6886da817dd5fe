"""The labelled images of a validation: the bundle's own sample, or a data set that is at hand."""

from __future__ import annotations

import hashlib

import numpy as np

from resq_deploy import data
from resq_deploy.bundle import Bundle, Sample
from resq_deploy.errors import DataError


def labelled(bundle: Bundle, spec: str | None) -> Sample:
    """The bundle's evaluation sample, or (given a spec, see data.load) the test split of that data set.

    Raises DataError where the data do not fit the bundle's input or classes.
    """
    if spec is None:
        return bundle.eval_sample()
    found = data.load(spec, "test", shape=bundle.manifest.input.shape)
    classes = len(bundle.manifest.classes)
    if len(found.classes) > classes:
        raise DataError(
            f"{spec} has {len(found.classes)} classes, the bundle {classes}", "give its own data"
        )
    indices = np.arange(len(found), dtype=np.int64)
    images, labels = found.batch(indices)
    return Sample(images, labels, indices)


def images_key(sample: Sample) -> str:
    """sha256 (hex) of places, labels and images: equal keys of two samples say that they are the same images."""
    sha = hashlib.sha256(np.ascontiguousarray(sample.indices).tobytes())
    sha.update(sample_digest(sample).encode())
    return sha.hexdigest()


def sample_digest(sample: Sample) -> str:
    """sha256 (hex) of images and labels: what a journal knows its images by."""
    sha = hashlib.sha256(np.ascontiguousarray(sample.images).tobytes())
    sha.update(np.ascontiguousarray(sample.labels).tobytes())
    return sha.hexdigest()
