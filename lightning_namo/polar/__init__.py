"""Orthogonalization: polar factors of matrices by Newton-Schulz iteration or SVD, and what they cost."""
