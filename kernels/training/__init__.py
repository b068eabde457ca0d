"""NSA in training: autograd functions over packed sequences, of the same formulas as serving."""
