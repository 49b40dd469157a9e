"""`peft.tuners._buffer_dict`."""

from splice.buffer_dict import BufferDict as BufferDict
