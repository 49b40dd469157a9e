"""The tests of splice; they need the reference (peft), transformers and accelerate."""
