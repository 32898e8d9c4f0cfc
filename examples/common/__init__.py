"""What the examples share around their models, data and loops; none of it is needed to use torch_qgc."""
