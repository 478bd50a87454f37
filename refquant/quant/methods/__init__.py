"""Methods of post-training quantization, one file a paper. None of them imports another."""
