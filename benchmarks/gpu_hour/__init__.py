"""All figures that need a GPU, in parts of ten minutes; benchmarks/README.md says how to run them."""
