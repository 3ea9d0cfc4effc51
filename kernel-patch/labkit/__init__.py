"""The lab's steps, one module each, over the matrix of kernels in matrix.py."""
