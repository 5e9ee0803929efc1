"""The model of a training, written where torch is: in a task, so that the driver does without."""

from __future__ import annotations

import ray

from selective_ray import model as files
from selective_ray.actors.session import Session, unwrapped
from selective_ray.model import Model
from selective_ray.progress import Reporter
from selective_ray.training import Training


def exported(training: Training, session: Session, reporter: Reporter) -> Model:
    """Return the model of the newest checkpoint, and write its files where they are not there."""
    if model := files.exported(training):
        return model
    session.start()
    with unwrapped():
        model, said = ray.get(_export.remote(training))
    for message in said:
        reporter.warn(message)
    return model


@ray.remote(num_cpus=0)
def _export(training: Training) -> tuple[Model, list[str]]:
    said: list[str] = []
    return files.export(training, said.append), said
