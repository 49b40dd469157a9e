"""What `splice run` is made of, with torch: a base that gives text, adapters that stand on it, and their answers."""
