"""What is served, and on how many replicas."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


class Options(BaseModel):
    """What is served. Every machine of the cluster has to find the base and the adapters under the same paths."""

    model_config = ConfigDict(extra="forbid")

    # Folder of the base model, or its id on the Hub.
    base: str
    # A folder, below which every folder with an `adapter_config.json` is an adapter, named by its path from there; or a dict
    # from names to folders and Hub ids.
    adapters: str | dict[str, str]
    # What the base is called in requests; else its id, or the name of its folder.
    base_name: str = ""
    # Processes that hold the base, each with a store of its own.
    replicas: Positive = 1
    # Adapters that may be on the model of a replica at once, and for which Ray knows it: their requests go there.
    adapters_per_replica: Positive = 32
    # Requests that a replica answers at once, each in a thread; others wait.
    requests_per_replica: Positive = 8
    # Rank of the slots to reserve, into which adapters are read that fit there; None for no slots.
    slot_rank: Positive | None = None
    # Where the base is to be ("cpu", "cuda"); a GPU where the replica has one, if None.
    device: str | None = None
    # The dtype of the base ("bfloat16"); that of its files, if None.
    dtype: str | None = None
    # What Ray sets aside for a replica.
    cpus_per_replica: float = Field(1.0, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _name_the_base(self) -> "Options":
        place = Path(self.base)
        self.base_name = self.base_name or (place.resolve().name if place.is_dir() else self.base)
        return self
