"""Reading and writing the weights of base layers, whatever they are stored as."""
