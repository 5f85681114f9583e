"""What a plan says: frozen records, from the whole down to the parts of one GPU's memory. GB are 1e9 bytes."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Memory:
    """What one GPU (or the machine, for a processor) holds at the peak of a stage, in GB.

    loss: the head's chunks of logits and what the loss keeps.
    teacher: its resident weights, or its head where it is cached.
    overhead: the process itself, before it holds a tensor.
    """

    weights: float = 0.0
    adapters: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    loss: float = 0.0
    teacher: float = 0.0
    overhead: float = 0.0

    @property
    def peak(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


PARTS = tuple(field.name for field in fields(Memory))


@dataclass(frozen=True)
class Use:
    """Memory of some GPUs that are alike in a stage.

    name: "GPU 0", "GPUs 1-4", "this machine".
    capacity_gb: of each.
    """

    name: str
    memory: Memory
    capacity_gb: float

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity_gb


@dataclass(frozen=True)
class Change:
    """The nearest change that fits, found by planning again with it.

    of: the model that it is for, where a stage has several.
    words: what to do.
    settings: what to set, section.key -> value; empty where there is nothing to set.
    peak_gb: of the fullest GPU then.
    hours: then.
    """

    words: str
    settings: dict[str, Any]
    peak_gb: float
    hours: tuple[float, float]
    of: str = ""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    how: engine, devices, sizes that follow from the settings.
    disk_gb: what it writes.
    tokens: that pass through the models.
    flops: operations of all of them.
    hours: from and to.
    problems: why it does not fit, other than by its peak.
    changes: where it does not fit, what would; one for each model that does not.
    """

    stage: str
    how: str
    uses: tuple[Use, ...]
    disk_gb: float
    tokens: float
    flops: float
    hours: tuple[float, float]
    problems: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def peak_gb(self) -> float:
        return max(use.memory.peak for use in self.uses)

    @property
    def fits(self) -> bool:
        return not self.problems and all(use.fits for use in self.uses)


@dataclass(frozen=True)
class ModelSize:
    """A model as it is planned with; `config` says where its shapes are from."""

    role: str
    name: str
    config: str
    weights: int
    active_weights: int
    weights_gb: float


@dataclass(frozen=True)
class Plan:
    """A whole profile on given GPUs.

    rows: how many, how long, and where that is known from.
    notes: what was assumed or is left out.
    """

    hardware: str
    models: tuple[ModelSize, ...]
    rows: str
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def hours(self) -> tuple[float, float]:
        return sum(stage.hours[0] for stage in self.stages), sum(stage.hours[1] for stage in self.stages)

    @property
    def disk_gb(self) -> float:
        return sum(stage.disk_gb for stage in self.stages)
