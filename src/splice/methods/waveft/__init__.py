"""WaveFT: its record, and the filters of its wavelets."""
