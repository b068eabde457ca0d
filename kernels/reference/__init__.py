"""The ops in plain torch: the whole contract, on any device. This is the CPU backend."""
