"""Networks: a module tree over the tape, layers, the UNet, a classifier, and the training loop."""
