"""What a base model is: its layers and their kinds, its embeddings, its weights, and what other libraries did to it."""
