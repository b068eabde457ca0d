"""The ops in Triton: same names and signatures as the reference, for CUDA tensors."""
