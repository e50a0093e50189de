"""Weights and modules from and to other libraries."""
