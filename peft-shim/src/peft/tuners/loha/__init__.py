"""`peft.tuners.loha`."""

from peft.tuners.loha.layer import LoHaLayer as LoHaLayer
