"""`peft.tuners.lokr`."""

from peft.tuners.lokr.layer import LoKrLayer as LoKrLayer
