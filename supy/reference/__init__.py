"""The specification: every operator in plain PyTorch, in any floating-point dtype, one file an operator."""
