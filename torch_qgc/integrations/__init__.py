"""Frameworks that own the training loop: one module for each, which needs that framework."""
