"""Post-training quantization in floating point: affine maps, observers, fake quantization, methods."""
