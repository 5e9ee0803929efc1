"""Where encoders and decoders run: how many, and what CPUs, GPUs and memory each states to Ray."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from selective_ray.actors.session import cpus, gpus
from selective_ray.config import Resources
from selective_ray.errors import UserError
from selective_ray.memory import decoder_bytes, encoder_bytes


@dataclass(frozen=True)
class Placement:
    """Where encoders and decoders run."""

    encoders: int
    encode_cpus: float
    decode_cpus: float
    gpus: float
    device: str
    encode_memory: float
    decode_memory: float
    # CPUs of the cluster for which this was chosen; and whether it grows as it is asked to.
    cpus: float
    grows: bool = False

    def fits(self) -> bool:
        """Whether the cluster, if it has shrunk since, still has CPUs for all encoders and one decoder."""
        if self.grows:
            # What is lost comes again.
            return True
        needed = self.encoders * self.encode_cpus + self.decode_cpus
        return ray.cluster_resources().get("CPU", 0.0) >= min(needed, self.cpus) - 1e-6

    @property
    def at_once(self) -> int:
        """Ranges that can be decoded at the same time."""
        return max(1, int((cpus() - self.encoders * self.encode_cpus) / self.decode_cpus))


def place(resources: Resources) -> Placement:
    """Choose encoders and their share of the cluster.

    On GPUs: one encoder each, and every CPU decodes. Without: encoders and decoders share the CPUs, half a
    logical CPU each, and whichever is behind gets the time. With `autoscale` as many as were asked for, and
    where none were one, whatever is there.
    """
    there = ray.cluster_resources().get("CPU", 0.0)
    per_worker = gpus_each(resources)
    if resources.autoscale:
        shares = (0.1, 1.0) if per_worker > 0 else (0.5, 0.5)
        memory = encoder_bytes(resources.memory), decoder_bytes()
        device = "cuda" if per_worker > 0 else "cpu"
        return Placement(resources.workers or 1, *shares, per_worker, device, *memory, there, grows=True)
    if per_worker > 0:
        encoders_ = resources.workers or max(1, int(gpus() / per_worker))
        shares = (0.1, min(1.0, cpus() - 0.1 * encoders_))
        return Placement(encoders_, *shares, per_worker, "cuda", *_memory(resources, encoders_), there)
    encoders_ = resources.workers or cpus()
    # At least one decoder must find room beside all encoders.
    share = min(0.5, cpus() / (encoders_ + 1))
    return Placement(encoders_, share, share, 0.0, "cpu", *_memory(resources, encoders_), there)


def gpus_each(resources: Resources) -> float:
    """GPUs that a worker takes: one where the cluster has any, unless another number was asked for."""
    per_worker = resources.gpus_per_worker
    if per_worker is None:
        return 1.0 if gpus() else 0.0
    if gpus() < per_worker and not resources.autoscale:
        raise UserError(
            f"resources.gpus_per_worker = {per_worker}, but the cluster has {gpus():g} GPUs; set it to 0"
        )
    return per_worker


def _memory(resources: Resources, encoders_: int) -> tuple[float, float]:
    """Return what an encoder and a decoder state; less where the cluster has not that much.

    A process that states nothing is started beside others until the machine has no memory left.
    """
    encode, decode = encoder_bytes(resources.memory), decoder_bytes()
    there = 0.9 * ray.cluster_resources().get("memory", 0.0)
    less = min(1.0, there / (encoders_ * encode + cpus() * decode))
    return encode * less, decode * less
